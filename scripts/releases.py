"""Complete the released directories: the code files that a pushed model brings along, and its results for the Hub.

    python scripts/releases.py             # every model_cards/*/config.json
    python scripts/releases.py --check     # writes nothing; exit code 1 if a file differs

With its code files a directory loads with `trust_remote_code=True` where this package is not installed, as it would
from the Hub. `.eval_results/accuracy.yaml` holds the rows of the card's table that are this model's, in the Hub's
format.
"""

if __name__ == "__main__":
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from transformers import AutoConfig
from transformers.dynamic_module_utils import custom_object_save

import modeling_nim
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_text
from modeling_nim.runs.recipe import load_recipe
from reports import cards


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(".eval_results") / "accuracy.yaml"


def code_files(directory: Path) -> dict[str, str]:
    """The code that `save_pretrained` puts beside this model's weights, `{file name: text}`."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):  # the weights are not looked at
        model = getattr(modeling_nim, config.architectures[0])(config)
    with tempfile.TemporaryDirectory() as folder:
        custom_object_save(config, folder)
        custom_object_save(model, folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.py"))}


def result_entries(facts: cards.CardFacts, root: Path) -> list[EvalResultEntry]:
    """What the summaries of a card say of its own model, one entry per attack; paths are relative to `root`."""
    entries = []
    for path in facts.summaries:
        summary = json.loads((root / path).read_text(encoding="utf-8"))
        entries += [_entry(row, facts) for row in summary["rows"] if cards.is_own(row, facts)]
    # The same images without an attack are a row of every protocol.
    return [entry for index, entry in enumerate(entries) if entry not in entries[:index]]


def _entry(row: dict[str, Any], facts: cards.CardFacts) -> EvalResultEntry:
    metric = f"{cards.metric_name(row)}, {row['num_images']} images"
    settings = json.dumps(cards.metric_arguments(row))
    return EvalResultEntry(
        dataset_id=facts.data.id or facts.data.name,  # the Hub shows those whose data set it has
        task_id=re.sub(r"[^a-z0-9]+", "_", metric.lower()).strip("_"),
        value=round(row["accuracy"], 2),
        notes=f"{metric}, split {facts.data.split}; {settings}",
    )


def results_yaml(facts: cards.CardFacts, root: Path) -> str:
    """The text of `.eval_results/accuracy.yaml`; empty where there are no results."""
    entries = result_entries(facts, root)
    if not entries:
        return ""
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, width=120)


def released_files(directory: Path, root: Path = ROOT) -> dict[Path, str]:
    """Every text that `make cards` keeps beside a released model's card, `{path: text}`."""
    files = {directory / name: text for name, text in code_files(directory).items()}
    facts = directory / "card.yaml"
    listed = results_yaml(load_recipe(facts, cards.CardFacts), root) if facts.is_file() else ""
    if listed:
        files[directory / RESULTS] = listed
    return files


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file differs")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()

    changed = 0
    for config in sorted((ROOT / "model_cards").glob("*/config.json")):
        wanted = released_files(config.parent)
        kept = {*config.parent.glob("*.py"), *config.parent.glob(".eval_results/*.yaml")}
        for path in sorted(kept | wanted.keys()):
            old = path.read_text(encoding="utf-8") if path.is_file() else None
            if old == wanted.get(path):
                continue
            changed += 1
            if arguments.check:
                print(f"{path.relative_to(ROOT)} is not as made")
            elif path in wanted:
                write_text(path, wanted[path])
                print(f"wrote {path.relative_to(ROOT)}")
            else:
                path.unlink()
                print(f"removed {path.relative_to(ROOT)}, which no file of this model imports")
    if not changed:
        print("every released directory is as its model and records make it")
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    run_main(main)
