"""Checkpoints that are complete or absent, named by the optimizer step, the newest few kept.

A checkpoint is written under a temporary name, gets a manifest of its files with their hashes, and is renamed last.
The manifest finds a checkpoint that cannot be read back (a full disk, an incomplete copy); the one before it is used
instead. The manifest also holds the settings that the numbers follow from, so that a run is not continued with others
by mistake.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from typing import Any, Literal

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from ..runs.files import INCOMPLETE, naming_path, remove, sync, write_json
from ..runs.processes import on_main_process, together


MANIFEST = "manifest.json"
AVERAGE = "average.safetensors"
_NAME = re.compile(r"^step-(\d{8})$")


def checkpoint_path(folder: str, step: int) -> str:
    return os.path.join(folder, f"step-{step:08d}")


def list_checkpoints(folder: str) -> list[tuple[int, str]]:
    """`(step, path)` of checkpoints in `folder`, oldest first; unfinished ones have other names and do not count."""
    if not os.path.isdir(folder):
        return []
    found = [(int(match[1]), match[0]) for name in os.listdir(folder) if (match := _NAME.match(name))]
    return [(step, os.path.join(folder, name)) for step, name in sorted(found)]


def save_checkpoint(
    accelerator: Accelerator,
    folder: str,
    step: int,
    settings: dict[str, Any],
    state: dict[str, Any],
    keep: int,
    average: AveragedModel | None = None,
) -> str:
    """Save everything Accelerate knows (weights, optimizer, random states) and the JSON-able `state` as one checkpoint.

    Every process must call it. `settings` are what the run's numbers follow from (`settings.decisive_settings`),
    `average` is the moving average of the weights, if there is one. Returns the checkpoint's path; older ones beyond
    the newest `keep` are removed. Raises OSError naming the checkpoint in every process when one cannot write; older
    ones stay.
    """
    path = checkpoint_path(folder, step)
    temporary = f"{path}{INCOMPLETE}"
    try:
        with together(accelerator), naming_path(path):
            if accelerator.is_main_process:
                os.makedirs(folder, exist_ok=True)
                for name in os.listdir(folder):  # left by a run that was killed while saving
                    if name.endswith(INCOMPLETE):
                        shutil.rmtree(os.path.join(folder, name))
        with together(accelerator), naming_path(path):
            accelerator.save_state(temporary)
        with together(accelerator), naming_path(path):
            if accelerator.is_main_process:
                if average is not None:
                    tensors = {name: tensor.contiguous() for name, tensor in average.state_dict().items()}
                    save_file(tensors, os.path.join(temporary, AVERAGE))
                manifest = {"step": step, "settings": settings, "state": state, "sha256": _hash_files(temporary)}
                write_json(os.path.join(temporary, MANIFEST), manifest)
                sync(temporary)
                if os.path.isdir(path):  # the same step again, after a fall-back: the new one replaces the damaged one
                    shutil.rmtree(path)
                os.replace(temporary, path)
                for _, old in list_checkpoints(folder)[:-keep]:
                    shutil.rmtree(old)
    except OSError:
        if accelerator.is_main_process:
            remove(temporary)  # it takes the room that the next attempt needs
        raise
    return path


def load_newest_checkpoint(
    accelerator: Accelerator,
    folder: str,
    settings: dict[str, Any],
    on_changed_recipe: Literal["raise", "continue"] = "raise",
    average: AveragedModel | None = None,
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest intact checkpoint into what was prepared; returns its step and state, or None without any.

    Every process must call it; one process looks for damage and all load what it found. Damaged checkpoints are skipped
    with a warning that names the file. Raises ValueError naming what is not as it was when `settings` are not those of
    the checkpoint, unless `on_changed_recipe` is "continue".
    """
    found = on_main_process(accelerator, lambda: _newest_intact(folder))
    if found is None:
        return None
    step, path, manifest = found
    if on_changed_recipe == "raise" and (changes := _changes(manifest["settings"], settings)):
        raise ValueError(
            f"checkpoint {path!r} was made with another recipe: {changes}; restore it, name another output_dir, or set "
            "checkpoints.on_changed_recipe=continue to go on with the new one"
        )
    accelerator.load_state(path)
    if average is not None:
        if not os.path.exists(os.path.join(path, AVERAGE)):
            raise ValueError(
                f"checkpoint {path!r} holds no moving average; unset optimization.ema_decay or start afresh"
            )
        average.load_state_dict(load_file(os.path.join(path, AVERAGE)))
    return step, manifest["state"]


def _newest_intact(folder: str) -> tuple[int, str, dict[str, Any]] | None:
    """Step, path and manifest of the newest checkpoint whose files are as they were written."""
    for step, path in reversed(list_checkpoints(folder)):
        try:
            return step, path, _verified_manifest(path)
        except (OSError, ValueError, KeyError) as error:
            warnings.warn(f"checkpoint {path!r} is damaged ({error}); trying the one before", stacklevel=2)
    return None


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The settings that differ, e.g. "optimization.steps was 100 and is 200"; empty when none does."""
    before, now = ({key: str(value) for key, value in settings.items()} for settings in (before, now))
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name, 'not set')} and is {now.get(name, 'not set')}" for name in names)


def _verified_manifest(path: str) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are as they were written; ValueError, KeyError or OSError otherwise."""
    with open(os.path.join(path, MANIFEST), encoding="utf-8") as file:
        manifest = json.load(file)
    found = _hash_files(path)
    for name, expected in manifest["sha256"].items():
        if found.get(name) != expected:
            raise ValueError(f"{name} is {'not as it was written' if name in found else 'missing'}")
    return manifest


def _hash_files(path: str) -> dict[str, str]:
    hashes = {}
    for folder, _, files in os.walk(path):
        for name in files:
            if name != MANIFEST:
                full = os.path.join(folder, name)
                with open(full, "rb") as file:
                    hashes[os.path.relpath(full, path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
