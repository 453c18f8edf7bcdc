"""The optimizer's side of a recipe: batch, learning rate, weight decay, layer decay, moving average.

Small pure functions; the loops in the scripts call them step by step.
"""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..families_nim import FAMILIES
from ..runs.bounds import Bounds, Count, check_fields


BatchSize = Annotated[int, Bounds(least=1, most=2**24)]


@dataclass
class OptimizationRecipe:
    """The `optimization` section of a training recipe.

    `batch_size` is the global batch that the recipe was made for: images per optimizer step, over all processes and
    accumulated micro-batches. Left alone, every process takes its share of it. With `per_device_batch_size` the global
    batch follows from the machines instead, and the learning rate with it (linear scaling rule, Goyal et al. 2017):
    `base_learning_rate` * global batch / `base_batch_size`.

    Give the length as `epochs` or as `steps`, and the warm-up likewise. `schedule: cosine` falls to
    `min_learning_rate`; `schedule: multistep` multiplies by `decay_factor` at each of `decay_epochs`.

    `optimizer: muon` gives the matrices of the layers to Muon (Jordan et al. 2024), whose steps are scaled to the size
    of AdamW's, and the rest to AdamW. On a small purifier it needed a third of the steps (`scripts/recipes/photos`).
    """

    batch_size: BatchSize  # images per step, over all processes and accumulated micro-batches
    base_learning_rate: Annotated[float, Bounds(above=0)]  # times global batch / base_batch_size is the peak
    base_batch_size: BatchSize = 256  # see base_learning_rate
    epochs: Annotated[float, Bounds(above=0, most=1_000_000)] | None = None  # length of the run; give this or steps
    steps: Count | None = None  # length of the run; give this or epochs
    warmup_epochs: Annotated[float, Bounds(least=0)] | None = None  # length of the linear warm-up
    warmup_steps: Annotated[int, Bounds(least=0)] | None = None  # length of the linear warm-up
    schedule: Literal["cosine", "multistep"] = "cosine"  # how the learning rate falls after the warm-up
    min_learning_rate: Annotated[float, Bounds(least=0)] = 0.0  # where cosine ends
    # of multistep: when the rate falls
    decay_epochs: list[Annotated[float, Bounds(above=0)]] = field(default_factory=list)
    decay_factor: Annotated[float, Bounds(above=0, most=1)] = 0.1  # of multistep: by how much
    # instead of batch_size: the global batch follows from the machines, the learning rate with it
    per_device_batch_size: BatchSize | None = None
    gradient_accumulation_steps: BatchSize = 1  # micro-batches per step
    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw for all weights, or muon for the matrices of the layers
    weight_decay: Annotated[float, Bounds(least=0, most=10)] = 0.05  # of matrices; biases and norms have none
    betas: list[Annotated[float, Bounds(least=0, below=1)]] = field(default_factory=lambda: [0.9, 0.95])  # of Adam
    # factor on the learning rate from each layer to the one below it
    layer_decay: Annotated[float, Bounds(above=0, most=1)] = 1.0
    max_grad_norm: Annotated[float, Bounds(above=0)] | None = None  # gradients are scaled down to this norm
    # keep a moving average of the weights, and save that
    ema_decay: Annotated[float, Bounds(above=0, below=1)] | None = None

    def __post_init__(self):
        check_fields(self, "optimization.")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of optimization.epochs and optimization.steps")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("give at most one of optimization.warmup_epochs and optimization.warmup_steps")
        if len(self.betas) != 2:
            raise ValueError(f"optimization.betas must be two numbers, got {self.betas}")
        if self.schedule == "cosine" and self.decay_epochs:
            raise ValueError("optimization.decay_epochs is for schedule: multistep; set that, or leave it out")
        if self.schedule == "multistep" and self.min_learning_rate:
            raise ValueError("optimization.min_learning_rate is for schedule: cosine; set that, or leave it out")


@dataclass(frozen=True)
class Plan:
    """The batch, learning rate and lengths of a recipe on the machines at hand; lengths in optimizer steps."""

    per_device_batch_size: int
    global_batch_size: int
    steps_per_epoch: int
    num_steps: int
    warmup_steps: int
    peak_learning_rate: float


def make_plan(recipe: OptimizationRecipe, num_processes: int, num_images: int, warn: bool = True) -> Plan:
    """Share the batch, scale the learning rate and count the steps.

    Warns when the global batch is not the recipe's, with the learning rate that follows; `warn` is for one of several
    processes. Raises ValueError when the batch cannot be shared evenly or is larger than the data.
    """
    shares = num_processes * recipe.gradient_accumulation_steps
    if recipe.per_device_batch_size is None and recipe.batch_size % shares:
        raise ValueError(
            f"optimization.batch_size {recipe.batch_size} does not divide into {num_processes} processes x "
            f"{recipe.gradient_accumulation_steps} accumulation steps; change one of them or set per_device_batch_size"
        )
    per_device = recipe.per_device_batch_size or recipe.batch_size // shares
    global_batch_size = per_device * shares
    if num_images < global_batch_size:
        raise ValueError(
            f"one step takes {global_batch_size} images and the training split has {num_images}; lower "
            "optimization.batch_size"
        )
    peak = recipe.base_learning_rate * global_batch_size / recipe.base_batch_size
    if warn and global_batch_size != recipe.batch_size:
        warnings.warn(
            f"the global batch is {global_batch_size} ({per_device} images x {num_processes} processes x "
            f"{recipe.gradient_accumulation_steps} accumulation steps), the recipe's is {recipe.batch_size}: the peak "
            f"learning rate is scaled with it, to {peak:.6g}",
            stacklevel=2,
        )
    steps_per_epoch = num_images // global_batch_size
    num_steps = recipe.steps or round(recipe.epochs * steps_per_epoch)
    if num_steps == 0:
        raise ValueError(
            f"optimization.epochs {recipe.epochs} is less than one step of {global_batch_size} images; set it higher"
        )
    warmup_steps = recipe.warmup_steps or round((recipe.warmup_epochs or 0) * steps_per_epoch)
    if warmup_steps >= num_steps:
        raise ValueError(
            f"the warm-up takes {warmup_steps} of {num_steps} steps, so the learning rate would never be reached; "
            f"lower optimization.{'warmup_steps' if recipe.warmup_steps else 'warmup_epochs'}"
        )
    if recipe.min_learning_rate > peak:
        raise ValueError(
            f"optimization.min_learning_rate {recipe.min_learning_rate:g} is above the peak learning rate {peak:g}"
        )
    return Plan(
        per_device_batch_size=per_device,
        global_batch_size=global_batch_size,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        warmup_steps=warmup_steps,
        peak_learning_rate=peak,
    )


