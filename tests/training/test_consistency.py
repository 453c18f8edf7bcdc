"""Losses over several draws of an image, and over what a frozen classifier sees of a purified one."""

import math

import pytest
import torch
from training_runs import FINETUNE, PRETRAIN, losses, run

from modeling_nim import NIMClassifierConfig, NIMForImageClassification, NIMPurifiedImageClassification
from modeling_nim.training.consistency import ConsistencyRecipe, consistent_cross_entropy
from modeling_nim.training.finetuning import feature_error, features_of, find_layers
from modeling_nim.training.optimization import soft_cross_entropy


PLAIN = ConsistencyRecipe(num_draws=2)


def logits_of(*probabilities):
    """`(1, K, 2)` logits of two classes from the probabilities of class 0."""
    return torch.tensor([[[math.log(p), math.log(1 - p)] for p in probabilities]])


def test_one_draw_is_cross_entropy():
    logits, targets = torch.randn(5, 1, 4), torch.randn(5, 4).softmax(dim=-1)
    found = consistent_cross_entropy(logits, targets, ConsistencyRecipe())
    assert torch.equal(found, soft_cross_entropy(logits[:, 0], targets))


def test_divergence_from_the_mean_prediction_and_its_entropy():
    logits, targets = logits_of(0.9, 0.5), torch.tensor([[1.0, 0.0]])
    classification = -(math.log(0.9) + math.log(0.5)) / 2
    divergence = sum(0.7 * math.log(0.7 / p) + 0.3 * math.log(0.3 / (1 - p)) for p in (0.9, 0.5)) / 2
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    found = consistent_cross_entropy(logits, targets, ConsistencyRecipe(num_draws=2, weight=10, entropy_weight=0.5))
    assert found.item() == pytest.approx(classification + 10 * divergence + 0.5 * entropy, rel=1e-5)
    agreeing = logits_of(0.8, 0.8)
    weighted = consistent_cross_entropy(agreeing, targets, ConsistencyRecipe(num_draws=2, weight=10))
    assert weighted.item() == pytest.approx(consistent_cross_entropy(agreeing, targets, PLAIN).item(), abs=1e-6)


@pytest.mark.parametrize(
    "probabilities, counted, divergence_counts",
    [
        ((0.9, 0.6), (0.9, 0.6), True),  # all right
        ((0.9, 0.2), (0.9,), False),  # one right: the other one is lost, and is not learned
        ((0.1, 0.3), (0.3,), False),  # none right: the best one
    ],
)
def test_selection_of_draws(probabilities, counted, divergence_counts):
    recipe = ConsistencyRecipe(num_draws=2, weight=3, selection="right")
    found = consistent_cross_entropy(logits_of(*probabilities), torch.tensor([[1.0, 0.0]]), recipe)
    expected = -sum(math.log(p) for p in counted) / len(counted)
    if divergence_counts:
        mean = sum(probabilities) / 2
        terms = [mean * math.log(mean / p) + (1 - mean) * math.log((1 - mean) / (1 - p)) for p in probabilities]
        expected += 3 * sum(terms) / 2
    assert found.item() == pytest.approx(expected, rel=1e-5)


def small_classifier():
    config = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return NIMForImageClassification(NIMClassifierConfig(**config, num_labels=5)).eval()


def test_features_are_what_the_head_gets():
    classifier = small_classifier()
    layers = find_layers(classifier, None)
    assert [layer.module for layer in layers] == [classifier.classifier]
    with features_of(layers) as features:
        logits = classifier(torch.randn(3, 3, 16, 16)).logits
    assert features[0].shape == (3, 32)
    torch.testing.assert_close(classifier.classifier(features[0]), logits)
    classifier(torch.randn(1, 3, 16, 16))
    assert len(features) == 1  # nothing is taken outside the block
    classifier.classifier = torch.nn.Identity()
    with pytest.raises(ValueError, match="feature_loss needs a linear layer with 5 outputs in NIMForImageClass"):
        find_layers(classifier, None)


def test_features_are_the_outputs_of_named_layers():
    classifier = small_classifier()
    with features_of(find_layers(classifier, ["fc_norm", "classifier"])) as features:
        logits = classifier(torch.randn(3, 3, 16, 16)).logits
    assert [tuple(feature.shape) for feature in features] == [(3, 32), (3, 5)]
    torch.testing.assert_close(features[1], logits)
    with pytest.raises(ValueError, match="NIMForImageClassification has no module 'blocks.3'; it has.* fc_norm"):
        find_layers(classifier, ["fc_norm", "blocks.3"])


