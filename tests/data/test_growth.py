"""Large data: a folder is listed once, a table is copied where there is room, a damaged shard is reported."""

import io
import os
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import modeling_nim.data.folders as folders
from modeling_nim.data import DataRecipe, load_source
from modeling_nim.data.tars import check_tar


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_folder(root, num_files):
    for number in range(num_files):
        folder = root / "train" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:05d}.png").write_bytes(b"x" * (number + 1))
    long_ago = time.time() - 100
    for folder in (root / "train", *(root / "train").iterdir()):
        os.utime(folder, (long_ago, long_ago))
    return DataRecipe(source="folder", path=str(root))


def test_a_large_folder_is_listed_once_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "KEEP_FROM_FILES", 300)
    recipe = make_folder(tmp_path / "data", 300)
    sizes_asked = []
    stat = os.stat

    def counted_stat(path, **options):
        if str(path).endswith(".png"):
            sizes_asked.append(path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", counted_stat)
    first = load_source(recipe, "train")
    assert len(sizes_asked) == 300
    second = load_source(recipe, "train")
    assert len(sizes_asked) == 300  # no file was asked again
    assert (second.files, second.labels, second.class_names) == (first.files, first.labels, first.class_names)
    assert second.fingerprint == first.fingerprint and second.stored(7) == first.stored(7)

    (tmp_path / "data" / "train" / "class1" / "new.png").write_bytes(b"new")
    assert len(load_source(recipe, "train")) == 301  # and that a folder changed just now, so this listing is not kept
    (tmp_path / "data" / "train" / "class1" / "new.png").unlink()
    assert load_source(recipe, "train").fingerprint == first.fingerprint


def test_a_small_folder_and_a_damaged_listing_are_listed_again(tmp_path, monkeypatch):
    recipe = make_folder(tmp_path / "data", 30)
    small = load_source(recipe, "train")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(folders, "KEEP_FROM_FILES", 30)
    assert load_source(recipe, "train").fingerprint == small.fingerprint
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text(kept.read_text()[:100])
    assert load_source(recipe, "train").fingerprint == small.fingerprint


def make_tar(path, num_images=40):
    with tarfile.open(path, "w") as tar:
        for number in range(num_images):
            image = io.BytesIO()
            Image.fromarray(np.full((16, 16, 3), 6 * number, np.uint8)).save(image, "JPEG")
            for name, content in ((f"{number:03d}.jpg", image.getvalue()), (f"{number:03d}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def damage_header(path):
    """Bytes of the header in the middle of the tar."""
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[40].offset
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * 512)
    return offset


def test_a_tar_damaged_in_the_middle_is_named_and_not_taken_for_a_short_one(tmp_path):
    for number in range(3):
        make_tar(tmp_path / f"train-{number}.tar")
        check_tar(tmp_path / f"train-{number}.tar")
    offset = damage_header(tmp_path / "train-1.tar")
    with tarfile.open(tmp_path / "train-1.tar") as tar:
        assert len(tar.getmembers()) == 40  # of 80: Python's own reader sees an end there
    with pytest.raises(ValueError, match=rf"cannot read '.*train-1\.tar' \(no header at byte {offset}"):
        load_source(DataRecipe(source="webdataset", path=str(tmp_path)), "train")

    with open(tmp_path / "train-2.tar", "r+b") as file:
        file.truncate(offset + 700)
    with pytest.raises(ValueError, match=r"cannot read '.*train-2\.tar' \("):
        check_tar(tmp_path / "train-2.tar")


def make_parquet(path, num_rows):
    import pyarrow
    import pyarrow.parquet

    path.mkdir()
    images = [{"bytes": bytes([number % 251]) * 9, "path": None} for number in range(num_rows)]
    table = pyarrow.table({"image": images, "label": [number % 3 for number in range(num_rows)]})
    pyarrow.parquet.write_table(table, path / "train-0.parquet")
    return DataRecipe(source="parquet", path=str(path))


def test_parquet_is_copied_where_there_is_room_and_that_is_said(tmp_path, monkeypatch, capsys):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr("modeling_nim.data.tables.SAY_FROM_BYTES", 1000)
    recipe = make_parquet(tmp_path / "rows", 2000)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(ValueError, match="takes 0.0 GiB, and 0.0 GiB are free; set HF_DATASETS_CACHE"):
            load_source(recipe, "train")
    source = load_source(recipe, "train")
    assert "of parquet to" in capsys.readouterr().err
    assert len(source) == 2000 and source.stored(1234) == (bytes([1234 % 251]) * 9, 1234 % 3)
    load_source(recipe, "train")
    assert "of parquet to" not in capsys.readouterr().err  # the copy is there
