"""Files are whole or absent: on full disks, in directories that became read-only, at any moment of a write."""

import errno
import json
import os
import re
import shutil
import subprocess
from contextlib import suppress
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_runs import FINETUNE, PRETRAIN, last_step, losses, run

from modeling_nim.runs.files import append_text, write_json, written_whole
from modeling_nim.training.checkpoints import list_checkpoints


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "run.json"
    write_json(path, {"old": 1})
    for place in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError) as raised:
            patch.setattr(os, place, lambda *_: (_ for _ in ()).throw(FULL))
            write_json(path, {"new": 2})
        assert f"cannot write {str(path)!r} (No space left on device)" in str(raised.value)
        assert json.loads(path.read_text()) == {"old": 1} and os.listdir(path.parent) == ["run.json"]
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}


def test_a_directory_is_whole_or_absent(tmp_path):
    with pytest.raises(KeyError), written_whole(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_log_on_a_full_disk_is_named(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write '.*log\.jsonl' \(No space left on device\)"):
        append_text(tmp_path / "log.jsonl", "{}\n")


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_errors_of_safetensors_and_torch_name_the_file(save, tmp_path, monkeypatch):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with (
            pytest.raises(OSError, match=r"cannot write '.*weights'"),
            written_whole(tmp_path / "weights") as temporary,
        ):
            save({"weight": torch.zeros(100_000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_when_there_is_room(num_processes, tmp_path):
    run("run_pretrain", PRETRAIN, tmp_path / "unbroken", num_processes=num_processes)
    run("run_pretrain", PRETRAIN, tmp_path / "run", num_processes=num_processes, interruption=("step", 5, 15))
    checkpoints = tmp_path / "run" / "checkpoints"
    kept = list_checkpoints(checkpoints)
    sizes = {name: os.path.getsize(os.path.join(kept[-1][1], name)) for name in ("model.safetensors", "optimizer.bin")}
    full = sizes["model.safetensors"] + 100  # the weights have room, the optimizer's state has not
    assert full < sizes["optimizer.bin"]
    for number, limit in enumerate((full, sizes["model.safetensors"] - 100), start=1):
        exit_code = 2 if num_processes == 1 else 1
        options = {"num_processes": num_processes, "exit_code": exit_code, "largest_file_bytes": limit}
        printed = run("run_pretrain", PRETRAIN, tmp_path / "run", **options)
        assert re.search(r"cannot write '.*step-00000006' \(.*; what was there before is intact", printed)
        if num_processes == 1:
            lines = [line for line in printed.splitlines() if "error" in line.lower()]  # of both runs
            assert len(lines) == number and lines[-1].startswith("error: cannot write") and "Traceback" not in printed
        assert list_checkpoints(checkpoints) == kept and not list(checkpoints.glob("*incomplete*"))
    run("run_pretrain", PRETRAIN, tmp_path / "run", num_processes=num_processes)
    assert last_step(tmp_path / "run") == 12 and losses(tmp_path / "run") == losses(tmp_path / "unbroken")


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own, where it may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(path):
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def exceed_quota():
    """Raises the quota error where a network disk does: when the data are brought to the disk."""

    def refuse(_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    os.fsync = refuse


def go_on_after(trouble, repair, reason, output_dir):
    """A run that meets `trouble` after its fourth step says so, loses nothing, and goes on after `repair`."""
    run("run_pretrain", PRETRAIN, output_dir.with_name("unbroken"))
    printed = run("run_pretrain", PRETRAIN, output_dir, exit_code=2, interruption=("step", 4, trouble))
    (line,) = [line for line in printed.splitlines() if "error" in line.lower()]
    assert re.match(rf"error: cannot write '{output_dir}/\S+' \(.*{reason}.*\); what was there before is intact", line)
    assert "Traceback" not in printed
    (kept,) = list_checkpoints(output_dir / "checkpoints")
    assert kept[0] == 3 and not list(output_dir.rglob("*incomplete*"))
    repair()
    printed = run("run_pretrain", PRETRAIN, output_dir)
    assert "damaged" not in printed and last_step(output_dir) == 12
    assert losses(output_dir) == losses(output_dir.with_name("unbroken"))


def test_a_full_disk_is_named_and_the_run_goes_on_with_room(disk):
    go_on_after(partial(fill, disk / "other"), (disk / "other").unlink, "No space left on device", disk / "run")


def test_a_directory_that_becomes_read_only_is_named_and_the_run_goes_on_when_it_may_write(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    lock, unlock = partial(os.chmod, checkpoints, 0o500), partial(os.chmod, checkpoints, 0o700)
    go_on_after(lock, unlock, "Permission denied", tmp_path / "run")


def test_a_quota_that_is_used_up_is_named_and_the_run_goes_on_without_it(tmp_path):
    go_on_after(exceed_quota, lambda: None, "Disk quota exceeded", tmp_path / "run")


def test_a_model_without_room_is_absent_and_comes_with_room(tmp_path):
    run("run_pretrain", PRETRAIN, tmp_path / "pretrain")
    recipe = FINETUNE | {"init": str(tmp_path / "pretrain")}
    run("run_finetune", recipe, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "run" / "config.json").unlink()
    shutil.rmtree(tmp_path / "run" / "purified")
    printed = run("run_finetune", recipe, tmp_path / "run", exit_code=2, largest_file_bytes=20_000)
    assert f"error: cannot write '{tmp_path / 'run'}' (" in printed and "Traceback" not in printed
    assert not {"config.json", "model.safetensors", ".model.incomplete"} & set(os.listdir(tmp_path / "run"))
    run("run_finetune", recipe, tmp_path / "run")
    assert load_file(tmp_path / "run" / "purified" / "model.safetensors")
