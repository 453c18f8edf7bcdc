"""attack, evaluate and certify on models, data and attacks of users."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import yaml
from datasets import Dataset
from PIL import Image
from robustness_targets import corner_attack
from torch.utils.data import DataLoader, TensorDataset

from modeling_nim import NIMPurifiedImageClassification
from modeling_nim.data import DataRecipe, evaluation_batch, load_source
from modeling_nim.image_processing import image_processor_for
from modeling_nim.robustness import AttackRecipe, as_target, attack, certify, evaluate
from modeling_nim.robustness.records import read_records


RELEASED = Path(__file__).parents[2] / "model_cards" / "nim-digits"


@pytest.fixture(scope="module")
def released():
    return NIMPurifiedImageClassification.from_pretrained(RELEASED)


@pytest.fixture(scope="module")
def digits(released):
    source = load_source(DataRecipe(source="digits"), "test")
    indices = range(24)
    images_01 = evaluation_batch(source, indices, image_processor_for(released.config))
    return images_01, torch.tensor([source.stored(i)[1] for i in indices]), [source.image_id(i) for i in indices]


def blur(images_01, generator):
    noise = torch.randn(images_01.shape, generator=generator)
    return torch.nn.functional.avg_pool2d(images_01 + 0.1 * noise, 3, 1, 1).clamp(0, 1)


def classify(images_01):
    return torch.stack([images_01.mean(dim=(1, 2, 3)) * k for k in range(10)], dim=1)


def test_evaluate_gives_the_scripts_numbers_byte_for_byte(released, tmp_path):
    attacks = [
        {"attack": "pgd", "epsilon_255": [8], "steps": 3, "eot_samples": 2},
        {"attack": "fgsm", "epsilon_255": [8.0]},
    ]
    recipe = {"models": [{"name": "nim", "path": str(RELEASED), "sigma": 75}], "attacks": attacks}
    recipe |= {"num_images": 10, "num_draws": 3, "batch_size": 4, "seeds": [0, 1]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    reference.load_script("run_attack").main([str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path / 'script'}"])
    source = load_source(DataRecipe(source="digits"), "test")
    target = as_target(released, name="nim", sigma=75)
    arguments = {"num_images": 10, "num_draws": 3, "batch_size": 4, "seeds": [0, 1], "output_dir": tmp_path / "call"}
    summary = evaluate(target, source, attacks, **arguments)
    script, call = (tmp_path / name / "records.jsonl" for name in ("script", "call"))
    theirs, ours = read_records(script), read_records(call)
    assert [record.predictions for record in ours] == [record.predictions for record in theirs]
    assert call.read_bytes() == script.read_bytes()
    rows = json.loads((tmp_path / "script/summary.json").read_text())["rows"]
    assert [row.accuracy for row in summary.rows] == [row["accuracy"] for row in rows]
    call.write_bytes(b"".join(call.read_bytes().splitlines(keepends=True)[:7]))  # stopped, and called again
    assert [row.accuracy for row in evaluate(target, source, attacks, **arguments).rows] == [
        r["accuracy"] for r in rows
    ]
    assert call.read_bytes() == script.read_bytes()


def test_attack_returns_images_within_the_budget_and_what_they_cost(released, digits):
    x, y, ids = digits
    found = attack(
        released, x, y, "pgd", epsilon_255=8, steps=3, eot_samples=2, image_ids=ids, skip_misclassified=False
    )
    assert (found.images_01 - x).abs().max() <= 8 / 255 + 1e-6 and found.queries == [6] * 24
    again = attack(as_target(released), x, y, "pgd", steps=3, eot_samples=2, image_ids=ids, skip_misclassified=False)
    assert torch.equal(found.images_01, again.images_01)
    own = attack(classify, x, y, corner_attack, epsilon_255=4, steps=1, skip_misclassified=False)
    torch.testing.assert_close(own.images_01, (x + 4 / 255).clamp(0, 1))
    with pytest.raises(ValueError, match="'fgsm' does not use 'steps'"):
        attack(released, x, y, "fgsm", steps=3)
    with pytest.raises(ValueError, match=r"attacks move in \[0, 1\]"):
        attack(released, 255 * x, y)
    with pytest.raises(ValueError, match="labels holds 12, which is no class"):
        attack(released, x, y.clone().fill_(12))
    with pytest.raises(ValueError, match="image_ids names 3 images, there are 24"):
        attack(released, x, y, image_ids=ids[:3])


def test_every_way_to_bring_data_gives_the_same_rows(digits):
    x, y, _ = digits
    x = (255 * x).round() / 255
    target = as_target(classify, blur)
    pixels = (255 * x).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    rows = Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels], "label": y.tolist()})

    class Processor:
        def __call__(self, images, **_):
            arrays = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
            return {"pixel_values": torch.from_numpy(arrays / np.float32(255))}

    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    named = DataLoader([{"images_01": a, "labels": b} for a, b in zip(x, y, strict=True)], batch_size=5)
    found = [
        evaluate(target, data, "fgsm", epsilon_255=[8.0], num_draws=2, processor=Processor()).rows
        for data in ((x, y), loader, named, rows)
    ]
    accuracies = [[row.accuracy for row in one] for one in found]
    assert accuracies[0] == accuracies[1] == accuracies[2] == accuracies[3] and len(accuracies[0]) == 2
    with pytest.raises(ValueError, match="data must be"):
        evaluate(target, 3, "fgsm")


def test_purifiers_from_elsewhere_get_their_noise_by_name(digits):
    x = digits[0][:3]

    def with_list(images_01, generators):
        noise = torch.stack([torch.randn(x.shape[1:], generator=one) for one in generators])
        return torch.nn.functional.avg_pool2d(images_01 + 0.1 * noise, 3, 1, 1).clamp(0, 1)

    def with_global_noise(images_01):
        return (images_01 + 0.1 * torch.randn(images_01.shape)).clamp(0, 1)

    seeds = [5, 6, 7]
    one, many, hidden = (as_target(classify, purifier) for purifier in (blur, with_list, with_global_noise))
    assert one.is_random and one.sigma == "external"
    expected = torch.cat([classify(blur(x[i : i + 1], torch.Generator().manual_seed(seeds[i]))) for i in range(3)])
    for target in (one, many):
        torch.testing.assert_close(target.logits(x, target.draw(seeds, x.shape[1:])), expected)
    state = torch.get_rng_state()
    first = hidden.logits(x, hidden.draw(seeds, x.shape[1:]))
    assert torch.equal(first, hidden.logits(x, hidden.draw(seeds, x.shape[1:]))) and torch.equal(
        state, torch.get_rng_state()
    )
    assert not torch.equal(first, hidden.logits(x, hidden.draw([1, 2, 3], x.shape[1:])))
    torch.testing.assert_close(first[1:2], hidden.logits(x[1:2], hidden.draw([6], x.shape[1:])))
    assert not as_target(classify).is_random and as_target(classify).sigma is None
    with pytest.raises(ValueError, match="the purifier made"):
        broken = as_target(classify, lambda images_01: images_01[:, :, ::2], is_random=False)
        broken.logits(x, {})


def test_a_purifier_of_ours_stands_before_a_function(released, digits):
    x, y, ids = digits
    ours = as_target(released, name="ours")

    def bare(images_01):
        return ours.classifier_logits(images_01)

    both = as_target(bare, released.purifier, name="both", sigma=75)
    draw = both.draw([1, 2, 3], x.shape[1:])
    expected = ours.logits(x[:3], ours.draw([1, 2, 3], x.shape[1:]))
    torch.testing.assert_close(both.logits(x[:3], draw), expected, atol=1e-4, rtol=1e-4)
    summary = evaluate([ours, both], (x, y, ids), AttackRecipe("fgsm", epsilon_255=[8.0]), num_draws=2)
    accuracies = {(row.model, row.name): row.accuracy for row in summary.rows}
    assert accuracies["ours", "none"] == accuracies["both", "none"] > 80 > 100 - accuracies["ours", "fgsm"]


def test_certify_smooths_any_function_with_noise_of_its_own(digits):
    x, y, ids = digits
    plane = torch.nn.functional.normalize(torch.ones(3 * 32 * 32), dim=0)

    def linear(images_01):
        margin = (images_01 - 0.3).flatten(1) @ plane
        return torch.stack([-margin, margin], dim=1)

    labels = (linear(x)[:, 1] > 0).long()
    rows = certify(linear, (x, labels, ids), 63.75, num_draws=1000, radii=[0.0, 0.4, 100.0])
    distance = (linear(x)[:, 1]).abs()
    assert rows[0]["num_images"] == 24 and rows[0]["sigma"] == 63.75 and rows[2]["certified_accuracy"] == 0
    # never farther than the plane is, and not much nearer where 1,000 draws can tell
    low, high = (100 * float((distance > radius).double().mean()) for radius in (0.55, 0.4))
    assert 0 < low <= rows[1]["certified_accuracy"] <= high + 1e-3
    with pytest.raises(ValueError, match="is random on its own"):
        certify(as_target(classify, blur), (x, y, ids), 30, num_images=2)
