"""Publish a model directory on the Hub: weights, configuration, image processor, code, card.

    python scripts/push_to_hub.py outputs/demo/finetune_denoised/purified org/nim --summary outputs/demo/summary.json
    python scripts/push_to_hub.py model_cards/nim-cifar10 org/nim-cifar10 --update

The weights go up as safetensors, holding the model's parameters and nothing else. The configuration names the code
files that go with them, so that `trust_remote_code=True` loads the model where this package is not installed. The card
is the directory's README.md, or else one written from its configuration and, with --summary, from the results of
`run_attack.py`, which go up as `.eval_results/accuracy.yaml` too. Everything arrives in one commit: an upload that is
cut off leaves no part of it behind.

Log in once with `hf auth login`, or set HF_TOKEN to a token with write access.
"""

if __name__ == "__main__":
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import shlex
import tempfile
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, RepoUrl
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers import PreTrainedConfig, PreTrainedModel

from hub_results import results_yaml
from modeling_nim import MODELS
from modeling_nim.loading_nim import naming_damaged_files
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_text
from modeling_nim.runs.models import ModelKind, load_model, load_processor
from modeling_nim.runs.recipe import read_recipe
from releases import RESULTS
from reports.cards import CardFacts, DataFacts, own_results, render_card
from reports.tables import read_result


def load_for_publication(directory: Path) -> PreTrainedModel:
    """The model of a directory, complete and of a class of this package; ValueError or FileNotFoundError otherwise."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} holds no config.json: pass a directory that save_pretrained wrote")
    with naming_damaged_files(directory):
        names = [str(name) for name in PreTrainedConfig.get_config_dict(directory)[0].get("architectures") or ["none"]]
    model_class = MODELS.get(names[0])
    if model_class is None:
        raise ValueError(
            f"{directory} holds a {names[0]}, no model of this package: publish it with its own push_to_hub"
        )
    classes = {model_class.config_class.model_type: model_class}
    kind = ModelKind(names[0], "a directory that save_pretrained wrote", classes)
    return load_model(directory, kind, exact=True, dtype="auto")


def stage(model: PreTrainedModel, args: argparse.Namespace, staging: Path) -> None:
    """Puts what is published into the folder `staging`."""
    if (args.directory / "preprocessor_config.json").is_file():
        load_processor(args.directory).save_pretrained(staging)
    with naming_damaged_files(args.directory):  # the configuration goes up as it is, with all that was written in it
        model.save_pretrained(staging)
    card, results = args.directory / "README.md", args.directory / RESULTS
    if card.is_file() and args.summary is None:
        text = card.read_text(encoding="utf-8")
        listed = results.read_text(encoding="utf-8") if results.is_file() else ""
    else:
        facts = facts_of_directory(args.directory, args.repo_id, args.summary, args.model)
        text = render_card(args.repo_id, facts, model.config, root=Path())
        listed = results_yaml(own_results(facts, root=Path()))
    write_text(staging / "README.md", text)
    if listed:
        write_text(staging / RESULTS, listed)


def facts_of_directory(directory: Path, name: str, summary: Path | None = None, model: str | None = None) -> CardFacts:
    """What a card.yaml would say of a model directory: the recipes saved beside it, and a summary of run_attack.py.

    `model` may be left out where the summary tells it: it is of one model, or one was loaded from this directory.
    """
    folders = (directory, directory.parent)  # a composed model lies inside the classifier's directory
    recipe = next((folder / "recipe.yaml" for folder in folders if (folder / "recipe.yaml").is_file()), None)
    recipes, data = {}, DataFacts("unknown data")
    if recipe is not None:
        recipes["Training"] = shlex.quote(str(recipe))
        section = read_recipe(recipe).get("data", {})
        path = section.get("path")
        data = DataFacts(
            name=section.get("source", "unknown data") if path is None else Path(path).name,
            id=path if section.get("source") == "hub" else None,
            split=section.get("test_split", "test"),
        )
    facts = CardFacts(title=name.split("/")[-1], data=data, recipes=recipes, model=model)
    if summary is not None:
        facts.summaries = [str(summary)]
        if model is None:
            facts.model = own_name(read_result(summary), directory)
    return facts


def own_name(summary: dict[str, Any], directory: Path) -> str:
    """What a summary calls the model of a directory."""
    recipe = summary["provenance"].get("recipe", {})
    by_path = [
        model["name"]
        for model in recipe.get("models", [])
        if model.get("path")
        and Path(model["path"]).resolve() == directory.resolve()
        and not model.get("without_purifier")
    ]
    names = by_path or sorted({row["model"] for row in summary["rows"]})
    if len(names) != 1:
        raise ValueError(f"the summary has results of {names}: say with --model which is {directory}")
    return names[0]


def upload(args: argparse.Namespace, staging: str) -> tuple[RepoUrl, CommitInfo]:
    """The repository and the commit in which the folder `staging` went up.

    Raises:
        FileExistsError: the name is taken, and --update was not given.
        OSError: the connection broke off.
    """
    api = HfApi()
    try:
        # Without --update a name that is taken is an error, so that no model is overwritten by mistake.
        url = api.create_repo(args.repo_id, private=args.private or None, exist_ok=args.update)
        commit = api.upload_folder(repo_id=url.repo_id, folder_path=staging, commit_message=args.message)
    except HfHubHTTPError as error:
        if error.response.status_code != HTTPStatus.CONFLICT or args.update:
            raise  # the Hub has answered, and says what is wrong
        raise FileExistsError(
            f"{args.repo_id} exists on {ENDPOINT} already, and nothing was published: pass --update to publish a new "
            "version of it, or another name"
        ) from error
    except HTTPError as error:
        raise OSError(
            f"the connection to {ENDPOINT} broke off ({error}); nothing was published. Run the command again, with "
            "--update if the repository exists by now"
        ) from error
    return url, commit


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a directory that save_pretrained or one of the scripts wrote")
    parser.add_argument("repo_id", help="namespace and name of the repository, such as org/nim-digits")
    parser.add_argument("--summary", type=Path, help="summary.json of run_attack.py, whose numbers go into the card")
    parser.add_argument("--model", help="with --summary: what it calls this model, where it has several")
    parser.add_argument(
        "--update", action="store_true", help="publish a new version in a repository that exists already"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default="Upload model, code and card", help="the commit's message (%(default)s)")
    return parser


def main() -> None:
    args = make_parser().parse_args()

    model = load_for_publication(args.directory)
    with tempfile.TemporaryDirectory() as staging:
        stage(model, args, Path(staging))
        url, commit = upload(args, staging)
        num_files = sum(path.is_file() for path in Path(staging).rglob("*"))
    print(f"{num_files} files published at {url}, commit {commit.oid[:8]}")


if __name__ == "__main__":
    run_main(main)
