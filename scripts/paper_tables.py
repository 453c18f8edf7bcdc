"""Prints the paper's tables with our numbers beside the paper's, and the commands that make the rows that are missing.

    python scripts/paper_tables.py
    python scripts/paper_tables.py --dataset cifar10

`scripts/recipes/DATASET/paper.yaml` says what makes each row; `results/DATASET/*.json` are the summaries of attacks that
were run. A step whose output is there already is left out of the commands. The paper's numbers are ImageNet's, whatever the
data set of ours.
"""

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_nim.cli import run_main


ROOT = Path(__file__).resolve().parents[1]
ACCURACY_DECIMALS = 2  # as the paper


@dataclass(frozen=True)
class Step:
    """One command: a script with its recipe and overrides, or with options, and where its output goes."""

    script: str
    output_dir: str
    recipe: str | None
    overrides: tuple[str, ...]  # "key=value" for a recipe, "--key value" for options

    @property
    def command(self) -> str:
        if self.recipe is None:
            return (
                f"python scripts/{self.script} {' '.join(self.overrides)} --output_dir {shlex.quote(self.output_dir)}"
            )
        words = [self.recipe, f"output_dir={self.output_dir}", *self.overrides]
        return f"accelerate launch scripts/{self.script} {' '.join(map(shlex.quote, words))}"

    @property
    def is_done(self) -> bool:
        made = "summary.json" if self.script == "run_attack.py" else "config.json"
        return (ROOT / self.output_dir / made).exists()


@dataclass(frozen=True)
class Row:
    """A row of a table: its labels, the paper's numbers by column, the steps and the result that ours are read from."""

    labels: tuple[str, ...]
    paper: dict[str, float]
    steps: tuple[Step, ...]
    result: str
    model: str
    sigma: float | str | None


@dataclass(frozen=True)
class Table:
    title: str
    label_names: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def slug(value: Any) -> str:
    """A sigma specification as part of a file name: "gamma(25, 3)" is gamma_25_3."""
    return re.sub(r"[^0-9A-Za-z.]+", "_", str(value)).strip("_")


def read_tables(dataset: str) -> tuple[list[Table], dict[str, dict[str, Any]]]:
    """The tables of `scripts/recipes/DATASET/paper.yaml`, templates filled, and what its columns mean.

    Raises:
        FileNotFoundError: there is no such file; the data sets that have one are named.
    """
    recipes = ROOT / "scripts" / "recipes"
    path = recipes / dataset / "paper.yaml"
    if not path.is_file():
        known = sorted(file.parent.name for file in recipes.glob("*/paper.yaml"))
        raise FileNotFoundError(f"no tables for --dataset {dataset!r}; there are tables for {', '.join(known)}")
    content = yaml.safe_load(path.read_text())
    # Another data set takes the rows of its `base`, less those it leaves out, with columns and recipes of its own.
    base = yaml.safe_load((recipes / content["base"] / "paper.yaml").read_text()) if "base" in content else content
    left_out, renamed = content.get("leave_out", {}), content.get("recipes", {})
    tables = []
    for table in base["tables"]:
        rows = []
        for row in table["rows"]:
            fields = {"dataset": dataset} | table.get("defaults", {}) | row
            if any(fields.get(name) in values for name, values in left_out.items()):
                continue
            fields |= {f"{name}_slug": slug(value) for name, value in fields.items() if isinstance(value, str)}
            fields["result"] = fields["result"].format(**fields)
            rows.append(
                Row(
                    labels=tuple("-" if fields[name] is None else str(fields[name]) for name in table["label"]),
                    paper=fields["paper"],
                    steps=tuple(_fill(step, fields, renamed) for step in fields["steps"]),
                    result=fields["result"],
                    model=fields["model"],
                    sigma=fields["sigma"],
                )
            )
        if rows:
            tables.append(Table(table["title"], tuple(table["label"]), tuple(table["columns"]), tuple(rows)))
    columns = base["columns"] | content["columns"]
    return tables, {name: {"paper_title": base["columns"][name]["title"]} | column for name, column in columns.items()}


