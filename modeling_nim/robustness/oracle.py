"""What an attacker may ask a model: losses, and gradients averaged over fresh noise draws (EOT).

The oracle answers what the threat model lets the attacker ask, in forward passes of at most `micro_batch` rows. An
attack is a function of an oracle and images, and asks nothing else. EOT: Athalye et al. 2018. DLR loss: Croce & Hein
2020.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .draws import ATTACK, EVALUATE, SELECT, START, stream_seed
from .targets import Target


RowLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Forward = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


# Losses take (R, num_classes) logits and (R,) labels and give (R,); the attacker makes them large.


def cross_entropy_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Minus the log-probability of the label."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Best wrong logit minus the right one: positive where the answer is wrong."""
    right = logits.gather(1, labels[:, None]).squeeze(1)
    wrong = logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
    return wrong - right


def dlr_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio (Croce & Hein 2020, Eq. 6): a margin that does not change when logits are scaled."""
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the model has {logits.shape[1]}: use the CE loss")
    ordered = logits.sort(dim=1, descending=True).values
    return margin_loss(logits, labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


def closeness_to_failing(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The slope of a sigmoid of the margin, a weight of a draw `(R,)`: largest on the border of a mistake.

    Draws that are wrong already and draws that are far from a mistake get little weight. The floor keeps the
    weights above zero where all draws of an image are far from a mistake.
    """
    margins = margin_loss(logits, labels).clamp(-30, 30)
    return torch.sigmoid(margins) * torch.sigmoid(-margins)


LOSSES: dict[str, RowLoss] = {"ce": cross_entropy_loss, "dlr": dlr_loss, "margin": margin_loss}


