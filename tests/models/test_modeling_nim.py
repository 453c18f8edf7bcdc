"""NIM-MAE and its classifier: what they compute, what they refuse, and what survives saving."""

import pytest
import torch
from conftest import TINY, TINY_DECODER
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMModel,
    denormalize,
)
from modeling_nim.modeling_nim import DropPath, resize_position_table, sincos_position_table


def test_the_loss_is_the_mean_square_over_all_patches_and_the_target_is_the_clean_image(purifier, pixel_values):
    output = purifier(pixel_values, sigma=50, epsilon=torch.randn_like(pixel_values))
    patches = purifier.patchify(pixel_values)
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(output.loss, (output.logits - (patches - mean) / std).square().mean())
    torch.testing.assert_close(output.reconstruction, purifier.unpatchify(output.logits * std + mean))


def test_without_norm_pix_loss_the_prediction_is_the_image(pixel_values):
    model = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, norm_pix_loss=False)).eval()
    output = model(pixel_values, sigma=50)
    torch.testing.assert_close(output.loss, (output.reconstruction - pixel_values).square().mean())


def test_a_convolutional_stem_sees_beyond_its_patch_and_the_linear_one_does_not(pixel_values):
    """Two steps of 3x3 windows see three pixels beyond the patch on the upper and left side, none on the others."""
    stem = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, patch_embedding="convolutional"))
    convolutions = [m for m in stem.vit.embeddings.patch_embeddings.projection if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride) for c in convolutions] == [(3, 16, (2, 2)), (16, 32, (2, 2))]
    for model, rows in [
        (stem, [1, 2, 3, 4, 5, 6, 7]),
        (NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER)), [4, 5, 6, 7]),
    ]:
        images = pixel_values[:1].clone().requires_grad_()
        tokens = model.vit.embeddings.patch_embeddings(images)  # (1, 16, 32)
        tokens[0, 4].abs().sum().backward()  # the first patch of the second row
        assert tokens.shape == (1, 16, 32)
        assert images.grad[0].abs().sum(dim=(0, 2)).nonzero().flatten().tolist() == rows


def test_sigma_defaults_to_the_configuration_and_is_drawn_per_image(purifier, pixel_values):
    def drawn(**kwargs):
        return purifier(pixel_values, generator=torch.Generator().manual_seed(5), **kwargs).degraded_pixel_values

    assert torch.equal(drawn(), drawn(sigma="gamma(25, 3)"))
    spread = (drawn() - pixel_values).flatten(1).std(dim=1)
    assert spread.unique().numel() == 4, "one sigma for each image"


def test_mask_mode_hides_three_quarters_and_pastes_the_visible_patches_back(pixel_values):
    model = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, degradation="mask")).eval()
    inside = pixel_values.clamp(-1.5, 1.5)  # well inside the image range, so that the clamp changes no visible pixel
    noise = torch.rand(4, 16)
    output = model(inside, noise=noise)
    assert output.mask.sum(dim=1).tolist() == [12.0] * 4
    kept = noise.argsort(dim=1)[:, :4]
    assert output.mask.gather(1, kept).sum() == 0
    purified = model.patchify(model.purify(inside, noise=noise))
    visible = output.mask == 0
    assert torch.equal(purified[visible], model.patchify(inside)[visible])
    assert not torch.equal(purified[~visible], model.patchify(inside)[~visible])


def test_mask_mode_draws_its_order_from_the_generator_whatever_the_batch_size(pixel_values):
    model = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, degradation="mask")).eval()
    together, one_by_one = torch.Generator().manual_seed(2), torch.Generator().manual_seed(2)
    batch = model.purify(pixel_values, generator=together)
    singles = torch.cat([model.purify(image[None], generator=one_by_one) for image in pixel_values])
    torch.testing.assert_close(batch, singles)


def test_purified_images_are_in_the_image_range(purifier, pixel_values):
    config = purifier.config
    images_01 = denormalize(purifier.purify(3 * pixel_values), config.image_mean, config.image_std)
    assert images_01.min() >= -1e-6 and images_01.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sigma": -1}, "sigma must be >= 0"),
        ({"sigma": "beta(1, 2)"}, "not understood"),
        ({"noise": torch.rand(4, 16)}, "use `epsilon`"),
        ({"interpolate_pos_encoding": True}, "16x16 images only"),
    ],
)
def test_bad_arguments_are_refused(purifier, pixel_values, kwargs, message):
    with pytest.raises(ValueError, match=message):
        purifier(pixel_values, **kwargs)


def test_a_wrong_image_size_is_named_with_the_remedy(purifier, classifier):
    for model in (purifier, classifier):
        with pytest.raises(ValueError, match="images are 20x20, the model takes 16x16.*image processor"):
            model(torch.zeros(1, 3, 20, 20))


