"""`pipeline("image-classification")` with the package imported: purified models, and everyone else's."""

import base64
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.pipelines import ImageClassificationPipeline
from transformers.pipelines.pt_utils import KeyDataset

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    image_processor_for,
)
from modeling_nim.data.decode import BadImageError, decode_rgb
from modeling_nim.noise_nim import denormalize


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 8}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def tiny_purified(image_size=32):
    torch.manual_seed(0)
    purifier = NIMForPreTraining(NIMConfig(**SIZES, **DECODER, image_size=image_size))
    classifier = NIMForImageClassification(NIMClassifierConfig(**SIZES, image_size=image_size, num_labels=4))
    # A fresh head is almost zero, and every probability then almost equal: spread them.
    torch.nn.init.normal_(classifier.classifier.weight)
    return NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30).eval()


def random_image(width, height, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture(scope="module")
def pipe():
    model = tiny_purified()
    return pipeline("image-classification", model=model, image_processor=image_processor_for(model.config))


@pytest.fixture(scope="module")
def images():
    return [random_image(40, 56, seed) for seed in range(5)]


def scores(result):
    return {entry["label"]: entry["score"] for entry in result}


def test_a_seed_gives_the_model_s_own_answer(pipe, images):
    pixel_values = pipe.image_processor(images[0], return_tensors="pt")["pixel_values"]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        logits = pipe.model(pixel_values, sigma=60, num_votes=3, generator=generator).logits
    expected = dict(zip(pipe.model.config.id2label.values(), logits.softmax(-1)[0].tolist(), strict=True))
    assert scores(pipe(images[0], sigma=60, num_votes=3, seed=7)) == pytest.approx(expected, abs=1e-6)
    assert scores(pipe(images[0], sigma=60, num_votes=3, seed=8)) != pytest.approx(expected, abs=1e-6)


def test_answers_depend_neither_on_batch_size_nor_on_company(pipe, images):
    arguments = {"sigma": 40, "num_votes": 2, "seed": 3, "return_purified": True}
    alone = [pipe(image, **arguments) for image in images]
    for batch_size in (1, 2, 5):
        together = pipe(images, batch_size=batch_size, **arguments)
        for one, other in zip(alone, together, strict=True):
            assert scores(one["labels"]) == pytest.approx(scores(other["labels"]), abs=1e-6)
            difference = np.asarray(one["purified"], dtype=int) - np.asarray(other["purified"], dtype=int)
            assert abs(difference).max() <= 1  # rounding to levels


def test_each_image_has_its_own_sigma(pipe, images):
    """A list of sigmas answers as so many calls with one sigma do, in lists, datasets and streams, in any batch."""
    sigmas = [0, 10.5, 30, "75", 200]
    arguments = {"seed": 3, "num_votes": 2, "return_purified": True}
    alone = [pipe(image, sigma=sigma, **arguments) for image, sigma in zip(images, sigmas, strict=True)]
    assert scores(alone[1]["labels"]) != pytest.approx(
        scores(pipe(images[1], sigma=30, **arguments)["labels"]), abs=1e-4
    )
    numbers = [float(sigma) for sigma in sigmas]
    for given, batch_size in [(sigmas, 1), (sigmas, 2), (torch.tensor(numbers), 5), (np.array(numbers), 3)]:
        results = pipe(images, sigma=given, batch_size=batch_size, **arguments)
        assert isinstance(results, list)
        streamed = list(pipe((image for image in images), sigma=given, batch_size=batch_size, **arguments))
        for expected, result, other in zip(alone, results, streamed, strict=True):
            assert scores(result["labels"]) == pytest.approx(scores(expected["labels"]), abs=1e-6)
            assert scores(other["labels"]) == pytest.approx(scores(expected["labels"]), abs=1e-6)
            difference = np.asarray(result["purified"], dtype=int) - np.asarray(expected["purified"], dtype=int)
            assert abs(difference).max() <= 1  # rounding to levels
    dataset = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    by_dataset = list(pipe(KeyDataset(dataset, "image"), sigma=sigmas, batch_size=2, seed=3, num_votes=2))
    for expected, labels in zip(alone, by_dataset, strict=True):
        assert scores(labels) == pytest.approx(scores(expected["labels"]), abs=1e-6)


def test_sigmas_and_images_must_be_as_many(pipe, images, stock_model):
    with pytest.raises(ValueError, match="2 numbers for 5 images: pass one per image"):
        pipe(images, sigma=[10, 20])
    with pytest.raises(ValueError, match="1 numbers, one per image: pass the images as a list"):
        pipe(images[0], sigma=[10])
    for number, message in ((3, "3 numbers for 4 images"), (6, "6 numbers for 5 images")):
        with pytest.raises(ValueError, match=message):
            list(pipe((image for image in images), sigma=[10] * number))
    with pytest.raises(ValueError, match="must be >= 0 and finite, got -1"):
        pipe(images[:2], sigma=[10, -1])
    with pytest.raises(ValueError, match="sigma of an image must be a number on 0..255, got 'uniform"):
        pipe(images[:2], sigma=[10, "uniform(0, 30)"])
    with pytest.raises(ValueError, match="is a list, one number per image: pass it in the call"):
        pipeline("image-classification", model=pipe.model, image_processor=pipe.image_processor, sigma=[10, 20])
    stock = pipeline("image-classification", model=stock_model, image_processor=ViTImageProcessorPil())
    with pytest.raises(ValueError, match="ViTForImageClassification has no purifier, so sigma has no meaning"):
        stock(images[:2], sigma=[10, 20])


def test_streams_and_workers_give_the_same_answers(pipe, images):
    expected = pipe(images, seed=3, return_purified=True)
    state = torch.get_rng_state()
    streamed = list(pipe((image for image in images), seed=3, batch_size=2, return_purified=True))
    assert torch.equal(torch.get_rng_state(), state)
    by_workers = pipe(images, seed=3, batch_size=2, num_workers=1, return_purified=True)
    for result in (streamed, by_workers):
        for one, other in zip(expected, result, strict=True):
            assert scores(one["labels"]) == pytest.approx(scores(other["labels"]), abs=1e-6)
            assert one["purified"].size == other["purified"].size == (40, 56)


def test_the_global_random_state_is_untouched_by_a_seeded_call(pipe, images):
    state = torch.get_rng_state()
    pipe(images, seed=0, num_votes=2, return_purified=True, batch_size=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert scores(pipe(images[0])) != scores(pipe(images[0]))  # without a seed every call draws anew


def test_the_purified_image_is_the_first_draw_at_the_input_s_size(pipe):
    image = random_image(32, 32, seed=9)
    result = pipe(image, sigma=30, num_votes=4, seed=5, return_purified=True)
    pixel_values = pipe.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        purified = pipe.model.purify(pixel_values, sigma=30, generator=torch.Generator().manual_seed(5))
    config = pipe.model.config
    expected = denormalize(purified, config.image_mean, config.image_std)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(np.asarray(result["purified"], dtype=float) - expected).max() <= 0.51
    assert result["labels"] == pipe(image, sigma=30, num_votes=4, seed=5)
    tall = pipe(random_image(30, 70), seed=5, return_purified=True)
    assert tall["purified"].size == (30, 70)
    assert pipe(image, seed=5, return_purified=False) == pipe(image, seed=5)


def test_margins_that_the_crop_removes_are_shown_as_they_were():
    model = tiny_purified(image_size=64)
    pipe = pipeline("image-classification", model=model, image_processor=image_processor_for(model.config))
    image = random_image(146, 73)  # the shortest edge is resized to 73, so one resized pixel is one pixel here
    shown = np.asarray(pipe(image, seed=0, return_purified=True)["purified"])
    original = np.asarray(image)
    changed = (shown != original).any(axis=-1)
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (4, 68, 41, 105)
    pixel_values = pipe.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        purified = model.purify(pixel_values, generator=torch.Generator().manual_seed(0))
    expected = denormalize(purified, model.config.image_mean, model.config.image_std)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(shown[4:68, 41:105] - expected).max() <= 0.51


def test_paths_urls_base64_arrays_and_tensors_are_taken(pipe, tmp_path):
    image = random_image(48, 32)
    image.save(tmp_path / "image.png")
    base64_text = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *args: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        inputs = [
            str(tmp_path / "image.png"),
            f"http://127.0.0.1:{server.server_address[1]}/image.png",
            base64_text,
            f"data:image/png;base64,{base64_text}",
            np.asarray(image),
        ]
        expected = pipe(image, seed=1, return_purified=True)
        for given in inputs:
            result = pipe(given, seed=1, return_purified=True, timeout=10)
            assert result["labels"] == expected["labels"]
            assert np.array_equal(result["purified"], expected["purified"])
        server.shutdown()


def test_levels_of_more_bits_are_scaled_as_in_training(pipe, tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    levels = np.rint(ramp / 257).astype(np.uint8)
    expected = pipe(Image.fromarray(levels).convert("RGB"), seed=1, return_purified=True)
    for kind in ("png", "tif", "pgm"):
        Image.fromarray(ramp).save(tmp_path / f"ramp.{kind}")
        given = str(tmp_path / f"ramp.{kind}")
        for source in (given, Image.open(given)):
            result = pipe(source, seed=1, return_purified=True)
            assert result["labels"] == expected["labels"]
            assert np.array_equal(result["purified"], expected["purified"])
    floats = np.repeat((levels / 255)[..., None], 3, axis=2)
    for array in (floats, torch.from_numpy(floats).permute(2, 0, 1)):
        assert pipe(array, seed=1) == pipe(floats, seed=1) == expected["labels"]


def test_what_the_data_loader_refuses_the_pipeline_refuses(pipe, tmp_path):
    floats = np.zeros((32, 32), np.float32)
    floats[0, 0] = np.nan
    Image.fromarray(floats).save(tmp_path / "nan.tif")
    Image.new("RGB", (400, 1)).save(tmp_path / "line.png")
    Image.fromarray(np.full((32, 32), 70000, np.int32)).save(tmp_path / "int.tif")
    (tmp_path / "text.png").write_text("hello")
    random_image(64, 64).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-500])
    (tmp_path / "folder.png").mkdir()
    for name, words in [
        ("nan.tif", "NaN"),
        ("line.png", "400x1 pixels"),
        ("int.tif", "32-bit integers"),
        ("text.png", "not an image"),
        ("cut.jpg", "truncated"),
        ("folder.png", "directory"),
        ("none.png", "no such file"),
    ]:
        with pytest.raises((ValueError, OSError), match=words):
            pipe(str(tmp_path / name))
        if name not in ("folder.png", "none.png"):
            with pytest.raises(BadImageError):
                decode_rgb((tmp_path / name).read_bytes(), name)
    with pytest.raises(ValueError, match="uint8 .* got uint16"):
        pipe(np.zeros((32, 32, 3), np.uint16))
    with pytest.raises(ValueError, match="levels in 0..1"):
        pipe(np.full((32, 32, 3), 200.0))
    with pytest.raises(TypeError, match="got bytes"):
        pipe(b"bytes")


def test_a_saved_directory_needs_nothing_but_its_path(tmp_path, images):
    model = tiny_purified()
    model.save_pretrained(tmp_path)
    image_processor_for(model.config).save_pretrained(tmp_path)
    loaded = pipeline("image-classification", model=str(tmp_path), seed=2, num_votes=2)
    direct = pipeline("image-classification", model=model, image_processor=image_processor_for(model.config))
    assert loaded(images) == direct(images, seed=2, num_votes=2)
    assert loaded(images[0], top_k=2) == direct(images[0], seed=2, num_votes=2)[:2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sigma": -1}, "sigma must be >= 0"),
        ({"num_votes": 0}, "num_votes must be at least 1"),
        ({"seed": "0"}, "seed must be a whole number"),
    ],
)
def test_bad_arguments_are_named(pipe, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(images[0], **arguments)


@pytest.fixture(scope="module")
def stock_model():
    torch.manual_seed(1)
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=32, num_labels=3)).eval()


def test_other_models_get_the_stock_pipeline_s_answers(stock_model, images, tmp_path):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    ours = pipeline("image-classification", model=stock_model, image_processor=processor)
    stock = ImageClassificationPipeline(model=stock_model, image_processor=processor, task="image-classification")
    assert ours(images, batch_size=2, top_k=2) == stock(images, batch_size=2, top_k=2)
    assert ours(images[0], function_to_apply="none") == stock(images[0], function_to_apply="none")
    ours.save_pretrained(tmp_path)
    assert "custom_pipelines" not in (tmp_path / "config.json").read_text()
    assert not list(tmp_path.glob("*.py"))


def test_other_models_refuse_the_purifier_s_arguments(stock_model, images):
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    pipe = pipeline("image-classification", model=stock_model, image_processor=processor)
    with pytest.raises(ValueError, match="ViTForImageClassification has no purifier, so sigma, seed"):
        pipe(images[0], sigma=30, seed=0)
    with pytest.raises(TypeError, match="unknown_argument"):
        pipe(images[0], unknown_argument=1)
