"""Prints the paper's tables with our numbers beside the paper's, and the commands for the rows that are missing.

    python scripts/reports/paper_tables.py
    python scripts/reports/paper_tables.py --dataset cifar10 --output results/cifar10/tables.md
    python scripts/reports/paper_tables.py --dataset cifar10 --results outputs/again --makefile | make -j2 -f -

`scripts/recipes/studies.py` says what makes each row. With --makefile the commands come as rules for `make`, which runs
what does not depend on one another at the same time, leaves out what is there already, and collects the results; a step
that was broken off resumes. `results/DATASET/RESULT.json` are the summaries of what was run, `records/RESULT.jsonl.gz`
beside them the records, a line per image, that they were made of. The paper's numbers are ImageNet's, whatever ours are
of. Below them stand the rows of `results/published.yaml`, which are others'.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_text
from recipes.studies import STUDIES, Row, Step, Study, Table
from reports.tables import TEMPLATES, environment, find_rows, percent, read_result


ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published.yaml"
COLLECT = "reports/collect.py"


def in_order(steps: Sequence[Step]) -> list[Step]:
    """The steps, each once, behind everything that it needs."""
    ordered: dict[str, Step] = {}
    for step in steps:
        for needed in [*in_order(step.needs), step]:
            ordered.setdefault(needed.target, needed)
    return list(ordered.values())


def find_cells(study: Study, table: Table, row: Row, results: Path) -> list[dict[str, Any] | None]:
    """The summary's row of each column, None where ours is missing."""
    file = results / f"{row.result}.json"
    summary = read_result(file) if file.is_file() else {"rows": []}
    cells = []
    for column in (study.columns[name] for name in table.columns):
        wanted = {"model": row.model, "sigma": row.sigma} | column.wanted
        if row.sigma is None and column.threat_model == "gray_box":
            wanted["threat_model"] = "white_box"  # without a defense gray-box is white-box
        cells.append(next(iter(find_rows(summary, **wanted)), None))
    return cells


def filled(study: Study, table: Table, results: Path) -> dict[str, Any]:
    """A table's header and lines, ours beside the paper's with as many decimals, and how many images ours are of."""
    in_paper = {name for row in table.rows for name in row.paper}
    header = [name.replace("_", " ") for name in table.label_names]
    for name in table.columns:
        column = study.columns[name]
        header += [f"{column.paper_title} paper", f"{column.title} ours"] if name in in_paper else [column.title]
    lines, sources = [], {}
    for row in table.rows:
        cells = ["-" if label is None else str(label) for label in row.labels]
        for name, ours in zip(table.columns, find_cells(study, table, row, results), strict=True):
            if name in in_paper:
                cells.append(percent(row.paper[name], decimals=2) if name in row.paper else "–")
            cells.append("missing" if ours is None else percent(ours["accuracy"], ours["ci95"], decimals=2))
            if ours is not None:
                sources.setdefault(os.path.relpath(results / f"{row.result}.json", ROOT), set()).add(ours["num_images"])
        lines.append(cells)
    sources = {file: [f"{images:,}" for images in sorted(counts, reverse=True)] for file, counts in sources.items()}
    return {"title": table.title, "header": header, "lines": lines, "sources": sources}


def missing_steps(study: Study, results: Path) -> list[tuple[str, list[Step]]]:
    """The rows that lack a number or their result, with the steps that are to be made for them, each once, in order."""
    missing, known = [], set()
    for table in study.tables:
        for row in table.rows:
            result = results / f"{row.result}.json"
            if result.is_file() and None not in find_cells(study, table, row, results):
                continue
            kept = os.path.relpath(result, ROOT)
            collect = Step(COLLECT, os.path.dirname(kept), (row.step.output_dir, kept), (row.step,), result.name)
            made = [step for step in in_order([row.step]) if not (ROOT / step.target).exists()]
            steps = [step for step in [*made, collect] if step.target not in known]
            if steps:
                missing.append((f"{table.title.partition(':')[0]}: {', '.join(map(str, row.labels))}", steps))
            known |= {step.target for step in steps}
    return missing


def report(study: Study, results: Path) -> str:
    """All tables, others' numbers, then the commands for what is missing."""
    template = environment(TEMPLATES).get_template("paper_tables.md.j2")
    text = template.render(
        study=study.key.removesuffix("_full"),
        tables=[filled(study, table, results) for table in study.tables if table.columns],
        published=yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")),
        missing=missing_steps(study, results),
    )
    return f"{text.strip()}\n"


def makefile(study: Study, results: Path) -> str:
    """Rules that make what is missing; what comes before a step is there before it, and old or new all the same."""
    steps = [step for _, steps in missing_steps(study, results) for step in steps]
    rules = [".PHONY: all", f"all: {' '.join(step.target for step in steps if step.script == COLLECT)}"]
    for step in steps:
        rules.append(f"{step.target}: | {' '.join(needed.target for needed in step.needs)}")
        rules.append(f"\t{step.command.replace('$', '$$')}")
    return "\n".join(rules) + "\n"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="imagenet", help="imagenet, cifar10 or cifar10_full (%(default)s)")
    parser.add_argument("--makefile", action="store_true", help="print rules for make in place of the tables")
    parser.add_argument("--results", metavar="DIR", help="where results are read and put; default results/DATASET")
    parser.add_argument("--output", metavar="FILE", help="write the tables there instead of printing them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    if arguments.dataset not in STUDIES:
        raise ValueError(f"no tables for --dataset {arguments.dataset!r}; there are tables for {', '.join(STUDIES)}")
    study = STUDIES[arguments.dataset]()
    results = ROOT / (arguments.results or f"results/{study.key}")
    text = makefile(study, results) if arguments.makefile else report(study, results)
    if arguments.output:
        write_text(arguments.output, text)
    else:
        print(text, end="")


if __name__ == "__main__":
    run_main(main)
