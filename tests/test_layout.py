"""The rules of the layout that CONTRIBUTING states: sizes of functions and files, who may import whom, and spelling."""

import ast
import re
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]

MOST_FILE_LINES = 450
MOST_FUNCTION_LINES = 79
MOST_REPORT_LINES = 700  # of scripts/reports together
BELOW = {  # the folders of the package, "" for its top, and those that each may import from
    "": [],
    "runs": [""],
    "data": ["", "runs"],
    "robustness": ["", "runs", "data"],
    "training": ["", "runs", "data", "robustness"],
}

PACKAGE = sorted((ROOT / "modeling_nim").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
REPORTS = sorted((ROOT / "scripts" / "reports").rglob("*.py"))
ENDS = ("oldest", "oldest-transformers", "newest")  # of the ranges in setup.cfg
# British spellings, as stems
BRITISH = r"defence|colour|neighbour|behaviour|grey|centre|artefact|learnt|(?:normal|summar|optim|random|initial)is[ei]"


def functions(source: str):
    """`(name, lines)` of every function of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def floor_of(path) -> str:
    relative = path.relative_to(ROOT / "modeling_nim")
    return relative.parts[0] if len(relative.parts) > 1 else ""


def imported_floors(path) -> set[str]:
    """The folders of the package that a file imports from, "" for the package itself."""
    floor, found = floor_of(path), set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level:  # from here (1), or from the floor above it (2)
                base = [floor] if node.level == 1 and floor else []
                names = [".".join(["modeling_nim", *base, *parts])]
            else:
                names = [".".join(parts)]
        for name in names:
            if name.split(".")[0] == "modeling_nim":
                part = (name.split(".") + [""])[1]
                found.add(part if part in BELOW else "")
    return found


def test_functions_and_files_are_short():
    lines_of_files = {str(path): len(path.read_text().splitlines()) for path in PACKAGE}
    assert {name: lines for name, lines in lines_of_files.items() if lines > MOST_FILE_LINES} == {}
    assert 0 < sum(len(path.read_text().splitlines()) for path in REPORTS) <= MOST_REPORT_LINES
    lines_of_functions = {
        f"{path}:{name}": lines for path in [*PACKAGE, *SCRIPTS] for name, lines in functions(path.read_text())
    }
    assert len(lines_of_functions) > 500  # they were found
    assert {name: lines for name, lines in lines_of_functions.items() if lines > MOST_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_from_a_floor_above(path):
    floor = floor_of(path)
    assert imported_floors(path) <= {floor, *BELOW[floor]}
    text = path.read_text()
    assert not re.search(r"^\s*(from|import) scripts\b", text, re.M)
    if not floor:  # what the Hub copies into one folder: imports of one dot, and no folder
        assert not re.search(r"^\s*from \.\.|^\s*from \.\w+\.|^\s*from modeling_nim", text, re.M)


def test_there_is_one_line_length():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert settings["line-length"] == 120
    assert "pycodestyle" not in settings["lint"] and not (ROOT / "ruff.toml").exists()


def test_names_and_documents_are_spelled_as_in_transformers():
    folders = ("modeling_nim", "scripts", "docs", "examples", "metrics", "model_cards", "space", "tests")
    files = [*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    files = [path for path in files if path.suffix in (".py", ".md", ".yaml", ".j2") and path != Path(__file__)]
    assert len(files) > 200  # they were found
    words = {(str(path), word) for path in files for word in re.findall(BRITISH, path.read_text(), re.IGNORECASE)}
    assert words == set()


def test_the_ends_of_the_ranges_are_those_that_are_tested():
    """setup.cfg says what is supported, the Makefile what its rules for the oldest and the newest versions install."""
    text = (ROOT / "setup.cfg").read_text()
    rules = (ROOT / "Makefile").read_text()
    tested = {end: dict(re.findall(r"(\w+)==([\d.]+)", rules.split(f"\n{end} := ")[1].split("\n")[0])) for end in ENDS}
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in ("torch", "transformers"):
        low, above = re.search(rf"^    {name}>=([\d.]+),<([\d.]+)$", text, re.MULTILINE).groups()
        newest = (tested["newest"] | {"torch": pinned["torch"]})[name]
        major, minor = above.split(".")
        assert tested["oldest"][name] == f"{low}.0" and newest.startswith(f"{major}.{int(minor) - 1}.")
    assert tested["oldest-transformers"] == {"transformers": tested["oldest"]["transformers"]}
