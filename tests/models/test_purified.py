"""The defended classifier of Eq. 9: composition, votes, generators, other people's classifiers, saving."""

import copy

import pytest
import torch
from conftest import TINY, TINY_DECODER
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from modeling_nim import (
    NIMConfig,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    NIMSimMIMConfig,
    NIMSimMIMForPreTraining,
    denormalize,
    image_processor_for,
    normalize,
)


@pytest.fixture
def model(purifier, classifier) -> NIMPurifiedImageClassification:
    return NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_the_parts_in_a_row(model, purifier, classifier, pixel_values):
    epsilon = torch.randn_like(pixel_values)
    expected = classifier(purifier.purify(pixel_values, sigma=30, epsilon=epsilon)).logits
    torch.testing.assert_close(model(pixel_values, epsilon=epsilon).logits, expected)
    labels = torch.tensor([0, 1, 2, 3])
    loss = torch.nn.functional.cross_entropy(expected, labels)
    torch.testing.assert_close(model(pixel_values, epsilon=epsilon, labels=labels).loss, loss)
    assert model.purifier is purifier and model.classifier is classifier


def test_noise_is_drawn_anew_and_a_seed_repeats_it(model, pixel_values):
    assert not torch.equal(model(pixel_values).logits, model(pixel_values).logits)
    before = torch.get_rng_state()
    assert torch.equal(model(pixel_values, generator=seeded(4)).logits, model(pixel_values, generator=seeded(4)).logits)
    assert torch.equal(torch.get_rng_state(), before)


def test_votes_average_probabilities(model, pixel_values):
    epsilon = torch.randn(4, 3, *pixel_values.shape[1:])  # (B, K, 3, H, W)
    each = torch.stack([model(pixel_values, epsilon=epsilon[:, k]).logits.softmax(-1) for k in range(3)])
    voted = model(pixel_values, epsilon=epsilon).logits
    torch.testing.assert_close(voted.softmax(-1), each.mean(0))
    torch.testing.assert_close(voted.exp().sum(-1), torch.ones(4))


