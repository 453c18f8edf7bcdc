"""Prints the paper's tables with our numbers beside the paper's, and prints or runs what makes the rows that are missing.

    python scripts/reports/paper_tables.py
    python scripts/reports/paper_tables.py --dataset cifar10
    python scripts/reports/paper_tables.py --dataset cifar10 --run --jobs 2 --results outputs/cifar10/results
    python scripts/reports/paper_tables.py --dataset cifar10 --output results/cifar10/tables.md

`scripts/recipes/DATASET/paper.yaml` says what makes each row. A step whose output is there already is left out; one that was
broken off resumes. `results/DATASET/RESULT.json` are the summaries of what was run, `records/RESULT.jsonl.gz` beside them
the records, a line per image, that the summaries were made of. The paper's numbers are ImageNet's, whatever ours are of.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_bytes, write_text


ROOT = Path(__file__).resolve().parents[2]
ACCURACY_DECIMALS = 2  # as the paper
# What a script leaves when it is done, and the records that this was made of.
MADE = {
    "run_pretrain.py": ("config.json", None),
    "run_finetune.py": ("config.json", None),
    "convert_checkpoint.py": ("config.json", None),
    "run_attack.py": ("summary.json", "records.jsonl"),
    "run_certify.py": ("certified.json", "certificates.jsonl"),
}


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
        return (ROOT / self.output_dir / MADE[self.script][0]).exists()


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
    content = _with_base(content, recipes)
    left_out, renamed = content.get("leave_out", {}), content.get("recipes", {})
    tables = []
    for table in content["tables"]:
        rows = []
        for row in table["rows"]:
            fields = {"dataset": dataset} | content.get("defaults", {}) | table.get("defaults", {}) | row
            if any(fields.get(name) in values for name, values in left_out.items()):
                continue
            fields = _with_slugs(fields)
            fields["result"] = fields["result"].format(**fields)
            rows.append(
                Row(
                    labels=tuple("-" if fields[name] is None else str(fields[name]) for name in table["label"]),
                    paper=fields["paper"],
                    steps=tuple(_fill(content["steps"], step, fields, renamed) for step in fields["steps"]),
                    result=fields["result"],
                    model=fields["model"],
                    sigma=fields["sigma"],
                )
            )
        if rows:
            tables.append(Table(table["title"], tuple(table["label"]), tuple(table["columns"]), tuple(rows)))
    return tables, content["columns"]


def _with_base(content: dict[str, Any], recipes: Path) -> dict[str, Any]:
    """What `content` says over what its `base`, the file of another data set, says.

    Columns, steps, recipes and defaults are added or replaced by name; of a table of the same title the rows are added.
    """
    if "base" not in content:
        columns = {name: {"paper_title": column["title"]} | column for name, column in content["columns"].items()}
        return content | {"columns": columns}
    base = _with_base(yaml.safe_load((recipes / content["base"] / "paper.yaml").read_text()), recipes)
    columns = dict(base["columns"])
    for name, column in content.get("columns", {}).items():
        paper_title = base["columns"].get(name, {"paper_title": None})["paper_title"]
        columns[name] = {"paper_title": paper_title} | column
    added = {table["title"]: table for table in content.get("tables", [])}
    tables = []
    for table in base["tables"]:
        more = added.pop(table["title"], {})
        defaults = table.get("defaults", {}) | more.get("defaults", {})
        tables.append(table | more | {"defaults": defaults, "rows": table["rows"] + more.get("rows", [])})
    names = ("defaults", "steps", "recipes", "leave_out")
    merged = {name: base.get(name, {}) | content.get(name, {}) for name in names}
    return base | merged | {"columns": columns, "tables": [*tables, *added.values()]}


def _with_slugs(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {f"{name}_slug": slug(value) for name, value in fields.items() if isinstance(value, str)}


def _fill(steps: dict[str, Any], name: str | dict[str, Any], fields: dict[str, Any], renamed: dict[str, str]) -> Step:
    """The step called `name`, filled in; as `{step: name, field: value, ...}` with fields that are not the row's."""
    if isinstance(name, dict):
        fields, name = _with_slugs(fields | name), name["step"]
    step = steps[name]
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


def find_cells(
    table: Table, row: Row, columns: dict[str, dict[str, Any]], results: Path
) -> list[dict[str, Any] | None]:
    """The summary's row of each column, None where ours is missing."""
    file = results / f"{row.result}.json"
    summary = json.loads(file.read_text()) if file.is_file() else None
    return [our_row(summary, row, columns[name]) for name in table.columns]


def is_missing(table: Table, row: Row, columns: dict[str, dict[str, Any]], results: Path) -> bool:
    """Whether the row lacks a number, or its whole result."""
    return None in find_cells(table, row, columns, results) or not (results / f"{row.result}.json").is_file()


