"""Write the model cards from configurations, recipes and result records; never by hand.

    python scripts/reports/cards.py                          # every model_cards/*/card.yaml -> README.md beside it
    python scripts/reports/cards.py --check                  # writes nothing; exit code 1 if a card differs
    python scripts/reports/cards.py --directory outputs/demo/finetune_denoised/purified --name nim-digits \
        --summary outputs/demo/summary.json               # prints the card of any model directory

A `card.yaml` says where the facts are, and nothing else; paths are relative to the repository's root:

    title: NIM-MAE on handwritten digits
    data: {name: scikit-learn digits, id: null, split: test}     # id: of the data set on the Hub, if it is there
    recipes: {Pre-training: scripts/recipes/digits/pretrain_nim_mae.yaml, Attack: scripts/recipes/digits/attack.yaml}
                                                                 # each with its overrides behind it, as on the command line
    summaries: [results/digits/summary.json]                     # of run_attack.py
    model: purified                                              # what the summaries call this model
    sigma: 75                                                    # optional: which of its sigmas, where there are several
    certificates: [results/digits/certified.json]                # optional: of run_certify.py
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

import modeling_nim
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_text
from modeling_nim.runs.recipe import load_recipe
from recipes.studies import PAPER_COLUMNS, STUDIES, TABLE_1


ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "model_cards" / "TEMPLATE.md"
KINDS = {
    "NIMForPreTraining": "denoiser",
    "NIMSimMIMForPreTraining": "denoiser",
    "NIMForImageClassification": "classifier",
    "NIMSimMIMForImageClassification": "classifier",
    "NIMPurifiedImageClassification": "purified",
}
PIPELINE_TAGS = {
    "denoiser": "image-feature-extraction",
    "classifier": "image-classification",
    "purified": "image-classification",
}
TAGS = ["vision", "noisy-image-modeling", "adversarial-robustness"]
SCRIPTS = {
    "pretrain": "run_pretrain.py",
    "finetune": "run_finetune.py",
    "attack": "run_attack.py",
    "certify": "run_certify.py",
}
# Sections of a recipe that say how a run was executed, not what was learnt.
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
    paper_systems: list[str] = field(default_factory=list)
    license: str = "apache-2.0"


def render_card(name: str, facts: CardFacts, config: PreTrainedConfig, root: Path) -> str:
    """The text of a card.

    Args:
        name: of the repository, such as "org/nim-digits" or "nim-digits".
        root: what the paths in `facts` are relative to.

    Raises:
        FileNotFoundError, ValueError: a recipe or summary is missing, or a summary does not know `facts.model`.
    """
    kind = KINDS[_architecture(config)]
    summaries = [_read_summary(root / path) for path in facts.summaries]
    certificates = [_read_summary(root / path) for path in facts.certificates]
    if summaries and facts.model is None and kind != "denoiser":
        raise ValueError(f"card {name!r}: say with 'model' which rows of {facts.summaries[0]} are this model's")
    rows = [row for summary in summaries for row in summary["rows"]]
    own = [row for row in rows if is_own(row, facts)]
    if facts.model is not None and not own:
        known = sorted({row["model"] for row in rows})
        raise ValueError(f"card {name!r}: no row is of model {facts.model!r} at sigma {facts.sigma}; models: {known}")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    body = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=facts.title,
        kind=kind,
        summary_line=_summary_line(kind, config, facts),
        sources=[*(_recipe_path(line) for line in facts.recipes.values()), *facts.summaries, *facts.certificates],
        facts=_config_facts(kind, config),
        usage=_usage(kind, name, config),
        stages=[
            {"title": title, "recipe": line, "settings": _stage_settings(root, line)}
            for title, line in facts.recipes.items()
            if not Path(_recipe_path(line)).name.startswith(("attack", "certify"))
        ],
        rows=[_table_row(row, facts) for row in rows],
        rows_have_draws=any(row.get("num_draws", 1) > 1 for row in rows),
        results_line=_results_line(facts, kind),
        provenance=[line for summary in [*summaries, *certificates] for line in _provenance(summary["provenance"])],
        alarms=[
            f"{alarm['alarm'].replace('_', ' ')} ({alarm['where']}): {alarm['message']}"
            for summary in summaries
            for alarm in summary.get("alarms", [])
        ],
        certified_rows=[_certified_row(row) for summary in certificates for row in summary["rows"]],
        paper_rows=_paper_rows(facts.paper_systems),
        limits=_limits(kind, config, own),
        reproduce=_reproduce(facts, root),
    )
    while "\n\n\n" in body:
        body = body.replace("\n\n\n", "\n\n")
    return f"---\n{_metadata(name, facts, kind, own).to_yaml()}\n---\n\n{body.strip()}\n"


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

    `model` may be left out where the summary's rows say by themselves which one is meant: one model, or a hash that fits.
    """
    recipes = {}
    for folder in (directory, directory.parent):  # a composed model lies inside the classifier's directory
        if (folder / "recipe.yaml").is_file():
            recipes["Training"] = shlex.quote(str(folder / "recipe.yaml"))
            break
    data = DataFacts("unknown data")
    if recipes:
        section = yaml.safe_load(Path(_recipe_path(recipes["Training"])).read_text(encoding="utf-8")).get("data", {})
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
            facts.model = _own_name(_read_summary(summary), directory)
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


