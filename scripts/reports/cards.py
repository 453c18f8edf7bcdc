"""Write the model cards from configurations, recipes and result records; never by hand.

    python scripts/reports/cards.py                          # every model_cards/*/card.yaml -> README.md beside it
    python scripts/reports/cards.py --check                  # writes nothing; exit code 1 if a card differs
    python scripts/reports/cards.py --directory outputs/demo/finetune_denoised/purified --name nim-digits \
        --summary outputs/demo/summary.json               # prints the card of any model directory

A `card.yaml` says where the facts are, and nothing else; paths are relative to the repository's root:

    title: NIM-MAE on handwritten digits
    data: {name: scikit-learn digits, id: null, split: test}     # id: of the data set on the Hub, if it is there
    recipes: {Pre-training: scripts/recipes/digits/pretrain_nim_mae.yaml, Attack: scripts/recipes/digits/attack.yaml}
                                                                 # each with its overrides behind it
    summaries: [results/digits/summary.json]                     # of run_attack.py
    model: purified                                              # what the summaries call this model
    sigma: 75                                                    # optional: which of its sigmas, if several
    certificates: [results/digits/certified.json]                # optional: of run_certify.py
    restorations: [results/photos/psnr.json]                     # optional: of run_attack.py's section reconstruction
    paper_systems: [NIM-MAE]                                     # optional: rows of Table 1, shown as the paper's

The model's own facts come from `config.json` beside `card.yaml`.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)

import argparse
import difflib
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

import modeling_nim
from modeling_nim.robustness.recipes import SETTINGS
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_text
from modeling_nim.runs.recipe import load_recipe, read_recipe, stack_recipes
from recipes.studies import PAPER_COLUMNS, STUDIES, TABLE_1
from reports.tables import Row, attack_text, environment, number


ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "model_cards" / "TEMPLATE.md"
KINDS = {"ForPreTraining": "denoiser", "NIMPurified": "purified", "ForImageClassification": "classifier"}
# By a key that no other recipe has; what has none of them is an attack's.
SCRIPTS = {"init": "run_finetune", "model": "run_pretrain", "radii": "run_certify"}
# Sections of a recipe that say how a run was executed, not what was learned.
EXECUTION_KEYS = ("output_dir", "execution", "checkpoints", "logging", "pictures", "reconstruction")


@dataclass
class DataFacts:
    name: str
    id: str | None = None
    split: str = "test"


@dataclass
class CardFacts:
    """The content of a card.yaml; see the module's docstring."""

    title: str
    data: DataFacts
    recipes: dict[str, str] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)
    model: str | None = None
    sigma: float | str | None = None
    certificates: list[str] = field(default_factory=list)
    restorations: list[str] = field(default_factory=list)
    paper_systems: list[str] = field(default_factory=list)
    license: str = "apache-2.0"

    def __post_init__(self):
        known = {row[0] for row in TABLE_1}
        if unknown := set(self.paper_systems) - known:
            raise ValueError(f"the paper's Table 1 has no system {min(unknown)!r}; known: {', '.join(sorted(known))}")


