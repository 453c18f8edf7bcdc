"""The optimizer's side of a recipe, value by value."""

import copy
import dataclasses
import typing
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import TINY, TINY_DECODER
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedConfig,
    NIMPurifiedImageClassification,
    NIMSimMIMConfig,
)
from modeling_nim.families_nim import ARCHITECTURES, FAMILIES
from modeling_nim.training.finetuning import Finetuning
from modeling_nim.training.models import (
    ModelRecipe,
    enable_activation_checkpointing,
    make_config,
    make_pretraining_model,
)
from modeling_nim.training.optimization import (
    OptimizationRecipe,
    learning_rate_at,
    make_average,
    make_optimizer,
    make_plan,
    parameter_settings,
    set_learning_rate,
    soft_cross_entropy,
)


SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def recipe(**changes) -> OptimizationRecipe:
    return OptimizationRecipe(**{"batch_size": 64, "base_learning_rate": 1e-3, "epochs": 10} | changes)


def test_plan_of_the_recipes_own_batch_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = make_plan(recipe(gradient_accumulation_steps=2, warmup_epochs=0.5), num_processes=4, num_images=1000)
    assert (plan.per_device_batch_size, plan.global_batch_size) == (8, 64)
    assert (plan.steps_per_epoch, plan.num_steps, plan.warmup_steps) == (15, 150, 8)
    assert plan.peak_learning_rate == pytest.approx(1e-3 * 64 / 256)


def test_another_global_batch_scales_the_learning_rate_and_says_so():
    with pytest.warns(UserWarning, match=r"global batch is 192 .*recipe's is 64.*to 0.00075"):
        plan = make_plan(recipe(per_device_batch_size=96), num_processes=2, num_images=1000)
    assert plan.peak_learning_rate == pytest.approx(1e-3 * 192 / 256)
    assert plan.num_steps == 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_plan(recipe(per_device_batch_size=96), num_processes=2, num_images=1000, warn=False) == plan


def test_less_than_one_step_is_no_training():
    with pytest.raises(ValueError, match="optimization.epochs 0.01 is less than one step of 64 images"):
        make_plan(recipe(epochs=0.01), num_processes=1, num_images=1000)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 3}, "exactly one of optimization.epochs"),
        ({"epochs": None}, "exactly one of optimization.epochs"),
        ({"batch_size": 0}, "optimization.batch_size must be at least 1 and at most 16777216, got 0"),
        ({"betas": [0.9]}, "two numbers"),
        ({"ema_decay": 1.0}, "ema_decay must be above 0 and below 1, got 1.0"),
        ({"warmup_epochs": 1.0, "warmup_steps": 3}, "at most one"),
        ({"base_learning_rate": float("nan")}, "optimization.base_learning_rate must be a finite number"),
        ({"weight_decay": -0.1}, "optimization.weight_decay must be at least 0 and at most 10, got -0.1"),
        ({"warmup_epochs": -1.0}, "optimization.warmup_epochs must be at least 0, got -1.0"),
        ({"decay_factor": 0.0}, "optimization.decay_factor must be above 0 and at most 1, got 0.0"),
        ({"layer_decay": 1.5}, "optimization.layer_decay must be above 0 and at most 1, got 1.5"),
        ({"decay_epochs": [3.0]}, "decay_epochs is for schedule: multistep"),
        ({"schedule": "multistep", "min_learning_rate": 1e-6}, "min_learning_rate is for schedule: cosine"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"warmup_epochs": 10.0}, "the warm-up takes 150 of 150 steps.*lower optimization.warmup_epochs"),
        ({"warmup_steps": 151}, "the warm-up takes 151 of 150 steps.*lower optimization.warmup_steps"),
        ({"min_learning_rate": 1.0}, "min_learning_rate 1 is above the peak learning rate"),
    ],
)
def test_plans_that_never_reach_the_learning_rate_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_plan(recipe(**changes), num_processes=4, num_images=1000)


def test_multistep_schedule_falls_at_its_epochs():
    falling = recipe(schedule="multistep", decay_epochs=[4, 8], warmup_epochs=1)
    plan = make_plan(falling, 1, 640)
    rates = [learning_rate_at(10 * epoch, falling, plan) / plan.peak_learning_rate for epoch in (0, 1, 3.9, 4, 8)]
    assert rates == pytest.approx([0, 1, 1, 0.1, 0.01])


