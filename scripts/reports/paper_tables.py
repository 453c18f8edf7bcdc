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
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_text
from recipes.studies import STUDIES, Row, Step, Study, Table
from reports.collect import store
from reports.tables import find_rows, markdown_table, percent


ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "results" / "published.yaml"
ACCURACY_DECIMALS = 2  # as the paper
# What a script leaves when it is done, and the records that this was made of.
MADE = {
    "run_pretrain.py": ("config.json", None),
    "run_finetune.py": ("config.json", None),
    "convert_checkpoint.py": ("config.json", None),
    "run_attack.py": ("summary.json", "records.jsonl"),
    "run_certify.py": ("certified.json", "certificates.jsonl"),
}


def command_of(step: Step) -> str:
    words = " ".join(map(shlex.quote, step.arguments))
    if step.script == "convert_checkpoint.py":
        return f"python scripts/{step.script} {words} --output_dir {shlex.quote(step.output_dir)}"
    return f"python scripts/launch.py scripts/{step.script} {words}"


def target_of(step: Step) -> str:
    """The file that is there when the step is done."""
    return f"{step.output_dir}/{MADE[step.script][0]}"


def is_done(step: Step) -> bool:
    return (ROOT / target_of(step)).exists()


def in_order(steps: Sequence[Step]) -> list[Step]:
    """The steps, each once, behind everything that it needs."""
    ordered: dict[str, Step] = {}
    for step in steps:
        for needed in [*in_order(step.needs), step]:
            ordered.setdefault(needed.output_dir, needed)
    return list(ordered.values())


def find_cells(study: Study, table: Table, row: Row, results: Path) -> list[dict | None]:
    """The summary's row of each column, None where ours is missing."""
    file = results / f"{row.result}.json"
    summary = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    cells = []
    for column in (study.columns[name] for name in table.columns):
        wanted = {"model": row.model, "sigma": row.sigma, "attack": column.attack}
        given = {name: getattr(column, name) for name in ("name", "threat_model", "epsilon_255")}
        wanted |= {name: value for name, value in given.items() if value is not None}
        if row.sigma is None and column.threat_model == "gray_box":
            wanted["threat_model"] = "white_box"  # without a defense there is none to be unaware of
        cells.append(next(iter(find_rows(summary, **wanted)), None))
    return cells


def missing_rows(study: Study, results: Path) -> list[tuple[Table, Row]]:
    """The rows that lack a number, or their whole result."""
    return [
        (table, row)
        for table in study.tables
        for row in table.rows
        if None in find_cells(study, table, row, results) or not (results / f"{row.result}.json").is_file()
    ]


def table_text(study: Study, table: Table, results: Path) -> str:
    """One table in Markdown, and under it where its numbers are from."""
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
                cells.append(f"{row.paper[name]:.{ACCURACY_DECIMALS}f}" if name in row.paper else "–")
            cells.append("missing" if ours is None else percent(ours["accuracy"], ours["ci95"], ACCURACY_DECIMALS))
            if ours is not None:
                sources.setdefault(results / f"{row.result}.json", set()).add(ours["num_images"])
        lines.append(cells)
    text = f"### {table.title}\n\n{markdown_table(header, lines, rule=' --- ')}\n"
    for file, images in sources.items():
        counts = " and ".join(f"{number:,}" for number in sorted(images, reverse=True))
        text += f"\nOurs, 95% intervals in brackets: {os.path.relpath(file, ROOT)}, {counts} images.\n"
    return text