def render_card(name: str, facts: CardFacts, config: PreTrainedConfig, root: Path) -> str:
    """The text of a card.

    Args:
        name: of the repository, such as "org/nim-digits" or "nim-digits".
        root: what the paths in `facts` are relative to.

    Raises:
        FileNotFoundError, ValueError: a recipe or summary is missing, or a summary does not know `facts.model`.
    """
    architecture = (config.architectures or ["none"])[0]
    kind = next((kind for part, kind in KINDS.items() if part in architecture), None)
    if kind is None or not hasattr(modeling_nim, architecture):
        raise ValueError(f"no card is known for the architecture {architecture!r}; it is no model of this package")
    summaries = [_read_result(root / path) for path in facts.summaries]
    certificates = [_read_result(root / path) for path in facts.certificates]
    if summaries and facts.model is None and kind != "denoiser":
        raise ValueError(f"card {name!r}: say with 'model' which rows of {facts.summaries[0]} are this model's")
    rows = [row for summary in summaries for row in summary["rows"]]
    own = [row for row in rows if is_own(row, facts)]
    if facts.model is not None and not own:
        known = sorted({row["model"] for row in rows})
        raise ValueError(f"card {name!r}: no row is of model {facts.model!r} at sigma {facts.sigma}; models: {known}")
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in getattr(modeling_nim, architecture)(config).parameters())
    body = (
        environment(TEMPLATE.parent)
        .from_string(TEMPLATE.read_text(encoding="utf-8"))
        .render(
            facts=facts,
            kind=kind,
            config=config,
            architecture=architecture,
            num_parameters=num_parameters,
            repository=name if "/" in name else f"model_cards/{name}",
            stages={title: _stage(root, line) for title, line in facts.recipes.items()},
            rows=rows,
            own=own,
            summaries=summaries,
            certificates=certificates,
            restored=[row for path in facts.restorations for row in _read_result(root / path)["rows"]],
            strongest=strongest_attacks(own),
            paper_table=TABLE_1,
            paper_columns=PAPER_COLUMNS,
        )
    )
    while "\n\n\n" in body:
        body = body.replace("\n\n\n", "\n\n")
    return f"---\n{_metadata(name, facts, kind, own).to_yaml()}\n---\n\n{body.strip()}\n"


def strongest_attacks(own: list[Row]) -> list[Row]:
    """Of each budget the row that leaves least."""
    # The upper bound of an attacker who knows the draw is no deployed threat; the limit is what can be met.
    attacked = [row for row in own if row["attack"] != "none" and row["threat_model"] != "white_box_known_draw"]
    strongest = []
    for epsilon_255 in sorted({row["epsilon_255"] for row in attacked if row["epsilon_255"] > 0}):
        tried = [row for row in attacked if row["epsilon_255"] == epsilon_255]
        # The few images of a sweep over settings are no match for the attacks on all images.
        enough = max(row["num_images"] for row in tried) / 4
        strongest.append(min((row for row in tried if row["num_images"] >= enough), key=lambda row: row["accuracy"]))
    return strongest


def card_of_directory(
    directory: Path, name: str, summary: Path | None = None, model: str | None = None, sigma: float | str | None = None
) -> str:
    """The card of a model directory: its config.json and what `facts_of_directory` finds."""
    facts = facts_of_directory(directory, name, summary, model, sigma)
    return render_card(name, facts, AutoConfig.from_pretrained(directory), root=Path())


def facts_of_directory(
    directory: Path, name: str, summary: Path | None = None, model: str | None = None, sigma: float | str | None = None
) -> CardFacts:
    """What a card.yaml would say of a model directory: the recipes saved beside it, and a summary of run_attack.py.

    `model` may be left out where the summary's rows tell it: they are of one model, or a hash fits.
    """
    recipes = {}
    for folder in (directory, directory.parent):  # a composed model lies inside the classifier's directory
        if (folder / "recipe.yaml").is_file():
            recipes["Training"] = shlex.quote(str(folder / "recipe.yaml"))
            break
    data = DataFacts("unknown data")
    if recipes:
        section = read_recipe(shlex.split(recipes["Training"])[0]).get("data", {})
        path = section.get("path")
        data = DataFacts(
            name=section.get("source", "unknown data") if path is None else Path(path).name,
            id=path if section.get("source") == "hub" else None,
            split=section.get("test_split", "test"),
        )
    facts = CardFacts(title=name.split("/")[-1], data=data, recipes=recipes, model=model, sigma=sigma)
    if summary is not None:
        facts.summaries = [str(summary)]
        if model is None:
            facts.model = _own_name(_read_result(summary), directory)
    return facts


def _own_name(summary: dict[str, Any], directory: Path) -> str:
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


def _read_result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there are no results {path}: make them with scripts/run_attack.py or run_certify.py")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no summary.json of run_attack.py or run_certify.py: {error}") from None


def is_own(row: dict[str, Any], facts: CardFacts) -> bool:
    return row["model"] == facts.model and (facts.sigma is None or row["sigma"] == facts.sigma)