def _architecture(config: PreTrainedConfig) -> str:
    name = (config.architectures or ["none"])[0]
    if name not in KINDS:
        raise ValueError(f"no card is known for the architecture {name!r}; known: {', '.join(KINDS)}")
    return name


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there are no results {path}: make them with scripts/run_attack.py or run_certify.py")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no summary.json of run_attack.py or run_certify.py: {error}") from None


def is_own(row: dict[str, Any], facts: CardFacts) -> bool:
    return row["model"] == facts.model and (facts.sigma is None or row["sigma"] == facts.sigma)


# ---- what the config says --------------------------------------------------------------------------------------------


def _summary_line(kind: str, config: PreTrainedConfig, facts: CardFacts) -> str:
    if kind == "purified":
        return (
            f"An image classifier ({len(config.id2label)} classes, {facts.data.name}) that defends itself: each image gets "
            f"Gaussian noise (sigma {_number(config.sigma)} on 0..255), a pre-trained denoiser removes it, and the classifier "
            "sees the result. Method: noisy image modeling (You, Liu, Xu 2023)."
        )
    if kind == "classifier":
        return (
            f"The classifier ({len(config.id2label)} classes, {facts.data.name}) of a noisy-image-modeling defence (You, Liu, "
            "Xu 2023), without its purifier."
        )
    task = "denoise images" if config.degradation == "noise" else "fill in masked patches"
    return f"A vision transformer pre-trained on {facts.data.name} to {task} (noisy image modeling; You, Liu, Xu 2023)."


def _config_facts(kind: str, config: PreTrainedConfig) -> list[tuple[str, str]]:
    parts = [("model", config)]
    if kind == "purified":
        parts = [("purifier", config.purifier_config), ("classifier", config.classifier_config)]
    facts = [("class", f"`{_architecture(config)}`"), ("parameters", f"{_num_parameters(config):,}")]
    for name, part in parts:
        size = getattr(part, "image_size", None)
        sizes = f"width {part.hidden_size}, depth {part.num_hidden_layers}" if hasattr(part, "hidden_size") else ""
        patch = f", patch {part.patch_size}" if hasattr(part, "patch_size") else ""
        facts.append((name, f"`{part.model_type}`: {size}x{size} images{patch}, {sizes}"))
    denoiser = config.purifier_config if kind == "purified" else config
    if kind != "classifier":
        facts.append(("degradation it was trained on", _degradation(denoiser)))
        facts.append(("patch statistics", _patch_statistics(denoiser)))
    if kind == "purified":
        facts.append(("sigma of the defence", f"{_number(config.sigma)} of 255"))
        facts.append(("votes (noise draws per answer)", str(config.num_votes)))
    return facts


def _num_parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = getattr(modeling_nim, _architecture(config))(config)
    return sum(parameter.numel() for parameter in model.parameters())


def _degradation(config: PreTrainedConfig) -> str:
    if config.degradation == "mask":
        return f"mask, ratio {config.mask_ratio}"
    return f"Gaussian noise, sigma ~ {config.sigma} on 0..255"


def _patch_statistics(config: PreTrainedConfig) -> str:
    if not getattr(config, "norm_pix_loss", False):
        return "none (predicts pixels)"
    return {"input": "of the input, as in the authors' code", "noisy": "of the noisy image"}[config.patch_statistics]


def _usage(kind: str, name: str, config: PreTrainedConfig) -> str:
    repository = name if "/" in name else f"model_cards/{name}"
    if kind == "denoiser":
        arguments = "pixel_values, sigma=30" if config.degradation == "noise" else "pixel_values"
        return "\n".join(
            [
                "from PIL import Image",
                "from transformers import AutoImageProcessor, AutoModelForPreTraining",
                "",
                f'model = AutoModelForPreTraining.from_pretrained("{repository}", trust_remote_code=True)',
                f'processor = AutoImageProcessor.from_pretrained("{repository}")',
                'pixel_values = processor(Image.open("image.png"), return_tensors="pt")["pixel_values"]',
                f"purified = model.purify({arguments})  # (1, 3, {config.image_size}, {config.image_size}), normalised",
            ]
        )
    lines = [
        "from transformers import pipeline",
        "",
        f'pipe = pipeline("image-classification", "{repository}", trust_remote_code=True)',
    ]
    if kind == "classifier":
        return "\n".join([*lines, 'pipe("image.png")'])
    sigma = _number(config.sigma) if isinstance(config.sigma, (int, float)) else repr(config.sigma)
    return "\n".join(
        [
            *lines,
            f'result = pipe("image.png", sigma={sigma}, num_votes=8, seed=0, return_purified=True)',
            'result["labels"]    # [{"label": ..., "score": ...}, ...], best first',
            'result["purified"]  # what the classifier saw, a PIL image of the input\'s size',
        ]
    )


