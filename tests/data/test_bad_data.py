"""Odd files and tables: each gives a right result, a skipped image that is named, or one error."""

import io
import os
import tarfile
import zlib

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from modeling_nim import NIMClassifierConfig, image_processor_for
from modeling_nim.data import BadImageError, DataRecipe, load_source
from modeling_nim.data.decode import decode_rgb, decode_window
from modeling_nim.data.loader import CropRecipe, TrainingImages
from modeling_nim.data.streams import StreamPosition
from modeling_nim.robustness.draws import evaluation_order
from modeling_nim.robustness.images import SourceImages


def photo(height=40, width=60) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    channels = [255 * y / height, 255 * x / width, 127 + 100 * np.sin(x / 9) * np.cos(y / 7)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image=None, kind="JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    (image or photo()).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def whole(height, width):
    return 0, 0, height, width


def both_decodes(content):
    """The image by the careful and by the fast decoder, or the message of each."""
    results = []
    for decode in (decode_rgb, lambda content, name: decode_window(content, name, whole, 32)):
        try:
            results.append(np.asarray(decode(content, "x")))
        except BadImageError as error:
            results.append(str(error))
    return results


def damaged_jpegs():
    content = encoded(photo(80, 80), quality=90)
    rng = np.random.default_rng(0)
    yield from ((f"cut at {length}", content[:length]) for length in (0, 1, 2, 3, 20, 160, 400, 623, 900, -20, -2, -1))
    yield "garbage behind the end", content + b"\x00" * 5000
    yield "zeros in the tail", content[: len(content) // 2] + b"\x00" * (len(content) // 2)
    for number in range(12):
        broken = bytearray(content)
        for place in rng.integers(2, len(content), 20):
            broken[place] = rng.integers(256)
        yield f"20 wrong bytes, {number}", bytes(broken)


@pytest.mark.parametrize("name, content", [pytest.param(*case, id=case[0]) for case in damaged_jpegs()])
def test_damaged_jpegs_are_read_or_named_alike(name, content):
    careful, fast = both_decodes(content)
    assert isinstance(careful, str) == isinstance(fast, str), (careful, fast)
    if isinstance(careful, str):
        assert careful == fast and careful.startswith("cannot read image 'x'")
    else:
        assert fast.shape == (32, 32, 3)


def odd_images():
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    palette.info["transparency"] = 3
    frames = [photo(), Image.new("RGB", (60, 40))]
    broken_exif = encoded(exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff nothing")
    cmyk = photo().convert("CMYK")
    return {
        "animation": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 8),
        "animated webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), 1),
        "two pages": (encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), 0),
        "palette": (encoded(palette, "PNG", transparency=3), 9),
        "transparent": (encoded(photo().convert("RGBA"), "PNG"), 0),
        "gray and alpha": (encoded(photo().convert("LA"), "PNG"), 80),
        "cmyk jpeg": (encoded(cmyk), 6),
        "cmyk tiff": (encoded(cmyk, "TIFF"), 2),
        "progressive": (encoded(progressive=True, quality=95), 4),
        "no subsampling": (encoded(subsampling=0, quality=95), 4),
        "bmp": (encoded(kind="BMP"), 0),
        "damaged exif": (broken_exif, 6),
        "bilevel": (encoded(photo().convert("1"), "PNG"), 128),
    }


@pytest.mark.parametrize("name", odd_images())
def test_odd_images_show_their_first_picture_in_rgb(name):
    content, tolerance = odd_images()[name]
    careful, fast = both_decodes(content)
    assert careful.shape == (40, 60, 3) and fast.shape == (32, 32, 3)
    assert np.abs(careful.astype(int) - np.asarray(photo())).mean() <= tolerance


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (7, 64), (64, 7)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_slivers_are_named_and_the_smallest_size_is_taken(size, kind):
    careful, fast = both_decodes(encoded(Image.new("RGB", size), kind))
    assert careful == fast and f"{size[0]}x{size[1]} pixels, fewer than 8 on a side" in careful
    assert both_decodes(encoded(Image.new("RGB", (8, 8)), kind))[0].shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_of_two_billion_pixels_is_refused_by_its_header(kind):
    content = bytearray(encoded(kind=kind))
    if kind == "PNG":  # width and height stand behind the signature
        content[16:24] = (50_000).to_bytes(4, "big") * 2
        content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    else:
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = (50_000).to_bytes(2, "big") * 2
    for message in both_decodes(bytes(content)):
        assert "decompression bomb" in message


def folder(tmp_path, name="0.jpg", content=None):
    where = tmp_path / "data" / "train" / "class0"
    where.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (where / f"good{number}.jpg").write_bytes(encoded())
    if content is not None:
        (where / name).write_bytes(content)
    return DataRecipe(source="folder", path=str(tmp_path / "data"), on_bad_image="skip"), where


@pytest.mark.parametrize(
    "name", ["mit Leerzeichen.jpg", "été 🐈.JPG", "-rf.jpg", "a'b\"c.jpeg", "x" * 200 + ".png", "\n.jpg"]
)
def test_names_of_all_kinds_are_read(name, tmp_path):
    recipe, _ = folder(tmp_path, name, encoded())
    source = load_source(recipe, "train")
    assert len(source) == 4
    index = next(index for index in range(4) if source.image_id(index) == f"class0/{name}")
    assert source[index][0].size == (60, 40)


def test_names_that_are_no_unicode_are_read(tmp_path):
    recipe, where = folder(tmp_path)
    with open(os.fsencode(where) + b"/\xff\xfe.jpg", "wb") as file:
        file.write(encoded())
    source = load_source(recipe, "train")
    assert len(source) == 4 and all(source[index][0].size == (60, 40) for index in range(4))
    order = evaluation_order([source.image_id(index) for index in range(4)])  # the ids name random numbers
    assert sorted(order) == [0, 1, 2, 3]


def test_what_is_no_image_is_left_out_of_the_listing(tmp_path):
    recipe, where = folder(tmp_path)
    (where / "folder.jpg").mkdir()
    (where / "._resource.jpg").write_bytes(b"macOS")
    (where / "notes.txt").write_text("hello")
    (where.parent / ".ipynb_checkpoints").mkdir()
    (where.parent / "list.jpg").write_bytes(encoded())
    (where / "loop").symlink_to(where)
    source = load_source(recipe, "train")
    assert [source.image_id(index) for index in range(len(source))] == [f"class0/good{n}.jpg" for n in range(3)]
    assert source.class_names == ["class0"]


@pytest.mark.parametrize("kind", ["pipe", "broken link", "link to itself"])
def test_links_to_nothing_and_pipes_are_named(kind, tmp_path):
    recipe, where = folder(tmp_path)
    if kind == "pipe":
        os.mkfifo(where / "odd.jpg")
    else:
        (where / "odd.jpg").symlink_to(where / ("odd.jpg" if kind == "link to itself" else "none.jpg"))
    with pytest.raises((ValueError, OSError), match="odd.jpg"):
        load_source(recipe, "train")


def test_a_class_without_images_keeps_its_place(tmp_path):
    recipe, where = folder(tmp_path)
    (where.parent / "a_first").mkdir()
    source = load_source(recipe, "train")
    assert source.class_names == ["a_first", "class0"] and {source[index][1] for index in range(3)} == {1}


def test_a_file_that_went_away_is_skipped_and_named(tmp_path):
    recipe, where = folder(tmp_path)
    source = load_source(recipe, "train")
    (where / "good1.jpg").unlink()
    crop = CropRecipe(crop="none", flip=False)
    batch = TrainingImages(source, crop, 16, 0, "skip").__getitems__([(0, 1)])
    assert batch["bad_images"] == ["cannot read image 'class0/good1.jpg': No such file or directory"]
    assert isinstance(TrainingImages(source, crop, 16, 0, "raise").__getitems__([(0, 1)]), BadImageError)


def tar(path, members):
    """`members`: (name, content), or (TarInfo, content)."""
    path.mkdir(exist_ok=True)
    with tarfile.open(path / "train-0.tar", "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return DataRecipe(source="webdataset", path=str(path))


@pytest.mark.parametrize("key", ["0", "./0", "a.b/0", "../../0", "/0", "é ü/0", "x" * 150, "dir/./0"])
def test_tar_members_of_all_names_are_samples(key, tmp_path):
    source = load_source(tar(tmp_path, [(f"{key}.jpg", encoded()), (f"{key}.cls", b" 2\n")]), "train")
    assert len(source) == 1 and source[0][0].size == (60, 40) and source[0][1] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train-0.tar"]  # nothing is unpacked


LINK = tarfile.TarInfo("1.jpg")
LINK.type, LINK.linkname = tarfile.SYMTYPE, "/etc/passwd"


@pytest.mark.parametrize(
    "members, words",
    [
        ([("0.jpg", b"x")], "'0'.*has no label; expected 0.cls"),
        ([("0.jpg", b"x"), ("0.cls", b"cat")], "train-0.tar.*'cat'"),
        ([("0.jpg", b"x"), ("0.cls", b"")], "train-0.tar"),
        ([("0.jpg", b"x"), ("0.cls", b"1.5")], "train-0.tar.*'1.5'"),
        ([("0.jpg", b"x"), ("0.cls", b"-1")], "label -1 must be 0 or more"),
        ([("0.jpg", b"x"), ("0.cls", b"1000000")], "1000001 classes of 1 images"),
        ([("0.jpg", b"x"), ("0.cls", str(2**40).encode())], "classes of 1 images"),
        ([("0.jpg", b"x"), ("0.cls", b"9" * 40)], "classes of 1 images"),
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"1")], "'0' has two images"),
        ([("0.txt", b"x"), ("0.cls", b"1")], "no images in split"),
        ([(LINK, b""), ("1.cls", b"1")], "no images in split"),
        ([], "no images in split"),
    ],
)
def test_wrong_tars_are_named(members, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_source(tar(tmp_path, members), "train")


def parquet(path, columns, features=None):
    path.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path / "train-0.parquet"))
    return DataRecipe(source="parquet", path=str(path), on_bad_image="skip")


