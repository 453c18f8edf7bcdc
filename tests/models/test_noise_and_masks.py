"""Noise and masks together (`degradation="noise+mask"`): between NIM-MAE and MAE, and equal to each at one end."""

import pytest
import torch
from conftest import TINY, TINY_DECODER
from test_numerics import CLASSIFIERS, nim_mae, relative_error
from transformers import AutoConfig, AutoModelForPreTraining

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    add_noise,
)
from modeling_nim.configuration_nim import MODEL_SIZES
from modeling_nim.runs.machine import count_flops


STATISTICS = pytest.mark.parametrize("normalized", [True, False], ids=["normalized patches", "raw pixels"])


def masked(**fields):
    return nim_mae(degradation="noise+mask", **fields)


def draws(sigma=40.0):
    generator = torch.Generator().manual_seed(3)
    return {
        "sigma": torch.full((4,), sigma),
        "epsilon": torch.randn(4, 3, 16, 16, generator=generator),
        "noise": torch.rand(4, 16, generator=generator),
    }


def test_a_draw_has_sigma_and_epsilon_and_the_order_of_patches():
    model = masked(sigma="uniform(10, 20)")
    found = model.draw(3, [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)])
    generator = torch.Generator().manual_seed(2)  # of the second image: sigma, then epsilon, then the order
    assert found["sigma"][1] == 10 + 10 * torch.rand(1, generator=generator)
    assert torch.equal(found["epsilon"][1], torch.randn(3, 16, 16, generator=generator))
    assert torch.equal(found["noise"][1], torch.rand(16, generator=generator))
    assert {name: draw.shape for name, draw in found.items()} == {
        "sigma": (3,),
        "epsilon": (3, 3, 16, 16),
        "noise": (3, 16),
    }


@pytest.mark.parametrize("given", [(), ("sigma",), ("epsilon",), ("noise",), ("sigma", "epsilon")])
def test_what_is_not_given_is_drawn_image_by_image(pixel_values, given):
    model = masked(sigma="uniform(0, 90)")
    some = {name: draw for name, draw in draws().items() if name in given}
    together = model(pixel_values, generator=torch.Generator().manual_seed(7), **some)
    generator = torch.Generator().manual_seed(7)
    alone = [
        model(image[None], generator=generator, **{name: draw[index, None] for name, draw in some.items()})
        for index, image in enumerate(pixel_values)
    ]
    assert torch.equal(together.degraded_pixel_values, torch.cat([output.degraded_pixel_values for output in alone]))


@STATISTICS
def test_the_encoder_sees_noisy_patches_and_the_loss_is_over_all_of_them(pixel_values, normalized):
    """By its parts: noise, then patches chosen, encoder, mask tokens, decoder, and the clean image as the target."""
    model, given = masked(norm_pix_loss=normalized), draws()
    output = model(pixel_values, **given)
    noisy = add_noise(pixel_values, given["sigma"], given["epsilon"], model.config.image_std)
    kept = given["noise"].argsort(dim=1)[:, :4]  # a quarter of 16
    assert torch.equal(output.mask, torch.ones(4, 16).scatter(1, kept, 0))
    encoder = model.vit
    embedded = encoder.embeddings.patch_embeddings(noisy) + encoder.embeddings.position_embeddings[:, 1:]
    tokens = embedded.gather(1, kept[..., None].expand(-1, -1, 32))
    token = (encoder.embeddings.cls_token + encoder.embeddings.position_embeddings[:, :1]).expand(4, -1, -1)
    hidden = torch.cat([token, tokens], dim=1)
    for layer in encoder.layers:
        hidden = layer(hidden)
    latent = model.decoder.decoder_embed(encoder.layernorm(hidden))
    full = model.decoder.mask_token.expand(4, 16, -1).scatter(1, kept[..., None].expand(-1, -1, 16), latent[:, 1:])
    hidden = torch.cat([latent[:, :1], full], dim=1) + model.decoder.decoder_pos_embed
    for layer in model.decoder.decoder_layers:
        hidden = layer(hidden)
    expected = model.decoder.decoder_pred(model.decoder.decoder_norm(hidden))[:, 1:]
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    target = model.patchify(pixel_values)
    if normalized:
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(output.loss, (output.logits - target).square().mean())


@STATISTICS
def test_without_masks_it_is_noise_alone(pixel_values, normalized):
    noise, both = nim_mae(norm_pix_loss=normalized), masked(norm_pix_loss=normalized, mask_ratio=0)
    both.load_state_dict(noise.state_dict())
    given = draws()
    order = given.pop("noise")
    expected, found = noise(pixel_values, **given), both(pixel_values, **given)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.reconstruction, expected.reconstruction)
    assert torch.equal(both.purify(pixel_values, **given), noise.purify(pixel_values, **given))
    assert found.mask is None and not both.decoder.mask_token.requires_grad
    generators = [[torch.Generator().manual_seed(seed) for seed in range(4)] for _ in range(2)]
    assert torch.equal(both.draw(4, generators[0])["epsilon"], noise.draw(4, generators[1])["epsilon"])
    with pytest.raises(ValueError, match='here it is "noise\\+mask" with mask_ratio 0: use `epsilon`'):
        both(pixel_values, **given, noise=order)


