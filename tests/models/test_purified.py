"""The defended classifier of Eq. 9: composition, votes, generators, other people's classifiers, saving."""

import copy

import pytest
import torch
from conftest import TINY, TINY_DECODER
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_nim import (
    NIMConfig,
    NIMForPreTraining,
    NIMPurifiedConfig,
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


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_votes_on_several_labels_average_probabilities_and_are_finite_where_these_are_0_and_1(
    scale, model, pixel_values
):
    model.config.problem_type = "multi_label_classification"
    torch.nn.init.normal_(model.classifier.classifier.weight, std=scale)
    epsilon, labels = torch.randn(4, 3, *pixel_values.shape[1:]), torch.ones(4, model.config.num_labels)
    each = torch.stack([model(pixel_values, epsilon=epsilon[:, k]).logits for k in range(3)])
    voted = model(pixel_values, epsilon=epsilon, labels=labels)
    torch.testing.assert_close(voted.logits.sigmoid(), each.sigmoid().mean(0))
    assert voted.logits.isfinite().all() and voted.loss.isfinite()
    assert (each.abs().max() > 100) == (scale > 1)


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
        ({"num_votes": 0}, "at least 1 and at most 100000, got 0"),
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
    gray = ViTForImageClassification(ViTConfig(**TINY, num_channels=1))
    with pytest.raises(ValueError, match="3 channels and the classifier takes 1"):
        NIMPurifiedImageClassification.from_parts(purifier, gray)


def test_any_classifier_with_its_own_size_and_normalization(purifier, pixel_values):
    other = ViTForImageClassification(ViTConfig(**{**TINY, "image_size": 24}, num_labels=3)).eval()
    half = [0.5, 0.5, 0.5]
    model = NIMPurifiedImageClassification.from_parts(
        purifier, other, image_size=16, classifier_image_mean=half, classifier_image_std=half
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


def test_a_classifier_that_does_not_state_its_normalization_is_taken_with_a_warning(purifier, pixel_values):
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    ).eval()
    with pytest.warns(UserWarning, match="ResNetForImageClassification does not say how its images are normalized"):
        model = NIMPurifiedImageClassification.from_parts(purifier, resnet)
    assert model(pixel_values).logits.shape == (4, 2)


def test_the_normalization_is_found_in_the_processor_saved_with_the_classifier(purifier, tmp_path, recwarn):
    other = ViTForImageClassification(ViTConfig(**TINY))
    other.save_pretrained(tmp_path)
    config = purifier.config.__class__(**{**TINY, **TINY_DECODER}, image_mean=[0.1] * 3, image_std=[0.2] * 3)
    image_processor_for(config).save_pretrained(tmp_path)
    model = NIMPurifiedImageClassification.from_parts(purifier, ViTForImageClassification.from_pretrained(tmp_path))
    assert model.config.classifier_image_mean == [0.1] * 3 and model.config.classifier_image_std == [0.2] * 3
    assert not [w for w in recwarn if "normalized" in str(w.message)]


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
    normalization = {"classifier_image_mean": [0.5] * 3, "classifier_image_std": [0.5] * 3}
    for deit in (DeiTForImageClassification(config), DeiTForImageClassificationWithTeacher(config)):
        model = NIMPurifiedImageClassification.from_parts(purifier, deit.eval(), **normalization)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert type(loaded.classifier) is type(deit)
        epsilon = torch.randn_like(pixel_values)
        assert torch.equal(loaded(pixel_values, epsilon=epsilon).logits, model(pixel_values, epsilon=epsilon).logits)


def foreign(size: int = 24, **fields) -> ViTForImageClassification:
    """A classifier of 24x24 images that is not of this package."""
    torch.manual_seed(3)
    return ViTForImageClassification(ViTConfig(**{**TINY, "image_size": size, "num_labels": 3, **fields})).eval()


HALF = {"classifier_image_mean": [0.5] * 3, "classifier_image_std": [0.5] * 3}


def test_a_larger_classifier_gets_images_that_were_purified_at_its_size(purifier, tmp_path):
    classifier = foreign()
    with pytest.warns(UserWarning, match="purified at 24x24, in overlapping tiles. Pass image_size=16"):
        model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30, **HALF)
    assert model.config.image_size == 24
    images = torch.randn(2, 3, 24, 24)
    epsilon = torch.randn_like(images)
    output = model(images, epsilon=epsilon)
    purified = purifier.purify(images, sigma=30, epsilon=epsilon)
    assert torch.equal(output.purified_pixel_values, purified)
    images_01 = denormalize(purified, model.config.image_mean, model.config.image_std)
    torch.testing.assert_close(output.logits, classifier(2 * images_01 - 1).logits, atol=1e-4, rtol=1e-4)
    assert model.draw(2, num_votes=3)["epsilon"].shape == (2, 3, 3, 24, 24)
    with pytest.raises(ValueError, match="images are 16x16, the model takes 24x24"):
        model(torch.randn(2, 3, 16, 16))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(images, epsilon=epsilon).logits, output.logits)
    shown = pipeline("image-classification", str(tmp_path))(Image.new("RGB", (50, 40)), seed=1, return_purified=True)
    assert shown["purified"].size == (50, 40)
    assert AutoImageProcessor.from_pretrained(tmp_path).size["height"] == 24


