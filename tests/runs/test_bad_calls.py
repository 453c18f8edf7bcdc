"""What callers from Python get wrong: arguments of models, pipelines, attacks and certificates, named in the error."""

import io

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import pipeline

from modeling_nim import NIMPurifiedImageClassification, image_processor_for
from modeling_nim.robustness import as_target, attack, certify, evaluate
from modeling_nim.robustness.images import RowsSource


IMAGES_01, LABELS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3])
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
NAN = torch.full((3,), torch.nan)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            {"pixel_values": PIXELS.long()},
            r"pixel_values must be normalized images \(B, 3, H, W\) of floats, got .*int64",
        ),
        ({"pixel_values": PIXELS.byte()}, "pixel_values must be normalized images .*uint8"),
        ({"pixel_values": PIXELS[:, :1]}, r"pixel_values .* got \(3, 1, 16, 16\)"),
        ({"pixel_values": PIXELS[:, :, :8, :8]}, "the images are 8x8, the model takes 16x16"),
        ({"pixel_values": PIXELS.numpy()}, r"pixel_values must be .* in a tensor, got ndarray \(3, 3, 16, 16\)"),
        ({"pixel_values": [[1]]}, "pixel_values must be .* in a tensor, got list"),
        ({"pixel_values": PIXELS[0, 0, 0]}, r"pixel_values must be .* got Tensor \(16,\)"),
        ({"sigma": NAN}, "sigma must be >= 0 and finite, got nan"),
        ({"sigma": torch.tensor([1.0, -2.0, 3.0])}, "sigma must be >= 0 and finite, got -2"),
        ({"sigma": torch.tensor([1.0, torch.inf, 3.0])}, "sigma must be >= 0 and finite, got inf"),
        ({"epsilon": PIXELS.numpy()}, "epsilon must be a tensor of the images' shape, got ndarray"),
        ({"generator": 3}, r"generator must be a torch.Generator .*, got int; .*manual_seed"),
        ({"labels": [1, 2, 3]}, "labels must be class indices .* in a tensor of integers, got list"),
        ({"labels": LABELS.numpy()}, "labels must be class indices .* got ndarray"),
        ({"labels": LABELS.bool()}, "labels must be class indices .* got torch.bool"),
        ({"sigma": torch.tensor([1.0, 2.0])}, r"sigma has shape \(2,\) for 3 images"),
        ({"epsilon": PIXELS[:1]}, r"epsilon has shape \(1, 3, 16, 16\), the images"),
        ({"generator": [torch.Generator()]}, "got 1 generators for 3 images"),
        ({"num_votes": 10**9}, "num_votes must be at least 1 and at most 100000, got 1000000000"),
        ({"num_votes": 2.5}, "num_votes must be a whole number, got 2.5"),
        ({"labels": LABELS.float()}, "labels must be class indices"),
    ],
)
def test_arguments_of_a_model(arguments, words, purifier, classifier):
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier).eval()
    with pytest.raises(ValueError, match=words):
        model(**{"pixel_values": PIXELS} | arguments)


HALVES = [0.5] * 3


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"classifier_image_size": -3}, "classifier_image_size must be at least 1 and at most 16384 pixels, got -3"),
        ({"classifier_image_mean": [0.5], "classifier_image_std": HALVES}, "one number for each channel"),
        ({"classifier_image_mean": HALVES, "classifier_image_std": [0.0, 1.0, 1.0]}, "deviations above 0"),
        ({"classifier_image_mean": [float("nan")] * 3, "classifier_image_std": HALVES}, "one number for each channel"),
        ({"image_size": 3}, "image_size 3 is below the purifier's 16"),
        ({"image_size": "16"}, "image_size"),
        ({"num_votes": 2.5}, "num_votes"),
        ({"sigma": "thirty"}, "sigma 'thirty' is not understood"),
    ],
)
def test_settings_of_a_composed_model(settings, words, purifier, classifier):
    with pytest.raises((ValueError, StrictDataclassError), match=words):
        NIMPurifiedImageClassification.from_parts(purifier, classifier, **settings)


@pytest.mark.parametrize("part", [None, torch.nn.Linear(3, 3), lambda pixel_values: pixel_values])
def test_a_classifier_that_is_no_model_of_transformers_is_named(part, purifier):
    with pytest.raises(ValueError, match=f"the classifier must be .*, got {type(part).__name__}; .*as_target"):
        NIMPurifiedImageClassification.from_parts(purifier, part)


@pytest.mark.parametrize(
    "pixel_values, words",
    [(PIXELS.numpy(), "got ndarray"), (None, "got NoneType"), ([[1]], "got list"), (PIXELS[0], r"got \(3, 16, 16\)")],
)
def test_what_is_no_batch_cannot_be_purified(pixel_values, words, purifier):
    with pytest.raises(ValueError, match=f"pixel_values must be normalized images .*{words}"):
        purifier.purify(pixel_values)


def encoded(levels):
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


RAMP = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64


def rows_of(images, labels):
    return Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())


