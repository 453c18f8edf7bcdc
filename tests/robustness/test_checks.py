"""Planted mistakes of users: each must stop the run or give an alarm."""

import json
import shutil
from pathlib import Path

import pytest
import reference
import torch
import yaml
from accelerate import Accelerator
from robustness_targets import NoisyTarget, QuietTarget, images, names
from safetensors.torch import load_file, save_file

from modeling_nim.robustness.checks import inspect_target
from modeling_nim.robustness.images import TensorImages
from modeling_nim.robustness.protocols import Protocol
from modeling_nim.robustness.recipes import AttackRecipe, AttackRunRecipe
from modeling_nim.robustness.run import AttackRun
from modeling_nim.runs.recipe import load_recipe


RELEASED = Path(__file__).parents[2] / "model_cards" / "nim-digits"


@pytest.fixture
def released(tmp_path):
    return Path(shutil.copytree(RELEASED, tmp_path / "model"))


def summary_of(model_dir, tmp_path, capsys, attacks=None, num_images=40, **model):
    recipe = {
        "models": [{"name": "released", "path": str(model_dir), "sigma": 75} | model],
        "attacks": attacks or [{"attack": "fgsm", "epsilon_255": [0.5]}],
        "num_images": num_images,
        "num_draws": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    reference.load_script("run_attack").main([str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path / 'out'}"])
    return json.loads((tmp_path / "out/summary.json").read_text()), capsys.readouterr().out


def alarms(summary):
    return {alarm["alarm"] for alarm in summary["alarms"]}


def answer_four_classes_alone(model_dir):
    weights = load_file(model_dir / "model.safetensors")
    weights["classifier.classifier.bias"][:4] += 100  # the other six are never answered
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_released_model_rings_nothing(released, tmp_path, capsys):
    summary, _ = summary_of(released, tmp_path, capsys)
    assert alarms(summary) == set() and summary["rows"][0]["accuracy"] > 90


def test_a_rolled_head_rings_before_the_first_attack(released, tmp_path, capsys):
    weights = load_file(released / "model.safetensors")
    for key in ("classifier.classifier.weight", "classifier.classifier.bias"):
        weights[key] = weights[key].roll(1, dims=0)
    save_file(weights, released / "model.safetensors", {"format": "pt"})
    summary, printed = summary_of(released, tmp_path, capsys)
    assert {"no_better_than_chance", "below_what_is_stated"} <= alarms(summary)
    assert printed.index("ALARM no_better_than_chance") < printed.index("threat model")  # before the table
    message = next(a["message"] for a in summary["alarms"] if a["alarm"] == "below_what_is_stated")
    assert "README.md on scikit-learn digits states 97.9%" in message


def test_a_model_far_below_its_card_rings_above_chance_too(released, tmp_path, capsys):
    answer_four_classes_alone(released)
    summary, _ = summary_of(released, tmp_path, capsys, num_images=60)
    assert "below_what_is_stated" in alarms(summary)


def test_a_summary_beside_the_weights_states_an_accuracy_too(released, tmp_path, capsys):
    (released / "README.md").unlink()
    answer_four_classes_alone(released)
    high, _ = summary_of(released, tmp_path, capsys)
    assert alarms(high) == set()
    shutil.rmtree(tmp_path / "out")
    high["rows"][0] |= {"accuracy": 97.9, "ci95": [95.9, 99.0]}
    (released / "summary.json").write_text(json.dumps(high))
    assert "below_what_is_stated" in alarms(summary_of(released, tmp_path, capsys)[0])
    shutil.rmtree(tmp_path / "out")
    high["provenance"]["models"]["released @ sigma 75"]["hash"] = "of other weights"
    (released / "summary.json").write_text(json.dumps(high))
    assert alarms(summary_of(released, tmp_path, capsys)[0]) == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean .* its processor .0.5"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std .* its processor .0.5"),
        ({"do_normalize": False}, "its processor does not normalize"),
        ({"do_rescale": False}, "leaves pixels on 0..255"),
        ({"rescale_factor": 1 / 127.5}, "scales pixels by 0.00784"),
        ({"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}, "image_size 32.*gives 28x28"),
        ({"size": {"height": 16_000, "width": 16_000}}, "image_size 32.*gives 16000x16000"),
        ({"size": {"height": 32, "width": 40}}, "image_size 32.*gives 32x40"),
    ],
)
def test_a_processor_that_contradicts_its_model_stops_the_run(released, tmp_path, capsys, changes, message):
    edit_json(released / "preprocessor_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        summary_of(released, tmp_path, capsys)
    assert not (tmp_path / "out").exists()


class WrongGradients(QuietTarget):
    """Right answers, and gradients that point the other way."""

    def logits(self, images_01, draw):
        return super().logits(2 * images_01.detach() - images_01, draw)


def finish(run, output_dir):
    records = run.open(AttackRunRecipe(str(output_dir)), 64, Accelerator())
    for _ in run.rounds(records):
        pass
    summary = run.summary(records)
    records.close()
    return summary


def run_alarms(target, attacks, tmp_path, epsilon_255=8.0, number=60):
    x = images(number, 0.2, 0.8)
    labels = target.logits(x, target.draw(range(number))).argmax(1)
    plan = Protocol([AttackRecipe(kind, epsilon_255=[epsilon_255]) for kind in attacks], None, [0], 4)
    run = AttackRun([target], TensorImages(x, labels, names(number)), plan, micro_batch=64)
    return run, finish(run, tmp_path / "out")


def test_an_attack_that_takes_nothing_rings_without_another_to_compare_with(tmp_path):
    _, summary = run_alarms(WrongGradients(), ["pgd"], tmp_path)
    assert {alarm["alarm"] for alarm in summary.alarms} == {"attack_without_effect"}


def test_a_small_budget_that_takes_nothing_rings_nothing(tmp_path):
    _, summary = run_alarms(QuietTarget(), ["pgd"], tmp_path, epsilon_255=0.01)
    assert not summary.alarms


class StuckTarget(NoisyTarget):
    """Declared random; its draws are all the same."""

    def draw(self, seeds, image_shape=(3, 8, 8)):
        return super().draw([0] * len(seeds), image_shape)


class ImageSeededTarget(QuietTarget):
    """Declared deterministic; its noise is seeded by the image."""

    def logits(self, images_01, draw):
        rows = []
        for row in images_01:
            seed = int(row.double().sum().detach().view(torch.int64)) % 2**31
            rows.append(0.3 * torch.randn(row.shape, generator=torch.Generator().manual_seed(seed)))
        return super().logits(images_01 + torch.stack(rows), {})


def test_draws_that_never_differ_and_noise_seeded_by_the_image_ring(tmp_path):
    run, summary = run_alarms(StuckTarget(), ["fgsm"], tmp_path / "a")
    assert [alarm["alarm"] for alarm in run.warnings] == ["draws_never_differ"]
    assert "draws_never_differ" in {alarm["alarm"] for alarm in summary.alarms}
    run, summary = run_alarms(ImageSeededTarget(), ["fgsm"], tmp_path / "b")
    assert "depends_on_the_last_bit" in {alarm["alarm"] for alarm in run.warnings}
    assert "depends_on_the_last_bit" in {alarm["alarm"] for alarm in summary.alarms}
    assert inspect_target(ImageSeededTarget(), images(4))["repeatable"]  # which is why the last bit is asked for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_01": 255 * images(4)}, r"values in \[.*\]: attacks move in \[0, 1\]"),
        ({"images_01": images(4) - 0.5}, "values in"),
        ({"images_01": images(4).masked_fill(images(4) < 0.1, float("nan"))}, "values in"),
        ({"images_01": (255 * images(4)).to(torch.uint8)}, "float tensor"),
        ({"image_ids": ["a", "b"]}, "image_ids names 2 images, there are 4"),
        ({"image_ids": ["a", "b", "b", "c"]}, "image_ids names 'b' more than once"),
        ({"labels": torch.tensor([0, 1, 2, 4])}, "labels holds 4, which is no class: the model tells 4"),
        ({"labels": torch.tensor([0, -1, 2, 3])}, "labels holds -1"),
        ({"labels": torch.tensor([0, 1])}, "labels must be 4 class indices"),
        ({"labels": torch.rand(4)}, "labels must be 4 class indices"),
    ],
)
def test_images_labels_and_ids_that_cannot_be_are_refused(arguments, message):
    whole = {"images_01": images(4), "labels": torch.arange(4), "image_ids": names(4), "num_classes": 4} | arguments
    with pytest.raises(ValueError, match=message):
        TensorImages(**whole)


@pytest.mark.parametrize("value", ["alpha_ratio=0", "alpha_ratio=-1", "alpha_ratio=.nan", "epsilon_255=[.inf]"])
def test_numbers_that_mean_nothing_are_refused_when_the_recipe_is_read(tmp_path, value):
    (tmp_path / "recipe.yaml").write_text("output_dir: x\nattacks: [{attack: pgd}]\n")
    with pytest.raises(ValueError, match="must be (a finite number|above 0, got)"):
        load_recipe(tmp_path / "recipe.yaml", AttackRunRecipe, [f"attacks.0.{value}"])