def test_optimizer_groups_hold_every_trainable_parameter_once():
    config = NIMClassifierConfig(**SIZES, num_labels=5)
    model = NIMForImageClassification(config)
    optimizer = make_optimizer(model, recipe(layer_decay=0.5, betas=[0.9, 0.999]))
    set_learning_rate(optimizer, 0.8)
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[parameter]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        rates["vit.embeddings.position_embeddings"] == pytest.approx(0.1)
        and decays["vit.embeddings.position_embeddings"] == 0
    )
    assert rates["classifier.weight"] == 0.8 and rates["fc_norm.bias"] == 0.8
    assert rates["vit.layers.1.mlp.fc1.weight"] == pytest.approx(0.4)
    assert rates["vit.layers.0.mlp.fc1.weight"] == pytest.approx(0.2)
    assert rates["vit.embeddings.patch_embeddings.projection.weight"] == pytest.approx(0.1)
    assert decays["classifier.weight"] == 0.05 and decays["classifier.bias"] == decays["vit.embeddings.cls_token"] == 0


def test_average_follows_its_definition():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = make_average(model, 0.9)
    expected = None
    for value in (1.0, 2.0, 4.0):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        expected = value if expected is None else 0.9 * expected + 0.1 * value
    assert average.module.weight.item() == pytest.approx(expected)
    assert not average.module.weight.requires_grad


def test_soft_cross_entropy_of_hard_targets_is_the_usual_one():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    smooth = torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.1 / 4
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, smooth), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_trains_on_draws_that_belong_to_the_image(architecture):
    config = dict(SIZES) | ({"mask_patch_size": 8} if architecture == "simmim" else {})
    model = make_pretraining_model(ModelRecipe(architecture, size="tiny", config=config))
    undone = {"mae": "mask", "simmim": "mask", "nim_mae_masked": "noise+mask"}
    assert model.config.degradation == undone.get(architecture, "noise")
    pixel_values = torch.randn(4, 3, 16, 16)

    def draws(seeds):
        return model.draw(len(seeds), [torch.Generator().manual_seed(seed) for seed in seeds])

    together, last = draws([1, 2, 3, 4]), draws([4])
    for name, values in together.items():
        assert torch.equal(values[3:], last[name])
    loss = model(pixel_values, **together).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    if model.config.adds_noise:
        assert together["epsilon"].shape == (4, 3, 16, 16)
        fixed = model.draw(2, [torch.Generator() for _ in range(2)], sigma=30)
        assert fixed["sigma"].tolist() == [30, 30]


def test_model_recipes_refuse_what_the_configuration_does_not_have():
    with pytest.raises(ValueError, match="'model.config.hidden_sise' is not for the architecture 'nim_mae'"):
        make_config(ModelRecipe(config={"hidden_sise": 3}))
    with pytest.raises(ValueError, match="model.config.degradation"):
        make_config(ModelRecipe(config={"degradation": "mask"}))
    base = make_config(ModelRecipe(size="base"))
    assert (base.hidden_size, base.decoder_num_hidden_layers, base.patch_size) == (768, 8, 16)
    assert isinstance(make_config(ModelRecipe("simmim", "base")), NIMSimMIMConfig)
    assert isinstance(make_config(ModelRecipe("mae")), NIMConfig)