class Oracle:
    """What an attacker may ask about B images, averaged over `eot_samples` draws of its own.

    Args:
        forward: `(R, 3, H, W)` images and R draw seeds to `(R, num_classes)` logits.
        labels: `(B,)`; with `targeted` the classes to be reached.
        image_ids, seed: name the draws.
        eot_samples: draws per answer; 1 where there is no randomness.
        known_draw: every answer uses the one draw that will be scored: what an attacker who knows the noise can do.
        micro_batch: largest number of rows in one forward pass.
        row_loss: from logits and labels to one loss per row.
        targeted: the loss towards `labels` is made small instead.
        is_random: whether the model under attack answers otherwise to another draw.
        answers_only: there are no gradients to be had: a black box.
        bf16_gradients: gradients are computed in bfloat16, which is faster; losses and decisions stay in float32.
    """

    def __init__(
        self,
        forward: Forward,
        labels: torch.Tensor,
        image_ids: Sequence[str],
        seed: int,
        eot_samples: int = 1,
        known_draw: bool = False,
        micro_batch: int = 256,
        row_loss: RowLoss = cross_entropy_loss,
        targeted: bool = False,
        is_random: bool = True,
        answers_only: bool = False,
        bf16_gradients: bool = False,
    ):
        if eot_samples < 1 or micro_batch < 1:
            raise ValueError(f"eot_samples and micro_batch must be at least 1, got {eot_samples} and {micro_batch}")
        self.forward, self.labels, self.image_ids, self.seed = forward, labels, list(image_ids), seed
        self.eot_samples, self.known_draw, self.micro_batch = eot_samples, known_draw, micro_batch
        self.row_loss, self.sign, self.is_random = row_loss, -1.0 if targeted else 1.0, is_random
        self.answers_only, self.bf16_gradients, self.restart = answers_only, bf16_gradients, 0
        self.queries = torch.zeros(len(self.image_ids), dtype=torch.long)
        self.zero_gradients = torch.zeros(len(self.image_ids), dtype=torch.long)

    def begin(self, restart: int) -> None:
        """Moves to the noise streams of another restart."""
        self.restart = restart

    def seeds(self, image: int, draws: range) -> list[int]:
        """Seeds of the draws that the next answer about an image uses."""
        if self.known_draw:
            return [stream_seed(self.seed, self.image_ids[image], EVALUATE, 0)] * len(draws)
        # every query gets fresh noise: the number of earlier queries of the image is part of the draw's name
        name = (self.seed, self.image_ids[image], ATTACK, self.restart, int(self.queries[image]))
        return [stream_seed(*name, draw) for draw in draws]

    def _groups(self, images: Sequence[int]) -> list[tuple[Sequence[int], range]]:
        """Cuts images x draws into pieces of at most `micro_batch` rows; draws are cut when one image has too many."""
        draws = min(self.eot_samples, self.micro_batch)
        per_group = max(1, self.micro_batch // draws)
        image_groups = [images[start : start + per_group] for start in range(0, len(images), per_group)]
        draw_groups = [
            range(start, min(start + draws, self.eot_samples)) for start in range(0, self.eot_samples, draws)
        ]
        return [(group, part) for group in image_groups for part in draw_groups]

    def _losses(self, images_01: torch.Tensor, group: Sequence[int], draws: range, weigh: RowLoss | None = None):
        """`(b, k)` losses of the images of a group and, with `weigh`, the weights of their draws."""
        rows = images_01 if len(draws) == 1 else images_01.repeat_interleave(len(draws), dim=0)  # (b * k, 3, H, W)
        seeds = [seed for image in group for seed in self.seeds(image, draws)]
        labels = self.labels[list(group)].repeat_interleave(len(draws))
        logits = self.forward(rows, seeds).float()
        losses = self.sign * self.row_loss(logits, labels).view(len(group), len(draws))
        if weigh is None:
            return losses, None
        return losses, weigh(logits.detach(), labels).view(len(group), len(draws))

    def gradient(self, images_01: torch.Tensor, weigh: RowLoss | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss `(B,)` over the draws and its gradient `(B, 3, H, W)`, exact for these draws.

        `weigh` makes the means weighted ones: from `(R, num_classes)` logits and `(R,)` labels to weights above 0.
        """
        if self.answers_only:
            raise ValueError("a black box gives no gradients: use 'loss', or the threat model white_box")
        losses = torch.zeros(len(images_01), device=images_01.device)
        gradients = torch.zeros_like(images_01)
        weights = torch.zeros_like(losses)
        for group, draws in self._groups(range(len(images_01))):
            piece = slice(group[0], group[-1] + 1)
            leaf = images_01[piece].detach().requires_grad_()
            with torch.autocast(leaf.device.type, torch.bfloat16, enabled=self.bf16_gradients):
                row_losses, row_weights = self._losses(leaf, group, draws, weigh)
            if row_weights is None:
                mean = row_losses.sum(dim=1) / self.eot_samples  # (b,)
            else:
                mean = (row_losses * row_weights).sum(dim=1)
                weights[piece] += row_weights.sum(dim=1)
            if mean.requires_grad:  # else nothing depends on the images and the gradient is zero
                gradients[piece] += torch.autograd.grad(mean.sum(), leaf, allow_unused=True, materialize_grads=True)[0]
            losses[piece] += mean.detach()
        if weigh is not None:
            losses, gradients = losses / weights, gradients / weights.view(-1, 1, 1, 1)
        self.queries += self.eot_samples
        zero = gradients.flatten(1).abs().amax(dim=1) == 0
        if self.row_loss is dlr_loss:  # constant at its largest value, 1, where a gradient of zero is right
            zero &= losses < 1 - 1e-6
        self.zero_gradients += zero.cpu()
        return losses, gradients

    @torch.no_grad()
    def loss(self, images_01: torch.Tensor, images: Sequence[int] | None = None) -> torch.Tensor:
        """Mean loss over the draws of `images_01`, which are the oracle's images, or those that `images` numbers."""
        images = range(len(images_01)) if images is None else images
        losses = torch.zeros(len(images_01), device=images_01.device)
        done = 0
        for group, draws in self._groups(images):
            piece = slice(done, done + len(group))
            losses[piece] += self._losses(images_01[piece], group, draws)[0].sum(dim=1) / self.eot_samples
            done += len(group) if draws.stop == self.eot_samples else 0
        self.queries[list(images)] += self.eot_samples
        return losses

    def generators(self, device: torch.device, purpose: str = START) -> list[torch.Generator]:
        """One generator per image for the attacker's own choices, such as a random start."""
        seeds = [stream_seed(self.seed, image_id, purpose, self.restart) for image_id in self.image_ids]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def choose_worst(
    oracle: Oracle,
    forward: Forward,
    candidates: list[torch.Tensor],
    labels: torch.Tensor,
    num_draws: int,
) -> torch.Tensor:
    """Per image, the candidate with the lowest accuracy, and among equals the largest margin loss.

    Judged on selection draws, which are neither the attack's nor the ones that will be scored; an attacker who knows
    the scored draw judges on that.
    """
    if len(candidates) == 1:
        return candidates[0]
    purpose = EVALUATE if oracle.known_draw else SELECT
    scores = []
    for candidate in candidates:
        logits = decide(forward, candidate, oracle.image_ids, oracle.seed, purpose, num_draws, oracle.micro_batch)
        margins = margin_loss(logits.flatten(0, 1), labels.repeat_interleave(num_draws)).view(len(labels), num_draws)
        oracle.queries += num_draws
        wrong = (margins > 0).double().mean(dim=1)
        scores.append(wrong + 0.5 * torch.sigmoid(margins.double().mean(dim=1)) / num_draws)  # ties by the margin
    choice = torch.stack(scores).argmax(dim=0)  # (B,)
    return torch.stack(candidates)[choice, torch.arange(len(labels), device=choice.device)]


@torch.no_grad()
def decide(
    forward: Forward,
    images_01: torch.Tensor,
    image_ids: Sequence[str],
    seed: int,
    purpose: str,
    num_draws: int,
    micro_batch: int,
) -> torch.Tensor:
    """Logits `(B, num_draws, num_classes)` on the draws named by `purpose`, at most `micro_batch` rows at a time."""
    rows = [(image, draw) for image in range(len(images_01)) for draw in range(num_draws)]
    pieces = []
    for start in range(0, len(rows), micro_batch):
        piece = rows[start : start + micro_batch]
        seeds = [stream_seed(seed, image_ids[image], purpose, draw) for image, draw in piece]
        pieces.append(forward(images_01[[image for image, _ in piece]], seeds).float())
    return torch.cat(pieces).view(len(images_01), num_draws, -1)


def target_forward(target: Target) -> Forward:
    """The whole target as a function of images and draw seeds."""
    return lambda images_01, seeds: target.logits(images_01, target.draw(seeds, images_01.shape[1:]))


def without_draws(function: Callable[[torch.Tensor], torch.Tensor]) -> Forward:
    """A function of images alone, as an oracle calls it."""
    return lambda images_01, seeds: function(images_01)


def rows_per_pass(micro_batch: int, target: Target) -> int:
    """Decisions that fit into a forward pass of `micro_batch` rows."""
    return max(1, micro_batch // target.rows_per_decision)