@STATISTICS
def test_without_noise_it_is_masks_alone_but_for_what_is_scored(pixel_values, normalized):
    mask, both = nim_mae(degradation="mask", norm_pix_loss=normalized), masked(norm_pix_loss=normalized)
    both.load_state_dict(mask.state_dict())
    given = draws(sigma=0.0)
    expected, found = mask(pixel_values, noise=given["noise"]), both(pixel_values, **given)
    for field in ("logits", "mask", "reconstruction", "degraded_pixel_values"):
        assert torch.equal(found[field], expected[field]), field
    hidden = found.mask.bool()
    seen = mask.forward_loss(pixel_values, type(found)(**{**found, "mask": (~hidden).float()}))
    torch.testing.assert_close(found.loss, 0.75 * expected.loss + 0.25 * seen)
    purified = both.patchify(both.purify(pixel_values, **given))
    pasted = mask.patchify(mask.purify(pixel_values, noise=given["noise"]))
    assert torch.equal(purified[hidden], pasted[hidden])
    assert not torch.isclose(purified[~hidden], pasted[~hidden]).all(dim=-1).any()  # noisy patches are not pasted back


def test_a_hidden_pixel_changes_nothing_and_a_visible_one_has_a_gradient(pixel_values):
    model, given = masked(norm_pix_loss=False), draws()
    images = pixel_values.clone().requires_grad_()
    output = model(images, **given)
    output.reconstruction.square().sum().backward()
    size = model.patchify(images.grad).abs().sum(dim=-1)
    assert (size[output.mask.bool()] == 0).all() and (size[~output.mask.bool()] > 0).all()


def test_a_saved_model_purifies_with_and_without_masks(tmp_path, pixel_values):
    model, given = masked(norm_pix_loss=False), draws()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path).eval()
    assert (loaded.config.degradation, loaded.config.mask_ratio) == ("noise+mask", 0.75)
    assert torch.equal(loaded.purify(pixel_values, **given), model.purify(pixel_values, **given))
    without = AutoModelForPreTraining.from_pretrained(tmp_path, mask_ratio=0).eval()
    noise = nim_mae(norm_pix_loss=False)
    noise.load_state_dict(model.state_dict())
    order = given.pop("noise")
    assert torch.equal(without.purify(pixel_values, **given), noise.purify(pixel_values, **given))
    without.save_pretrained(tmp_path / "without")
    assert AutoConfig.from_pretrained(tmp_path / "without").mask_ratio == 0
    half = AutoModelForPreTraining.from_pretrained(tmp_path, mask_ratio=0.5).eval()
    assert half(pixel_values, noise=order, **given).mask.sum(dim=1).tolist() == [8.0] * 4
    classifier, report = NIMForImageClassification.from_pretrained(tmp_path, num_labels=5, output_loading_info=True)
    assert {key.partition(".")[0] for key in report["missing_keys"]} == {"fc_norm", "classifier"}
    assert not report["unexpected_keys"] and not hasattr(classifier.config, "mask_ratio")
    assert torch.equal(classifier.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)


def test_the_defense_passes_sigma_epsilon_and_masks_on(pixel_values):
    model = NIMPurifiedImageClassification.from_parts(masked(norm_pix_loss=False), CLASSIFIERS["mae"](), sigma=50)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    found = model.draw(4, generators, num_votes=2)
    assert found["noise"].shape == (4, 2, 16) and (found["sigma"] == 50).all()
    output = model(pixel_values, **found)
    first = {name: draw[:, 0] for name, draw in found.items()}
    alone = model.purifier(pixel_values, **first)
    assert torch.equal(output.degraded_pixel_values, alone.degraded_pixel_values)
    shown = output.degraded_pixel_values.permute(0, 2, 3, 1).abs().sum(dim=-1)
    assert (shown == 0).float().mean(dim=(1, 2)).tolist() == [0.75] * 4
    torch.testing.assert_close(output.purified_pixel_values, model.purifier.purify(pixel_values, **first))


def test_a_shift_that_the_noise_takes_back_changes_nothing(pixel_values):
    """What certificates rest on: the answer is a function of the noisy image and of masks that do not look at it."""
    model, given = masked(norm_pix_loss=False), draws(sigma=30.0)
    shift = 0.2 * torch.randn(4, 3, 16, 16)
    std = torch.tensor(model.config.image_std).view(1, 3, 1, 1)
    taken_back = given | {"epsilon": given["epsilon"] - shift * std * 255 / 30}
    first, second = model.purify(pixel_values, **given), model.purify(pixel_values + shift, **taken_back)
    assert relative_error(second, first) < 1e-5


def training_gflops(config: NIMConfig) -> float:
    """Of one image, forward and backward, without computing anything."""
    with torch.device("meta"):
        model = NIMForPreTraining(config)
        images = torch.empty(1, 3, config.image_size, config.image_size)
        hidden = torch.empty(1, (config.image_size // config.patch_size) ** 2) if config.hides_patches else None

        def step():
            model.forward_loss(images, model.reconstruct(images, hidden, images)).backward()

        return count_flops(step) / 1e9


def test_masks_save_more_than_half_of_the_arithmetic_of_training():
    """ViT-B at 224 with MAE's decoder: 58.5 instead of 137.7 GFLOP an image."""
    sizes = MODEL_SIZES["base"]
    assert training_gflops(NIMConfig(**sizes, degradation="noise+mask")) == pytest.approx(58.46, abs=0.01)
    assert training_gflops(NIMConfig(**sizes)) == pytest.approx(137.73, abs=0.01)


def test_the_classifier_has_no_decoder():
    config = NIMClassifierConfig(**TINY, num_labels=5)
    assert not any("decoder" in name for name, _ in NIMForImageClassification(config).named_parameters())
    assert not set(TINY_DECODER) & set(config.to_dict())