def print_table(table: Table, columns: dict[str, dict[str, Any]], results: Path) -> None:
    """Prints one table in Markdown."""
    print(f"\n### {table.title}\n")
    in_paper = {name for row in table.rows for name in row.paper}
    header = [name.replace("_", " ") for name in table.label_names]
    for name in table.columns:
        title, paper_title = columns[name]["title"], columns[name]["paper_title"]
        header += [f"{paper_title} paper", f"{title} ours"] if name in in_paper else [title]
    print(f"| {' | '.join(header)} |\n|{'|'.join(' --- ' for _ in header)}|")
    sources = {}
    for row in table.rows:
        file = results / f"{row.result}.json"
        cells = list(row.labels)
        found = find_cells(table, row, columns, results)
        for name, ours in zip(table.columns, found, strict=True):
            if name in in_paper:
                cells.append(f"{row.paper[name]:.{ACCURACY_DECIMALS}f}" if name in row.paper else "–")
            if ours is None:
                cells.append("missing")
                continue
            low, high = ours["ci95"]
            cells.append(f"{ours['accuracy']:.{ACCURACY_DECIMALS}f} [{low:.1f}, {high:.1f}]")
            sources.setdefault(file, set()).add(ours["num_images"])
        print(f"| {' | '.join(cells)} |")
    for file, images in sources.items():
        counts = " and ".join(f"{number:,}" for number in sorted(images, reverse=True))
        print(f"\nOurs, 95% intervals in brackets: {os.path.relpath(file, ROOT)}, {counts} images.")


def print_tables(tables: Sequence[Table], columns: dict[str, dict[str, Any]], results: Path, dataset: str) -> None:
    """Prints all tables, then the commands for what is missing."""
    for table in tables:
        if table.columns:
            print_table(table, columns, results)
    missing = [(table, row) for table in tables for row in table.rows if is_missing(table, row, columns, results)]
    if not missing:
        return
    print("\n### Commands for what is missing, in order\n\n```bash")
    printed = set()
    for position, (table, row) in enumerate(missing):
        # an attack that several rows share comes behind what the last of them needs
        later = {step.command for _, other in missing[position + 1 :] for step in other.steps[-1:]}
        commands = [step.command for step in row.steps if not step.is_done and step.command not in later]
        if new := [command for command in commands if command not in printed]:
            print(f"# {table.title.partition(':')[0]}: {', '.join(row.labels)}", *new, sep="\n")
            printed.update(new)
    print(f"python scripts/reports/paper_tables.py --dataset {dataset} --collect\n```")


def run_steps(rows: Sequence[Row], results: Path, jobs: int) -> None:
    """Run what `rows` lack, `jobs` commands at a time with their share of the cores, and collect the results.

    Raises ChildProcessError naming the first command that failed; what does not depend on it is run nevertheless.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    earlier: dict[str, list[Step]] = {}  # what a step waits for: its inputs, and an attack for all of its rows
    todo: dict[str, Step] = {}
    longest = max(len(row.steps) for row in rows)
    # What is waited for is submitted first, or waiting workers would keep it from starting: in the order of the rows,
    # inputs before what takes them, and all attacks at the end.
    for depth in range(longest):
        for row in rows:
            for step in row.steps[:-1][depth : depth + 1]:
                inputs = [
                    other
                    for other in row.steps[:depth]
                    if any(o.endswith(f"={other.output_dir}") for o in step.overrides)
                ]
                todo.setdefault(step.output_dir, step)
                earlier.setdefault(step.output_dir, []).extend(inputs)
    for row in rows:
        todo.setdefault(row.steps[-1].output_dir, row.steps[-1])
        earlier.setdefault(row.steps[-1].output_dir, []).extend(row.steps[:-1])
    running: dict[str, Future] = {}

    def run(step: Step) -> None:
        for needed in earlier[step.output_dir]:
            running[needed.output_dir].result()
        if step.is_done:
            return
        print(step.command, flush=True)
        words = shlex.split(step.command)
        if words[0] == "accelerate":  # of this Python, whatever PATH says
            words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:]]
        else:
            words[0] = sys.executable
        if subprocess.run(words, cwd=ROOT, env=environment).returncode:
            raise ChildProcessError(f"failed: {step.command}")

    with ThreadPoolExecutor(jobs) as pool:
        for output_dir, step in todo.items():
            running[output_dir] = pool.submit(run, step)
    collect(rows, results)
    for step in running.values():
        step.result()


def collect(rows: Sequence[Row], results: Path) -> None:
    """Copies the summaries of what is done to `results`, and the records, compressed, to `results/records`."""
    for step, result in {(row.steps[-1], row.result) for row in rows if row.steps[-1].is_done}:
        summary, records = (ROOT / step.output_dir / name for name in MADE[step.script])
        write_bytes(results / f"{result}.json", summary.read_bytes())
        # no time in the header: the same records give the same file
        write_bytes(results / "records" / f"{result}.jsonl.gz", gzip.compress(records.read_bytes(), mtime=0))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="imagenet", help="a folder of scripts/recipes with a paper.yaml")
    parser.add_argument(
        "--run", action="store_true", help="run the commands for what is missing, then print the tables"
    )
    parser.add_argument("--collect", action="store_true", help="copy the results of what was run into results/DATASET")
    parser.add_argument("--results", metavar="DIR", help="where results are read and put; default results/DATASET")
    parser.add_argument("--output", metavar="FILE", help="write the tables there instead of printing them")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="with --run: so many commands at a time")
    arguments = parser.parse_args(argv)
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    dataset = arguments.dataset
    tables, columns = read_tables(dataset)
    results = ROOT / (arguments.results or f"results/{dataset}")
    if arguments.run:
        lacking = [row for table in tables for row in table.rows if is_missing(table, row, columns, results)]
        if lacking:
            run_steps(lacking, results, arguments.jobs)
    if arguments.collect:
        collect([row for table in tables for row in table.rows], results)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_tables(tables, columns, results, dataset)
    if arguments.output:
        write_text(arguments.output, text.getvalue().lstrip("\n"))
    else:
        print(text.getvalue(), end="")


if __name__ == "__main__":
    run_main(main)