@pytest.mark.parametrize(
    "rows, words",
    [
        (rows_of([{"bytes": b"hello", "path": None}], [1]), "cannot read image '00000000': UnidentifiedImageError"),
        (rows_of([encoded(np.zeros((4, 40), np.uint8))], [1]), "cannot read image '00000000': .*40x4 pixels"),
        (rows_of([encoded(RAMP)], [None]), "column 'label' must hold class indices, got None"),
        (rows_of([encoded(RAMP)], ["cat"]), "column 'label' must hold class indices, got 'cat'"),
        (rows_of([encoded(RAMP)], [1.5]), "column 'label' must hold class indices, got 1.5"),
        (rows_of([], []), "the data hold no image"),
        (Dataset.from_dict({"image": ["a"], "label": [1]}), "cannot read image '00000000': AttributeError"),
    ],
)
def test_rows_that_are_no_images_with_labels_are_named(rows, words, purifier, classifier):
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier).eval()
    with pytest.raises(ValueError, match=words):
        evaluate(model, rows, "fgsm")


def test_rows_of_16_bits_are_scaled_as_everywhere():
    image, label = RowsSource(rows_of([encoded(RAMP)], [1]))[0]
    assert label == 1 and np.array_equal(np.asarray(image)[..., 0], np.rint(RAMP / 257).astype(np.uint8))


def test_the_pipeline_takes_bfloat16_and_names_what_it_does_not_take(purifier, classifier):
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier).eval()
    pipe = pipeline("image-classification", model=model, image_processor=image_processor_for(model.config))
    half = torch.full((3, 32, 32), 0.5)
    assert pipe(half.bfloat16(), seed=0) == pipe(half, seed=0)
    with pytest.raises(ValueError, match="the list of images is empty: pass at least one"):
        pipe([])
    with pytest.raises(ValueError, match="return_purified must be True or False, got 'no'"):
        pipe(half, return_purified="no")


def test_what_the_pipeline_cannot_read_is_named_as_in_training(purifier, classifier, tmp_path):
    NIMPurifiedImageClassification.from_parts(purifier, classifier).save_pretrained(tmp_path / "model")
    pipe = pipeline("image-classification", model=str(tmp_path / "model"))
    bad = {
        "empty": b"",
        "text": b"hello",
        "cut": (tmp_path / "model" / "model.safetensors").read_bytes()[:100],
        "bomb": b"P6 30000 30000 255\n" + bytes(100),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read image '.*{name}': (not an image|DecompressionBombError)"):
            pipe(str(tmp_path / name))
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\) or \(3, H, W\), got \(1, 32, 32, 3\)"):
        pipe(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="seed must be a whole number of at most 64 bits, got 18446744073709551616"):
        pipe(Image.new("RGB", (32, 32)), seed=2**64)


def linear(images_01):
    return images_01.flatten(1)[:, :10]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda target: evaluate(target, (IMAGES_01, LABELS), 3), "attacks must be|an attack must be"),
        (lambda target: evaluate(target, (IMAGES_01, LABELS), [None]), "an attack must be a name, .*got None"),
        (
            lambda target: evaluate(target, (IMAGES_01, LABELS), lambda x: x),
            r"is called with \(oracle, images_01, epsilon",
        ),
        (lambda target: evaluate(target, (IMAGES_01, LABELS), lambda o, x, e: 1 / 0), "ended with ZeroDivisionError"),
        (
            lambda target: evaluate(target, (IMAGES_01, LABELS), "pgd", epsilon_255="4"),
            "epsilon_255 must be a number, got '4'",
        ),
        (
            lambda target: evaluate(target, (IMAGES_01, LABELS), "pgd", num_images=2.5),
            "num_images must be a whole number",
        ),
        (lambda target: evaluate(target, (IMAGES_01, LABELS), "pgd", seeds=[-1]), "seeds must be at least 0"),
        (
            lambda target: evaluate(target, (IMAGES_01, LABELS), {"attack": "pgd", "epsilon_255": 8}),
            "epsilon_255 must be a list, got 8",
        ),
        (lambda target: evaluate(target, (IMAGES_01, None), "pgd"), "labels must be class indices, got NoneType"),
        (
            lambda target: evaluate(target, (IMAGES_01 * 255, LABELS), "pgd"),
            r"values in \[.*\]: attacks move in \[0, 1\]",
        ),
        (lambda target: evaluate(target, (IMAGES_01, LABELS * 100), "pgd"), "labels holds 300, which is no class"),
        (
            lambda target: attack(target, IMAGES_01, LABELS, "pgd", epsilon_255=[4]),
            r"epsilon_255 must be a number, got \[4\]",
        ),
        (lambda target: attack(target, IMAGES_01, LABELS, "pgd", steps=2.5), "steps must be a whole number, got 2.5"),
        (lambda target: attack(target, IMAGES_01, LABELS, "pgd", steps=True), "steps must be a number, got True"),
        (
            lambda target: attack(target, IMAGES_01, LABELS, lambda o, x, e: x[:1]),
            r"attack '.*' was given images \(3, 3, 16, 16\) and returned \(1, 3, 16, 16\)",
        ),
        (lambda target: attack(target, IMAGES_01, LABELS, lambda o, x, e: None), "and returned NoneType"),
        (lambda target: certify(target, (IMAGES_01, LABELS), 0), "sigma_255 .* above 0 and at most 1000, got 0"),
        (lambda target: certify(target, (IMAGES_01, LABELS), -3), "sigma_255 .* got -3"),
        (lambda target: certify(target, (IMAGES_01, LABELS), 30, radii="x"), "radii must be a number, got 'x'"),
    ],
)
def test_arguments_of_an_evaluation(call, words):
    with pytest.raises(ValueError, match=words):
        call(as_target(linear, num_classes=10))