# ---- what the recipes and records say --------------------------------------------------------------------------------


def _recipe_path(line: str) -> str:
    """The recipe of a line such as `recipe.yaml section.key=value ...`."""
    return shlex.split(line)[0]


def _stage_settings(root: Path, line: str) -> list[tuple[str, str]]:
    name, *overrides = shlex.split(line)
    if not (root / name).is_file():
        raise FileNotFoundError(f"there is no recipe {root / name}: correct the path in card.yaml")
    settings = dict(_leaves(yaml.safe_load((root / name).read_text(encoding="utf-8"))))
    for override in overrides:
        key, _, value = override.partition("=")
        settings[key] = yaml.safe_load(value)
    kept = [(key, value) for key, value in settings.items() if not key.startswith(EXECUTION_KEYS)]
    return [(key, f"`{value}`") for key, value in kept if value is not None and value != []]


def _leaves(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for key, value in values.items():
        leaves += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return leaves


def _percent(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.1f}" if interval is None else f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def _table_row(row: dict[str, Any], facts: CardFacts) -> dict[str, str]:
    name = f"**{row['model']}**" if is_own(row, facts) else row["model"]
    several = row.get("num_draws", 1) > 1
    return {
        "model": name,
        "sigma": "none" if row["sigma"] is None else _number(row["sigma"]),
        "attack": _attack_text(row),
        "threat_model": row["threat_model"].replace("_", " "),
        "epsilon": "0" if row["attack"] == "none" else _number(row["epsilon_255"]),
        "accuracy": _percent(row["accuracy"], row["ci95"]),
        "majority": _percent(row["accuracy_majority"], row["ci95_majority"]) if several else "",
        "worst": _percent(row["accuracy_worst_draw"], row["ci95_worst_draw"]) if several else "",
        "num_images": str(row["num_images"]),
    }


def _certified_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "model": row["model"],
        "sigma": _number(row["sigma"]),
        "radius": _number(row["radius_l2"]),
        "accuracy": _percent(row["certified_accuracy"], row["ci95"]),
        "abstained": f"{row['abstained']:.1f}",
        "num_images": str(row["num_images"]),
    }


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _attack_text(row: dict[str, Any]) -> str:
    if row["attack"] == "none":
        return "none"
    settings = row.get("settings", {})
    details = []
    if settings.get("norm", "linf") != "linf":
        details.append(settings["norm"])
    if "steps" in settings:
        details.append(f"{settings['steps']} steps")
    if "alpha_255" in settings:
        details.append(f"alpha {_number(settings['alpha_255'])}")
    if settings.get("eot_samples", 1) > 1:
        details.append(f"EOT {settings['eot_samples']}")
    if settings.get("restarts", 1) > 1:
        details.append(f"{settings['restarts']} restarts")
    if "queries" in settings:
        details.append(f"{settings['queries']} queries")
    return row["attack"] + (f" ({', '.join(details)})" if details else "")


def _results_line(facts: CardFacts, kind: str) -> str:
    marked = " This model's rows are in bold." if facts.model is not None and kind != "denoiser" else ""
    return f"Accuracy on {facts.data.name}, split `{facts.data.split}`.{marked}"


def _paper_rows(systems: Sequence[str]) -> list[dict[str, str]]:
    """Rows of the paper's Table 1 for the systems named, from the file that also `reports/paper_tables.py` reads."""
    known = [row[0] for row in TABLE_1]
    for system in systems:
        if system not in known:
            raise ValueError(f"the paper's Table 1 has no system {system!r}; known: {', '.join(sorted(known))}")
    return [
        {"system": system, "defense": text}
        | {column: f"{value:.2f}" for column, value in zip(PAPER_COLUMNS, numbers, strict=True)}
        for system, defense, bare, defended in TABLE_1
        if system in systems
        for text, numbers in (("none", bare), (defense, defended))
    ]


