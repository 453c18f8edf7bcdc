"""What the README, the cards and the paper's tables share: finding rows, printing numbers and tables, writing files."""

import difflib
import json
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from modeling_nim.robustness.recipes import attack_text
from modeling_nim.runs.files import write_text


TEMPLATES = Path(__file__).parent / "templates"
Row = dict[str, Any]  # one of the `rows` of a summary.json or certified.json


def read_result(path: Path) -> dict[str, Any]:
    """A summary of run_attack.py or run_certify.py."""
    if not path.is_file():
        raise FileNotFoundError(f"there are no results {path}: make them with scripts/run_attack.py or run_certify.py")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no summary.json of run_attack.py or run_certify.py: {error}") from None


def find_rows(result: dict[str, Any], **wanted: Any) -> list[Row]:
    """The rows of a summary whose values are as wanted; of a list, one of its values is."""
    choices = {key: value if isinstance(value, list) else [value] for key, value in wanted.items()}
    return [row for row in result["rows"] if all(row.get(key) in values for key, values in choices.items())]


def find_row(result: dict[str, Any], **wanted: Any) -> Row:
    """The one row that is as wanted; ValueError where there are none or several."""
    rows = find_rows(result, **wanted)
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of the summary are {wanted}, 1 is needed")
    return rows[0]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    """A table in Markdown; `rule` stands under each column's title."""
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rule for _ in header)}|"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in rows])


def percent(value: float, interval: Sequence[float] | None = None, decimals: int = 1) -> str:
    """`"43.9 [38.0, 49.1]"`, or without an interval `"43.9"`."""
    return f"{value:.{decimals}f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def accuracies(rows: Iterable[Row], intervals_at: Collection[float] | None = None, separator: str = " / ") -> str:
    """`"57.2 / 35.1 [32.2, 38.1]"`: with the intervals of the named budgets, by default of all; "–" without rows."""
    cells = [
        percent(row["accuracy"], row["ci95"] if intervals_at is None or row["epsilon_255"] in intervals_at else None)
        for row in rows
    ]
    return separator.join(cells) or "–"


def number(value: Any) -> str:
    """A number without trailing zeros; text as it is."""
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def half_width(row: Row) -> float:
    """Half of the 95% interval, in percent."""
    return (row["ci95"][1] - row["ci95"][0]) / 2


def environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder, with the functions above; a name that is not known is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        extensions=["jinja2.ext.do"],
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    made.filters |= {"row": find_row, "rows": find_rows, "percent": percent, "accuracies": accuracies}
    made.filters |= {"number": number, "half_width": half_width, "attack_text": attack_text, "json": json.dumps}
    made.globals["table"] = markdown_table
    return made


def keep_as_made(texts: dict[Path, str | None], check: bool) -> int:
    """Writes the files that hold another text and removes those of None; returns the exit code of a script.

    With `check` it writes nothing, shows the differences and returns 1 where there are any.
    """
    differing = 0
    for path, text in texts.items():
        name, old = os.path.relpath(path), path.read_text(encoding="utf-8") if path.is_file() else None
        if old == text:
            continue
        differing += 1
        if check:
            print(f"{name} is not as made")
            lines = [(content or "").splitlines(keepends=True) for content in (old, text)]
            sys.stdout.writelines(difflib.unified_diff(*lines, "as it is", "as made"))
        elif text is None:
            path.unlink()
            print(f"removed {name}")
        else:
            write_text(path, text)
            print(f"wrote {name}")
    if not differing:
        print("every file is as made")
    return int(check and differing > 0)
