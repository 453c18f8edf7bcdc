"""Numbers that must not depend on how they are computed: gradients, kernels, precision, compilation, batch size."""

import json

import pytest
import torch
from conftest import TINY, TINY_DECODER
from safetensors.torch import load_file, save_file
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    NIMSimMIMClassifierConfig,
    NIMSimMIMConfig,
    NIMSimMIMForImageClassification,
    NIMSimMIMForPreTraining,
    denormalize,
    image_processor_for,
)
from modeling_nim.robustness import loading
from modeling_nim.runs.models import load_purifier
from modeling_nim.training import models as training_models


def enlarge(model):
    """Fresh weights leave blocks close to the identity, where nothing is tested; these are larger."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "norm" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.ndim > 1 else 0.1)
    return model.eval()


def nim_mae(**fields):
    return enlarge(NIMForPreTraining(NIMConfig(**{**TINY, **TINY_DECODER, **fields})))


def nim_simmim(**fields):
    return enlarge(
        NIMSimMIMForPreTraining(NIMSimMIMConfig(**{**TINY, "mask_patch_size": 8, "drop_path_rate": 0.0, **fields}))
    )


PURIFIERS = {
    "nim_mae": lambda: nim_mae(),
    "nim_mae noisy statistics": lambda: nim_mae(patch_statistics="noisy"),
    "nim_mae raw pixels": lambda: nim_mae(norm_pix_loss=False),
    "nim_mae with a convolutional stem": lambda: nim_mae(norm_pix_loss=False, patch_embedding="convolutional"),
    "mae": lambda: nim_mae(degradation="mask"),
    "nim_mae_masked": lambda: nim_mae(degradation="noise+mask"),
    "nim_mae_masked raw pixels": lambda: nim_mae(degradation="noise+mask", norm_pix_loss=False),
    "nim_simmim": lambda: nim_simmim(),
    "simmim": lambda: nim_simmim(degradation="mask"),
}
CLASSIFIERS = {
    "mae": lambda: enlarge(NIMForImageClassification(NIMClassifierConfig(**TINY, num_labels=5))),
    "simmim": lambda: enlarge(
        NIMSimMIMForImageClassification(NIMSimMIMClassifierConfig(**TINY, num_labels=5, drop_path_rate=0.0))
    ),
}
every_purifier = pytest.mark.parametrize("name", PURIFIERS)
every_classifier = pytest.mark.parametrize("name", CLASSIFIERS)


def draws(model, batch_size: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Given randomness for one call, as the model's degradation takes it."""
    given = {}
    if model.config.adds_noise:
        given["sigma"] = torch.linspace(20, 60, batch_size).to(dtype)
        given["epsilon"] = torch.randn(batch_size, 3, 16, 16, dtype=dtype)
    if model.config.hides_patches:
        given["noise"] = torch.rand(batch_size, 4 if hasattr(model.config, "mask_patch_size") else 16)
    return given


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@every_purifier
def test_gradients_through_purify_agree_with_finite_differences(name):
    model = PURIFIERS[name]().double()
    # inside the image range nearly everywhere; the clamp's corners have no derivative to compare
    pixel_values = (0.3 * torch.randn(2, 3, 16, 16, dtype=torch.double)).requires_grad_()
    given = draws(model, 2, torch.double)
    assert torch.autograd.gradcheck(
        lambda images: model.purify(images, **given), (pixel_values,), eps=1e-7, atol=1e-5, fast_mode=True
    )


def test_gradients_through_the_whole_defense_agree_with_finite_differences():
    model = NIMPurifiedImageClassification.from_parts(PURIFIERS["nim_mae"](), CLASSIFIERS["mae"]()).double()
    pixel_values = (0.3 * torch.randn(2, 3, 16, 16, dtype=torch.double)).requires_grad_()
    epsilon = torch.randn(2, 2, 3, 16, 16, dtype=torch.double)  # two votes
    labels = torch.tensor([0, 1])
    assert torch.autograd.gradcheck(
        lambda images: model(images, labels=labels, epsilon=epsilon).logits.double(),
        (pixel_values,),
        eps=1e-4,  # votes are averaged in float32
        atol=1e-2,
        fast_mode=True,
    )


