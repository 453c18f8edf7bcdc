"""Fill the tables and findings of the README and of docs/ from the result files; never by hand.

    python scripts/reports/readme.py            # rewrites what stands between the <!-- results:NAME --> marks
    python scripts/reports/readme.py --check    # writes nothing; exit code 1 if a document differs

The sentences of NAME are in `templates/NAME.md.j2`; a template looks its numbers up by name, in `FOLDER.FILE` for
`results/FOLDER/FILE.json` and `A_B.FILE` for `results/A/B/FILE.json`; an evaluation's provenance names its recipe.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)

import argparse
import re
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jinja2
import yaml

from modeling_nim.robustness.records import read_records
from modeling_nim.robustness.summary import compare_models
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.help import recipe_sections
from reports.tables import TEMPLATES, environment, keep_as_made, read_result


ROOT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r"(<!-- results:(?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
SCRIPTS = ("run_pretrain", "run_finetune", "run_attack", "run_certify")  # in the order of docs/recipes.md


@cache
def paired(results: Path, *names: str) -> list[dict[str, Any]]:
    """The comparisons of models that several evaluations attacked on the same images: `names` as FOLDER/NAME, or as
    FOLDER/NAME=PREFIX, which is put before the names of its models."""
    parts = [name.replace("/", "/records/").partition("=") for name in names]
    return compare_models([r for path, _, word in parts for r in read_records(results / f"{path}.jsonl.gz", word)])


@cache
def templates(results: Path) -> jinja2.Environment:
    """The templates, which know the content of `results` by folder and file, and what others published."""
    known = environment(TEMPLATES)
    scripts = [ROOT / "scripts" / f"{name}.py" for name in SCRIPTS]
    known.globals |= {"recipe_sections": partial(recipe_sections, scripts), "paired": partial(paired, results)}
    known.globals |= {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in results.glob("*.yaml")}
    for path in results.rglob("*.json"):
        known.globals.setdefault("_".join(path.relative_to(results).parts[:-1]), {})[path.stem] = read_result(path)
    return known


def filled(document: str, results: Path) -> str:
    """The document with what stands between its marks made anew."""

    def fill(match: re.Match) -> str:
        text = templates(results).get_template(f"{match['name']}.md.j2").render()
        return f"{match[1]}{text.strip()}\n{match[3]}"

    return MARKED.sub(fill, document)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 if a document differs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {path: filled(path.read_text(encoding="utf-8"), ROOT / "results") for path in documents}
    return keep_as_made(texts, arguments.check)


if __name__ == "__main__":
    run_main(main)
