"""Recipes: one YAML file per run, read into dataclasses that know every key.

A script declares its recipe as a dataclass whose fields are the recipe's keys and sections, and calls
`parse_command_line`. Several files stack: the first is the whole recipe, those after it say what is different.
Nothing is guessed: an unknown key, a missing one or a value of the wrong type is an error that names it.
"""

import dataclasses
import difflib
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, Union

import yaml

from .bounds import check_value
from .help import RecipeParser


T = TypeVar("T")

_MAX_INT = 2**63  # what seeds and tensors hold
_MAX_VALUES = 100_000  # in one recipe, aliases written out


def parse_command_line(documentation: str, schema: type[T], argv: Sequence[str] | None = None) -> T:
    """The recipe of a script that is launched as `script.py RECIPE.yaml [MORE.yaml ...] [section.key=value ...]`.

    `argv` are the arguments, None those of the process. `--help` prints the script's `documentation` and every key of
    `schema`, and exits; `load_recipe` says what else is raised.
    """
    module = sys.modules.get(schema.__module__)
    parser = RecipeParser(documentation, inspect.getsourcefile(module) if module else None, schema.__name__)
    arguments = parser.parse_args(argv).recipe
    overrides = [argument for argument in arguments if "=" in argument and not os.path.exists(argument)]
    paths = [argument for argument in arguments if argument not in overrides]
    if not paths:
        raise ValueError(f"name a recipe before {overrides[0]!r}: a YAML file, e.g. one of scripts/recipes/")
    return load_recipe(paths, schema, overrides)


def load_recipe(
    paths: str | os.PathLike | Sequence[str | os.PathLike], schema: type[T], overrides: Sequence[str] = ()
) -> T:
    """Read one YAML file, or several that stack, into the dataclass `schema`.

    Keys of later files win: mappings are merged key by key, everything else (a list too) is replaced. `overrides` are
    dotted assignments such as `"data.batch_size=32"` or `"models.0.sigma=30"`; their values are parsed as YAML, and
    they win over the files, later ones over earlier ones. Fields may be `int`, `float`, `str`, `bool`, `Any`,
    `Literal`, `Optional`/unions, `list[...]`, `dict[str, ...]` and nested dataclasses.

    Raises FileNotFoundError when there is no such file, and ValueError naming the key, the value and what is expected
    for everything else.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return build_dataclass(schema, stack_recipes(paths, overrides, schema))


def stack_recipes(
    paths: Sequence[str | os.PathLike], overrides: Sequence[str] = (), schema: type | None = None
) -> dict[str, Any]:
    """What YAML files and overrides say together, as `load_recipe` reads them, before a dataclass knows the keys.

    A word that stands for a section of `schema` is spelled out, so that what comes after it can change a key of it.
    """
    values: dict[str, Any] = {}
    for path in paths:
        values = _merge(values, _spelled_out(read_recipe(path), schema))
    for override in overrides:
        _apply_override(values, override)
        values = _spelled_out(values, schema)
    return values


def _spelled_out(value: Any, schema: Any) -> Any:
    """`value` with the sections that a word of `SHORTHANDS` stands for, where `schema` is a dataclass."""
    if not dataclasses.is_dataclass(schema):
        return value
    if isinstance(value, str):
        return dict(getattr(schema, "SHORTHANDS", {}).get(value, ())) or value
    if not isinstance(value, dict):
        return value
    hints = typing.get_type_hints(schema)
    return {key: _spelled_out(part, hints.get(key)) for key, part in value.items()}


def _merge(values: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in later.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


class _UniqueKeyLoader(yaml.SafeLoader):
    """Reads YAML and refuses a key that stands twice in one mapping, of which PyYAML would take the last."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"line {line}: key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_recipe(path: str | os.PathLike) -> dict[str, Any]:
    """What one YAML file says, as it stands there; raises as `load_recipe` does."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no recipe {str(path)!r}; name a YAML file, e.g. one of scripts/recipes/")
    with open(path, "rb") as file:
        values = _parse_yaml(file.read(), f"recipe {str(path)!r}")
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"recipe {str(path)!r} must be a mapping of keys to values, got {type(values).__name__}")
    return values


def _parse_yaml(text: bytes | str, what: str) -> Any:
    """The value of a YAML text; ValueError that begins with `what` for invalid YAML and for too many values."""
    try:
        value = yaml.load(text.decode("utf-8") if isinstance(text, bytes) else text, _UniqueKeyLoader)
        _count_values(value, {})
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply to be read") from None
    # constructors of dates, numbers and truth values raise many types for invalid ones
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
        raise ValueError(f"{what} is not valid YAML: {' '.join(str(error).split())}") from None
    return value


def _count_values(value: Any, counted: dict[int, int]) -> int:
    """Number of values with every alias written out; a few lines of aliases of aliases make billions.

    `counted` holds what is known of lists and mappings by their id, 0 for those that are being counted.
    """
    if not isinstance(value, (dict, list, set)):
        return 1
    if (known := counted.get(id(value))) is not None:
        if known == 0:
            raise ValueError("an alias refers to what it stands in")
        return known
    counted[id(value)] = 0
    parts = value.values() if isinstance(value, dict) else value
    counted[id(value)] = number = 1 + sum(_count_values(part, counted) for part in parts)
    if number > _MAX_VALUES:
        raise ValueError(f"it holds more than {_MAX_VALUES} values")
    return number


def build_dataclass(schema: type[T], values: dict[str, Any], where: str = "") -> T:
    """Make the dataclass `schema` from nested dictionaries, strictly; `where` is the dotted path for error messages.

    A schema may have `SHORTHANDS`, words that stand for a whole section: `{word: values}`.
    """
    values = _spelled_out(values, schema)
    if not isinstance(values, dict):
        words = "".join(f"{word!r} or " for word in getattr(schema, "SHORTHANDS", {}))
        raise ValueError(f"recipe key {where!r} must be {words}a section with keys {_known(schema)}, got {values!r}")
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown recipe key {_dotted(where, key)!r}{hint}; known keys: {_known(schema)}")
    arguments = {}
    for name, field in fields.items():
        if name in values:
            key = _dotted(where, name)
            arguments[name] = _convert(values[name], hints[name], key)
            check_value(arguments[name], schema, name, f"recipe key {key!r}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"recipe key {_dotted(where, name)!r} is missing; it has no default")
    return schema(**arguments)


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as plain nested dictionaries, defaults filled in, ready for `yaml.safe_dump` or JSON."""
    return dataclasses.asdict(recipe)


