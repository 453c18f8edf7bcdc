"""Stochastic depth belongs to the image."""

import numpy as np
import pytest
import torch
from conftest import TINY
from training_runs import PRETRAIN, losses, run

from modeling_nim import (
    NIMClassifierConfig,
    NIMForImageClassification,
    NIMSimMIMClassifierConfig,
    NIMSimMIMForImageClassification,
)
from modeling_nim.training.models import enable_activation_checkpointing
from modeling_nim.training.stochastic_depth import DropPaths


FAMILIES = [
    (NIMClassifierConfig, NIMForImageClassification),
    (NIMSimMIMClassifierConfig, NIMSimMIMForImageClassification),
]


@pytest.mark.parametrize("config_class, model_class", FAMILIES)
def test_an_image_meets_the_same_depth_alone_and_in_a_batch(config_class, model_class):
    model = model_class(config_class(**TINY | {"num_hidden_layers": 4}, num_labels=5, drop_path_rate=0.5)).train()
    torch.nn.init.normal_(model.classifier.weight)
    drop_paths = DropPaths(model)
    assert len(drop_paths.modules) >= 3 and max(module.rate for module in drop_paths.modules) == 0.5
    pixel_values, indices = torch.randn(6, 3, 16, 16), np.arange(6)

    def logits(which, epoch=0):
        drop_paths.draw(3, np.full(len(which), epoch), indices[which], torch.device("cpu"))
        return model(pixel_values[which]).logits

    whole = logits(np.arange(6))
    parts = torch.cat([logits(np.array([0, 1])), logits(np.array([2])), logits(np.array([3, 4, 5]))])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole, logits(np.arange(6), epoch=1), atol=1e-2)
    with torch.no_grad():
        twice = model(torch.cat([pixel_values, pixel_values])).logits  # the draws of epoch 1, for both copies
    assert torch.allclose(twice[:6], twice[6:], atol=1e-5)
    assert torch.equal(model.eval()(pixel_values).logits, model(pixel_values).logits)


def test_the_share_that_is_dropped_is_the_rate_and_branches_differ():
    model = NIMForImageClassification(NIMClassifierConfig(**TINY, num_labels=5, drop_path_rate=0.25))
    drop_paths = DropPaths(model)
    drop_paths.draw(0, np.zeros(4000, int), np.arange(4000), torch.device("cpu"))
    module = drop_paths.modules[-1].train()
    tokens = torch.ones(4000, 2, 1)
    attention, mlp = module(tokens)[:, 0, 0], module(tokens)[:, 0, 0]
    assert module.branch == 0
    for branch in (attention, mlp):
        assert (branch == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
        assert branch.max().item() == pytest.approx(1 / 0.75)
    assert ((attention == 0) & (mlp == 0)).float().mean().item() == pytest.approx(0.25**2, abs=0.02)
    with pytest.raises(ValueError, match="3 images pass a drop path that was drawn for 4000"):
        module(tokens[:3])


def test_recomputed_activations_meet_the_same_depth(pixel_values):
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = NIMForImageClassification(
            NIMClassifierConfig(**TINY | {"num_hidden_layers": 4}, num_labels=5, drop_path_rate=0.5)
        ).train()
        drop_paths = DropPaths(model)
        if recompute:
            enable_activation_checkpointing(model)
        for _ in range(2):  # the second batch begins with the first branch again
            drop_paths.draw(1, np.zeros(4, int), np.arange(4), torch.device("cpu"))
            model.zero_grad()
            model(pixel_values).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


def test_two_processes_give_the_curve_of_one_with_stochastic_depth(tmp_path):
    config = TINY | {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, "drop_path_rate": 0.5}
    config |= {"layer_scale_init_value": 1.0, "initializer_range": 0.3}  # so that the branches weigh something
    recipe = PRETRAIN | {"model": {"architecture": "nim_simmim", "config": config}}
    for num_processes in (1, 2):
        run("run_pretrain", recipe, tmp_path / str(num_processes), num_processes=num_processes)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert two == pytest.approx(one, abs=2e-5)
    run("run_pretrain", recipe, tmp_path / "all", "model.config.drop_path_rate=0")
    whole = losses(tmp_path / "all")
    assert max(abs(whole[step] - one[step]) for step in one) > 2e-4  # it is in use
