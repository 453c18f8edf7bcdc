"""Model cards: made from config, recipes and records, valid for the Hub, and the same each time."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from stub_hub import card_errors
from transformers import AutoConfig, AutoModelForImageClassification, pipeline

import modeling_nim
import push_to_hub
from hub_results import metric_arguments
from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
)
from modeling_nim.robustness.attacks import ATTACKS
from modeling_nim.robustness.loading import model_hash
from modeling_nim.robustness.recipes import AttackRecipe, attack_text
from reports import cards


ROOT = Path(__file__).parents[2]
ENCODER = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def card_of_directory(directory, name, summary=None, model=None, sigma=None):
    """What `push_to_hub.py` writes of a model directory; of a model at several sigmas, the card of one."""
    facts = dataclasses.replace(push_to_hub.facts_of_directory(directory, name, summary, model), sigma=sigma)
    return cards.render_card(name, facts, AutoConfig.from_pretrained(directory), root=Path())


def row(model, sigma, attack, threat_model, epsilon_255, accuracy, **settings):
    interval = [accuracy - 5, min(accuracy + 4, 100.0)]
    return {
        "model": model,
        "sigma": sigma,
        "attack": attack,
        "name": attack,
        "threat_model": threat_model,
        "epsilon_255": epsilon_255,
        "accuracy": accuracy,
        "ci95": interval,
        "num_images": 360,
        "control_accuracy": 95.6 if sigma else 96.7,
        "seconds": 1.0,
        "accuracy_majority": accuracy,
        "ci95_majority": interval,
        "accuracy_worst_draw": accuracy,
        "ci95_worst_draw": interval,
        "num_draws": 1 if sigma is None else 5,
        "settings": settings,
    }


PGD = {"norm": "linf", "steps": 10, "alpha_255": 2.0, "eot_samples": 1, "restarts": 1}
ROWS = [
    row("original", None, "none", "clean", 0, 96.7),
    row("original", None, "pgd", "white_box", 8, 1.4, **PGD),
    row("purified", 75, "none", "clean", 0, 95.6),
    row("purified", 75, "pgd", "white_box", 8, 76.4, **PGD),
    row("purified", 75, "pgd", "gray_box", 8, 88.1, **PGD),
    row("purified", 75, "pgd", "white_box_known_draw", 8, 11.1, **PGD),
    row("purified", 75, "square", "black_box", 8, 80.2, norm="linf", queries=1000, eot_samples=1),
    row("purified", 30, "none", "clean", 0, 93.3),
]


@pytest.fixture
def world(tmp_path):
    """A model directory and a summary, as `run_finetune.py` and `run_attack.py` leave them behind."""
    torch.manual_seed(0)
    purifier = NIMForPreTraining(NIMConfig(**ENCODER, **DECODER))
    classifier = NIMForImageClassification(NIMClassifierConfig(**ENCODER, num_labels=10))
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=75)
    model.save_pretrained(tmp_path / "finetune" / "purified")
    purifier.save_pretrained(tmp_path / "pretrain")
    classifier.save_pretrained(tmp_path / "finetune")
    recipe = {"seed": 7, "output_dir": "o", "init": "i", "data": {"source": "digits"}, "optimization": {"steps": 660}}
    (tmp_path / "finetune" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    provenance = {
        "data": "digits 0123",
        "models": {"purified @ sigma 75": {"hash": "0123456789abcdef"}},
        "device": "cpu",
        "versions": {"torch": "2"},
        "seeds": [0],
        "num_draws": 5,
    }
    alarms = [{"alarm": "too_few_images", "where": "pgd", "message": "360 images do not rank 2 models"}]
    (tmp_path / "summary.json").write_text(json.dumps({"rows": ROWS, "alarms": alarms, "provenance": provenance}))
    return tmp_path


@pytest.fixture
def purified_card(world):
    directory, summary = world / "finetune" / "purified", world / "summary.json"
    return card_of_directory(directory, "org/nim-digits", summary, model="purified", sigma=75)


def test_metadata_is_valid_and_keeps_every_attack_apart(purified_card):
    assert card_errors(purified_card) == []
    card = ModelCard(purified_card)
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "transformers"
    assert "adversarial-robustness" in card.data.tags
    results = card.data.eval_results
    assert [(result.metric_type, result.metric_value) for result in results] == [
        ("accuracy", 95.6),
        ("robust_accuracy", 76.4),
        ("robust_accuracy", 88.1),
        ("robust_accuracy", 11.1),
        ("robust_accuracy", 80.2),
    ]
    white_box = results[1].metric_args
    expected = {"attack": "pgd", "threat_model": "white_box", "epsilon_255": 8, "steps": 10, "alpha_255": 2.0}
    assert expected.items() <= white_box.items()
    assert (white_box["sigma_255"], white_box["num_draws"], white_box["num_images"]) == (75, 5, 360)
    assert white_box["ci95"] == [71.4, 80.4]
    assert len({json.dumps(result.metric_args) for result in results}) == len(results)


def test_the_table_has_every_row_with_its_interval(purified_card):
    assert "| **purified** | 75 | pgd (10 steps, alpha 2) | white box | 8 | 76.4 [71.4, 80.4] |" in purified_card
    assert "| original | none | pgd (10 steps, alpha 2) | white box | 8 | 1.4 [" in purified_card
    assert "| purified | 30 | none | clean | 0 | 93.3 [" in purified_card  # another sigma is not this model's
    assert "square (1000 queries)" in purified_card
    assert "data: `digits 0123`" in purified_card
    assert "weights (start of their SHA-256): purified @ sigma 75 `0123456789ab`" in purified_card
    assert "too few images (pgd): 360 images do not rank 2 models" in purified_card


def test_limits_name_the_strongest_attack_an_attacker_can_make(purified_card):
    limits = purified_card.split("## Limits")[1]
    strongest = (
        "(pgd (10 steps, alpha 2), white box) leaves 76.4 [71.4, 80.4]%, from 95.6% without an attack on the same 360"
    )
    assert strongest in limits
    assert "by-passes the noise" in limits  # patch_statistics="input"
    assert "11.1" not in limits.split("## How to reproduce")[0]


def test_training_and_commands_come_from_the_recipe(purified_card, world):
    assert "| optimization.steps | `660` |" in purified_card
    assert "| seed | `7` |" in purified_card
    assert "output_dir" not in purified_card
    assert f"python scripts/launch.py scripts/run_finetune.py {world / 'finetune' / 'recipe.yaml'}" in purified_card


def test_of_recipes_that_stack_the_settings_are_those_of_the_last(repository, world):
    folder, call = repository
    changes = {"optimization": {"steps": 900, "epochs": None}, "images": "denoised"}
    (world / "finetune" / "longer=900.yaml").write_text(yaml.safe_dump(changes))
    line = "finetune/recipe.yaml finetune/longer=900.yaml seed=8"
    card = yaml.safe_load((folder / "card.yaml").read_text())
    (folder / "card.yaml").write_text(yaml.safe_dump(card | {"recipes": {"Fine-tuning": line}}))
    assert call() == 0
    text = (folder / "README.md").read_text()
    settings = text.partition("| setting | value |\n|---|---|\n")[2].partition("\n\n")[0]
    assert settings.splitlines() == [
        "| data.source | `digits` |",
        "| init | `i` |",
        "| optimization.steps | `900` |",
        "| seed | `8` |",
        "| images | `denoised` |",
    ]
    assert f"python scripts/launch.py scripts/run_finetune.py {line}\n" in text
    assert "from finetune/recipe.yaml, finetune/longer=900.yaml, summary.json." in text


def test_parameters_are_counted(purified_card, world):
    model = modeling_nim.NIMPurifiedImageClassification.from_pretrained(world / "finetune" / "purified")
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in purified_card


def test_denoisers_and_bare_classifiers_say_what_they_are(world):
    denoiser = card_of_directory(world / "pretrain", "org/nim-mae")
    assert card_errors(denoiser) == []
    assert "AutoModelForPreTraining" in denoiser and "It classifies nothing" in denoiser
    assert "## Threat model" not in denoiser
    classifier = card_of_directory(world / "finetune", "org/nim-classifier")
    assert "no defense against adversarial images" in classifier
    assert "No results are recorded" in classifier


def test_unclear_and_missing_results_are_named(world):
    directory = world / "finetune" / "purified"
    with pytest.raises(ValueError, match=r"results of \['original', 'purified'\]: say with --model"):
        card_of_directory(directory, "org/x", world / "summary.json")
    with pytest.raises(ValueError, match="no row is of model 'purfied'"):
        card_of_directory(directory, "org/x", world / "summary.json", model="purfied")
    with pytest.raises(FileNotFoundError, match="make them with scripts/run_attack.py"):
        card_of_directory(directory, "org/x", world / "absent.json", model="purified")


@pytest.fixture
def repository(world, monkeypatch):
    """A repository with one card.yaml, and `call(*arguments) -> exit code`."""
    monkeypatch.setattr(cards, "ROOT", world)
    folder = world / "model_cards" / "nim-digits"
    NIMPurifiedImageClassification.from_pretrained(world / "finetune" / "purified").save_pretrained(folder)
    card = {
        "title": "NIM-MAE on handwritten digits",
        "data": {"name": "scikit-learn digits"},
        "recipes": {"Fine-tuning": "finetune/recipe.yaml"},
        "summaries": ["summary.json"],
        "model": "purified",
        "sigma": 75,
        "paper_systems": ["NIM-MAE"],
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cards.py", *arguments])
        with pytest.raises(SystemExit) as exit_info:
            modeling_nim.runs.errors.run_main(cards.main)
        return exit_info.value.code or 0

    return folder, call


def test_cards_are_made_checked_and_stay_the_same(repository, world, capsys):
    folder, call = repository
    with open(folder / "card.yaml", "a") as file:
        file.write("certificates: [certified.json]\n")
    certified = {"model": "noisy", "sigma": 75, "radius_l2": 0.25, "certified_accuracy": 61.0, "ci95": [51.2, 70.0]}
    certified |= {"abstained": 4.0, "num_images": 100}
    (world / "certified.json").write_text(json.dumps({"rows": [certified], "provenance": {"device": "cpu"}}))
    assert call("--check") == 1
    assert not (folder / "README.md").exists()
    assert call() == 0
    text = (folder / "README.md").read_text()
    assert "**The paper's numbers, not this model's** (Table 1; ImageNet-1K" in text
    assert "| NIM-MAE | sigma 30 | 81.30 | 43.92 | 68.99 | 72.85 |" in text
    assert "| noisy | 75 | 0.25 | 61.0 [51.2, 70.0] | 4.0 | 100 |" in text
    assert call("--check") == 0
    (folder / "README.md").write_text(text.replace("76.4", "86.4"))
    capsys.readouterr()
    assert call("--check") == 1
    difference = capsys.readouterr().out
    assert "-| **purified**" in difference and "86.4" in difference
    assert call() == 0
    assert (folder / "README.md").read_text() == text


def test_an_unknown_key_in_a_card_is_named(repository, capsys):
    folder, call = repository
    with open(folder / "card.yaml", "a") as file:
        file.write("licence: mit\n")
    assert call() == 2
    assert "unknown recipe key 'licence' (did you mean 'license'?)" in capsys.readouterr().err


def test_the_cards_in_this_repository_are_as_their_records_make_them(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cards.py", "--check"])
    assert cards.main() == 0, capsys.readouterr().out


CARDS = {path.parent: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "model_cards").glob("*/card.yaml"))}
RESTORING = [folder for folder, card in CARDS.items() if card.get("restorations")]  # purifiers alone
RELEASED = [folder for folder, card in CARDS.items() if card.get("summaries") and folder not in RESTORING]


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_released_weights_are_those_that_the_numbers_belong_to(folder):
    card = CARDS[folder]
    measured = set()
    for path in card["summaries"]:
        for name, model in json.loads((ROOT / path).read_text())["provenance"]["models"].items():
            if name == card["model"] or name.startswith(f"{card['model']} @ "):
                measured.add(model["hash"])
    assert measured == {model_hash(AutoModelForImageClassification.from_pretrained(folder))}
    image = Image.effect_noise((40, 30), 60)
    assert len(pipeline("image-classification", str(folder))(image)) == 5


@pytest.mark.parametrize("folder", RESTORING, ids=lambda folder: folder.name)
def test_released_purifiers_are_those_that_the_numbers_belong_to(folder):
    results = [json.loads((ROOT / path).read_text()) for path in CARDS[folder]["restorations"]]
    measured = {result["provenance"]["models"][folder.name]["hash"] for result in results}
    assert measured == {model_hash(NIMForPreTraining.from_pretrained(folder))}


# The first test images of CIFAR-10, ten in a row, and their labels.
PHOTOGRAPHS = ROOT / "tests" / "fixtures" / "cifar10.png"
LABELS = "937097796545494270473725470803287359267941040354042414312127"


@pytest.mark.parametrize("name", ["nim-cifar10", "nim-cifar10-consistent"])
def test_released_models_of_photographs_classify_photographs(name):
    pipe = pipeline("image-classification", str(ROOT / "model_cards" / name))
    sheet = Image.open(PHOTOGRAPHS)
    images = [
        sheet.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32)) for row in range(6) for column in range(10)
    ]
    answers = pipe(images, seed=0, num_votes=8, top_k=1)
    predictions = [pipe.model.config.label2id[answer[0]["label"]] for answer in answers]
    right = [prediction == int(label) for prediction, label in zip(predictions, LABELS, strict=True)]
    assert sum(right) >= 27  # of 60; chance gives 6, the cards say more than half


@pytest.mark.parametrize("kind", [kind for kind in ATTACKS if kind != "torchattacks"])
def test_the_text_of_an_attack_tells_every_setting_that_its_row_of_the_table_uses(kind):
    others = {"norm": "l2", "steps": 7, "alpha_255": 1.0, "alpha_ratio": 0.5, "eot_samples": 3, "restarts": 2}
    others |= {"random_start": False, "targeted": True, "loss": "margin", "queries": 50, "patch_size": 4}
    needed = {"source": "m"} if kind == "transfer" else {}

    def made(settings):
        found = {"attack": kind, "threat_model": "white_box", "epsilon_255": 8, "settings": settings}
        found |= {"sigma": None, "ci95": [0, 1], "num_images": 1}
        return attack_text(found), str(metric_arguments(found))

    plain = made(AttackRecipe(kind, **needed).settings(8.0))
    for key in set(others) & set(ATTACKS[kind].settings):
        text, arguments = made(AttackRecipe(kind, **(needed | {key: others[key]})).settings(8.0))
        assert text != plain[0] and arguments != plain[1], f"{key} is not told: {text}"


def test_the_text_of_an_attack_in_words():
    settings = AttackRecipe("pgd", steps=20, eot_samples=5, restarts=2, norm="l2", random_start=False).settings(8.0)
    found = {"attack": "pgd", "settings": settings}
    assert attack_text(found) == "pgd (l2, 20 steps, alpha 2, EOT 5, 2 restarts, no random start)"
    theirs = AttackRecipe("torchattacks", torchattacks_class="PGD", steps=3, arguments={"eps": 0.1}).settings(8.0)
    assert "eps=0.1" in attack_text({"attack": "pgd", "settings": theirs})
    own = AttackRecipe("robustness_targets:corner_attack", steps=3).settings(8.0)
    assert attack_text({"attack": "corner_attack", "settings": own}) == "corner_attack (3 steps)"
