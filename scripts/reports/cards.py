"""Write the model cards from configurations, recipes and result records; never by hand.

    python scripts/reports/cards.py            # every model_cards/*/card.yaml -> README.md beside it
    python scripts/reports/cards.py --check    # writes nothing; exit code 1 if a card differs

A `card.yaml` says where the facts are, and nothing else: `CardFacts` has its keys. The model's own facts come from
`config.json` beside it, the sentences from `model_cards/TEMPLATE.md`.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)

import argparse
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

from hub_results import in_metadata
from modeling_nim import MODELS, NIMPurifiedImageClassification
from modeling_nim.families_nim import FAMILIES
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.recipe import dotted_keys, load_recipe, stack_recipes
from recipes.studies import TABLE_1
from reports.tables import Row, environment, keep_as_made, read_result


ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "model_cards" / "TEMPLATE.md"
KINDS = {
    NIMPurifiedImageClassification: "purified",
    **{family.classifier: "classifier" for family in FAMILIES},
    **{family.pretraining: "denoiser" for family in FAMILIES},
}
# By a key that no other recipe has; what has none of them is an attack's.
SCRIPTS = {"init": "run_finetune", "model": "run_pretrain", "radii": "run_certify"}
# Sections of a recipe that say how a run was executed, not what was learned.
EXECUTION_KEYS = ("output_dir", "execution", "checkpoints", "logging", "pictures", "reconstruction")


@dataclass
class DataFacts:
    name: str
    id: str | None = None  # of the data set on the Hub, if it is there
    split: str = "test"


@dataclass
class CardFacts:
    """The content of a card.yaml; paths are relative to the repository's root."""

    title: str
    data: DataFacts
    recipes: dict[str, str] = field(default_factory=dict)  # by title: files that stack, overrides behind them
    summaries: list[str] = field(default_factory=list)  # of run_attack.py
    model: str | None = None  # what the summaries call this model
    sigma: float | str | None = None  # which of its sigmas, if several
    certificates: list[str] = field(default_factory=list)  # of run_certify.py
    restorations: list[str] = field(default_factory=list)  # of run_attack.py's section reconstruction
    paper_systems: list[str] = field(default_factory=list)  # rows of Table 1, shown as the paper's
    license: str = "apache-2.0"

    def __post_init__(self):
        known = {row[0] for row in TABLE_1}
        if unknown := set(self.paper_systems) - known:
            raise ValueError(f"the paper's Table 1 has no system {min(unknown)!r}; known: {', '.join(sorted(known))}")

    def is_own(self, row: Row) -> bool:
        """Whether a row of the summaries is this model's."""
        return row["model"] == self.model and self.sigma in (None, row["sigma"])


def own_results(facts: CardFacts, root: Path) -> list[EvalResult]:
    """What the summaries of a card say of its own model, in the Hub's format; paths are relative to `root`."""
    rows = [row for path in facts.summaries for row in read_result(root / path)["rows"] if facts.is_own(row)]
    return [in_metadata(row, facts.data.name, facts.data.id, facts.data.split) for row in rows]


def render_card(name: str, facts: CardFacts, config: PreTrainedConfig, root: Path) -> str:
    """The text of a card.

    Args:
        name: of the repository, such as "org/nim-digits" or "nim-digits".
        root: what the paths in `facts` are relative to.

    Raises:
        FileNotFoundError, ValueError: a recipe or summary is missing, or a summary does not know `facts.model`.
    """
    architecture = (config.architectures or ["none"])[0]
    model_class = MODELS.get(architecture)
    if model_class not in KINDS:
        raise ValueError(f"no card is known for the architecture {architecture!r}; it is no model of this package")
    kind = KINDS[model_class]
    summaries = [read_result(root / path) for path in facts.summaries]
    if summaries and facts.model is None and kind != "denoiser":
        raise ValueError(f"card {name!r}: say with 'model' which rows of {facts.summaries[0]} are this model's")
    rows = [row for summary in summaries for row in summary["rows"]]
    own = [row for row in rows if facts.is_own(row)]
    if facts.model is not None and not own:
        known = sorted({row["model"] for row in rows})
        raise ValueError(f"card {name!r}: no row is of model {facts.model!r} at sigma {facts.sigma}; models: {known}")
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in model_class(config).parameters())
    template = environment(TEMPLATE.parent).get_template(TEMPLATE.name)
    body = template.render(
        facts=facts,
        kind=kind,
        config=config,
        architecture=architecture,
        num_parameters=num_parameters,
        repository=name if "/" in name else f"model_cards/{name}",
        stages={title: stage(root, line) for title, line in facts.recipes.items()},
        rows=rows,
        own=own,
        summaries=summaries,
        certificates=[read_result(root / path) for path in facts.certificates],
        restorations=[read_result(root / path) for path in facts.restorations],
        strongest=strongest_attacks(own),
        paper_table=TABLE_1,
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{metadata(name, facts, kind, own_results(facts, root)).to_yaml()}\n---\n\n{body}\n"


def strongest_attacks(own: list[Row]) -> list[Row]:
    """Of each budget the row with the lowest accuracy."""
    # An attacker who knows the draw gives an upper bound, which no deployed defense meets; it is left out.
    attacked = [row for row in own if row["attack"] != "none" and row["threat_model"] != "white_box_known_draw"]
    strongest = []
    for epsilon_255 in sorted({row["epsilon_255"] for row in attacked if row["epsilon_255"] > 0}):
        tried = [row for row in attacked if row["epsilon_255"] == epsilon_255]
        # Sweeps over settings attack few images; they are not compared with attacks on all images.
        enough = max(row["num_images"] for row in tried) / 4
        strongest.append(min((row for row in tried if row["num_images"] >= enough), key=lambda row: row["accuracy"]))
    return strongest


def stage(root: Path, line: str) -> dict[str, Any]:
    """The files, the command and the settings of a recipe's line: by dotted key, and none for an evaluation."""
    words = shlex.split(line)
    files = [word for word in words if "=" not in word or (root / word).is_file()]
    recipe = stack_recipes([root / file for file in files], [word for word in words if word not in files])
    script = next((script for key, script in SCRIPTS.items() if key in recipe), "run_attack")
    settings = {
        key: value
        for key, value in dotted_keys(recipe if script in ("run_pretrain", "run_finetune") else {}).items()
        if not key.startswith(EXECUTION_KEYS) and value is not None and value != []
    }
    return {"files": files, "command": f"python scripts/launch.py scripts/{script}.py {line}", "settings": settings}


def metadata(name: str, facts: CardFacts, kind: str, results: list[EvalResult]) -> ModelCardData:
    """What the Hub reads of a card."""
    return ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if kind == "denoiser" else "image-classification",
        tags=["vision", "noisy-image-modeling", "adversarial-robustness"],
        datasets=[facts.data.id] if facts.data.id else None,
        metrics=["accuracy", "robust_accuracy"] if results else None,
        model_name=name.split("/")[-1],
        eval_results=results or None,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a card differs")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    texts: dict[Path, str | None] = {}
    for path in sorted((ROOT / "model_cards").glob("*/card.yaml")):
        folder, facts = path.parent, load_recipe(path, CardFacts)
        texts[folder / "README.md"] = render_card(folder.name, facts, AutoConfig.from_pretrained(folder), ROOT)
    return keep_as_made(texts, arguments.check)


if __name__ == "__main__":
    run_main(main)
