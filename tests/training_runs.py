"""Run the training scripts in processes of their own, without the seconds of imports that a launched one costs.

They are forked from a server that has only imported things. Forked from the test runner they would inherit what earlier
tests left there: an `Accelerator` that one of them made keeps its state in the class, and with it two ranks would each
take themselves for the only process and write the same files.
"""

import ctypes
import importlib.util
import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState, debug_launcher

from modeling_nim.runs.errors import run_main
from modeling_nim.training.progress import Reporter


REPOSITORY = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "modeling_nim.data.augment",
        "modeling_nim.data.evaluation",
        "modeling_nim.training.checkpoints",
        "modeling_nim.training.finetuning",
        "modeling_nim.training.models",
        "modeling_nim.training.progress",
        "modeling_nim.training.settings",
        "sklearn.datasets",
        "sklearn.model_selection",
        "torch._dynamo",
    ]
)
TIMEOUT_S = 120

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}
PRETRAIN = {
    "seed": 0,
    "data": {"source": "digits"},
    "model": {"architecture": "nim_mae", "config": TINY},
    "crop": {"crop": "random_resized"},
    "optimization": {"batch_size": 16, "base_learning_rate": 0.016, "steps": 12, "warmup_steps": 2},
    "checkpoints": {"every_steps": 3},
    "logging": {"every_steps": 1},
}
FINETUNE = {key: value for key, value in PRETRAIN.items() if key != "model"} | {
    "images": "denoised",
    "drop_path_rate": 0.1,
    "label_smoothing": 0.1,
    "augmentation": {"rand_augment_ops": 1, "erase_probability": 0.25, "mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "optimization": PRETRAIN["optimization"] | {"layer_decay": 0.75, "ema_decay": 0.9},
}


def load_script(name: str) -> ModuleType:
    """A script of `scripts/` as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _run(script: str, arguments: list[str]) -> int | None:
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    return load_script(script).main()


# Where a run may be interrupted: after this method has done its work for the nth time, whatever the clock says.
MOMENTS = {"step": (Reporter, "add_step"), "save": (Accelerator, "save_state")}


def _interrupt(moment: str, number: int, what: int | str | Callable[[], Any], num_processes: int) -> None:
    """Kill all processes of this run at the `number`-th step or save.

    Another signal goes to the last of them alone, but "group SIGINT", as from a terminal, to all with their workers. A
    function is called in each.
    """
    owner, name = MOMENTS[moment]
    method, calls = getattr(owner, name), itertools.count(1)

    def interrupted(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if next(calls) == number:
            if callable(what):
                what()
            elif what == "group SIGINT":
                os.killpg(os.getpgrp(), signal.SIGINT)
            elif what == signal.SIGKILL:
                os.killpg(os.getpgrp(), signal.SIGKILL)
            elif PartialState().process_index == num_processes - 1:
                os.kill(os.getpid(), what)
        return result

    setattr(owner, name, interrupted)


def _obey_permissions() -> None:
    """Gives up root's privilege to write where no one may."""
    version, this_process = 0x20080522, 0  # of linux/capability.h
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(version, this_process), (ctypes.c_uint32 * 6)())


def _child(
    script: str,
    arguments: list[str],
    num_processes: int,
    log: str,
    interruption: tuple | None,
    largest_file_bytes: int | None,
) -> None:
    os.setsid()  # so that the run and the processes that it forks are killed as one
    _obey_permissions()
    if largest_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, largest_file_bytes))
    multiprocessing.set_start_method("fork", force=True)  # for loaders' workers, as in a launched run
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not the test runner's
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    if interruption:
        _interrupt(*interruption, num_processes)
    if num_processes == 1:
        run_main(lambda: _run(script, arguments))
    else:
        debug_launcher(_run, (script, arguments), num_processes)


def run(
    script: str,
    recipe: dict,
    output_dir: Path,
    *overrides: str,
    num_processes: int = 1,
    exit_code: int = 0,
    interruption: tuple[str, int, int | str | Callable[[], Any]] | None = None,
    largest_file_bytes: int | None = None,
) -> str:
    """Run a script on a recipe to its end; returns what it printed.

    `interruption` is a moment ("step" or "save"), which one, counted from 1, and the signal that the run gets then, or
    the function that is called. No file grows beyond `largest_file_bytes`: to the run, the disk is full.
    """
    path, log = output_dir.with_suffix(".yaml"), output_dir.with_suffix(".txt")
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(output_dir)}))
    arguments = (script, [str(path), *overrides], num_processes, str(log), interruption, largest_file_bytes)
    process = SERVER.Process(target=_child, args=arguments)
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    printed = log.read_text()
    assert process.exitcode == exit_code, printed
    return printed


def torchrun(script: str, recipe: dict, output_dir: Path, num_processes: int) -> str:
    """Launch a script as a user does, on CPU processes; returns what it printed."""
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(output_dir)}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    command += ["--master_port", port, str(REPOSITORY / "scripts" / f"{script}.py"), str(path)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def records(output_dir: Path) -> list[dict]:
    """The complete records of `log.jsonl`."""
    path = output_dir / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_step(output_dir: Path) -> int:
    return max((record["step"] for record in records(output_dir)), default=0)


def losses(output_dir: Path) -> dict[int, float]:
    """`{step: loss}`; a step that is logged twice fails."""
    pairs = [(record["step"], record["loss"]) for record in records(output_dir) if "loss" in record]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)
