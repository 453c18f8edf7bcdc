"""Whole training runs: broken off, resumed, shared among processes. The curves must be the same."""

import random
import signal

import pytest
from safetensors.torch import load_file
from training_runs import FINETUNE, PRETRAIN, losses, records, run, stop_at


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-training run of 12 steps, never broken off."""
    output_dir = tmp_path_factory.mktemp("unbroken") / "pretrain"
    run("run_pretrain", PRETRAIN, output_dir)
    assert list(losses(output_dir)) == list(range(1, 13))
    return output_dir


def recipe_of(script, pretrained):
    return PRETRAIN if script == "run_pretrain" else FINETUNE | {"init": str(pretrained)}


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize("script", ["run_pretrain", "run_finetune"])
def test_killed_run_goes_on_exactly(script, num_processes, pretrained, tmp_path):
    recipe = recipe_of(script, pretrained)
    run(script, recipe, tmp_path / "unbroken", num_processes=num_processes)
    step = random.randint(1, 9)
    stop_at(script, recipe, tmp_path / "killed", step, signal.SIGKILL, num_processes)
    assert not (tmp_path / "killed" / "model.safetensors").exists(), f"was not killed at step {step}"
    run(script, recipe, tmp_path / "killed", num_processes=num_processes)

    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    unbroken, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "killed"))
    assert all((unbroken[key] == resumed[key]).all() for key in unbroken)


def test_two_processes_and_accumulation_give_the_single_process_curve(tmp_path):
    twenty = PRETRAIN | {"optimization": PRETRAIN["optimization"] | {"steps": 20}}
    run("run_pretrain", twenty, tmp_path / "one")
    run("run_pretrain", twenty, tmp_path / "two", num_processes=2)
    run("run_pretrain", twenty, tmp_path / "accumulated", "optimization.gradient_accumulation_steps=4")
    expected = losses(tmp_path / "one")
    assert len(expected) == 20
    for name in ("two", "accumulated"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-4)