def test_the_purifier_s_own_size_can_be_asked_for_and_no_smaller_one(purifier, recwarn):
    model = NIMPurifiedImageClassification.from_parts(purifier, foreign(), image_size=16, **HALF)
    assert (model.config.image_size, model.config.classifier_image_size) == (16, 24)
    assert not [w for w in recwarn if "purified at" in str(w.message)]
    with pytest.raises(Exception, match="image_size 12 is below the purifier's 16"):
        NIMPurifiedImageClassification.from_parts(purifier, foreign(12), image_size=12, **HALF)


def test_a_configuration_of_before_image_size_means_the_purifier_s(purifier):
    config = NIMPurifiedImageClassification.from_parts(purifier, foreign(), image_size=16, **HALF).config.to_dict()
    del config["image_size"], config["image_geometry"]
    assert NIMPurifiedConfig(**config).image_size == 16


IMAGE = Image.fromarray((torch.rand(50, 70, 3) * 255).byte().numpy())


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        (
            ViTImageProcessorPil(
                size={"height": 24, "width": 24}, resample=2, image_mean=[0.4] * 3, image_std=[0.2] * 3
            ),
            24,
        ),
        (
            ViTImageProcessorPil(
                size={"shortest_edge": 30}, do_center_crop=True, crop_size={"height": 24, "width": 24}, resample=3
            ),
            24,
        ),
        (ViTImageProcessorPil(size={"height": 24, "width": 24}, do_rescale=False, image_mean=[127.5] * 3), 24),
        (ViTImageProcessorPil(size={"height": 24, "width": 24}, rescale_factor=1 / 127.5, do_normalize=False), 24),
        (ConvNextImageProcessorPil(size={"shortest_edge": 24}, crop_pct=0.8), 24),
        (EfficientNetImageProcessorPil(size={"height": 24, "width": 24}, rescale_offset=True, include_top=True), 24),
    ],
    ids=["squeezed", "cropped", "not rescaled", "to 2 and not normalized", "shortest edge", "with an offset"],
)
@pytest.mark.parametrize("name", ["ResNet", "RegNet"])
def test_the_defense_sees_what_the_classifier_s_own_processor_shows(name, processor, size, purifier, tmp_path):
    """Behind a purifier that changes nothing: processor and the step between the parts give the classifier's input."""
    model_class, config_class, kind = {
        "ResNet": (ResNetForImageClassification, ResNetConfig, {"layer_type": "basic"}),
        "RegNet": (RegNetForImageClassification, RegNetConfig, {"layer_type": "y", "groups_width": 8}),
    }[name]
    config = config_class(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=2, **kind)
    model_class(config).save_pretrained(tmp_path / "classifier")
    processor.save_pretrained(tmp_path / "classifier")
    classifier = model_class.from_pretrained(tmp_path / "classifier").eval()
    with pytest.warns(UserWarning, match="purified at 24x24"):
        model = NIMPurifiedImageClassification.from_parts(purifier, classifier)
    assert (model.config.image_size, model.config.classifier_image_size) == (size, size)
    model.save_pretrained(tmp_path / "defended")
    own = AutoImageProcessor.from_pretrained(tmp_path / "defended")
    seen = model.prepare_for_classifier(own(IMAGE, return_tensors="pt")["pixel_values"])
    expected = processor(IMAGE, return_tensors="pt")["pixel_values"]
    scale = expected.max() - expected.min()
    torch.testing.assert_close(seen / scale, expected.float() / scale, atol=1e-4, rtol=0)


