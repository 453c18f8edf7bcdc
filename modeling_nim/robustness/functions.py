"""Functions that a recipe names or a caller passes: attacks, losses and purifiers that live outside of this package."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def named_function(name: str, what: str) -> Callable:
    """The function that `package.module:function` names; it is imported, and never downloaded.

    Raises ValueError when the text has another form, or there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{what} {name!r} is not of the form package.module:function")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{what} {name!r}: {error}; put the folder of the module on PYTHONPATH, e.g. "
            "PYTHONPATH=. python scripts/..."
        ) from None
    except AttributeError:
        raise ValueError(f"{what} {name!r}: module {module_name!r} has no function {function_name!r}") from None
    if not callable(found):
        raise ValueError(f"{what} {name!r} is a {type(found).__name__}, no function")
    return found


@contextmanager
def naming_own_function(what: str) -> Iterator[None]:
    """Says which function from outside of this package ended with an error, and with which."""
    try:
        yield
    except (ValueError, OSError):  # these say what is wrong
        raise
    except Exception as error:
        kind, words = type(error).__name__, " ".join(str(error).split())
        raise ValueError(f"{what} ended with {kind}: {words}; NIM_TRACEBACK=1 shows where") from error


def is_function(name: str) -> bool:
    """Whether a recipe's text names a function and not a directory or a model of the Hub."""
    return ":" in name and not os.path.exists(name)


def function_name(function: Callable | str) -> str:
    """`package.module:function` of a function, or of the class of an object that is called; a text stays as it is."""
    if isinstance(function, str):
        return function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}:{named.__qualname__}"


def short_name(function: Callable | str) -> str:
    """The last part of `function_name`, for labels."""
    return function_name(function).rpartition(":")[2].rpartition(".")[2]
