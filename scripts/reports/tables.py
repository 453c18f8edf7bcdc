"""What the README, the cards and the paper's tables share: finding rows of results, and printing numbers and tables."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2

from modeling_nim.robustness.recipes import settings_text


Row = dict[str, Any]  # one of the `rows` of a summary.json or certified.json


def find_rows(result: dict[str, Any], **wanted: Any) -> list[Row]:
    """The rows whose values are as wanted, of a summary of run_attack.py or run_certify.py."""
    return [row for row in result["rows"] if all(row.get(key) == value for key, value in wanted.items())]


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
    text = f"{value:.{decimals}f}"
    return text if interval is None else f"{text} [{interval[0]:.1f}, {interval[1]:.1f}]"


def number(value: Any) -> str:
    """A number without trailing zeros; text as it is."""
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def attack_text(row: Row) -> str:
    """The attack of a row with the settings that set attacks apart: "pgd (10 steps, alpha 2)"."""
    if row["attack"] == "none":
        return "none"
    details = settings_text(row.get("settings", {}))
    return row["attack"] + (f" ({', '.join(details)})" if details else "")


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
    made.filters |= {"row": find_row, "rows": find_rows, "percent": percent, "number": number}
    made.filters |= {"half_width": half_width, "attack_text": attack_text, "json": json.dumps}
    made.globals["table"] = markdown_table
    return made
