"""Run the training scripts in forked processes: as separate as launched ones, without their seconds of imports."""

import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import yaml
from accelerate import debug_launcher


REPOSITORY = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")

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


def load_script(name: str):
    """A script of `scripts/` as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _run(script: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    sys.argv = [script, *arguments]
    load_script(script).main()


def _child(script: str, arguments: list[str], num_processes: int, log: str) -> None:
    os.setsid()  # so that the run and the processes that it forks are killed as one
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)  # not the test runner's
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    torch.set_num_threads(1)
    if num_processes == 1:
        load_script("run_pretrain").run_main(lambda: _run(script, arguments))
    else:
        debug_launcher(_run, (script, arguments), num_processes)


def start(script: str, recipe: dict, output_dir: Path, *overrides: str, num_processes: int = 1):
    """Start a script on a recipe; its output goes to `output_dir`.txt."""
    load_script(script), load_script("run_pretrain")  # imported before the fork, once
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe | {"output_dir": str(output_dir)}))
    arguments = [str(path), *overrides]
    process = FORK.Process(target=_child, args=(script, arguments, num_processes, str(output_dir.with_suffix(".txt"))))
    process.start()
    return process


def run(
    script: str, recipe: dict, output_dir: Path, *overrides: str, num_processes: int = 1, exit_code: int = 0
) -> str:
    """Run a script to its end; returns what it printed."""
    process = start(script, recipe, output_dir, *overrides, num_processes=num_processes)
    process.join(120)
    printed = output_dir.with_suffix(".txt").read_text()
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def stop_at(script: str, recipe: dict, output_dir: Path, step: int, signal_number: int, num_processes: int = 1) -> int:
    """Start a script, send it a signal once its log has reached `step`; returns the exit code."""
    process = start(script, recipe, output_dir, num_processes=num_processes)
    deadline = time.monotonic() + 120
    while last_step(output_dir) < step:
        assert process.is_alive() and time.monotonic() < deadline, output_dir.with_suffix(".txt").read_text()
        time.sleep(0.002)
    if signal_number == signal.SIGKILL:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal_number)
    process.join(120)
    return process.exitcode


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