def test_feature_error_is_a_share_of_the_clean_square():
    clean = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])  # squares of 25 and 4
    draws = torch.cat([clean, 2 * clean])  # the second draw is as far away as the clean feature is from 0
    assert feature_error(clean, clean) == 0 and feature_error(draws, clean) == pytest.approx(0.5)


@pytest.fixture(scope="module")
def denoised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("denoised")
    run("run_pretrain", PRETRAIN, folder / "pretrain")
    run("run_finetune", FINETUNE | {"init": str(folder / "pretrain")}, folder / "finetune")
    return folder / "finetune" / "purified"


def recipe_from(denoised, **sections):
    recipe = {key: value for key, value in FINETUNE.items() if key != "augmentation"} | {"init": str(denoised)}
    return recipe | {"optimization": {"batch_size": 16, "base_learning_rate": 0.016, "steps": 3}} | sections


def test_more_draws_lower_the_variance_and_processes_share_them(denoised, tmp_path):
    recipe = recipe_from(denoised)  # with a drop path, whose draws an image has once for all of its draws
    run("run_finetune", recipe, tmp_path / "one")
    four = ("consistency.num_draws=4", "consistency.weight=10", "consistency.entropy_weight=0.5")
    run("run_finetune", recipe, tmp_path / "four", *four)
    run("run_finetune", recipe, tmp_path / "shared", *four, num_processes=2)
    assert losses(tmp_path / "shared") == pytest.approx(losses(tmp_path / "four"), abs=1e-4)
    assert losses(tmp_path / "four")[1] > losses(tmp_path / "one")[1]  # divergence and entropy


@pytest.mark.parametrize("sigma", ["0", "uniform(0, 110)"])
def test_draws_of_an_image_differ_in_noise_alone(sigma, denoised, tmp_path):
    """Without noise they are one and the same, and any number of them gives the curve of a single one."""
    recipe = recipe_from(denoised, drop_path_rate=0.0, sigma=sigma)
    run("run_finetune", recipe, tmp_path / "one")
    run("run_finetune", recipe, tmp_path / "two", "consistency.num_draws=2", "consistency.weight=10")
    difference = losses(tmp_path / "two")[1] - losses(tmp_path / "one")[1]
    assert abs(difference) < 1e-6 if sigma == "0" else abs(difference) > 1e-5


def test_feature_loss_brings_the_purified_features_to_the_clean_ones(denoised, tmp_path):
    adversary = {"trains": "purifier", "targets": "clean_answer"}
    recipe = recipe_from(denoised, adversary=adversary, drop_path_rate=0.0)
    run("run_finetune", recipe, tmp_path / "without")
    run("run_finetune", recipe, tmp_path / "with", "feature_loss.weight=5")
    run(
        "run_finetune", recipe, tmp_path / "layers", "feature_loss.weight=5", "feature_loss.layers=[classifier,fc_norm]"
    )
    silent = ("adversary.classification_weight=0", "feature_loss.weight=5")
    run("run_finetune", recipe, tmp_path / "silent", *silent)
    first = {name: losses(tmp_path / name)[1] for name in ("without", "with", "layers", "silent")}
    assert first["silent"] == pytest.approx(first["with"] - first["without"], abs=1e-4)
    assert abs(first["layers"] - first["with"]) > 1e-3
    model = NIMPurifiedImageClassification.from_pretrained(denoised)
    assert first["with"] - first["without"] > 5e-3  # a relative error, times 5
    assert not (tmp_path / "with" / "model.safetensors").exists() and model.config.sigma == 30


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["consistency.num_draws=0"], "consistency.num_draws' must be at least 1 "),
        (["consistency.weight=10"], "set consistency.num_draws to 2 or more"),
        (["consistency.num_draws=2", "images=original"], "consistency.num_draws 2 are draws of the noise"),
        (["feature_loss.weight=1"], "feature_loss.weight 1.0 is for a purifier before a frozen classifier"),
        (["feature_loss.layers=[]"], "feature_loss.layers is an empty list"),
        (["feature_loss.weight=-1"], "feature_loss.weight' must be at least 0 and at most 1000000, got -1"),
    ],
)
def test_bad_input_is_one_line(overrides, message, denoised, tmp_path):
    printed = run("run_finetune", recipe_from(denoised), tmp_path / "run", *overrides, exit_code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message in line and not (tmp_path / "run").exists()
