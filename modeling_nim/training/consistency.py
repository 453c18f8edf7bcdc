"""Losses that make several noise draws of one image agree, for worst-draw accuracy and for certificates."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from ..runs.bounds import Bounds, Weight, check_fields


@dataclass
class ConsistencyRecipe:
    """The `consistency` section of fine-tuning on denoised images: `num_draws` of each image at one sigma.

    To the mean cross-entropy are added `weight` times the mean KL divergence of the draws from their mean prediction
    and `entropy_weight` times the entropy of that prediction (Jeong & Shin 2020, with 10 to 20 and 0.5).
    `selection: right` is FT-CADIS's (Jeong et al. 2024): the cross-entropy of an image counts the draws that are right,
    or the one with the smallest loss where none is; its divergence counts where all are right.
    """

    num_draws: Annotated[int, Bounds(least=1, most=1024)] = 1  # of the noise, for each image of a batch
    weight: Weight = 0.0  # of the draws' divergence from their mean prediction
    entropy_weight: Weight = 0.0  # of the mean prediction's entropy
    # right: the cross-entropy counts the draws that are right, or else the best one
    selection: Literal["all", "right"] = "all"

    def __post_init__(self):
        check_fields(self, "consistency.")
        if self.num_draws == 1 and (self.weight or self.selection != "all"):
            raise ValueError("one draw agrees with itself: set consistency.num_draws to 2 or more")


def consistent_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, recipe: ConsistencyRecipe) -> torch.Tensor:
    """The classification loss of K draws of B images, a scalar.

    Args:
        logits: `(B, K, num_labels)`.
        targets: `(B, num_labels)` probabilities.
    """
    log_probabilities = logits.float().log_softmax(dim=-1)  # (B, K, num_labels)
    losses = -(targets[:, None] * log_probabilities).sum(dim=-1)  # (B, K)
    mean = log_probabilities.exp().mean(dim=1)  # (B, num_labels)
    log_mean = log_probabilities.logsumexp(dim=1) - math.log(logits.shape[1])
    divergences = (mean[:, None] * (log_mean[:, None] - log_probabilities)).sum(dim=-1)  # (B, K)
    entropies = -(mean * log_mean).sum(dim=-1)  # (B,)
    if recipe.selection == "right":
        right = log_probabilities.argmax(dim=-1) == targets.argmax(dim=-1)[:, None]  # (B, K)
        best = torch.nn.functional.one_hot(losses.argmin(dim=1), losses.shape[1]).bool()
        chosen = torch.where(right.any(dim=1, keepdim=True), right, best)
        losses = (losses * chosen).sum(dim=1) / chosen.sum(dim=1)
        divergences = divergences * right.all(dim=1, keepdim=True)
    return losses.mean() + recipe.weight * divergences.mean() + recipe.entropy_weight * entropies.mean()