def dotted_keys(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by the keys that overrides name them with; `where` is the path to them."""
    found = {}
    for key, value in values.items():
        found |= dotted_keys(value, _dotted(where, key)) if isinstance(value, dict) else {_dotted(where, key): value}
    return found


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    value = _parse_yaml(text, f"override {override!r}: the value")
    *parents, last = key.split(".")
    node: Any = values
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_list_index(node, part, override)]
        elif isinstance(node, dict):
            if node.get(part) is None:  # a section that the file leaves at its defaults
                node[part] = {}
            node = node[part]
        if not isinstance(node, (dict, list)):
            raise ValueError(f"override {override!r}: {'.'.join(parents[: depth + 1])!r} is not a section")
    if isinstance(node, list):
        node[_list_index(node, last, override)] = value
    else:
        node[last] = value


def _list_index(node: list, part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ValueError(f"override {override!r}: {part!r} is not an index of a list of {len(node)}")
    return int(part)


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint` says, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is Literal:
        if value not in arguments or type(value) not in {type(choice) for choice in arguments}:
            raise ValueError(f"recipe key {where!r} must be one of {list(arguments)}, got {value!r}")
        return value
    if hint is types.NoneType:
        if value is None:
            return None
    elif dataclasses.is_dataclass(hint):
        return build_dataclass(hint, {} if value is None else value, where)
    elif origin is list or hint is list:
        if isinstance(value, list):
            item_hint = arguments[0] if arguments else Any
            return [_convert(item, item_hint, f"{where}.{index}") for index, item in enumerate(value)]
    elif origin is dict or hint is dict:
        if isinstance(value, dict):
            item_hint = arguments[1] if arguments else Any
            return {str(key): _convert(item, item_hint, _dotted(where, key)) for key, item in value.items()}
    elif hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as a string; a recipe means the number
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                pass
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isnan(value) or abs(value) > sys.float_info.max:
                raise ValueError(f"recipe key {where!r} must be a finite number, got {value!r}")
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            if not -_MAX_INT <= value < _MAX_INT:
                raise ValueError(f"recipe key {where!r} must fit in 64 bits, got {value!r}")
            return value
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError(f"recipe key {where!r} must be {_type_name(hint)}, got {value!r} ({type(value).__name__})")


def _convert_union(value: Any, choices: tuple, where: str) -> Any:
    if value is None and types.NoneType in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not types.NoneType)
    if len(choices) == 1:
        return _convert(value, choices[0], where)
    exact = [choice for choice in choices if isinstance(choice, type) and type(value) is choice]
    for choice in exact + [choice for choice in choices if choice not in exact]:
        try:
            return _convert(value, choice, where)
        except ValueError:
            continue
    names = " or ".join(_type_name(choice) for choice in choices)
    raise ValueError(f"recipe key {where!r} must be {names}, got {value!r} ({type(value).__name__})")


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _known(schema: type) -> str:
    return ", ".join(field.name for field in dataclasses.fields(schema) if field.init)


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)
