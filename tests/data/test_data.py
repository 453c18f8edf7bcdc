"""Sources, decoding and the order of the data."""

import io
import os
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler

from modeling_nim import NIMConfig, image_processor_for, normalize
from modeling_nim.data import BadImageError, DataRecipe, evaluation_batch, load_source
from modeling_nim.data.augment import OPERATIONS, AugmentationRecipe, augment, mix
from modeling_nim.data.decode import decode_rgb, decode_window
from modeling_nim.data.evaluation import BAD_IMAGE_LABEL, EvaluationImages
from modeling_nim.data.loader import (
    CropRecipe,
    StepSampler,
    StreamedImages,
    TrainingImages,
    random_window,
    to_images_01,
    training_loader,
)
from modeling_nim.data.randomness import generators, image_seeds, uniforms
from modeling_nim.data.streams import StreamPosition


def photo(height: int = 60, width: int = 80) -> Image.Image:
    """A smooth picture whose four corners differ, so that a rotation shows."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * y / height, 255 * x / width, 127 + 100 * np.sin(x / 9) * np.cos(y / 7)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


def whole(height, width):
    return 0, 0, height, width


BAD_FILES = {"garbage": b"\xff\xd8 not a picture", "zero": b"", "truncated": encoded(photo())[:900], "text": b"hello"}


def class_folder(path, num_images=8, bad=()):
    for index in range(num_images):
        folder = path / "train" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:03d}.jpg").write_bytes(encoded(photo(40 + index, 60)))
    for name, content in bad:
        (path / "train" / "class0" / f"{name}.jpg").write_bytes(content)
    return DataRecipe(source="folder", path=str(path), test_split="train")


def tar_shards(path, num_images=8):
    path.mkdir(exist_ok=True)
    for shard in range(2):
        with tarfile.open(path / f"train-{shard:03d}.tar", "w") as tar:
            for index in range(shard, num_images, 2):
                for suffix, content in (("jpg", encoded(photo(40 + index, 60))), ("cls", str(index % 2).encode())):
                    member = tarfile.TarInfo(f"{index:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return DataRecipe(source="webdataset", path=str(path), test_split="train")


def parquet_shards(path, num_images=8):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    path.mkdir(exist_ok=True)
    for shard in range(2):
        rows = [
            {"image": {"bytes": encoded(photo(40 + index, 60)), "path": None}, "label": index % 2}
            for index in range(shard, num_images, 2)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(path / f"train-{shard:03d}.parquet"))
    return DataRecipe(source="parquet", path=str(path), test_split="train")


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_digits_are_split_once_and_for_all():
    train, test = (load_source(DataRecipe(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert not {train.image_id(i) for i in range(1437)} & {test.image_id(i) for i in range(360)}
    counts = np.bincount([test[i][1] for i in range(360)])
    assert counts.min() >= 34 and counts.max() <= 37  # stratified
    image, label = test[0]
    assert (image.size, image.mode, test.class_names[label]) == ((32, 32), "RGB", str(label))
    assert test.fingerprint == load_source(DataRecipe(), "test").fingerprint != train.fingerprint


def test_validation_is_held_out_of_training_by_the_seed():
    recipe = DataRecipe(validation_fraction=0.1)
    train, held_out = (load_source(recipe, split) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (1293, 144)
    ids = {held_out.image_id(i) for i in range(144)}
    assert not ids & {train.image_id(i) for i in range(len(train))}
    again = load_source(recipe, "validation")
    assert ids == {again.image_id(i) for i in range(144)}
    other = load_source(DataRecipe(validation_fraction=0.1, split_seed=1), "validation")
    assert ids != {other.image_id(i) for i in range(144)}
    with pytest.raises(ValueError, match="data.validation_fraction is 0.0"):
        load_source(DataRecipe(), "validation")


@pytest.mark.parametrize("make", [class_folder, tar_shards, parquet_shards])
def test_sources_agree_on_images_and_labels(make, tmp_path):
    source = load_source(make(tmp_path / "data"), "train")
    assert len(source) == 8 and len(source.class_names) == 2
    found = {}
    for index in range(8):
        image, label = source[index]
        found[image.height - 40] = label
        expected = decode_rgb(encoded(photo(image.height, 60)), "expected")
        assert (np.asarray(image) == np.asarray(expected)).all()
    assert found == {number: number % 2 for number in range(8)}
    assert len({source.image_id(index) for index in range(8)}) == 8


@pytest.mark.parametrize("make", [class_folder, tar_shards, parquet_shards])
def test_streams_give_every_image_and_go_on(make, tmp_path):
    recipe = make(tmp_path / "data")
    recipe.streaming, recipe.num_images = True, 8
    source = load_source(recipe, "train")
    images = TrainingImages(source, CropRecipe(crop="none", flip=False), 16, seed=0)
    batches = iter(StreamedImages(images, 4, rank=0, num_processes=1, positions=[StreamPosition()]))
    first, second, third = (next(batches) for _ in range(3))
    assert first["pixels"].shape == (4, 16, 16, 3)
    assert sorted(first["labels"].tolist() + second["labels"].tolist()) == [0] * 4 + [1] * 4
    both = torch.cat([first["pixels"], second["pixels"]])
    assert len({tuple(pixels.flatten().tolist()) for pixels in both}) == 8
    assert any((third["pixels"][0] == pixels).all() for pixels in both)  # the second epoch
    assert len({*first["indices"], *second["indices"], *third["indices"]}) == 12  # randomness of their own


@pytest.mark.parametrize(
    "recipe, error, message",
    [
        ({"source": "folder", "path": "nowhere"}, FileNotFoundError, "no folder 'nowhere/train'"),
        (
            {"source": "parquet", "path": "nowhere"},
            FileNotFoundError,
            "no .parquet files of split 'train' in 'nowhere'",
        ),
        ({"source": "webdataset", "path": "nowhere"}, FileNotFoundError, "no .tar files"),
        ({"source": "parquet"}, ValueError, "needs data.path"),
        ({"validation_fraction": 1.5}, ValueError, "got 1.5"),
        ({"streaming": True}, ValueError, "digits are in memory"),
    ],
)
def test_wrong_sources_are_named(recipe, error, message):
    with pytest.raises(error, match=message):
        load_source(DataRecipe(**recipe), "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_tar_is_named(streaming, tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"not a tar" * 200)
    recipe = DataRecipe(source="webdataset", path=str(tmp_path), streaming=streaming, num_images=8)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}.*cannot be read" if streaming else r"cannot read .*train-0\.tar"
    ):
        load_source(recipe, "train")


def test_empty_folder_is_named(tmp_path):
    (tmp_path / "train" / "class0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no images under"):
        load_source(DataRecipe(source="folder", path=str(tmp_path)), "train")


def test_gated_data_says_how_to_log_in(monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("gated dataset")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"ILSVRC/imagenet-1k.*gated.*hf auth login"):
        load_source(DataRecipe(source="hub", path="ILSVRC/imagenet-1k"), "train")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_decoders_turn_photos_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photo(), exif=exif)
    expected = decode_rgb(content, "x")
    assert expected.size == ((80, 60) if orientation < 5 else (60, 80))
    fast = decode_window(content, "x", whole, 48)
    assert np.abs(fast.astype(int) - np.asarray(expected.resize((48, 48), Image.Resampling.BICUBIC))).mean() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA"])
def test_every_color_mode_becomes_rgb(mode):
    content = encoded(photo().convert(mode), "JPEG" if mode in ("L", "CMYK") else "PNG")
    expected = decode_rgb(content, "x")
    assert expected.mode == "RGB"
    fast = decode_window(content, "x", whole, 48)
    reference = np.asarray(expected.resize((48, 48), Image.Resampling.BICUBIC))
    assert fast.shape == (48, 48, 3)
    assert np.abs(fast.astype(int) - reference).mean() < (6 if mode == "P" else 4)  # dithering is all edges


RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_gray_keeps_its_ramp(kind):
    content = encoded(Image.fromarray(RAMP), kind)
    expected = np.repeat(np.rint(RAMP / 257).astype(np.uint8)[..., None], 3, axis=2)
    assert (np.asarray(decode_rgb(content, "ramp")) == expected).all()
    assert (decode_window(content, "ramp", whole, 256) == expected).all()


def test_float_levels_are_scaled_or_named():
    levels = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)
    decoded = np.asarray(decode_rgb(encoded(Image.fromarray(levels), "TIFF"), "x"))
    assert (decoded == np.rint(levels * 255).astype(np.uint8)[..., None]).all()
    broken = levels.copy()
    broken[3, 4] = np.nan
    for bad, words in [
        (broken, "NaN or infinite"),
        (np.full_like(levels, np.inf), "NaN or infinite"),
        (levels * 255, "0 to 255"),
        (levels - 1, "-1 to 0"),
        (RAMP.astype(np.int32), "32-bit integers"),
    ]:
        content = encoded(Image.fromarray(bad), "TIFF")
        for decode in (decode_rgb, lambda content, image_id: decode_window(content, image_id, whole, 32)):
            with pytest.raises(BadImageError, match=f"'odd.tif'.*{words}"):
                decode(content, "odd.tif")


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    content = encoded(photo(60, 80))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    for decode in (decode_rgb, lambda content, image_id: decode_window(content, image_id, whole, 32)):
        with pytest.raises(BadImageError, match=r"'bomb'.*4800 pixels.*limit of 4000 pixels"):
            decode(content, "bomb")


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientations_in_xmp_turn_the_image_in_both_decoders(orientation):
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    content = encoded(photo(), xmp=xmp)
    expected = decode_rgb(content, "x")
    assert expected.size == ((80, 60) if orientation < 5 else (60, 80))
    fast = decode_window(content, "x", whole, 48)
    assert np.abs(fast.astype(int) - np.asarray(expected.resize((48, 48), Image.Resampling.BICUBIC))).mean() < 4


@pytest.mark.parametrize("side", [200, 700])
def test_fast_decoding_stays_close_to_bicubic(side):
    content = encoded(photo(side, side))  # 700: decoded at half size
    window = (side // 10, side // 20, side * 4 // 5, side * 3 // 4)
    top, left, height, width = window
    expected = decode_rgb(content, "x").crop((left, top, left + width, top + height)).resize((224, 224), 3)
    fast = decode_window(content, "x", lambda h, w: window, 224)
    assert np.abs(fast.astype(int) - np.asarray(expected)).mean() < 1.5


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_by_both_decoders(name):
    for decode in (decode_rgb, lambda content, image_id: decode_window(content, image_id, whole, 32)):
        messages = set()
        for _ in range(3):
            with pytest.raises(BadImageError, match=f"'{name}'") as caught:
                decode(BAD_FILES[name], name)
            messages.add(str(caught.value))
        assert len(messages) == 1  # the same at every read, so that an image is counted once
        with pytest.raises(BadImageError, match="1x1 pixels"):
            decode(encoded(Image.new("RGB", (1, 1))), name)


def test_bad_images_are_replaced_and_named_or_raised(tmp_path):
    recipe = class_folder(tmp_path, 8, BAD_FILES.items())
    source = load_source(recipe, "train")
    keys = [(0, index) for index in range(len(source))]
    crop = CropRecipe(crop="none", flip=False)
    batch = TrainingImages(source, crop, 16, 0, "skip").__getitems__(keys)
    assert batch["pixels"].shape == (12, 16, 16, 3)
    for name in BAD_FILES:
        assert any(f"{name}.jpg" in message for message in batch["bad_images"])
    assert not any(message for message in batch["bad_images"] if "000.jpg" in message)
    error = TrainingImages(source, crop, 16, 0, "raise").__getitems__(keys)
    assert isinstance(error, BadImageError) and "on_bad_image=skip" in str(error)

    processor = image_processor_for(NIMConfig(image_size=32, patch_size=8))
    items = [EvaluationImages(source, processor)[index] for index in range(len(source))]
    for item in items:
        assert item["images_01"].shape == (3, 32, 32)
        assert (item["labels"] == BAD_IMAGE_LABEL) == (source.image_id(item["indices"]) in item["bad_images"])
    assert [item["labels"] for item in items].count(BAD_IMAGE_LABEL) == 4


def test_cache_gives_the_same_images_of_any_size(tmp_path):
    recipe = class_folder(tmp_path, 8, BAD_FILES.items())
    recipe.on_bad_image = "skip"
    plain = load_source(recipe, "train")
    recipe.cache_in_memory = True
    source = load_source(recipe, "train")
    assert len(source) == 8 and len(source.bad_images) == 4
    by_name = {plain.image_id(index): index for index in range(len(plain))}
    for index in range(8):
        image, label = source[index]
        expected, expected_label = plain[by_name[source.image_id(index)]]
        assert image.size == expected.size and (np.asarray(image) == np.asarray(expected)).all()
        assert label == expected_label
    assert len({source[index][0].height for index in range(8)}) == 8
    digits, cached = (load_source(DataRecipe(cache_in_memory=cached), "test") for cached in (False, True))
    assert all((np.asarray(digits[i][0]) == np.asarray(cached[i][0])).all() for i in range(5))
    assert digits.fingerprint == cached.fingerprint


def test_evaluation_is_the_processors_transform(tmp_path):
    source = load_source(class_folder(tmp_path), "train")
    config = NIMConfig(image_size=64, patch_size=16)
    processor = image_processor_for(config)
    images_01 = evaluation_batch(source, [0, 3], processor)
    as_the_pipeline = processor(images=[source[0][0], source[3][0]], return_tensors="pt")["pixel_values"]
    assert images_01.min() >= 0 and images_01.max() <= 1
    torch.testing.assert_close(normalize(images_01, config.image_mean, config.image_std), as_the_pipeline)


def test_randomness_belongs_to_the_image():
    seeds = image_seeds(0, np.array([3, 3, 4]), np.array([7, 8, 7]), "crop")
    assert len(set(seeds.tolist())) == 3
    assert image_seeds(0, 3, 7, "crop") == seeds[:1] != image_seeds(0, 3, 7, "noise")
    assert image_seeds(1, 3, 7, "crop") != seeds[:1]
    numbers = uniforms(image_seeds(0, 0, np.arange(4000), "crop"), 8)
    assert np.abs(numbers.mean(axis=0) - 0.5).max() < 0.03 and np.abs(np.corrcoef(numbers.T) - np.eye(8)).max() < 0.06
    first, second = (torch.randn(3, generator=generator) for generator in generators(seeds[:2]))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.randn(3, generator=generators(seeds[:1])[0]))


def test_windows_have_the_area_and_ratio_asked_for():
    numbers = uniforms(image_seeds(0, 0, np.arange(2000), "crop"), 22)
    windows = np.array([random_window(300, 400, row, (0.2, 1.0)) for row in numbers])
    top, left, height, width = windows.T
    share, ratio = height * width / 120_000, width / height
    rng, drawn = np.random.default_rng(0), []
    while len(drawn) < 4000:  # the definition, by rejection
        area, aspect = 120_000 * rng.uniform(0.2, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        if np.sqrt(area * aspect) <= 400 and np.sqrt(area / aspect) <= 300:
            drawn.append(area / 120_000)
    assert abs(share.mean() - np.mean(drawn)) < 0.02 and abs(share.std() - np.std(drawn)) < 0.02
    assert 0.19 < share.min() and share.max() <= 1
    assert 0.74 < ratio.min() and ratio.max() < 1.35
    assert (top >= 0).all() and (top + height <= 300).all() and (left >= 0).all() and (left + width <= 400).all()
    assert random_window(10, 400, numbers[0], (0.9, 1.0)) == (0, 193, 10, 13)  # nothing fits: centered, 4:3


def test_padded_crop_moves_the_image_under_a_black_border():
    source = load_source(DataRecipe(), "train")
    still = TrainingImages(source, CropRecipe(crop="none", flip=False), 32, 0)
    moving = TrainingImages(source, CropRecipe(crop="padded", padding=2, flip=False), 32, 0)
    keys = [(0, index) for index in range(40)]
    before, after = (np.asarray(images.__getitems__(keys)["pixels"]) for images in (still, moving))
    places = set()
    for image, moved in zip(np.pad(before, ((0, 0), (2, 2), (2, 2), (0, 0))), after, strict=True):
        offsets = [(y, x) for y in range(5) for x in range(5) if (image[y : y + 32, x : x + 32] == moved).all()]
        assert offsets
        places |= set(offsets)
    assert len(places) > 12


@pytest.mark.parametrize("cached", [False, True])
def test_native_crop_cuts_windows_of_the_resized_image(cached, tmp_path):
    (tmp_path / "train" / "photos").mkdir(parents=True)
    content = encoded(photo(96, 160), "PNG")
    (tmp_path / "train" / "photos" / "0.png").write_bytes(content)
    source = load_source(DataRecipe(source="folder", path=str(tmp_path), cache_in_memory=cached), "train")
    pixels = np.asarray(decode_rgb(content, "x"))
    images = TrainingImages(source, CropRecipe(crop="native", shorter_side=96, flip=False), 32, seed=0)
    batch = images.__getitems__([(epoch, 0) for epoch in range(60)])
    places = set()
    for window in np.asarray(batch["pixels"]):  # the image has the asked side already: a window is a piece of it
        found = [
            (top, left)
            for top, left in np.argwhere((pixels[:65, :129] == window[0, 0]).all(axis=-1))
            if (pixels[top : top + 32, left : left + 32] == window).all()
        ]
        assert len(found) == 1
        places |= set(found)
    tops, lefts = np.array(sorted(places)).T
    assert len(places) > 55 and tops.min() < 8 and tops.max() > 56 and lefts.min() < 12 and lefts.max() > 116

    # half the side: windows of 64 of the 96 x 160 pixels, each pair of pixels averaged
    half = TrainingImages(source, CropRecipe(crop="native", shorter_side=48, flip=False), 32, seed=0)
    (window,) = np.asarray(half.__getitems__([(0, 0)])["pixels"]).astype(int)
    closest = min(
        np.abs(pixels[top : top + 64, left : left + 64].reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)) - window).max()
        for top in range(33)
        for left in range(97)
    )
    assert closest <= 1


def test_native_crop_enlarges_small_images_and_names_a_side_too_short():
    source = load_source(DataRecipe(), "train")
    enlarged = TrainingImages(source, CropRecipe(crop="native", shorter_side=64, flip=False), 32, 0)
    (window,) = np.asarray(enlarged.__getitems__([(0, 5)])["pixels"]).astype(int)
    image = np.asarray(source[5][0].resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    differences = {
        (top, left): np.abs(image[top : top + 32, left : left + 32] - window).mean()
        for top in range(33)
        for left in range(33)
    }
    assert min(differences.values()) < 4
    with pytest.raises(ValueError, match="crop.shorter_side 24 is less than the model's image size 32.*32 or more"):
        TrainingImages(source, CropRecipe(crop="native", shorter_side=24), 32, 0)
    with pytest.raises(ValueError, match="crop.shorter_side must be at least 1 and at most 65536, got 0"):
        CropRecipe(crop="native", shorter_side=0)


def test_order_is_a_function_of_seed_and_step():
    whole_run = list(StepSampler(23, 5, seed=0, start_step=0, num_steps=9))
    assert len(whole_run) == 45
    assert list(StepSampler(23, 5, seed=0, start_step=6, num_steps=9)) == whole_run[30:]
    for epoch in range(2):
        indices = [index for number, index in whole_run if number == epoch]
        assert len(indices) == len(set(indices)) == 20
    assert [key[1] for key in whole_run[:20]] != [key[1] for key in whole_run[20:40]]
    micro = BatchSampler(StepSampler(23, 4, 0, 0, 2), 2, drop_last=True)
    assert [key for batch in micro for key in batch] == list(StepSampler(23, 4, 0, 0, 2))


def test_workers_change_nothing():
    source = load_source(DataRecipe(), "train")
    images = TrainingImages(source, CropRecipe(min_scale=0.5), 32, seed=3)
    accelerator = types.SimpleNamespace(prepare=lambda loader: loader)
    alone, shared = (
        list(training_loader(accelerator, images, DataRecipe(num_workers=workers), 8, 8, 0, 4, {}))
        for workers in (0, 2)
    )
    assert len(alone) == 4
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["pixels"], other["pixels"]) and (one["indices"] == other["indices"]).all()


FULL = AugmentationRecipe(2, 9.0, 0.5, 0.5, 0.8, 1.0)


def test_augmentation_of_an_image_does_not_depend_on_its_batch():
    images_01, targets = torch.rand(8, 3, 24, 24), torch.eye(8)
    epochs, indices = np.zeros(8, int), np.arange(100, 108)
    arguments = (FULL, 0)
    statistics = ([0.5] * 3, [0.25] * 3)
    full, full_targets = augment(images_01.clone(), targets, *arguments, epochs, indices, *statistics)
    part = slice(4, 8)
    some, some_targets = augment(
        images_01[part].clone(), targets[part], *arguments, epochs[part], indices[part], *statistics
    )
    torch.testing.assert_close(full[part], some)
    torch.testing.assert_close(full_targets[part], some_targets)
    assert not torch.allclose(full, images_01)
    other, _ = augment(images_01.clone(), targets, *arguments, epochs + 1, indices, *statistics)
    assert not torch.allclose(full, other)


@pytest.mark.parametrize("name", OPERATIONS)
def test_increasing_operations_start_from_the_image(name):
    images_01 = torch.rand(4, 3, 16, 16)
    strength, sign = torch.tensor([0.1, 0.5, 0.9, 1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert not torch.allclose(OPERATIONS[name](images_01.clone(), strength, sign), images_01)
    if name not in ("auto_contrast", "equalize", "invert", "posterize"):  # these have no strength, or start at 4 bits
        torch.testing.assert_close(
            OPERATIONS[name](images_01.clone(), torch.zeros(4), sign), images_01, atol=1e-5, rtol=0
        )


def test_mixed_targets_say_what_share_of_the_image_is_left():
    images_01 = torch.stack([torch.full((3, 32, 32), float(index % 2)) for index in range(64)])
    targets = torch.nn.functional.one_hot(torch.arange(64) % 2, 2).float()
    seeds = image_seeds(0, 0, np.arange(64), "mix")
    for recipe in (AugmentationRecipe(mixup_alpha=0.8), AugmentationRecipe(cutmix_alpha=1.0)):
        mixed, mixed_targets = mix(images_01, targets, recipe, seeds)
        torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), mixed_targets[:, 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(mixed_targets.sum(dim=1), torch.ones(64))
        values = set(mixed.unique().tolist())
        assert (values == {0.0, 1.0}) == (recipe.cutmix_alpha > 0)  # cutmix pastes, mixup blends
        assert mixed_targets[:, 1].std() > 0.2


def test_pixels_become_images():
    pixels = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    images_01 = to_images_01(pixels)
    assert images_01.shape == (2, 3, 4, 4)
    assert images_01[1, 2, 3, 0].item() == pytest.approx(pixels[1, 3, 0, 2].item() / 255, abs=1e-7)


def test_files_of_a_tar_may_be_read_after_a_fork(tmp_path):
    source = load_source(tar_shards(tmp_path / "data"), "train")
    expected = [source.stored(index)[0] for index in range(8)]
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, bytes([all(source.stored(index)[0] == expected[index] for index in range(8))]))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"\x01"
