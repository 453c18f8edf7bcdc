"""Answers `--help` before a script imports PyTorch and transformers for seconds: the help is read from its source."""

import argparse
import ast
import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def answer_help(script: str) -> None:
    """Prints the help of the script and exits, where the command line asks for it; does nothing otherwise.

    The script either takes a recipe, and calls `parse_command_line(__doc__, Schema, ...)`, or has a function
    `make_parser()` that needs no more than `argparse`, `Path` and constants of the script that are literals.
    """
    if not {"-h", "--help"} & set(sys.argv[1:]):
        return
    tree = ast.parse(Path(script).read_text(encoding="utf-8"))
    names = {"argparse": argparse, "__doc__": ast.get_docstring(tree), "Path": Path} | _literals(tree)
    recipe_help = _help_module()
    if (schema := recipe_help.recipe_schema(script)) is not None:
        recipe_help.RecipeParser(ast.get_docstring(tree), script, schema).parse_args(["--help"])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "make_parser":
            exec(compile(ast.Module([node], []), script, "exec"), names)
            names["make_parser"]().parse_args(["--help"])


def _literals(tree: ast.Module) -> dict[str, Any]:
    """The constants at the top of a module whose values are written out."""
    values = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with suppress(ValueError):  # the value of another is computed
                values[node.targets[0].id] = ast.literal_eval(node.value)
    return values


def _help_module():
    """`modeling_nim.runs.help` without its package, which imports every model."""
    path = Path(__file__).resolve().parents[1] / "modeling_nim" / "runs" / "help.py"
    specification = importlib.util.spec_from_file_location("recipe_help", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module
