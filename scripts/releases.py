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
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.dynamic_module_utils import custom_object_save

from hub_results import results_yaml
from modeling_nim import MODELS
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.recipe import load_recipe
from reports.cards import CardFacts, own_results
from reports.tables import keep_as_made


ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(".eval_results") / "accuracy.yaml"


def code_files(directory: Path) -> dict[str, str]:
    """The code that `save_pretrained` puts beside this model's weights, `{file name: text}`."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):  # the weights are not looked at
        model = MODELS[config.architectures[0]](config)
    with tempfile.TemporaryDirectory() as folder:
        custom_object_save(config, folder)
        custom_object_save(model, folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.py"))}


def released_files(directory: Path, root: Path = ROOT) -> dict[Path, str]:
    """Every text that `make cards` keeps beside a released model's card, `{path: text}`."""
    files = {directory / name: text for name, text in code_files(directory).items()}
    facts = directory / "card.yaml"
    results = own_results(load_recipe(facts, CardFacts), root) if facts.is_file() else []
    if results:
        files[directory / RESULTS] = results_yaml(results)
    return files


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file differs")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()

    texts: dict[Path, str | None] = {}
    for config in sorted((ROOT / "model_cards").glob("*/config.json")):
        wanted = released_files(config.parent)
        kept = {*config.parent.glob("*.py"), *config.parent.glob(".eval_results/*.yaml")}
        texts |= {path: wanted.get(path) for path in sorted(kept | wanted.keys())}
    return keep_as_made(texts, arguments.check)


if __name__ == "__main__":
    run_main(main)