@every_purifier
def test_sdpa_equals_eager_attention_in_purifiers(name, pixel_values):
    model = PURIFIERS[name]()
    given = draws(model, 4)
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        attentions = [part for part in model.modules() if type(part).__name__.endswith("Attention")]
        assert {part.config._attn_implementation for part in attentions} == {implementation}  # of decoders too
        images = pixel_values.clone().requires_grad_()
        output = model(images, **given)
        output.loss.backward()
        results.append((output.loss, output.reconstruction, images.grad))
    for eager, sdpa in zip(*results, strict=True):
        torch.testing.assert_close(sdpa, eager, atol=1e-5, rtol=0)


@every_classifier
def test_sdpa_equals_eager_attention_in_classifiers(name, pixel_values):
    model = CLASSIFIERS[name]()
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits.append(model(pixel_values).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


@every_purifier
def test_bfloat16_autocast_stays_within_two_percent(name, pixel_values):
    model = PURIFIERS[name]()
    given = draws(model, 4)
    with torch.no_grad():
        expected = model(pixel_values, **given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(pixel_values, **given)
            purified = model.purify(pixel_values, **given)
        assert relative_error(found.loss, expected.loss) < 2e-2
        assert relative_error(found.reconstruction, expected.reconstruction) < 2e-2
        assert relative_error(purified, model.purify(pixel_values, **given)) < 2e-2


@every_classifier
def test_bfloat16_autocast_of_classifiers_stays_within_two_percent(name, pixel_values):
    model = CLASSIFIERS[name]()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(pixel_values).logits
    assert relative_error(found, model(pixel_values).logits.detach()) < 2e-2


@pytest.mark.parametrize("name", ["nim_mae noisy statistics", "mae", "nim_simmim", "simmim"])
def test_forward_and_purify_compile_into_one_graph(name, pixel_values):
    """Also backwards, as an attacker runs it."""
    model = PURIFIERS[name]()
    given = draws(model, 4)

    def loss_and_images(images, given):
        return model(images, **given).loss, model.purify(images, **given)

    compiled = torch.compile(loss_and_images, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss_and_images, compiled):
        images = pixel_values.clone().requires_grad_()
        loss, purified = function(images, given)
        (loss + purified.square().mean()).backward()
        results.append((loss, purified, images.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sigmas", [[30, 40, 50], [30.0, 40.5, 50.0], ["30", "40"]])
def test_one_compiled_purifier_takes_many_sigmas(sigmas, pixel_values):
    """From the second number on, the compiler holds it as a symbol."""
    model = PURIFIERS["nim_mae"]()
    compiled = torch.compile(model.purify, fullgraph=True, backend="eager")
    epsilon = torch.randn_like(pixel_values)
    for sigma in sigmas:
        expected = model.purify(pixel_values, sigma=torch.full((4,), float(sigma)), epsilon=epsilon)
        torch.testing.assert_close(compiled(pixel_values, sigma=sigma, epsilon=epsilon), expected, atol=1e-5, rtol=1e-5)


@every_classifier
def test_classifiers_compile_into_one_graph(name, pixel_values):
    model = CLASSIFIERS[name]()
    compiled = torch.compile(lambda images: model(images).logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixel_values), model(pixel_values).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*PURIFIERS, *(f"classifier {name}" for name in CLASSIFIERS)])
def test_gradient_checkpointing_leaves_loss_and_gradients_unchanged(name, pixel_values):
    if name.startswith("classifier"):
        model, given = CLASSIFIERS[name.split()[1]](), {"labels": torch.tensor([0, 1, 2, 3])}
    else:
        model = PURIFIERS[name]()
        given = draws(model, 4)
    model.train()
    calls = []
    model.base_model.layers[0].layernorm_before.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            assert len(calls) == 1
            training_models.enable_activation_checkpointing(model)
        model.zero_grad()
        loss = model(pixel_values, **given).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert len(calls) == 3  # the checkpointed forward pass ran again for the backward pass
    torch.testing.assert_close(results[1][0], results[0][0])
    assert results[0][1].keys() == results[1][1].keys()
    for parameter, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][parameter], gradient, msg=parameter)