def test_activation_checkpointing_reaches_every_layer_without_a_warning():
    model = make_pretraining_model(ModelRecipe(config=SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_activation_checkpointing(model)
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert len(layers) >= 2 + model.config.decoder_num_hidden_layers
    assert all(layer.gradient_checkpointing for layer in layers)


def test_pretrained_directory_remembers_its_degradation(tmp_path):
    model = make_pretraining_model(ModelRecipe("mae", size="tiny", config=SIZES))
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).degradation == "mask"
    assert NIMForPreTraining.from_pretrained(tmp_path).decoder.mask_token.requires_grad


@pytest.mark.parametrize(
    "name, machines, processes",
    [("cpu", 1, 1), ("gpu_1", 1, 1), ("gpu_8_ddp", 1, 8), ("gpu_8_fsdp2", 1, 8), ("nodes_2x8_ddp", 2, 16)],
)
def test_launch_configurations_are_understood_by_accelerate(name, machines, processes):
    config = load_config_from_file(str(Path(__file__).parents[2] / "scripts" / "launch" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.use_cpu == (name == "cpu")
    if name == "gpu_8_fsdp2":
        layers = {type(module).__name__ for module in make_pretraining_model(ModelRecipe(config=SIZES)).modules()}
        assert config.fsdp_config["fsdp_version"] == 2
        assert set(config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= layers


def trained_with_muon(steps: int, resume_at: int | None = None) -> list[torch.Tensor]:
    """The weights after steps on the same images; at `resume_at` a fresh optimizer goes on from the saved state."""
    torch.manual_seed(0)
    model = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER))
    recipe = OptimizationRecipe(batch_size=4, base_learning_rate=1e-2, steps=steps, optimizer="muon")
    optimizer = make_optimizer(model, recipe)
    pixel_values = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        if step == resume_at:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make_optimizer(model, recipe)
            optimizer.load_state_dict(state)
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        model(pixel_values, sigma=30, generator=torch.Generator().manual_seed(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def test_muon_moves_the_layers_matrices_and_adamw_the_rest():
    model = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER))
    names = {parameter: name for name, parameter in model.named_parameters()}
    recipe = OptimizationRecipe(batch_size=4, base_learning_rate=1e-2, steps=1, optimizer="muon")
    muon, adamw = make_optimizer(model, recipe).parts
    by_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert by_muon == {n for p, n in names.items() if p.requires_grad and p.ndim == 2 and "layers." in n}
    assert by_muon | by_adamw == {n for p, n in names.items() if p.requires_grad} and not by_muon & by_adamw
    # Muon's step is nearly orthogonal: directions whose gradients differ tenfold move about equally far.
    weight = model.vit.layers[0].attention.q_proj.weight
    before = weight.detach().clone()
    weight.grad = torch.linalg.qr(torch.randn_like(weight)).Q * torch.linspace(1, 10, len(weight))
    set_learning_rate(muon, 1.0)
    muon.param_groups[0]["weight_decay"] = 0.0
    muon.step()
    moved = torch.linalg.svdvals(before - weight.detach())
    assert moved.max() / moved.min() < 2


def test_muon_goes_on_from_its_saved_state():
    for whole, resumed in zip(trained_with_muon(4), trained_with_muon(4, resume_at=2), strict=True):
        assert torch.equal(whole, resumed)


@pytest.mark.parametrize("degradation", ["noise", "mask"])
def test_the_draws_of_fine_tuning_are_of_the_defense_s_size_and_of_its_purifier_s_kind(degradation):
    """Masks take no sigma, and a larger classifier needs noise of its own size."""
    purifier = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, degradation=degradation))
    with pytest.warns(UserWarning, match="purified at 24x24"):
        model = NIMPurifiedImageClassification.from_parts(
            purifier, NIMForImageClassification(NIMClassifierConfig(**{**TINY, "image_size": 24})), num_votes=3
        )
    finetuning = SimpleNamespace(
        purified_model=model,
        config=model.config,
        recipe=SimpleNamespace(sigma="uniform(0, 30)"),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    draws = Finetuning.draw(finetuning, [1, 2])
    if degradation == "noise":
        assert draws["epsilon"].shape == (2, 3, 24, 24) and draws["sigma"].shape == (2,)
    else:
        assert draws["noise"].shape == (2, 9 * 16)  # of 3 x 3 tiles
    assert model.purify(torch.randn(2, 3, 24, 24), **draws).shape == (2, 3, 24, 24)


def test_one_table_knows_every_model():
    """Registered, restored inside a defense, trained with layer decay, named by recipes: all from the same rows."""
    for family in FAMILIES:
        config = family.pretraining.config_class(**TINY, **TINY_DECODER)
        classifier = family.classifier.config_class(**TINY, num_labels=5)
        assert type(AutoModelForPreTraining.from_config(config)) is family.pretraining
        assert type(AutoModel.from_config(config)) is family.encoder
        assert type(AutoModelForImageClassification.from_config(classifier)) is family.classifier
        defended = NIMPurifiedConfig(purifier_config=config.to_dict(), classifier_config=classifier.to_dict())
        model = NIMPurifiedImageClassification(defended)
        assert (type(model.purifier), type(model.classifier)) == (family.pretraining, family.classifier)
        scales = parameter_settings(model.classifier, weight_decay=0.05, layer_decay=0.5)
        assert {scale for scale, _ in scales.values()} == {1.0, 0.5, 0.25, 0.125}  # head, two layers, embeddings
        pairs = {(a.family, a.degradation) for a in ARCHITECTURES.values() if a.family is family}
        assert {(family, "noise"), (family, "mask")} <= pairs
    (field,) = (field for field in dataclasses.fields(ModelRecipe) if field.name == "architecture")
    assert typing.get_args(field.type) == tuple(ARCHITECTURES)