def _stage(root: Path, line: str) -> dict[str, Any]:
    """The files, the command and the settings of a recipe's line: by dotted key, and none for an evaluation."""
    words = shlex.split(line)
    files = [word for word in words if "=" not in word or (root / word).is_file()]
    recipe = stack_recipes([root / file for file in files], [word for word in words if word not in files])
    script = next((script for key, script in SCRIPTS.items() if key in recipe), "run_attack")
    trains = script in ("run_pretrain", "run_finetune")
    settings = {
        key: value
        for key, value in (_leaves(recipe) if trains else [])
        if not key.startswith(EXECUTION_KEYS) and value is not None and value != []
    }
    return {"files": files, "command": f"python scripts/launch.py scripts/{script}.py {line}", "settings": settings}


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in values.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def _metadata(name: str, facts: CardFacts, kind: str, own: list[dict[str, Any]]) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=facts.data.id or facts.data.name,
            dataset_name=facts.data.name,
            dataset_split=facts.data.split,
            metric_type="accuracy" if row["attack"] == "none" else "robust_accuracy",
            metric_name=metric_name(row),
            metric_value=round(row["accuracy"], 2),
            # The client merges all results on one data set: what tells the attacks apart must be the metric's.
            metric_args=metric_arguments(row),
        )
        for row in own
    ]
    return ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if kind == "denoiser" else "image-classification",
        tags=["vision", "noisy-image-modeling", "adversarial-robustness"],
        datasets=[facts.data.id] if facts.data.id else None,
        metrics=["accuracy", "robust_accuracy"] if own else None,
        model_name=name.split("/")[-1],
        eval_results=results or None,
    )


def metric_name(row: dict[str, Any]) -> str:
    if row["attack"] == "none":
        return "clean accuracy"
    threat = row["threat_model"].replace("_", " ")
    return f"{threat} accuracy, {attack_text(row)}, eps {number(row['epsilon_255'])}/255"


def metric_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """The attack, the defense's randomness and the interval: what the value means nothing without."""
    arguments = {key: row[key] for key in ("attack", "threat_model", "epsilon_255")}
    if row["sigma"] is not None:
        arguments["sigma_255"] = row["sigma"]
    arguments |= {key: value for key, value in row.get("settings", {}).items() if key in SETTINGS}
    if "num_draws" in row:
        arguments["num_draws"] = row["num_draws"]
    return arguments | {"ci95": [round(bound, 2) for bound in row["ci95"]], "num_images": row["num_images"]}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 and a diff if a card is not as made"
    )
    parser.add_argument("--directory", type=Path, help="print the card of this model directory instead")
    parser.add_argument("--name", help="with --directory: the repository's name; default: the directory's")
    parser.add_argument("--summary", type=Path, help="with --directory: summary.json of run_attack.py")
    parser.add_argument("--model", help="with --summary: what it calls this model, where that is not plain")
    return parser


def main() -> int:
    args = make_parser().parse_args()

    if args.directory is not None:
        name = args.name or args.directory.resolve().name
        print(card_of_directory(args.directory, name, args.summary, args.model), end="")
        return 0
    changed = 0
    named: set[Path] = set()
    for path in sorted((ROOT / "model_cards").glob("*/card.yaml")):
        folder = path.parent
        facts = load_recipe(path, CardFacts)
        named |= {ROOT / results for results in [*facts.summaries, *facts.certificates, *facts.restorations]}
        text = render_card(folder.name, facts, AutoConfig.from_pretrained(folder), root=ROOT)
        card = folder / "README.md"
        old = card.read_text(encoding="utf-8") if card.is_file() else ""
        if text == old:
            continue
        changed += 1
        if args.check:
            names = (f"{card.relative_to(ROOT)} (as it is)", f"{card.relative_to(ROOT)} (as made)")
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), text.splitlines(True), *names))
        else:
            write_text(card, text)
            print(f"wrote {card.relative_to(ROOT)}")
    for study in STUDIES:  # what stands in a table of paper_tables.py
        named |= set((ROOT / "results" / study).glob("*.json"))
    for path in sorted((ROOT / "results").rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path not in named and isinstance(content, dict) and {"rows", "provenance"} <= content.keys():
            print(f"note: {path.relative_to(ROOT)} has results and is named by no card.yaml")
    if not changed:
        print("every card is as its records make it")
    return 1 if args.check and changed else 0


if __name__ == "__main__":
    run_main(main)
