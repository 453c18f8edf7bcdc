"""The benchmarks of training: their counted FLOPs against those by hand, and what they write."""

import json
import sys

import pytest
import reference
import torch

from modeling_nim.runs.machine import count_flops
from modeling_nim.training.models import ModelRecipe, make_pretraining_model


@pytest.mark.parametrize("architecture", ["nim_mae", "mae", "nim_mae_masked"])
def test_flops_by_hand_are_those_that_are_counted(architecture):
    model = make_pretraining_model(ModelRecipe(architecture, "tiny", {"image_size": 64}))
    draws = model.draw(2, torch.Generator().manual_seed(0))
    counted = count_flops(lambda: model(torch.zeros(2, 3, 64, 64), **draws)) / 2
    assert counted == reference.load_script("bench/pretrain").flops_arithmetic(model.config)["forward"]


def test_noise_and_masks_cost_well_under_half_of_noise_alone():
    arithmetic = reference.load_script("bench/pretrain").flops_arithmetic
    noise, both = (
        arithmetic(make_pretraining_model(ModelRecipe(name, "base", {"image_size": 224})).config)["forward"]
        for name in ("nim_mae", "nim_mae_masked")
    )
    # forward and backward are three times that: 137.7 and 58.5 GFLOP, but for the gradient of the pixels
    assert (noise / 1e9, both / 1e9) == (pytest.approx(45.97, abs=0.05), pytest.approx(19.56, abs=0.05))


def test_every_stage_of_training_has_its_share_of_the_peak(tmp_path, monkeypatch):
    bench = reference.load_script("bench/training")
    monkeypatch.setattr(bench, "BATCH_SIZE", 2)
    monkeypatch.setattr(bench, "matrix_peak_flops", lambda device, dtype: {"flops_per_s": 1e12, "dtype": str(dtype)})
    threads = torch.get_num_threads()
    arguments = ["--threads", "1", "--steps", "1", "--output", str(tmp_path / "training.json")]
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments])
    bench.main()
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * 2  # stages, precisions, kinds of attention
    for row in rows:
        rate = row["images_per_s"] * row["gflop_per_image"] * 1e9
        assert row["share_of_matrix_peak"] == pytest.approx(rate / 1e12) and row["images_per_s"] > 0
    gflop = {row["stage"]: row["gflop_per_image"] for row in rows}
    # an attack and a training step through both parts: two forward and backward passes
    assert gflop["hardening"] > gflop["pre-training"] + gflop["fine-tuning"]
