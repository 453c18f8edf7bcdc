"""What `--help` prints: every key of a recipe with type, default and meaning, read from the source, not imported.

Importing the recipes means importing PyTorch and transformers, which takes seconds. This file imports the standard
library alone, and nothing of this package, so that `scripts/early_help.py` can use it before anything else is imported.

The meaning of a key is the comment at the end of its line or above it, or else the bullet "- `key`: meaning" in the
docstring of its dataclass; that of a section is the first sentence of its docstring.
"""

import argparse
import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package, for its absolute imports


@dataclass(frozen=True)
class RecipeKey:
    """One key: `name` is dotted, with N for the index of a list; `default` is YAML, or "required"."""

    name: str
    type: str
    default: str
    meaning: str

    @property
    def section(self) -> str:
        """The dotted name without its last part."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class _Found:
    """A definition and the file that it stands in."""

    node: ast.AST
    path: Path


def recipe_schema(script: str | Path) -> str | None:
    """The dataclass of the recipe that a script takes, by its call `parse_command_line(__doc__, Schema, ...)`."""
    for node in ast.walk(_tree(Path(script))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "parse_command_line":
            return node.args[1].id
    return None


def recipe_keys(path: str | Path, schema: str) -> list[RecipeKey]:
    """The keys of the dataclass `schema` of the Python file `path`, those of its sections after them, in order.

    Raises ValueError where the file neither defines nor imports such a class.
    """
    found = _find(schema, Path(path))
    if found is None or not isinstance(found.node, ast.ClassDef):
        raise ValueError(f"{path} defines no dataclass {schema!r}")
    return _keys(found, "")


def recipe_sections(scripts: Iterable[Path]) -> dict[str, list[RecipeKey]]:
    """Every key of the recipes of `scripts`, by section; a section that several have stands once.

    Raises ValueError where two sections of one name differ.
    """
    sections: dict[str, list[RecipeKey]] = {}
    for script in scripts:
        for section, found in groupby(recipe_keys(script, recipe_schema(script)), lambda key: key.section):
            title, keys = section or f"scripts/{script.name}", list(found)
            if sections.setdefault(title, keys) != keys:
                raise ValueError(f"section {title} of {script} has other keys than the section of that name before it")
    return sections


def format_keys(keys: list[RecipeKey], width: int = 100) -> str:
    """The keys as text, two lines or more each."""
    lines = []
    for key in keys:
        default = key.default if key.default == "required" else f"default {key.default}"
        lines.append(f"  {key.name}: {key.type} ({default})")
        lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


class RecipeParser(argparse.ArgumentParser):
    """Takes recipe files and overrides; its help ends with the keys of `schema` in the Python file `path`."""

    def __init__(self, description: str, path: str | Path | None, schema: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.path, self.schema = path, schema
        self.add_argument(
            "recipe", nargs="+", help="YAML files, later ones win, e.g. scripts/recipes/cifar10/attack.yaml"
        )
        # for the usage line; the argument above takes both, and `parse_command_line` tells them apart
        self.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="keys of the recipe with other values"
        )

    def format_help(self) -> str:
        text = super().format_help()
        if self.path is None:
            return text
        return f"{text}\nkeys of the recipe:\n{format_keys(recipe_keys(self.path, self.schema))}\n"


def _keys(found: _Found, prefix: str) -> list[RecipeKey]:
    keys, sections = [], []
    for field, path, documentation in _fields(found):
        default = _default(field.value, path)
        if default is None:
            continue  # not a key
        name = prefix + field.target.id
        section = _section(field.annotation, path)
        meaning = _comments(path).get(field.end_lineno) or _comment_above(field.lineno, path)
        meaning = meaning or _from_documentation(field.target.id, documentation)
        if section and not meaning:
            meaning = _first_sentence(ast.get_docstring(section.node) or "")
        keys.append(RecipeKey(name, _type(field.annotation, path), default, meaning))
        if section:
            items = {"list": ".N", "dict": ".NAME"}.get(_outer(field.annotation), "")
            sections += _keys(section, f"{name}{items}.")
    return keys + sections


def _fields(found: _Found) -> list[tuple[ast.AnnAssign, Path, str]]:
    """The annotated names of a class after those of its bases, with their file and the docstring of their class."""
    fields: dict[str, tuple[ast.AnnAssign, Path, str]] = {}
    for base in found.node.bases:
        parent = _find(base.id, found.path) if isinstance(base, ast.Name) else None
        for field in _fields(parent) if parent else []:
            fields[field[0].target.id] = field
    documentation = ast.get_docstring(found.node) or ""
    for node in found.node.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            fields[node.target.id] = (node, found.path, documentation)
    return list(fields.values())


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _find(name: str, path: Path) -> _Found | None:
    """The class or the assignment that `name` stands for in a file, through the imports of this package."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _Found(node, path)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return _Found(node.value, path)
        if isinstance(node, ast.AnnAssign) and node.value and getattr(node.target, "id", None) == name:
            return _Found(node.value, path)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and (source := _imported_file(node, path)):
                    return _find(alias.name, source)
    return None


