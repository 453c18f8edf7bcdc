"""Every number that the reference implementations gave (fixtures/golden/README.md), to 1e-5 in float32."""

import json

import pytest
import reference
import torch
from safetensors.torch import load_file

from modeling_nim import (
    NIMClassifierConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    add_noise,
    normalize,
)
from modeling_nim.configuration_nim import IMAGENET_MEAN, IMAGENET_STD
from modeling_nim.modeling_nim_simmim import NIMSimMIMForImageClassification, NIMSimMIMForPreTraining
from modeling_nim.training.optimization import (
    OptimizationRecipe,
    cosine_learning_rate,
    learning_rate_at,
    make_plan,
    parameter_settings,
)


EXPECTED = load_file(reference.GOLDEN / "expected.safetensors")
RECIPE = json.loads((reference.GOLDEN / "recipe.json").read_text())
INPUTS = {"images_01", "epsilon", "sigma_255", "mae.masking_noise", "simmim.mask"}
CHECKPOINTS = {
    "nim-mae": ("nim-mae", "nim_mae_pretrain.pt", NIMForPreTraining),
    "mae": ("mae", "nim_mae_pretrain.pt", NIMForPreTraining),
    "classifier": ("mae", "mae_finetune.pt", NIMForImageClassification),
    "simmim": ("simmim", "simmim_pretrain.pth", NIMSimMIMForPreTraining),
    "simmim-classifier": ("simmim", "simmim_finetune.pth", NIMSimMIMForImageClassification),
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The golden checkpoints, through the converter's command line."""
    parent = tmp_path_factory.mktemp("converted")
    main = reference.load_script("convert_checkpoint").main
    heads = ["--num_attention_heads", str(RECIPE["config"]["num_attention_heads"])]
    heads += ["--decoder_num_attention_heads", str(RECIPE["config"]["decoder_num_attention_heads"])]
    for name, (source, file, _) in CHECKPOINTS.items():
        options = [] if source == "simmim" else heads  # SimMIM's tables tell
        checkpoint = str(reference.GOLDEN / file)
        main(["--source", source, "--checkpoint", checkpoint, "--output_dir", str(parent / name), *options])
    return parent


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def outputs(request, directories):
    """Everything that expected.safetensors holds, as this package computes it."""

    def load(name, **changes):
        cls = CHECKPOINTS[name][2]
        model, info = cls.from_pretrained(
            directories / name, attn_implementation=request.param, output_loading_info=True, **changes
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        return model.eval()

    images_01 = EXPECTED["images_01"].clone().requires_grad_()
    pixel_values = normalize(images_01, IMAGENET_MEAN, IMAGENET_STD)
    clean, epsilon, sigma = pixel_values.detach(), EXPECTED["epsilon"], EXPECTED["sigma_255"]
    noisy = add_noise(clean, sigma, epsilon, IMAGENET_STD)
    found = {"pixel_values": clean, "noisy_pixel_values": noisy}

    nim, classifier = load("nim-mae"), load("classifier")
    for name, model in [("norm_pix", nim), ("raw_pix", load("nim-mae", norm_pix_loss=False))]:
        output = model(clean, sigma=sigma, epsilon=epsilon)
        found[f"nim_mae.{name}.loss"] = output.loss
        found[f"nim_mae.{name}.reconstruction"] = output.reconstruction
    found["nim_mae.encoder"] = nim.vit(noisy).last_hidden_state

    output = load("mae")(clean, noise=EXPECTED["mae.masking_noise"])
    found |= {"mae.loss": output.loss, "mae.mask": output.mask, "mae.patch_prediction": output.logits}
    found["mae.raw_pix.loss"] = load("mae", norm_pix_loss=False)(clean, noise=EXPECTED["mae.masking_noise"]).loss

    found["classifier.logits"] = classifier(clean).logits
    defended = NIMPurifiedImageClassification.from_parts(nim, classifier)
    for sigma_255 in (0, 30, 75):
        found[f"defense.sigma{sigma_255}.purified"] = defended.purify(clean, sigma=sigma_255, epsilon=epsilon)
        found[f"defense.sigma{sigma_255}.logits"] = defended(clean, sigma=sigma_255, epsilon=epsilon).logits
    loss = defended(pixel_values, labels=torch.arange(3), sigma=30, epsilon=epsilon).loss
    found["defense.sigma30.cross_entropy"] = loss
    found["defense.sigma30.input_gradient"] = torch.autograd.grad(loss, images_01)[0]

    output = load("simmim")(clean, bool_masked_pos=EXPECTED["simmim.mask"])
    found |= {"simmim.loss": output.loss, "simmim.reconstruction": output.reconstruction}
    output = load("simmim", degradation="noise")(clean, sigma=sigma, epsilon=epsilon)
    found |= {"nim_simmim.l1_all_pixels": output.loss, "nim_simmim.reconstruction": output.reconstruction}
    found["simmim_classifier.logits"] = load("simmim-classifier")(clean).logits
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - INPUTS))
def test_reference_number(outputs, name):
    torch.testing.assert_close(outputs[name].to(EXPECTED[name].dtype), EXPECTED[name], atol=1e-5, rtol=0)