def published_text(study: str, published: dict[str, list[dict]]) -> str:
    """What others report on the data of a study, with protocol and source; empty where there is nothing."""
    text = ""
    attacked = [row for row in published["attacked"] if row["study"] == study]
    if attacked:
        lines = [
            [row["system"], row["protocol"], f"{row['clean']:.2f}", f"{row['robust']:.2f}", row["source"]]
            for row in attacked
        ]
        header = ["system", "protocol", "Clean theirs", "Attacked theirs", "source"]
        text += f"\n### Published by others: under attack\n\n{markdown_table(header, lines, rule=' --- ')}\n"
    certified = [row for row in published["certified"] if row["study"] == study]
    if certified:
        radii = sorted({radius for row in certified for radius in row["radii"]})
        lines = [
            [
                row["system"],
                row["protocol"],
                *(f"{row['radii'][radius]:.1f}" if radius in row["radii"] else "–" for radius in radii),
                row["source"],
            ]
            for row in certified
        ]
        header = ["system", "protocol", *(f"L2 {radius:g} theirs" for radius in radii), "source"]
        text += f"\n### Published by others: certified\n\n{markdown_table(header, lines, rule=' --- ')}\n"
    return text


def report(study: Study, results: Path) -> str:
    """All tables, others' numbers, then the commands for what is missing."""
    text = "\n".join(table_text(study, table, results) for table in study.tables if table.columns)
    text += published_text(study.key.removesuffix("_full"), yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")))
    missing = missing_rows(study, results)
    if not missing:
        return text
    text += "\n### Commands for what is missing, in order\n\n```bash\n"
    printed = set()
    for table, row in missing:
        steps = [step for step in in_order([row.step]) if not is_done(step) and step.output_dir not in printed]
        if steps:
            text += f"# {table.title.partition(':')[0]}: {', '.join(map(str, row.labels))}\n"
            text += "".join(f"{command_of(step)}\n" for step in steps)
            printed |= {step.output_dir for step in steps}
    return text + f"python scripts/reports/paper_tables.py --dataset {study.key} --collect\n```\n"


def makefile(study: Study, results: Path) -> str:
    """Rules that make what is missing; what comes before a step is there before it, and old or new all the same."""
    rows = {row.result: row for _, row in missing_rows(study, results)}
    folder = os.path.relpath(results, ROOT)
    text = f".PHONY: all\nall:{''.join(f' {folder}/{result}.json' for result in rows)}\n"
    for step in in_order([row.step for row in rows.values()]):
        if not is_done(step):
            needed = "".join(f" {target_of(other)}" for other in step.needs)
            text += f"{target_of(step)}: |{needed}\n\t{command_of(step).replace('$', '$$')}\n"
    for result, row in rows.items():
        collect = f"--dataset {study.key} --results {folder} --collect {result}"
        text += f"{folder}/{result}.json: | {target_of(row.step)}\n"
        text += f"\tpython scripts/reports/paper_tables.py {collect}\n"
    return text


def collect(rows: Sequence[Row], results: Path) -> None:
    """Copies the summaries of what is done to `results`, and the records, compressed, to `results/records`."""
    for step, result in {(row.step, row.result) for row in rows if is_done(row.step)}:
        summary, records = (ROOT / step.output_dir / name for name in MADE[step.script])
        store(summary.read_bytes(), records.read_bytes(), results / f"{result}.json")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="imagenet", help="a study: imagenet, cifar10 or cifar10_full")
    parser.add_argument("--makefile", action="store_true", help="print rules for make in place of the tables")
    parser.add_argument(
        "--collect",
        nargs="*",
        metavar="RESULT",
        help="copy the results of what was run, or those named, into results/DATASET, and print nothing",
    )
    parser.add_argument("--results", metavar="DIR", help="where results are read and put; default results/DATASET")
    parser.add_argument("--output", metavar="FILE", help="write the tables there instead of printing them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    if arguments.dataset not in STUDIES:
        raise ValueError(f"no tables for --dataset {arguments.dataset!r}; there are tables for {', '.join(STUDIES)}")
    study = STUDIES[arguments.dataset]()
    results = ROOT / (arguments.results or f"results/{study.key}")
    if arguments.collect is not None:
        rows = [row for table in study.tables for row in table.rows]
        collect([row for row in rows if row.result in (arguments.collect or [row.result])], results)
        return
    text = makefile(study, results) if arguments.makefile else report(study, results)
    if arguments.output:
        write_text(arguments.output, text)
    else:
        print(text, end="")


if __name__ == "__main__":
    run_main(main)
