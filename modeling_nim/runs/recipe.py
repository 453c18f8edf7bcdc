"""Recipes: one YAML file per run, read into dataclasses that know every key.

A script declares its recipe as a dataclass whose fields are the recipe's keys and sections, and calls `load_recipe`.
Nothing is guessed: an unknown key, a missing one or a value of the wrong type is an error that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, Union

import yaml


T = TypeVar("T")


def load_recipe(path: str | os.PathLike, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Read the YAML file `path` into the dataclass `schema`.

    `overrides` are dotted assignments such as `"data.batch_size=32"` or `"models.0.sigma=30"`; their values are parsed as
    YAML, and they win over the file. Fields may be `int`, `float`, `str`, `bool`, `Any`, `Literal`, `Optional`/unions,
    `list[...]`, `dict[str, ...]` and nested dataclasses.

    Raises FileNotFoundError when there is no such file, and ValueError naming the key, the value and what is expected for
    everything else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no recipe {str(path)!r}; name a YAML file, e.g. one of scripts/recipes/")
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"recipe {str(path)!r} must be a mapping of keys to values, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return build_dataclass(schema, values)


def build_dataclass(schema: type[T], values: dict[str, Any], where: str = "") -> T:
    """Make the dataclass `schema` from nested dictionaries, strictly; `where` is the dotted path for error messages."""
    if not isinstance(values, dict):
        raise ValueError(f"recipe key {where!r} must be a section with keys {_known(schema)}, got {values!r}")
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
            arguments[name] = _convert(values[name], hints[name], _dotted(where, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"recipe key {_dotted(where, name)!r} is missing; it has no default")
    return schema(**arguments)


def recipe_to_dict(recipe: Any) -> dict[str, Any]:
    """The recipe as plain nested dictionaries, defaults filled in, ready for `yaml.safe_dump` or JSON."""
    return dataclasses.asdict(recipe)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: the value {text!r} is not valid YAML") from None
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
                return float(value)
            except ValueError:
                pass
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
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