def test_plain_reference_gives_the_golden_numbers():
    """tests/reference.py gives the golden numbers, so that it can be the reference at other sizes."""
    states = {file: torch.load(reference.GOLDEN / file, weights_only=True) for _, file, _ in CHECKPOINTS.values()}
    clean, noisy = EXPECTED["pixel_values"], EXPECTED["noisy_pixel_values"]
    simmim = states["simmim_pretrain.pth"]["model"]
    found = {
        "nim_mae.norm_pix.reconstruction": reference.nim_mae(
            noisy, clean, states["nim_mae_pretrain.pt"]["model"], 4, 4
        ),
        "classifier.logits": reference.mae_classify(clean, states["mae_finetune.pt"]["classifier"], 4),
        "simmim.reconstruction": reference.simmim(clean, simmim, EXPECTED["simmim.mask"]),
        "nim_simmim.reconstruction": reference.simmim(noisy, simmim),
        "simmim_classifier.logits": reference.simmim_classify(clean, states["simmim_finetune.pth"]["model"]),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, EXPECTED[name], atol=1e-5, rtol=0)


def test_layer_wise_learning_rates_and_weight_decay():
    """Every parameter of the classifier, by the reference's name and ours; q, k and v share their fused name's."""
    config = NIMClassifierConfig(
        image_size=RECIPE["config"]["image_size"],
        patch_size=RECIPE["config"]["patch_size"],
        hidden_size=RECIPE["config"]["hidden_size"],
        num_hidden_layers=RECIPE["config"]["num_hidden_layers"],
        num_attention_heads=RECIPE["config"]["num_attention_heads"],
        num_labels=RECIPE["config"]["num_labels"],
    )
    found = parameter_settings(NIMForImageClassification(config), weight_decay=0.05, layer_decay=0.75)
    expected = {}
    for reference_name, names in reference.load_script("convert_checkpoint").mae_layout(config).items():
        entry = RECIPE["layer_decay_0.75"][reference_name]
        expected |= dict.fromkeys(names, (entry["lr_scale"], entry["weight_decay"]))
    assert found.keys() == expected.keys()
    for parameter_name, settings in expected.items():
        assert found[parameter_name] == pytest.approx(settings), parameter_name


@pytest.mark.parametrize("name", ["pretrain_lr", "finetune_lr"])
def test_learning_rate_schedules(name):
    schedule = RECIPE[name]
    for epoch, expected in schedule["at_epoch"].items():
        found = cosine_learning_rate(
            float(epoch), schedule["peak"], schedule["min"], schedule["warmup_epochs"], schedule["epochs"]
        )
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-15), epoch
    # and as the training loop asks for it, by optimizer step
    recipe = OptimizationRecipe(
        batch_size=4096,
        base_learning_rate=schedule["peak"] / 16,
        epochs=schedule["epochs"],
        warmup_epochs=schedule["warmup_epochs"],
        min_learning_rate=schedule["min"],
    )
    plan = make_plan(recipe, num_processes=1, num_images=20 * 4096)
    for epoch, expected in schedule["at_epoch"].items():
        found = learning_rate_at(round(float(epoch) * 20), recipe, plan)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-15), epoch