def test_mask_mode_refuses_sigma(pixel_values):
    model = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, degradation="mask"))
    with pytest.raises(ValueError, match="this model hides patches"):
        model(pixel_values, sigma=30)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma": "-3"}, "sigma must be >= 0"),
        ({"image_size": 30, "patch_size": 8}, "multiple"),
        ({"degradation": "mask", "patch_statistics": "noisy"}, "no.*statistics of its own"),
        ({"degradation": "noise+mask", "patch_statistics": "noisy"}, "no.*statistics of its own"),
        ({"degradation": "mask", "mask_ratio": 0}, "mask_ratio must be between 0 and 1, got 0"),
        ({"degradation": "noise+mask", "mask_ratio": 1.0}, "mask_ratio must be between 0 and 1, or 0, got 1.0"),
        ({"degradation": "noise+mask", "mask_ratio": -0.5}, "mask_ratio must be between 0 and 1, or 0, got -0.5"),
        ({"degradation": "noise+mask", "patch_embedding": "convolutional"}, "show hidden pixels"),
        ({"degradation": "blur"}, "blur"),
        ({"patch_embedding": "convolutional", "patch_size": 14}, "patch_size 14 must be a power of two"),
        ({"patch_embedding": "convolutional", "hidden_size": 756}, "hidden_size 756 a multiple of 8"),
        ({"patch_embedding": "convolutional", "degradation": "mask"}, "show hidden pixels"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        NIMConfig(**fields)


def test_positions_are_the_sincos_tables_also_when_trained_from_scratch(purifier, classifier):
    # The formula, entry by entry: patch (row, column), the column in the first half, then the row; sines, then cosines.
    import math

    def entry(row, column, d, dim):
        position, d = (column, d) if d < dim // 2 else (row, d - dim // 2)
        quarter = dim // 4
        angle = position / 10000 ** ((d % quarter) / quarter)
        return math.sin(angle) if d < quarter else math.cos(angle)

    for table, dim in [
        (purifier.vit.embeddings.position_embeddings, 32),
        (purifier.decoder.decoder_pos_embed, 16),
        (classifier.vit.embeddings.position_embeddings, 32),
    ]:
        expected = torch.tensor([[entry(n // 4, n % 4, d, dim) for d in range(dim)] for n in range(16)])
        torch.testing.assert_close(table[0, 1:], expected)
        assert table[0, 0].abs().max() == 0
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sincos_position_table(2, 6)


def test_every_trainable_parameter_gets_a_gradient(purifier, pixel_values):
    """DDP stops at a trainable parameter outside the graph."""
    for degradation, mask_ratio in (("noise", 0.75), ("mask", 0.75), ("noise+mask", 0.75), ("noise+mask", 0)):
        config = NIMConfig(**TINY, **TINY_DECODER, degradation=degradation, mask_ratio=mask_ratio)
        model = NIMForPreTraining(config).train()
        model(pixel_values).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_positions_are_interpolated_in_two_dimensions(classifier):
    table = classifier.vit.embeddings.position_embeddings
    larger = resize_position_table(table, (4, 8))  # only the columns change
    grid = larger[0, 1:].reshape(4, 8, 32)
    torch.testing.assert_close(grid[:, :, 16:], table[0, 1:].reshape(4, 4, 32)[:, :1, 16:].expand(-1, 8, -1))
    logits = classifier(torch.randn(2, 3, 24, 24), interpolate_pos_encoding=True).logits
    assert logits.shape == (2, 5) and logits.isfinite().all()


def test_the_classifier_pools_the_patches_and_normalizes_after(classifier, pixel_values):
    tokens = classifier.vit(pixel_values).last_hidden_state  # no norm before the pooling
    expected = classifier.classifier(classifier.fc_norm(tokens[:, 1:].mean(dim=1)))
    torch.testing.assert_close(classifier(pixel_values).logits, expected)
    labels = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(
        classifier(pixel_values, labels=labels).loss, torch.nn.functional.cross_entropy(expected, labels)
    )
    with pytest.raises(ValueError, match="soft targets"):
        classifier(pixel_values, labels=torch.rand(4, 5))


def test_drop_path_drops_whole_branches_and_keeps_the_mean():
    drop = DropPath(0.25).train()
    out = drop(torch.ones(20000, 2, 2))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (out[:, 0, 0] == out[:, 1, 1]).all() and out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(out), out)


def test_drop_path_rises_with_depth(pixel_values):
    model = NIMForImageClassification(NIMClassifierConfig(**{**TINY, "num_hidden_layers": 3}, drop_path_rate=0.2))
    assert [layer.drop_path.rate for layer in model.vit.layers] == [0.0, 0.1, 0.2]


def test_fine_tuning_starts_from_a_pretrained_directory(purifier, tmp_path, caplog):
    purifier.save_pretrained(tmp_path)
    model, info = NIMForImageClassification.from_pretrained(tmp_path, num_labels=7, output_loading_info=True)
    fresh = {"fc_norm.weight", "fc_norm.bias", "classifier.weight", "classifier.bias"}
    assert info["missing_keys"] == fresh and info["unexpected_keys"] == set() and not info["mismatched_keys"]
    loaded, source = model.vit.state_dict(), purifier.vit.state_dict()
    assert all(torch.equal(value, source[key]) for key, value in loaded.items())
    assert model.classifier.weight.shape == (7, 32) and model.classifier.weight.std().item() == pytest.approx(
        2e-5, rel=0.3
    )
    assert torch.equal(model.fc_norm.weight, torch.ones(32))
    assert "sigma" not in model.config.to_dict() and model.config.model_type == "nim_classifier"
    assert "of type" not in caplog.text, "no warning about the model's type"


@pytest.mark.parametrize(
    ("cls", "config", "auto"),
    [
        (NIMModel, NIMConfig(**TINY, **TINY_DECODER), AutoModel),
        (NIMForPreTraining, NIMConfig(**TINY, **TINY_DECODER, sigma="uniform(0, 30)"), AutoModelForPreTraining),
        (
            NIMForPreTraining,
            NIMConfig(**TINY, **TINY_DECODER, norm_pix_loss=False, patch_embedding="convolutional"),
            AutoModelForPreTraining,
        ),
        (NIMForImageClassification, NIMClassifierConfig(**TINY, num_labels=5), AutoModelForImageClassification),
    ],
)
def test_saving_and_loading_changes_nothing(cls, config, auto, tmp_path, pixel_values):
    model = cls(config).eval()
    model.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    for loader in (cls, auto):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is cls and not any(
            info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        torch.manual_seed(1)
        expected = model(pixel_values)
        torch.manual_seed(1)
        torch.testing.assert_close(loaded(pixel_values).to_tuple(), expected.to_tuple(), rtol=0, atol=0)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