def small_resnet(folder, processor):
    """A classifier as it is loaded, with its processor beside it; its configuration tells no size."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return ResNetForImageClassification.from_pretrained(folder).eval()


def test_a_processor_that_keeps_the_size_of_images_tells_none(purifier, tmp_path):
    classifier = small_resnet(tmp_path, ViTImageProcessorPil(do_resize=False))
    with pytest.warns(UserWarning, match="does not say which image size.*the purifier's, 16x16"):
        model = NIMPurifiedImageClassification.from_parts(purifier, classifier)
    assert (model.config.image_size, model.config.classifier_image_size) == (16, None)
    assert model.config.classifier_image_mean == pytest.approx([0.5] * 3)  # the rest is known


def test_levels_that_stay_in_0_to_255_have_six_digits(purifier, tmp_path):
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, do_rescale=False, do_normalize=False)
    model = NIMPurifiedImageClassification.from_parts(purifier, small_resnet(tmp_path, processor))
    assert model.config.classifier_image_mean == [0] * 3
    assert model.config.classifier_image_std == pytest.approx([1 / 255] * 3, rel=1e-6)
    levels = model.prepare_for_classifier(torch.zeros(1, 3, 16, 16))
    expected = 255 * torch.tensor(model.config.image_mean).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(levels, expected, atol=1e-4, rtol=0)


def test_the_configuration_asks_for_hidden_states_and_attentions_too(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    fields = {"output_hidden_states": True, "output_attentions": True, "attn_implementation": "eager"}
    asked = NIMPurifiedImageClassification.from_pretrained(tmp_path, **fields)
    depth = model.config.classifier_config.num_hidden_layers
    output = asked(pixel_values)
    assert (len(output.hidden_states), len(output.attentions)) == (depth + 1, depth)
    assert asked(pixel_values, output_hidden_states=False).hidden_states is None
    assert model(pixel_values).hidden_states is None


def test_a_classifier_that_does_not_tell_its_size_is_taken_with_a_warning(purifier, pixel_values):
    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    )
    with pytest.warns(UserWarning, match="does not say which image size.*the purifier's, 16x16"):
        model = NIMPurifiedImageClassification.from_parts(purifier, resnet, **HALF)
    assert model.config.image_size == 16 and model.config.classifier_image_size is None
    assert model.eval()(pixel_values).logits.shape == (4, 2)


class HomeMadeConfig(PreTrainedConfig):
    model_type = "home_made"
    image_size: int = 16
    image_mean: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: list[float] | tuple[float, ...] = (0.5, 0.5, 0.5)


class HomeMadeClassifier(PreTrainedModel):
    config_class = HomeMadeConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = torch.nn.Linear(3, config.num_labels)
        self.post_init()

    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.linear(pixel_values.mean(dim=(2, 3))))


def test_a_classifier_that_transformers_does_not_know_composes(purifier, pixel_values):
    classifier = HomeMadeClassifier(HomeMadeConfig(num_labels=4))
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier).eval()
    epsilon = torch.randn_like(pixel_values)
    output = model(pixel_values, epsilon=epsilon)
    expected = classifier(model.prepare_for_classifier(purifier.purify(pixel_values, sigma=30, epsilon=epsilon)))
    assert torch.equal(output.logits, expected.logits) and output.hidden_states is None
