"""NIM-SimMIM and SimMIM beyond the golden numbers: masks, saving, fine-tuning, other image sizes, refusals."""

import math

import pytest
import torch
from conftest import TINY

from modeling_nim import (
    NIMPurifiedImageClassification,
    NIMSimMIMClassifierConfig,
    NIMSimMIMConfig,
    NIMSimMIMForImageClassification,
    NIMSimMIMForPreTraining,
)
from modeling_nim.modeling_nim_simmim import relative_position_index, resize_relative_positions


def pretraining(degradation: str, **fields) -> NIMSimMIMForPreTraining:
    config = NIMSimMIMConfig(**{**TINY, "degradation": degradation, "mask_patch_size": 8, **fields})
    model = NIMSimMIMForPreTraining(config).eval()
    torch.nn.init.normal_(model.beit.shared_position_bias.relative_position_bias_table)
    return model


def test_masks_are_whole_squares_and_rounded_up(pixel_values):
    model = pretraining("mask", image_size=32, mask_ratio=0.6)
    mask = model(torch.randn(4, 3, 32, 32)).mask.view(4, 8, 8)
    squares = mask.view(4, 4, 2, 4, 2)
    assert (squares.float().mean(dim=(2, 4)) % 1 == 0).all()
    assert mask.float().sum(dim=(1, 2)).tolist() == [math.ceil(0.6 * 16) * 4] * 4
    assert not torch.equal(mask[0], mask[1])


def test_given_noise_masks_its_largest(pixel_values):
    noise = torch.tensor([[0.1, 0.9, 0.8, 0.7]]).repeat(4, 1)  # 2 x 2 squares, 3 of them hidden
    mask = pretraining("mask")(pixel_values, noise=noise).mask.view(4, 4, 4)
    assert not mask[:, :2, :2].any()
    assert mask.sum(dim=(1, 2)).tolist() == [12] * 4


def test_masked_loss_is_the_absolute_error_of_hidden_pixels(pixel_values):
    output = pretraining("mask")(pixel_values)
    hidden = output.mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1).bool()
    expected = (output.reconstruction - pixel_values)[hidden].abs().mean()
    torch.testing.assert_close(output.loss, expected)


def test_noisy_loss_is_the_absolute_error_of_all_pixels(pixel_values):
    output = pretraining("noise")(pixel_values)
    torch.testing.assert_close(output.loss, (output.reconstruction - pixel_values).abs().mean())
    assert output.mask is None


def test_logits_are_the_reconstruction_in_patches(pixel_values):
    output = pretraining("noise")(pixel_values)
    patch = output.reconstruction[1, :, 4:8, 8:12]  # row 1, column 2 of a 4 x 4 grid
    torch.testing.assert_close(output.logits[1, 6], patch.permute(1, 2, 0).flatten())


def test_masked_defense_keeps_the_visible_patches(pixel_values):
    model = pretraining("mask")
    mask = torch.zeros(4, 16)
    mask[:, 5] = 1
    images = pixel_values.clamp(-1.5, 1.5)
    purified = model.purify(images, bool_masked_pos=mask)
    changed = (purified != images).any(dim=1)
    assert changed[:, 4:8, 4:8].all()
    changed[:, 4:8, 4:8] = False
    assert not changed.any()


def test_a_generator_draws_masks_image_by_image(pixel_values):
    model = pretraining("mask")
    together = model(pixel_values, generator=torch.Generator().manual_seed(3)).mask
    generator = torch.Generator().manual_seed(3)
    alone = torch.cat([model(image[None], generator=generator).mask for image in pixel_values])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("degradation", ["noise", "mask"])
def test_every_trainable_parameter_gets_a_gradient(pixel_values, degradation):
    """Distributed training waits for each of them; the mask token is frozen where nothing is masked."""
    model = pretraining(degradation).train()
    model(pixel_values).loss.backward()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == ({"beit.embeddings.mask_token"} if degradation == "noise" else set())
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_fine_tuning_copies_the_shared_positions_to_every_layer(tmp_path, pixel_values):
    model = pretraining("noise")
    model.save_pretrained(tmp_path / "pretrained")
    classifier = NIMSimMIMForImageClassification.from_pretrained(tmp_path / "pretrained", num_labels=5).eval()
    shared = model.beit.shared_position_bias.relative_position_bias_table
    tables = [layer.relative_position_bias.relative_position_bias_table for layer in classifier.beit.layers]
    assert len(tables) == 2 and all(torch.equal(table, shared) for table in tables)
    assert len({table.data_ptr() for table in tables}) == 2  # copies, free to part in training
    # the encoder computes what it computed before, up to the norm that stays behind
    model.beit.layernorm = torch.nn.Identity()
    torch.testing.assert_close(
        classifier.beit(pixel_values).last_hidden_state, model.beit(pixel_values).last_hidden_state
    )
    classifier.save_pretrained(tmp_path / "finetuned")
    again, info = NIMSimMIMForImageClassification.from_pretrained(tmp_path / "finetuned", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again.eval()(pixel_values).logits, classifier(pixel_values).logits)