def _provenance(provenance: dict[str, Any]) -> list[str]:
    """Where the numbers come from, one line per fact; nested values as compact JSON."""
    # run_attack.py writes a hash and more for each model, run_certify.py the hash alone
    models = {
        name: model["hash"] if isinstance(model, dict) else model
        for name, model in provenance.get("models", {}).items()
    }
    hashes = [f"{name} `{hash[:12]}`" for name, hash in models.items()]
    lines = [f"weights (start of their SHA-256): {', '.join(hashes)}"] if hashes else []
    for key, label in (
        ("records_sha256", "records (SHA-256)"),
        ("data", "data"),
        ("protocol", "protocol"),
        ("seeds", "seeds"),
        ("seed", "seed"),
        ("num_draws", "evaluation draws per random decision"),
        ("device", "device"),
        ("versions", "versions"),
    ):
        value = provenance.get(key)
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            lines.append(f"{label}: `{text}`")
    return lines


def _limits(kind: str, config: PreTrainedConfig, own: list[dict[str, Any]]) -> list[str]:
    limits = []
    # The upper bound of an attacker who knows the draw is no deployed threat; the limit is what can be met.
    attacked = [row for row in own if row["attack"] != "none" and row["threat_model"] != "white_box_known_draw"]
    for epsilon in sorted({row["epsilon_255"] for row in attacked if row["epsilon_255"] > 0}):
        tried = [row for row in attacked if row["epsilon_255"] == epsilon]
        # The few images of a sweep over settings are no match for the attacks on all images.
        enough = max(row["num_images"] for row in tried) / 4
        row = min((row for row in tried if row["num_images"] >= enough), key=lambda row: row["accuracy"])
        limits.append(
            f"At eps {_number(epsilon)}/255 the strongest attack made here ({_attack_text(row)}, "
            f"{row['threat_model'].replace('_', ' ')}) leaves {_percent(row['accuracy'], row['ci95'])}%, from "
            f"{row['control_accuracy']:.1f}% without an attack on the same {row['num_images']} images."
        )
    if kind == "purified":
        if attacked:
            limits.append(
                "A stronger attack than those listed can only lower these numbers; none of them is a guarantee."
            )
        else:
            limits.append("No attack on this model is recorded here: nothing is known about its robustness.")
        denoiser = config.purifier_config
        if getattr(denoiser, "norm_pix_loss", False) and denoiser.patch_statistics == "input":
            limits.append(
                "The reconstruction takes each patch's mean and contrast from the input, un-noised image (as the authors' "
                "code does): a perturbation of patch means by-passes the noise, and no certificate can be given."
            )
        limits.append(
            "The defence costs clean accuracy and a second network per answer; averaging over votes costs more."
        )
        limits.append("Answers are random: two calls may differ, and an attacker may ask until one is wrong.")
    elif kind == "classifier":
        limits.append("Without its purifier this classifier is undefended; attacked images defeat it.")
    else:
        limits.append("It denoises images of its own input size only.")
        if getattr(config, "norm_pix_loss", False) and config.degradation == "mask":
            limits.append(
                "Hidden patches are de-normalised with statistics of the true patch, which needs the original."
            )
    return limits


def _reproduce(facts: CardFacts, root: Path) -> str:
    commands = []
    for line in facts.recipes.values():
        path = _recipe_path(line)
        script = next((script for stem, script in SCRIPTS.items() if Path(path).name.startswith(stem)), None)
        if script is None:  # a recipe that a run saved: the section that only one of the two scripts has tells which
            script = "run_finetune.py" if "init" in yaml.safe_load((root / path).read_text()) else "run_pretrain.py"
        commands.append(f"accelerate launch scripts/{script} {line}")
    if not commands:
        return "# no recipe is recorded with this model"
    return "\n".join(commands)


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
        pipeline_tag=PIPELINE_TAGS[kind],
        tags=TAGS,
        datasets=[facts.data.id] if facts.data.id else None,
        metrics=["accuracy", "robust_accuracy"] if own else None,
        model_name=name.split("/")[-1],
        eval_results=results or None,
    )


def metric_name(row: dict[str, Any]) -> str:
    if row["attack"] == "none":
        return "clean accuracy"
    threat = row["threat_model"].replace("_", " ")
    return f"{threat} accuracy, {_attack_text(row)}, eps {_number(row['epsilon_255'])}/255"


def metric_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """The attack, the defence's randomness and the interval: what the value means nothing without."""
    arguments = {key: row[key] for key in ("attack", "threat_model", "epsilon_255")}
    if row["sigma"] is not None:
        arguments["sigma_255"] = row["sigma"]
    kept = ("norm", "steps", "alpha_255", "eot_samples", "restarts", "queries")
    arguments |= {key: row["settings"][key] for key in kept if row.get("settings", {}).get(key) is not None}
    if "num_draws" in row:
        arguments["num_draws"] = row["num_draws"]
    return arguments | {"ci95": [round(bound, 2) for bound in row["ci95"]], "num_images": row["num_images"]}


# ---- files -----------------------------------------------------------------------------------------------------------


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
        named |= {ROOT / results for results in [*facts.summaries, *facts.certificates]}
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
