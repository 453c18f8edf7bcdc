"""Adversarial examples to train on: the package's own attacks, through everything that the trained model does."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from ..robustness.attacks import pgd
from ..robustness.oracle import Oracle
from ..runs.bounds import Bounds, Weight, check_fields
from .optimization import Plan, soft_cross_entropy


@dataclass
class AdversaryRecipe:
    """The `adversary` section of fine-tuning: which attack makes the images, what learns from them, and the losses.

    - `attack: fgsm` is one step from a random start (Wong et al. 2020), `pgd` are `steps` of them (Madry et al. 2018),
      in L-inf within `epsilon_255`, each `alpha_ratio * epsilon` long (None: 1 for fgsm, 2.5 / steps for pgd). The
      budget grows linearly over the first `warmup_epochs`.
    - `trains`: with `images: denoised`, which parts learn; the gradients pass through the other one.
    - `targets: labels`, or `clean_answer`: what the classifier says of the clean image, for a frozen one (AToP, Lin et
      al. 2024, and the stability objective of Salman et al. 2020).
    - The cross-entropy counts `classification_weight` times.
    - `reconstruction_weight` times the mean squared error between purified and clean image, both normalized, is added.
    """

    # fgsm is one step from a random start, pgd are `steps` of them; none trains on clean images
    attack: Literal["none", "fgsm", "pgd"] = "none"
    epsilon_255: Annotated[float, Bounds(least=0, most=255)] = 8.0  # L-infinity, on 0..255
    steps: Annotated[int, Bounds(least=1, most=1000)] = 3  # of pgd
    # step over epsilon; null: 1 for fgsm, 2.5 / steps for pgd
    alpha_ratio: Annotated[float, Bounds(above=0, most=100)] | None = None
    warmup_epochs: Annotated[float, Bounds(least=0, most=1_000_000)] = 0.0  # the budget grows over these
    trains: Literal["classifier", "purifier", "both"] = "classifier"
    # what is learned: labels, or what the classifier says of the clean image
    targets: Literal["labels", "clean_answer"] = "labels"
    classification_weight: Weight = 1.0  # of the cross-entropy to what is learned
    # of the squared error between purified and clean image
    reconstruction_weight: Weight = 0.0

    def __post_init__(self):
        check_fields(self, "adversary.")
        if self.reconstruction_weight and self.trains == "classifier":
            raise ValueError(
                f"adversary.reconstruction_weight {self.reconstruction_weight} is for a purifier that learns; set "
                "adversary.trains to purifier or both"
            )
        if self.targets == "clean_answer" and self.trains != "purifier":
            raise ValueError(
                "adversary.targets clean_answer asks a frozen classifier; set adversary.trains to purifier"
            )


def epsilon_255_at(step: int, recipe: AdversaryRecipe, plan: Plan) -> float:
    """The attacker's budget at optimizer step `step`, counted from 0; 0 means no attack."""
    if recipe.attack == "none":
        return 0.0
    warmup_steps = recipe.warmup_epochs * plan.steps_per_epoch
    if warmup_steps > plan.num_steps:
        raise ValueError(
            f"adversary.warmup_epochs {recipe.warmup_epochs:g} are {warmup_steps:.0f} steps and the run has "
            f"{plan.num_steps}, so epsilon_255 {recipe.epsilon_255:g} would never be reached; lower it"
        )
    return recipe.epsilon_255 * min(1.0, (step + 1) / warmup_steps if warmup_steps else 1.0)


def adversarial_images(
    forward: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
    images_01: torch.Tensor,
    targets: torch.Tensor,
    names: Sequence[str],
    seed: int,
    epsilon_255: float,
    recipe: AdversaryRecipe,
) -> torch.Tensor:
    """Images within `epsilon_255` of `images_01` that raise the cross-entropy to `targets`.

    Args:
        forward: `(B, 3, H, W)` images in [0, 1] and B seeds of noise draws to logits; differentiable.
        images_01: `(B, 3, H, W)`.
        targets: `(B, num_labels)` probabilities.
        names: one per image; with `seed` they name the random starts, and the noise of every question to the model.

    Returns:
        `(B, 3, H, W)` in [0, 1], without a gradient; `images_01` itself when the budget is 0.
    """
    if epsilon_255 == 0:
        return images_01

    def row_loss(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return soft_cross_entropy(logits, targets[rows], reduction="none")

    rows = torch.arange(len(images_01), device=images_01.device)  # the oracle's labels: where the targets are
    oracle = Oracle(forward, rows, names, seed, micro_batch=len(images_01), row_loss=row_loss)
    steps = 1 if recipe.attack == "fgsm" else recipe.steps
    alpha_ratio = recipe.alpha_ratio or (1.0 if steps == 1 else 2.5 / steps)
    epsilon = epsilon_255 / 255
    return pgd(oracle, images_01, epsilon, alpha_ratio * epsilon, steps)


@contextmanager
def as_attacked(model: nn.Module) -> Iterator[nn.Module]:
    """`model` as an attacker meets it: in evaluation mode, without gradients of weights, which cost a third more.

    Afterwards every module is in the mode and every weight as it was.
    """
    modes = {module: module.training for module in model.modules()}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield model
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