@pytest.mark.parametrize("sigma", [30, "gamma(25, 3)", torch.tensor([10.0, 20.0, 30.0, 40.0])])
def test_a_generator_gives_the_same_answer_at_any_batch_size(model, pixel_values, sigma):
    together, one_by_one = seeded(1), seeded(1)
    batch = model(pixel_values, sigma=sigma, generator=together, num_votes=3).logits
    singles = [
        model(
            pixel_values[i : i + 1],
            sigma=sigma[i : i + 1] if isinstance(sigma, torch.Tensor) else sigma,
            generator=one_by_one,
            num_votes=3,
        ).logits
        for i in range(4)
    ]
    torch.testing.assert_close(batch, torch.cat(singles))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_votes": 0}, "at least 1, got 0"),
        ({"sigma": -5}, "sigma must be >= 0"),
        ({"num_votes": 2, "epsilon": torch.zeros(4, 3, 16, 16)}, r"\(B, 2, 3, H, W\)"),
        ({"num_votes": 2, "epsilon": torch.zeros(4, 3, 3, 16, 16)}, "holds 3 draws for num_votes=2"),
    ],
)
def test_bad_arguments_are_refused(model, pixel_values, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model(pixel_values, **kwargs)


def test_parts_that_do_not_fit_are_refused(purifier, classifier):
    with pytest.raises(ValueError, match="NIMForImageClassification cannot purify"):
        NIMPurifiedImageClassification.from_parts(classifier, classifier)
    grey = ViTForImageClassification(ViTConfig(**TINY, num_channels=1))
    with pytest.raises(ValueError, match="3 channels and the classifier takes 1"):
        NIMPurifiedImageClassification.from_parts(purifier, grey)


def test_any_classifier_with_its_own_size_and_normalisation(purifier, pixel_values):
    other = ViTForImageClassification(ViTConfig(**{**TINY, "image_size": 24}, num_labels=3)).eval()
    half = [0.5, 0.5, 0.5]
    model = NIMPurifiedImageClassification.from_parts(
        purifier, other, classifier_image_mean=half, classifier_image_std=half
    )
    seen = model.prepare_for_classifier(pixel_values)
    images_01 = denormalize(pixel_values, model.config.image_mean, model.config.image_std)
    assert seen.shape == (4, 3, 24, 24)
    resized = torch.nn.functional.interpolate(images_01, (24, 24), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(seen, normalize(resized, half, half), atol=1e-5, rtol=1e-5)
    images = pixel_values.clone().requires_grad_()
    model(images, epsilon=torch.randn_like(images), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert images.grad.abs().max() > 0
    assert model.config.num_labels == 3


def test_a_classifier_that_does_not_state_its_normalisation_is_taken_with_a_warning(purifier, pixel_values):
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    ).eval()
    with pytest.warns(UserWarning, match="ResNetForImageClassification does not say how its images are normalised"):
        model = NIMPurifiedImageClassification.from_parts(purifier, resnet)
    assert model(pixel_values).logits.shape == (4, 2)


def test_the_normalisation_is_found_in_the_processor_saved_with_the_classifier(purifier, tmp_path, recwarn):
    other = ViTForImageClassification(ViTConfig(**TINY))
    other.save_pretrained(tmp_path)
    config = purifier.config.__class__(**{**TINY, **TINY_DECODER}, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    image_processor_for(config).save_pretrained(tmp_path)
    model = NIMPurifiedImageClassification.from_parts(purifier, ViTForImageClassification.from_pretrained(tmp_path))
    assert model.config.classifier_image_mean == [0.1] * 3 and model.config.classifier_image_std == [0.2] * 3
    assert not [w for w in recwarn if "normalised" in str(w.message)]


def test_masked_purifiers_serve_too(classifier, pixel_values):
    mae = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, degradation="mask")).eval()
    simmim = NIMSimMIMForPreTraining(NIMSimMIMConfig(**TINY, degradation="mask", mask_patch_size=8)).eval()
    for masked in (mae, simmim):
        model = NIMPurifiedImageClassification.from_parts(masked, classifier)
        a, b = (model(pixel_values, generator=seeded(3), num_votes=2).logits for _ in range(2))
        assert torch.equal(a, b) and not torch.equal(a, model(pixel_values).logits)


def test_saving_loading_and_the_pipeline(model, tmp_path, pixel_values):
    model.classifier.config.id2label = dict(enumerate("abcde"))
    model = NIMPurifiedImageClassification.from_parts(model.purifier, model.classifier, sigma="uniform(10, 30)")
    model.save_pretrained(tmp_path)
    image_processor_for(model.config).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is NIMPurifiedImageClassification and loaded.config.sigma == "uniform(10, 30)"
    expected = model(pixel_values, generator=seeded(2), num_votes=2).logits
    assert torch.equal(loaded(pixel_values, generator=seeded(2), num_votes=2).logits, expected)

    image = Image.new("RGB", (40, 30), (200, 30, 90))
    image.save(tmp_path / "x.png")
    classify = pipeline("image-classification", model=str(tmp_path))
    for answer in classify([image, str(tmp_path / "x.png")], batch_size=2):
        assert {entry["label"] for entry in answer} == set("abcde")
        assert sum(entry["score"] for entry in answer) == pytest.approx(1, abs=1e-5)


def test_gradient_checkpointing_reaches_both_parts(model):
    model.gradient_checkpointing_enable()
    layers = [*model.purifier.vit.layers, *model.purifier.decoder.decoder_layers, *model.classifier.vit.layers]
    assert all(layer.gradient_checkpointing for layer in layers)


def test_parts_of_different_precision(purifier, classifier, pixel_values):
    epsilon = torch.randn_like(pixel_values)
    expected = NIMPurifiedImageClassification.from_parts(purifier, classifier)(pixel_values, epsilon=epsilon).logits
    model = NIMPurifiedImageClassification.from_parts(purifier, copy.deepcopy(classifier).bfloat16())
    logits = model(pixel_values, epsilon=epsilon).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() / expected.norm() < 2e-2
    logits = model.bfloat16()(pixel_values.bfloat16(), epsilon=epsilon, num_votes=1).logits
    assert (logits - expected).norm() / expected.norm() < 5e-2


def test_classifier_whose_configuration_belongs_to_several_classes(purifier, pixel_values, tmp_path):
    config = DeiTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=3,
    )
    normalisation = {"classifier_image_mean": [0.5] * 3, "classifier_image_std": [0.5] * 3}
    for deit in (DeiTForImageClassification(config), DeiTForImageClassificationWithTeacher(config)):
        model = NIMPurifiedImageClassification.from_parts(purifier, deit.eval(), **normalisation)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert type(loaded.classifier) is type(deit)
        epsilon = torch.randn_like(pixel_values)
        assert torch.equal(loaded(pixel_values, epsilon=epsilon).logits, model(pixel_values, epsilon=epsilon).logits)
