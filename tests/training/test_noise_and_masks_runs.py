"""Noise and masks through the scripts: pre-training, fine-tuning on noisy images, certificates without a decoder."""

import json

import pytest
import torch
from reference import load_script
from training_runs import FINETUNE, PRETRAIN, losses, run

from modeling_nim import NIMForImageClassification, NIMForPreTraining, NIMPurifiedImageClassification, add_noise
from modeling_nim.robustness.certification import check_certifiable
from modeling_nim.robustness.loading import load_targets
from modeling_nim.robustness.recipes import EvaluatedModelRecipe
from modeling_nim.robustness.targets import ClassifierTarget, SmoothedTarget


TWO_STEPS = {"batch_size": 16, "base_learning_rate": 0.016, "steps": 2}
PLAIN = {key: value for key, value in FINETUNE.items() if key not in ("augmentation", "drop_path_rate")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`pretrain`, `noisy` (a classifier of noisy images) and `denoised` (behind the purifier without its masks)."""
    folder = tmp_path_factory.mktemp("masked")
    model = {"architecture": "nim_mae_masked", "config": PRETRAIN["model"]["config"] | {"norm_pix_loss": False}}
    run("run_pretrain", PRETRAIN | {"model": model, "optimization": TWO_STEPS}, folder / "pretrain")
    recipe = PLAIN | {"init": str(folder / "pretrain"), "optimization": TWO_STEPS}
    run("run_finetune", recipe | {"images": "noisy", "sigma": 63.75, "defense_sigma": 63.75}, folder / "noisy")
    run("run_finetune", recipe | {"mask_ratio": 0}, folder / "denoised")
    return folder


def test_the_recipe_makes_the_model_and_both_kinds_of_classifier(trained):
    purifier = NIMForPreTraining.from_pretrained(trained / "pretrain")
    assert (purifier.config.degradation, purifier.config.mask_ratio) == ("noise+mask", 0.75)
    assert len(losses(trained / "pretrain")) == 2
    assert type(NIMForImageClassification.from_pretrained(trained / "noisy")) is NIMForImageClassification
    assert not (trained / "noisy" / "purified").exists()
    composed = NIMPurifiedImageClassification.from_pretrained(trained / "denoised" / "purified")
    assert composed.config.purifier_config.mask_ratio == 0 and not composed.purifier.config.hides_patches


def test_noisy_images_are_images_with_noise(trained, tmp_path):
    """With sigma 0 they are images as they are; with noise, the same run is another one."""
    recipe = PLAIN | {"init": str(trained / "pretrain"), "optimization": TWO_STEPS, "label_smoothing": 0.0}
    for name, fields in {
        "original": {"images": "original"},
        "without noise": {"images": "noisy", "sigma": 0},
        "noisy": {"images": "noisy", "sigma": 63.75},
    }.items():
        run("run_finetune", recipe | fields, tmp_path / name.replace(" ", "_"))
    assert losses(tmp_path / "without_noise") == losses(tmp_path / "original")
    assert losses(tmp_path / "noisy")[2] != losses(tmp_path / "original")[2]


def test_masks_without_a_purifier_are_refused(trained, tmp_path):
    recipe = PLAIN | {"init": str(trained / "pretrain"), "images": "noisy", "mask_ratio": 0}
    printed = run("run_finetune", recipe, tmp_path / "run", exit_code=2)
    assert "error: mask_ratio 0 is for a purifier that hides patches: name one, or leave it out" in printed


def test_a_smoothed_classifier_is_certified_without_a_decoder(trained, tmp_path):
    recipe = {
        "output_dir": str(tmp_path / "certify"),
        "data": {"source": "digits"},
        "models": [
            {"name": "encoder", "path": str(trained / "noisy"), "sigma": 63.75, "smoothed": True},
            {"name": "behind the purifier", "path": str(trained / "denoised" / "purified"), "sigma": 63.75},
        ],
        "num_images": 2,
        "num_selection_draws": 10,
        "num_draws": 50,
        "radii": [0.0, 0.25],
    }
    path = tmp_path / "certify.yaml"
    path.write_text(json.dumps(recipe))
    load_script("run_certify").main([str(path)])
    rows = json.loads((tmp_path / "certify" / "certified.json").read_text())["rows"]
    assert {(row["model"], row["sigma_255"] if "sigma_255" in row else row["sigma"]) for row in rows} == {
        ("encoder", 63.75),
        ("behind the purifier", 63.75),
    }
    assert all(row["num_images"] == 2 for row in rows)


def one_target(**fields):
    (target,), _ = load_targets([EvaluatedModelRecipe(name="model", **fields)], "cpu")
    return target


def test_the_smoothed_target_is_the_classifier_of_noisy_images(trained):
    target = one_target(path=str(trained / "noisy"), sigma=63.75, smoothed=True)
    assert isinstance(target, SmoothedTarget) and isinstance(target.base, ClassifierTarget)
    images_01 = torch.rand(2, 3, 32, 32)
    noise = target.draw([1, 2], images_01.shape[1:])
    model = NIMForImageClassification.from_pretrained(trained / "noisy").eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (model.config.image_mean, model.config.image_std))
    pixel_values = add_noise((images_01 - mean) / std, 63.75, noise["epsilon"], model.config.image_std)
    torch.testing.assert_close(target.logits(images_01, noise), model(pixel_values).logits)
    assert check_certifiable(target, images_01) == 63.75


@pytest.mark.parametrize("composed", [True, False])
def test_masks_of_an_evaluated_purifier_can_be_taken_away_and_brought_back(trained, composed):
    parts = {"purifier": str(trained / "pretrain"), "classifier": str(trained / "denoised")}
    where = {"path": str(trained / "denoised" / "purified")} if composed else parts
    images_01 = torch.rand(2, 3, 32, 32)
    without = one_target(**where, sigma=30, mask_ratio=0)
    masked = one_target(**where, sigma=30, mask_ratio=0.75)
    noise = masked.draw([1, 2], images_01.shape[1:])
    assert noise["noise"].shape == (2, 16) and "noise" not in without.draw([1, 2], images_01.shape[1:])
    assert masked.is_random and not one_target(**where, sigma=0, mask_ratio=0).is_random
    purifier = NIMForPreTraining.from_pretrained(trained / "pretrain").eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(masked.model.purify(pixel_values, **noise), purifier.purify(pixel_values, **noise))
    order = noise.pop("noise")
    purifier = NIMForPreTraining.from_pretrained(trained / "pretrain", mask_ratio=0).eval()
    torch.testing.assert_close(without.model.purify(pixel_values, **noise), purifier.purify(pixel_values, **noise))
    # masks are draws of their own: the answer is still a function of the noisy image, and may be certified
    assert check_certifiable(masked, images_01) == check_certifiable(without, images_01) == 30
    changed = masked.model.purify(pixel_values, **noise, noise=order.flip(1))
    assert not torch.allclose(changed, masked.model.purify(pixel_values, **noise, noise=order))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "noisy", "smoothed": True}, "smoothed needs sigma as one number"),
        ({"path": "noisy", "smoothed": True, "sigma": "uniform(0, 30)"}, "smoothed needs sigma as one number"),
        ({"path": "denoised/purified", "smoothed": True, "sigma": 30}, "for a classifier without a purifier"),
        ({"path": "noisy", "mask_ratio": 0}, "has no purifier: leave mask_ratio out"),
        ({"path": "noisy", "mask_ratio": 1.0}, "mask_ratio must be at least 0 and below 1, got 1.0"),
    ],
)
def test_models_that_cannot_be_evaluated_like_this(trained, fields, message):
    with pytest.raises(ValueError, match=message):
        one_target(**fields | {"path": str(trained / fields["path"])})