@pytest.mark.parametrize("degradation", ["noise", "mask"])
def test_saving_and_loading_changes_nothing(tmp_path, pixel_values, degradation):
    model = pretraining(degradation)
    model.save_pretrained(tmp_path)
    again, info = NIMSimMIMForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found, expected = (
        m.eval().purify(pixel_values, generator=torch.Generator().manual_seed(1)) for m in (again, model)
    )
    assert torch.equal(found, expected)


def test_relative_positions_are_interpolated_in_two_dimensions():
    """Each distance is resized along its own axis: a slope stays a slope, and down stays down; CLS entries stay."""
    down = torch.linspace(-1, 1, 23)[:, None].expand(23, 23)
    cls = torch.tensor([7.0, 8.0, 9.0])
    tables = torch.stack([torch.cat([grid.flatten(), cls]) for grid in (down, down.T)], dim=1)  # two heads
    resized = resize_relative_positions(tables, (8, 8))
    assert resized.shape == (15 * 15 + 3, 2)
    assert torch.equal(resized[-3:], cls[:, None].expand(3, 2))
    first, second = resized[:-3].T.view(2, 15, 15)
    torch.testing.assert_close(first, second.T)
    torch.testing.assert_close(first, first[:, :1].expand(15, 15))
    torch.testing.assert_close(first[:, 0], torch.linspace(-1, 1, 15), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="not that of a square window"):
        resize_relative_positions(torch.zeros(20, 1), (4, 4))


def test_fine_tuning_at_another_size_interpolates_once_as_the_model_does_on_the_fly(tmp_path):
    model = pretraining("noise")
    model.save_pretrained(tmp_path)
    classifier = NIMSimMIMForImageClassification.from_pretrained(tmp_path, image_size=24).eval()
    images = torch.randn(2, 3, 24, 24)
    model.beit.layernorm = torch.nn.Identity()
    torch.testing.assert_close(
        classifier.beit(images).last_hidden_state,
        model.beit(images, interpolate_pos_encoding=True).last_hidden_state,
    )


@pytest.mark.parametrize("size", [(24, 24), (16, 24), (8, 8)])
def test_other_sizes_are_refused_unless_asked_for(size):
    images = torch.randn(2, 3, *size)
    purifier = pretraining("noise")
    classifier = NIMSimMIMForImageClassification(NIMSimMIMClassifierConfig(**TINY, num_labels=3)).eval()
    for model in (purifier, classifier):
        with pytest.raises(ValueError, match=f"images are {size[0]}x{size[1]}, the model was made for 16x16"):
            model(images)
    assert purifier(images, interpolate_pos_encoding=True).reconstruction.shape == images.shape
    assert classifier(images, interpolate_pos_encoding=True).logits.shape == (2, 3)
    with pytest.raises(ValueError, match="multiples of 4"):
        purifier(torch.randn(1, 3, 18, 16), interpolate_pos_encoding=True)


def test_relative_position_index_counts_rows_then_columns():
    index = relative_position_index((2, 3))
    assert index[1 + 0, 1 + 5] == 0  # from the first corner to the last: the most negative distances
    assert index[1 + 5, 1 + 0] == 3 * 5 - 1
    assert index[1 + 1, 1 + 1] == 1 * 5 + 2  # no distance
    assert [index[0, 1], index[1, 0], index[0, 0]] == [15, 16, 17]


@pytest.mark.parametrize(
    ("degradation", "arguments", "message"),
    [
        ("noise", {"noise": torch.rand(4, 4)}, 'belong to degradation="mask"'),
        ("noise", {"bool_masked_pos": torch.ones(4, 16)}, 'belong to degradation="mask"'),
        ("mask", {"sigma": 30}, 'belong to degradation="noise"'),
        ("mask", {"noise": torch.rand(4, 16)}, r"pass \(4, 4\)"),
        ("mask", {"bool_masked_pos": torch.ones(4, 4)}, r"pass \(4, 16\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pixel_values, degradation, arguments, message):
    with pytest.raises(ValueError, match=message):
        pretraining(degradation)(pixel_values, **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_patch_size": 6}, "mask_patch_size 6"),
        ({"mask_patch_size": 32}, "mask_patch_size 32"),
        ({"mask_patch_size": 16}, "hides all of the 1 squares"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"image_size": 18}, "image_size 18"),
        ({"sigma": "-3"}, "sigma"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError) as error:
        NIMSimMIMConfig(**{**TINY, "degradation": "mask", "mask_patch_size": 8, **fields})
    assert message in str(error.value.__cause__ or error.value)


def test_behind_the_purified_model(tmp_path, pixel_values):
    """SimMIM parts in the defense, saved and loaded as one model."""
    classifier = NIMSimMIMForImageClassification(NIMSimMIMClassifierConfig(**TINY, num_labels=3)).eval()
    torch.nn.init.normal_(classifier.classifier.weight)
    model = NIMPurifiedImageClassification.from_parts(pretraining("noise"), classifier)
    model.save_pretrained(tmp_path)
    again = NIMPurifiedImageClassification.from_pretrained(tmp_path).eval()
    logits = [m(pixel_values, generator=torch.Generator().manual_seed(5)).logits for m in (model, again)]
    assert torch.equal(*logits)
    purified = model.purify(pixel_values, epsilon=torch.zeros_like(pixel_values))
    expected = classifier(purified).logits
    torch.testing.assert_close(model(pixel_values, epsilon=torch.zeros_like(pixel_values)).logits, expected)