def cosine_learning_rate(epoch: float, peak: float, minimum: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up from 0, then half a cosine from `peak` to `minimum`; `epoch` is fractional, the unit arbitrary."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def multistep_learning_rate(
    epoch: float, peak: float, warmup_epochs: float, decay_epochs: Sequence[float], decay_factor: float
) -> float:
    """Linear warm-up from 0, then `peak`, times `decay_factor` for each of `decay_epochs` that has passed."""
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    return peak * decay_factor ** sum(epoch >= decay_epoch for decay_epoch in decay_epochs)


def learning_rate_at(step: int, recipe: OptimizationRecipe, plan: Plan) -> float:
    """The rate of optimizer step `step`, counted from 0; set by hand, because a prepared scheduler counts processes."""
    peak, warmup = plan.peak_learning_rate, plan.warmup_steps
    if recipe.schedule == "multistep":
        decay_steps = [epoch * plan.steps_per_epoch for epoch in recipe.decay_epochs]
        return multistep_learning_rate(step, peak, warmup, decay_steps, recipe.decay_factor)
    return cosine_learning_rate(step, peak, recipe.min_learning_rate, warmup, plan.num_steps)


_UNDECAYED = ("cls_token", "mask_token", "position_embeddings", "decoder_pos_embed")


def parameter_settings(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0
) -> dict[str, tuple[float, float]]:
    """`{parameter name: (learning-rate scale, weight decay)}` for every parameter, frozen ones too.

    Of L layers, layer l (from 0) learns at `layer_decay ** (L - l)`, the embeddings before it at `layer_decay ** (L +
    1)` and what comes after at 1 (Clark et al. 2020). Biases, norms and other vectors, tokens and positions have no
    decay.
    """
    encoder = rf"^(?:classifier\.)?(?:{'|'.join(family.encoder.base_model_prefix for family in FAMILIES)})"
    layers = re.compile(encoder + r"\.layers\.(\d+)\.")
    numbers = [int(match[1]) for name, _ in model.named_parameters() if (match := layers.match(name))]
    num_layers = max(numbers, default=-1) + 1
    settings = {}
    for name, parameter in model.named_parameters():
        if match := layers.match(name):
            depth = int(match[1]) + 1
        elif re.match(encoder + r"\.embeddings\.", name):
            depth = 0
        else:
            depth = num_layers + 1
        undecayed = parameter.ndim <= 1 or name.endswith(_UNDECAYED)
        settings[name] = (layer_decay ** (num_layers + 1 - depth), 0.0 if undecayed else weight_decay)
    return settings


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers that step together: Muon for the groups marked `muon`, of matrices, AdamW for the others."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]):
        super().__init__(groups, {"lr": 0.0})
        matrices = [group for group in self.param_groups if group["muon"]]
        others = [group for group in self.param_groups if not group["muon"]]
        self.parts = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=betas, fused=True),
        ]
        self._share_groups()

    def _share_groups(self) -> None:
        """Makes the groups those of the parts, so that a learning rate that is set here is set in its part."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()


def make_optimizer(model: nn.Module, recipe: OptimizationRecipe) -> torch.optim.Optimizer:
    """Fused AdamW, or Muon with it, over the trainable parameters: one group for each pair of settings, which keeps its
    `lr_scale`."""
    settings = parameter_settings(model, recipe.weight_decay, recipe.layer_decay)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr_scale, weight_decay = settings[name]
            muon = recipe.optimizer == "muon" and parameter.ndim == 2 and "layers." in name
            group = {"params": [], "lr_scale": lr_scale, "weight_decay": weight_decay, "muon": muon}
            groups.setdefault((lr_scale, weight_decay, muon), group)["params"].append(parameter)
    betas = tuple(recipe.betas)
    if recipe.optimizer == "muon":
        return MuonWithAdamW(list(groups.values()), betas)
    return torch.optim.AdamW(list(groups.values()), lr=0.0, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every group `learning_rate` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, `decay` per optimizer step; `.module` is the averaged model."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return average.requires_grad_(False).eval()


def soft_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, reduction: Literal["mean", "none"] = "mean"
) -> torch.Tensor:
    """Cross-entropy against probabilities `(B, num_labels)`: their mean, or `(B,)` with `reduction` "none".

    Outside the model on purpose: a model given soft `labels` would take them for a multi-label problem.
    """
    losses = -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1)  # (B,)
    return losses.mean() if reduction == "mean" else losses