@every_purifier
def test_the_same_generator_state_purifies_alike_at_batch_size_1_and_8(name):
    model = PURIFIERS[name]()
    images = torch.randn(8, 3, 16, 16)
    together = model.purify(images, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    alone = torch.cat([model.purify(image[None], generator=generator) for image in images])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    other = model.purify(images, generator=torch.Generator().manual_seed(5))
    assert (together - other).abs().max() > 1e-3


@pytest.mark.parametrize(("statistics", "alone"), [("noisy", True), ("input", False)])
def test_noisy_statistics_make_purify_a_function_of_the_noisy_image(statistics, alone, pixel_values):
    """Two inputs whose noisy image is the same: the output must be the same, whichever input it came from."""
    model = nim_mae(patch_statistics=statistics)
    std = torch.tensor(model.config.image_std).view(1, 3, 1, 1)
    epsilon = torch.randn_like(pixel_values)
    shift = 0.2 * torch.randn(4, 3, 1, 1).expand_as(pixel_values)  # a shift of patch means
    first = model.purify(pixel_values, sigma=30, epsilon=epsilon)
    second = model.purify(pixel_values + shift, sigma=30, epsilon=epsilon - shift * std * 255 / 30)
    distance = (first - second).abs().max().item()
    assert distance < 1e-5 if alone else distance > 0.1


OTHERS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**{**TINY, "image_size": 24, "patch_size": 8}, num_labels=3)),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@every_purifier
def test_any_classifier_of_transformers_behind_any_purifier(name, other, pixel_values):
    """In its own size and normalization; an attacker's gradient reaches the pixels."""
    purifier, classifier = PURIFIERS[name](), OTHERS[other]().eval()
    half = [0.5, 0.5, 0.5]
    model = NIMPurifiedImageClassification.from_parts(
        purifier,
        classifier,
        image_size=16,
        classifier_image_size=24,
        classifier_image_mean=half,
        classifier_image_std=half,
    ).eval()
    given = draws(purifier, 4)
    images = pixel_values.clone().requires_grad_()
    logits = model(images, **given).logits
    purified = purifier.purify(pixel_values, **given)
    images_01 = denormalize(purified, purifier.config.image_mean, purifier.config.image_std)
    resized = torch.nn.functional.interpolate(images_01, size=24, mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(logits, classifier(2 * resized - 1).logits, atol=1e-4, rtol=1e-4)
    logits[:, 0].sum().backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()


OLD_NAMES = [  # before transformers 5
    ("vit.layers.", "vit.encoder.layer."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
]


@pytest.mark.parametrize("layout", ["new", "old", "as transformers saves it"])
@pytest.mark.parametrize("cls", [NIMForPreTraining, NIMForImageClassification])
def test_transformers_mae_checkpoints_load_straight(tmp_path, layout, cls, pixel_values):
    """What facebook/vit-mae-* holds, in today's key names and in those that the Hub's files were written with."""
    theirs = enlarge(ViTMAEForPreTraining(ViTMAEConfig(**TINY, **TINY_DECODER)))
    theirs.save_pretrained(tmp_path, save_original_format=layout == "as transformers saves it")
    if layout == "old":
        weights = {}
        for key, weight in load_file(tmp_path / "model.safetensors").items():
            for new, old in OLD_NAMES:
                key = key.replace(new, old)
            weights[key] = weight
        assert "vit.encoder.layer.1.attention.attention.query.weight" in weights
        assert "decoder.decoder_layers.0.intermediate.dense.bias" in weights
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_version": "4.16.0"}))
    if cls is NIMForImageClassification:
        model, info = cls.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
        assert {key.split(".")[0] for key in info["missing_keys"]} == {"fc_norm", "classifier"}
        assert not info["unexpected_keys"] and not hasattr(model.config, "decoder_hidden_size")
        assert torch.equal(model.vit.layers[1].mlp.fc2.weight, theirs.vit.layers[1].mlp.fc2.weight)
        return
    model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert model.config.degradation == "mask"  # what such a model was trained on
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    noise = torch.rand(4, 16)
    expected, found = theirs(pixel_values, noise=noise), model.eval()(pixel_values, noise=noise)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)


@pytest.mark.parametrize("room", ["training", "robustness"])
def test_transformers_mae_checkpoints_serve_as_purifiers_in_recipes(tmp_path, room, pixel_values):
    """`purifier: facebook/vit-mae-large` in a recipe; with its own image processor."""
    theirs = enlarge(ViTMAEForPreTraining(ViTMAEConfig(**TINY, **TINY_DECODER)))
    theirs.save_pretrained(tmp_path)
    image_processor_for(NIMConfig(**TINY)).save_pretrained(tmp_path)
    if room == "training":
        purifier = load_purifier(str(tmp_path)).requires_grad_(False)
    else:
        purifier, _ = loading.load_with_processor(str(tmp_path), "cpu")
    assert isinstance(purifier, NIMForPreTraining) and not any(p.requires_grad for p in purifier.parameters())
    noise = torch.rand(4, 16)
    torch.testing.assert_close(purifier(pixel_values, noise=noise).logits, theirs(pixel_values, noise=noise).logits)
    assert purifier.purify(pixel_values, noise=noise).shape == pixel_values.shape


def test_a_larger_purifier_before_a_smaller_classifier(pixel_values):
    """Table 1's last MAE row: a purifier of other width, patches and image size than the classifier behind it."""
    larger = {"image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    purifier = nim_mae(degradation="mask", norm_pix_loss=False, **larger)
    classifier = CLASSIFIERS["mae"]()
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    noise = torch.rand(2, 16)
    logits = model(images, noise=noise).logits
    purified = purifier.purify(images, noise=noise)
    resized = torch.nn.functional.interpolate(purified, size=16, mode="bicubic", align_corners=False, antialias=True)
    torch.testing.assert_close(logits, classifier(resized).logits)
    logits.sum().backward()
    assert images.grad.abs().sum() > 0


def test_loading_at_another_image_size_interpolates_both_position_tables_in_two_dimensions(tmp_path):
    model = nim_mae()
    model.save_pretrained(tmp_path)
    larger, info = NIMForPreTraining.from_pretrained(tmp_path, image_size=24, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    classifier = NIMForImageClassification.from_pretrained(tmp_path, image_size=24).eval()
    images = torch.randn(2, 3, 24, 24)
    assert larger.eval().purify(images).shape == images.shape
    # what the encoder does on the fly, done once
    expected = model.vit(images, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(larger.vit(images).last_hidden_state, expected)
    classifier.vit.layernorm = model.vit.layernorm
    torch.testing.assert_close(classifier.vit(images).last_hidden_state, expected)
    # the columns of a table that encode columns must not change from row to row
    table = larger.decoder.decoder_pos_embed[0, 1:].view(6, 6, -1)
    half = table.shape[-1] // 2
    torch.testing.assert_close(table[..., :half], table[:1, :, :half].expand(6, 6, half))
    torch.testing.assert_close(table[..., half:], table[:, :1, half:].expand(6, 6, half))
    # and the size it was made for is loaded as it is
    assert torch.equal(
        NIMForPreTraining.from_pretrained(tmp_path).decoder.decoder_pos_embed, model.decoder.decoder_pos_embed
    )


def test_trained_positions_survive_inside_the_purified_model(tmp_path):
    """Tables that are not the formula's: a part is loaded as it was saved, whatever the whole's configuration says."""
    purifier, classifier = nim_mae(image_size=32, patch_size=8), CLASSIFIERS["mae"]()
    for table in (
        purifier.vit.embeddings.position_embeddings,
        purifier.decoder.decoder_pos_embed,
        classifier.vit.embeddings.position_embeddings,
    ):
        table.data.normal_()
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier)
    model.save_pretrained(tmp_path)
    again = NIMPurifiedImageClassification.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