def _imported_file(node: ast.ImportFrom, path: Path) -> Path | None:
    folder = path.resolve().parents[node.level - 1] if node.level else ROOT
    target = folder.joinpath(*(node.module or "").split("."))
    for candidate in (target.with_suffix(".py"), target / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None  # not of this package


def _section(annotation: ast.expr, path: Path) -> _Found | None:
    """The dataclass that an annotation names, alone or in a list, a dictionary or a union."""
    for node in ast.walk(annotation):
        found = _find(node.id, path) if isinstance(node, ast.Name) and node.id != "Bounds" else None
        if found and isinstance(found.node, ast.ClassDef):
            return found
    return None


def _outer(annotation: ast.expr) -> str:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in ("list", "dict"):
            return node.value.id
    return ""


def _type(annotation: ast.expr, path: Path) -> str:
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{_type(left, path)} | {_type(right, path)}"
        case ast.Constant(value=None):
            return "null"
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, ast.Call(keywords=bounds)])):
            limits = ", ".join(f"{b.arg} {ast.unparse(b.value)}" for b in bounds if b.arg != "reason")
            return f"{_type(inner, path)} [{limits}]"
        case ast.Subscript(
            value=ast.Name(id="Literal"), slice=ast.Call(func=ast.Name("tuple"), args=[ast.Name(table)])
        ):
            return " | ".join(_yaml(key.value) for key in _find(table, path).node.keys)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            choices = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return " | ".join(_yaml(choice.value) for choice in choices)
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return f"list of ({_type(item, path)})" if "|" in _type(item, path) else f"list of {_type(item, path)}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, item])):
            return f"mapping of names to {_type(item, path)}"
        case ast.Name(id=name):
            found = _find(name, path)
            if found is None:
                return {"Any": "anything"}.get(name, name)
            return "section" if isinstance(found.node, ast.ClassDef) else _type(found.node, found.path)
    return ast.unparse(annotation)


def _default(value: ast.expr | None, path: Path) -> str | None:
    """The default as YAML, "required" where there is none, None for a field that is not a key."""
    match value:
        case None:
            return "required"
        case ast.Call(func=ast.Name(id="field"), keywords=keywords):
            given = {keyword.arg: keyword.value for keyword in keywords}
            if "init" in given and ast.literal_eval(given["init"]) is False:
                return None
            factory = given.get("default_factory")
            if isinstance(factory, ast.Lambda):
                return _default(factory.body, path)
            if isinstance(factory, ast.Name):
                return {"list": "[]", "dict": "{}"}.get(factory.id, "its own defaults")
            return _default(given.get("default"), path)
        case ast.Name(id=name) if found := _find(name, path):
            return _default(found.node, found.path)
    try:
        return _yaml(ast.literal_eval(value))
    except ValueError:  # arithmetic or a call
        return ast.unparse(value)


def _yaml(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str) and value.lower() in ("", "no", "yes", "off", "on", "true", "false", "null"):
        return f'"{value}"'  # YAML 1.1 reads the bare word as something else
    return str(value)


@cache
def _comments(path: Path) -> dict[int, str]:
    """The comment of each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _comment_above(line: int, path: Path) -> str:
    source = path.read_text(encoding="utf-8").splitlines()
    above = []
    while line > 1 and source[line - 2].lstrip().startswith("#"):
        line -= 1
        above.insert(0, source[line - 1].lstrip("# "))
    return " ".join(above)


def _from_documentation(key: str, documentation: str) -> str:
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", documentation):
        head, _, meaning = " ".join(paragraph.split()).partition(": ")
        if head.startswith("- ") and f"`{key}`" in head:
            return meaning
    return ""


def _first_sentence(documentation: str) -> str:
    return re.split(r"(?<=[.;])\s", " ".join(documentation.split()))[0]