def _fill(step: dict[str, Any], fields: dict[str, Any], renamed: dict[str, str]) -> Step:
    recipe = step.get("recipe")
    if recipe is None:
        options = [f"--{name}" if value is True else f"--{name} {value}" for name, value in step["options"].items()]
        return Step(step["script"], step["output_dir"].format(**fields), None, tuple(options))
    overrides = tuple(f"{key}={value.format(**fields)}" for key, value in step["overrides"].items())
    recipe = recipe.format(**fields)
    recipe = f"scripts/recipes/{fields['dataset']}/{renamed.get(recipe, recipe)}"
    return Step(step["script"], step["output_dir"].format(**fields), recipe, overrides)


def our_row(summary: dict[str, Any] | None, row: Row, column: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a summary that belongs into a cell, or None."""
    if summary is None:
        return None
    wanted = {key: value for key, value in column.items() if key not in ("title", "paper_title")}
    wanted |= {"model": row.model, "sigma": row.sigma}
    if row.sigma is None and wanted.get("threat_model") == "gray_box":
        wanted["threat_model"] = "white_box"  # without a defence there is none to be unaware of
    for found in summary["rows"]:
        if all(found.get(key) == value for key, value in wanted.items()):
            return found
    return None


def print_table(table: Table, columns: dict[str, dict[str, Any]], results: Path) -> list[Row]:
    """Prints one table in Markdown; returns the rows that lack a number."""
    print(f"\n### {table.title}\n")
    in_paper = {name for row in table.rows for name in row.paper}
    header = [name.replace("_", " ") for name in table.label_names]
    for name in table.columns:
        title, paper_title = columns[name]["title"], columns[name]["paper_title"]
        header += [f"{paper_title} paper", f"{title} ours"] if name in in_paper else [title]
    print(f"| {' | '.join(header)} |\n|{'|'.join(' --- ' for _ in header)}|")
    missing, sources = [], {}
    for row in table.rows:
        file = results / f"{row.result}.json"
        summary = json.loads(file.read_text()) if file.is_file() else None
        cells = list(row.labels)
        found = [our_row(summary, row, columns[name]) for name in table.columns]
        for name, ours in zip(table.columns, found, strict=True):
            if name in in_paper:
                cells.append(f"{row.paper[name]:.{ACCURACY_DECIMALS}f}")
            if ours is None:
                cells.append("missing")
                continue
            low, high = ours["ci95"]
            cells.append(f"{ours['accuracy']:.{ACCURACY_DECIMALS}f} [{low:.1f}, {high:.1f}]")
            sources.setdefault(file, set()).add(ours["num_images"])
        print(f"| {' | '.join(cells)} |")
        if None in found:
            missing.append(row)
    for file, images in sources.items():
        counts = " and ".join(f"{number:,}" for number in sorted(images, reverse=True))
        print(f"\nOurs, 95% intervals in brackets: {file.relative_to(ROOT)}, {counts} images.")
    return missing


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="imagenet", help="a folder of scripts/recipes with a paper.yaml")
    dataset = parser.parse_args(argv).dataset
    tables, columns = read_tables(dataset)
    results = ROOT / "results" / dataset
    missing = {table.title: print_table(table, columns, results) for table in tables}
    if not any(missing.values()):
        return
    print("\n### Commands for what is missing, in order\n\n```bash")
    print(f"mkdir -p results/{dataset}")
    printed = set()
    for title, rows in missing.items():
        for row in rows:
            copy = f"cp {row.steps[-1].output_dir}/summary.json results/{dataset}/{row.result}.json"
            commands = [step.command for step in row.steps if not step.is_done] + [copy]
            if new := [command for command in commands if command not in printed]:
                print(f"# {title.partition(':')[0]}: {', '.join(row.labels)}", *new, sep="\n")
                printed.update(new)
    print("```")


if __name__ == "__main__":
    run_main(main)