CELL = {"bytes": encoded(), "path": None}
NAMED = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"label": [0, 1]}, "has no column 'image'; its columns: \\['label'\\]"),
        ({"image": [CELL, CELL]}, "has no column 'label'"),
        ({"image": [CELL, CELL], "label": [0, -1]}, "row 1: label -1 must be 0 or more"),
        ({"image": [CELL, CELL], "label": [0, 10**6]}, "label 1000000 would make 1000001 classes of 2 images"),
        ({"image": [CELL, CELL], "label": [2**40, 0]}, "row 0: label 1099511627776 would make"),
        ({"image": [CELL, CELL], "label": [0.0, 1.5]}, "'label' of .* holds double; labels must be whole numbers"),
        ({"image": [CELL, CELL], "label": [0.0, 1.0]}, "holds double"),
        ({"image": [CELL, CELL], "label": ["cat", "dog"]}, "holds string"),
        ({"image": [CELL, CELL], "label": [[0], [1]]}, "holds list"),
        ({"image": [CELL, CELL], "label": [None, 1]}, "row 0 has no label"),
        ({"image": [CELL, CELL], "label": [None, None]}, "holds null"),
        ({"image": [3, 4], "label": [0, 1]}, "'image' of .* holds int64, no images"),
        ({"image": [3.5, 4.0], "label": [0, 1]}, "'image' of .* holds double, no images"),
        ({"image": [[[1, 2], [3, 4]]] * 2, "label": [0, 1]}, "holds list.*, no images"),
        ({"image": [{"pixels": 3}] * 2, "label": [0, 1]}, "holds struct.*, no images"),
        ({"image": [{"bytes": {"bytes": b"x"}}] * 2, "label": [0, 1]}, "holds struct.*, no images"),
        ({"image": [{"bytes": [1, 2]}] * 2, "label": [0, 1]}, "holds struct.*, no images"),
    ],
)
def test_wrong_tables_are_named(columns, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        load_source(parquet(tmp_path / "data", columns), "train")


def test_labels_without_a_name_are_refused(tmp_path):
    recipe = parquet(tmp_path / "data", {"image": [CELL] * 2, "label": [0, 1]}, NAMED)
    source = load_source(recipe, "train")
    assert source.class_names == ["a", "b"] and source[1][1] == 1
    table = datasets.Dataset.from_dict({"image": [CELL] * 2, "label": [0, 1]}, features=NAMED)
    table = table.with_format("arrow").data.table.set_column(1, "label", [[0, 7]])
    pyarrow.parquet.write_table(table, tmp_path / "data" / "train-0.parquet")
    with pytest.raises(ValueError, match="label 7 has no name, there are 2 classes"):
        load_source(recipe, "train")


@pytest.mark.parametrize("metadata", ["{", '{"info": {"features": {"label": {"_type": "Nope"}}}}'])
def test_a_description_of_columns_that_cannot_be_read_is_named(metadata, tmp_path):
    table = pyarrow.table({"image": [CELL] * 2, "label": [0, 1]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "train-0.parquet")
    with pytest.raises(ValueError, match=f"the shards of split 'train' in '{tmp_path}' cannot be read: "):
        load_source(DataRecipe(source="parquet", path=str(tmp_path)), "train")


def test_a_table_without_rows_is_named(tmp_path):
    with pytest.raises(ValueError, match="train-0.parquet.*have no rows"):
        load_source(parquet(tmp_path / "data", {"image": [], "label": []}, NAMED), "train")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello" * 100, b"PAR1" + b"\x00" * 100 + b"PAR1"])
def test_files_that_are_no_parquet_are_named(content, tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"train-0\.parquet' is no parquet file or damaged"):
        load_source(DataRecipe(source="parquet", path=str(tmp_path)), "train")


def test_a_parquet_damaged_in_the_middle_is_named(tmp_path):
    recipe = parquet(tmp_path / "data", {"image": [CELL] * 40, "label": [0, 1] * 20})
    path = tmp_path / "data" / "train-0.parquet"
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="split 'train' in .* cannot be read"):
        load_source(recipe, "train")


@pytest.mark.parametrize(
    "kind", ["outside", "absolute", "link", "nowhere", "folder", "nothing", "empty bytes", "no image"]
)
def test_cells_without_an_image_are_named_and_no_file_outside_is_read(kind, tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encoded())
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (data / "inside.jpg").write_bytes(encoded(photo(30, 30)))
    cell = {
        "outside": {"bytes": None, "path": "../secret.jpg"},
        "absolute": {"bytes": None, "path": str(tmp_path / "secret.jpg")},
        "link": {"bytes": None, "path": "link.jpg"},
        "nowhere": {"bytes": None, "path": "none.jpg"},
        "folder": {"bytes": None, "path": "."},
        "nothing": {"bytes": None, "path": None},
        "empty bytes": {"bytes": b"", "path": None},
        "no image": {"bytes": b"text", "path": None},
    }[kind]
    inside = {"bytes": None, "path": "inside.jpg"}
    source = load_source(parquet(data, {"image": [inside, cell], "label": [0, 1]}), "train")
    assert source[0][0].size == (30, 30)
    with pytest.raises(BadImageError, match="image 'data/train/00000001'"):
        source[1]
    batch = TrainingImages(source, CropRecipe(crop="none"), 16, 0, "skip").__getitems__([(0, 1)])
    assert len(batch["bad_images"]) == 1 and batch["labels"].tolist() == [0]


@pytest.mark.parametrize(
    "label, words", [(-1, "0 or more"), (1.5, "whole number"), (10**6, "1000001 classes"), (None, "None")]
)
def test_streams_check_labels_as_tables_do(label, words, tmp_path):
    recipe = parquet(tmp_path / "data", {"image": [CELL] * 2, "label": [label, label]})
    recipe.streaming, recipe.num_images = True, 2
    source = load_source(recipe, "train")
    with pytest.raises(ValueError, match=words):
        next(source.epochs(0, 0, 1, StreamPosition()))


def test_streams_read_no_file_outside(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(encoded())
    recipe = parquet(tmp_path / "data", {"image": [{"bytes": None, "path": "../secret.jpg"}, CELL], "label": [0, 1]})
    recipe.streaming, recipe.num_images = True, 2
    stream = load_source(recipe, "train").epochs(0, 0, 1, StreamPosition())
    (refused,) = [stored for stored, _, _ in (next(stream), next(stream)) if isinstance(stored, BadImageError)]
    assert "which is no file inside" in str(refused)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"train_split": "training"}, "training"),
        ({"train_split": ""}, "data.train_split must be a text"),
        ({"path": " "}, "data.path must be a text"),
        ({"source": "digits"}, "data.path is '.*' and data.source digits, which need none: name how"),
        ({"validation_fraction": 1.0}, "data.validation_fraction must be at least 0 and below 1, got 1.0"),
        ({"validation_fraction": float("nan")}, "data.validation_fraction must be a finite number"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer must be at least 1"),
        ({"num_images": 0}, "data.num_images must be at least 1"),
        ({"num_workers": -1}, "data.num_workers must be at least 0"),
        ({"num_workers": 10**6}, "data.num_workers must be at least 0 and at most 1024"),
        ({"split_seed": -1}, "data.split_seed must be at least 0"),
        ({"split_seed": 2**64}, "data.split_seed must be a finite number of at most 64 bits"),
        ({"image_column": "pixels\0"}, "data.image_column must be a text"),
    ],
)
def test_wrong_data_sections_are_named(values, words, tmp_path):
    recipe, _ = folder(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        load_source(DataRecipe(**({"source": "folder", "path": recipe.path} | values)), "train")


@pytest.mark.parametrize("cache_in_memory", [True, False])
def test_an_evaluation_leaves_out_no_image(cache_in_memory, tmp_path):
    recipe, _ = folder(tmp_path, "torn.png", b"no image")
    recipe.cache_in_memory = cache_in_memory
    processor = image_processor_for(NIMClassifierConfig(image_size=32, patch_size=8))
    with pytest.raises(BadImageError, match="torn.png.*leave out no image, with data.on_bad_image=skip either"):
        SourceImages(load_source(recipe, "train"), [processor], "cpu").batch(0, range(4))
