"""Training from a stream: shuffled, broken off, resumed."""

import io
import re
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image
from training_runs import PRETRAIN, last_step, losses, run


def make_shards(path, num_shards=4, num_images=30):
    """Tars of images that differ from one another."""
    path.mkdir()
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        with tarfile.open(path / f"train-{shard}.tar", "w") as tar:
            for number in range(num_images):
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 32)).save(image, "PNG")
                for name, content in ((f"{number:03d}.png", image.getvalue()), (f"{number:03d}.cls", b"1")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "shards"
    make_shards(path)
    data = {"source": "webdataset", "path": str(path), "streaming": True, "shuffle_buffer": 25, "num_images": 120}
    return PRETRAIN | {"data": data}


# 12 steps of 16 images: the second epoch begins at step 8; 3 workers, 4 shards: they take unequal shares
@pytest.mark.parametrize("num_workers, num_processes, step", [(0, 1, 5), (3, 1, 5), (3, 1, 11), (1, 2, 8)])
def test_a_shuffled_stream_goes_on_exactly(num_workers, num_processes, step, stream, tmp_path):
    options = (f"data.num_workers={num_workers}",)
    run("run_pretrain", stream, tmp_path / "unbroken", *options, num_processes=num_processes)
    interruption = ("step", step, signal.SIGKILL)
    broken = {"num_processes": num_processes, "exit_code": -signal.SIGKILL, "interruption": interruption}
    run("run_pretrain", stream, tmp_path / "killed", *options, **broken)
    assert last_step(tmp_path / "killed") == step - 1
    run("run_pretrain", stream, tmp_path / "killed", *options, num_processes=num_processes)
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken") and last_step(tmp_path / "killed") == 12


def test_a_stream_shared_otherwise_is_refused(stream, tmp_path):
    run("run_pretrain", stream, tmp_path / "run", interruption=("step", 5, signal.SIGTERM))
    printed = run("run_pretrain", stream, tmp_path / "run", "data.num_workers=2", exit_code=2)
    (line,) = re.findall(r"^error: .*", printed, re.MULTILINE)
    assert "was shared by 1 processes with 1 readers each, now by 1 with 2" in line and "Traceback" not in printed


def test_a_tar_damaged_in_the_middle_of_the_stream_is_named(tmp_path):
    make_shards(tmp_path / "shards")
    damaged = tmp_path / "shards" / "train-2.tar"
    with tarfile.open(damaged) as tar:
        offset = tar.getmembers()[30].offset
    with open(damaged, "r+b") as file:
        file.seek(offset)
        file.write(b"\xa5" * 512)
    data = {"source": "webdataset", "path": str(tmp_path / "shards"), "streaming": True, "num_images": 120}
    for num_workers in (0, 2):
        data |= {"num_workers": num_workers}
        printed = run("run_pretrain", PRETRAIN | {"data": data}, tmp_path / f"run{num_workers}", exit_code=2)
        assert re.search(r"error: cannot read '.*train-2\.tar' \(no header at byte \d+", printed)
        assert "Traceback" not in printed
