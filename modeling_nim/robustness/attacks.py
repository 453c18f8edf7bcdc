"""Attacks, batched over images and noise draws; each is a small function of an `Oracle` and [0, 1] images.

The oracle answers what the threat model lets the attacker ask: losses and gradients, averaged over fresh noise draws
(expectation over transformation, EOT), in forward passes of at most `micro_batch` rows. Distances are in [0, 1] units here
(`epsilon` is `epsilon_255 / 255`; its L2 norm likewise).

Sources: FGSM, Goodfellow et al. 2015; PGD, Madry et al. 2018; EOT, Athalye et al. 2018; APGD and the DLR loss, Croce & Hein
2020; Square, Andriushchenko et al. 2020. Written from those papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from .draws import ATTACK, EVALUATE, SELECT, START, stream_seed
from .targets import Target


Norm = Literal["linf", "l2"]
RowLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


# ----------------------------------------------------------------------------------------------------------------------
# Losses: (R, num_classes) logits and (R,) labels to (R,); the attacker makes them large.


def cross_entropy_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
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


LOSSES: dict[str, RowLoss] = {"ce": cross_entropy_loss, "dlr": dlr_loss, "margin": margin_loss}


# ----------------------------------------------------------------------------------------------------------------------


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
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
        labels: torch.Tensor,
        image_ids: Sequence[str],
        seed: int,
        eot_samples: int = 1,
        known_draw: bool = False,
        micro_batch: int = 256,
        row_loss: RowLoss = cross_entropy_loss,
        targeted: bool = False,
    ):
        if eot_samples < 1 or micro_batch < 1:
            raise ValueError(f"eot_samples and micro_batch must be at least 1, got {eot_samples} and {micro_batch}")
        self.forward, self.labels, self.image_ids, self.seed = forward, labels, list(image_ids), seed
        self.eot_samples, self.known_draw, self.micro_batch = eot_samples, known_draw, micro_batch
        self.row_loss, self.sign = row_loss, -1.0 if targeted else 1.0
        self.restart = 0
        self.queries = torch.zeros(len(self.image_ids), dtype=torch.long)
        self.zero_gradients = torch.zeros(len(self.image_ids), dtype=torch.long)

    def begin(self, restart: int) -> None:
        """Moves to the noise streams of another restart."""
        self.restart = restart

    def seeds(self, image: int, draws: range) -> list[int]:
        if self.known_draw:
            return [stream_seed(self.seed, self.image_ids[image], EVALUATE, 0)] * len(draws)
        # every question meets fresh noise: how much the image has been asked before is part of the draw's name
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

    def _losses(self, images_01: torch.Tensor, group: Sequence[int], draws: range) -> torch.Tensor:
        """`(b, k)` losses of the images of a group."""
        rows = images_01 if len(draws) == 1 else images_01.repeat_interleave(len(draws), dim=0)  # (b * k, 3, H, W)
        seeds = [seed for image in group for seed in self.seeds(image, draws)]
        labels = self.labels[list(group)].repeat_interleave(len(draws))
        logits = self.forward(rows, seeds).float()
        return self.sign * self.row_loss(logits, labels).view(len(group), len(draws))

    def gradient(self, images_01: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss `(B,)` over the draws and its gradient `(B, 3, H, W)`, exact for these draws."""
        losses = torch.zeros(len(images_01), device=images_01.device)
        gradients = torch.zeros_like(images_01)
        for group, draws in self._groups(range(len(images_01))):
            piece = slice(group[0], group[-1] + 1)
            leaf = images_01[piece].detach().requires_grad_()
            mean = self._losses(leaf, group, draws).sum(dim=1) / self.eot_samples  # (b,)
            if mean.requires_grad:  # else nothing depends on the images and the gradient is zero
                gradients[piece] += torch.autograd.grad(mean.sum(), leaf, allow_unused=True, materialize_grads=True)[0]
            losses[piece] += mean.detach()
        self.queries += self.eot_samples
        zero = gradients.flatten(1).abs().amax(dim=1) == 0
        if self.row_loss is dlr_loss:  # flat, at its largest value, once an attack has gone far enough
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
            losses[piece] += self._losses(images_01[piece], group, draws).sum(dim=1) / self.eot_samples
            done += len(group) if draws.stop == self.eot_samples else 0
        self.queries[list(images)] += self.eot_samples
        return losses

    def generators(self, device: torch.device, purpose: str = START) -> list[torch.Generator]:
        """One generator per image for the attacker's own choices, such as a random start."""
        seeds = [stream_seed(self.seed, image_id, purpose, self.restart) for image_id in self.image_ids]
        return [torch.Generator(device).manual_seed(seed) for seed in seeds]


# ----------------------------------------------------------------------------------------------------------------------
# Geometry


def project(perturbation: torch.Tensor, epsilon: float, norm: Norm) -> torch.Tensor:
    """The nearest perturbation within epsilon."""
    if norm == "linf":
        return perturbation.clamp(-epsilon, epsilon)
    return perturbation * (epsilon / _l2_norm(perturbation).clamp_min(1e-12)).clamp_max(1)


def _within(images_01: torch.Tensor, candidates_01: torch.Tensor, epsilon: float, norm: Norm) -> torch.Tensor:
    """`candidates_01` moved into the ball around `images_01` and into [0, 1]; the second step never leaves the ball."""
    return (images_01 + project(candidates_01 - images_01, epsilon, norm)).clamp(0, 1)


def _l2_norm(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _direction(gradient: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Steepest ascent of unit length in the norm."""
    return gradient.sign() if norm == "linf" else gradient / _l2_norm(gradient).clamp_min(1e-12)


def random_start(
    images_01: torch.Tensor, epsilon: float, norm: Norm, generators: Sequence[torch.Generator], patch_size: int | None
) -> torch.Tensor:
    """A point drawn uniformly from the ball, one generator per image; constant over patches with `patch_size`."""
    starts = []
    for image_01, generator in zip(images_01, generators, strict=True):
        shape = image_01.shape
        if patch_size is not None:
            shape = (shape[0], shape[1] // patch_size, shape[2] // patch_size)
        if norm == "linf":
            noise = (2 * torch.rand(shape, generator=generator, device=image_01.device) - 1) * epsilon
        else:
            noise = torch.randn(shape, generator=generator, device=image_01.device)
            radius = epsilon * torch.rand((), generator=generator, device=image_01.device) ** (1 / noise.numel())
            noise = noise / noise.norm() * radius
            if patch_size is not None:
                noise = noise / patch_size  # each number is repeated patch_size^2 times
        starts.append(noise)
    start = torch.stack(starts)
    if patch_size is not None:
        start = F.interpolate(start, scale_factor=patch_size, mode="nearest")
    return (images_01 + start).clamp(0, 1)


def average_over_patches(tensor: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Each patch of `(B, C, H, W)` replaced by its mean."""
    height, width = tensor.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"patches of {patch_size} pixels do not tile images of {height}x{width}: set patch_size")
    return F.interpolate(F.avg_pool2d(tensor, patch_size), scale_factor=patch_size, mode="nearest")


# ----------------------------------------------------------------------------------------------------------------------
# Attacks: (oracle, images_01, epsilon, ...) to adversarial images of the same shape


def pgd(
    oracle: Oracle,
    images_01: torch.Tensor,
    epsilon: float,
    alpha: float,
    steps: int,
    norm: Norm = "linf",
    from_random_start: bool = True,
    patch_size: int | None = None,
    start_01: torch.Tensor | None = None,
) -> torch.Tensor:
    """Projected gradient ascent; returns the last iterate.

    With `patch_size`, start and steps are constant over each patch, so that the perturbation moves patch means alone: the
    patch-mean attack. Pixels that have met 0 or 1 on the way lag behind their patch; holding them to it as well, by
    clipping the image instead of the iterate, left the same accuracy on digits.
    `start_01` overrides the start.
    """
    if start_01 is not None:
        adversarial = start_01.clone()
    elif from_random_start:
        generators = oracle.generators(images_01.device)
        adversarial = random_start(images_01, epsilon, norm, generators, patch_size)
    else:
        adversarial = images_01.clone()
    for _ in range(steps):
        gradient = oracle.gradient(adversarial)[1]
        if patch_size is not None:
            gradient = average_over_patches(gradient, patch_size)
        adversarial = _within(images_01, adversarial + alpha * _direction(gradient, norm), epsilon, norm)
    return adversarial


def fgsm(oracle: Oracle, images_01: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One step of full length from the image itself."""
    return pgd(oracle, images_01, epsilon, alpha=epsilon, steps=1, from_random_start=False)


def apgd(oracle: Oracle, images_01: torch.Tensor, epsilon: float, steps: int, norm: Norm = "linf") -> torch.Tensor:
    """Auto-PGD (Croce & Hein 2020, Algorithm 1): momentum, and a step size that is halved when progress stops.

    Returns the iterate with the largest loss, averaged over the draws that the oracle gave it. `steps` counts gradients, as
    for PGD, the one at the random start included: the paper's algorithm makes one move more and looks at its end point.
    """
    momentum, progress_share = 0.75, 0.75
    checkpoints = _apgd_checkpoints(steps)
    step_size = torch.full((len(images_01), 1, 1, 1), 2 * epsilon, device=images_01.device)

    previous = random_start(images_01, epsilon, norm, oracle.generators(images_01.device), None)
    best_loss, best_gradient = oracle.gradient(previous)
    best = previous.clone()
    loss, gradient = best_loss.clone(), best_gradient.clone()
    current = _within(images_01, previous + step_size * _direction(gradient, norm), epsilon, norm)

    improvements = torch.zeros_like(loss)
    halved_last = torch.zeros_like(loss, dtype=torch.bool)
    best_at_checkpoint = best_loss.clone()
    last_checkpoint = 0
    for iteration in range(1, steps):
        new_loss, gradient = oracle.gradient(current)
        improvements += new_loss > loss
        loss = new_loss
        better = loss > best_loss
        best = torch.where(better.view(-1, 1, 1, 1), current, best)
        best_gradient = torch.where(better.view(-1, 1, 1, 1), gradient, best_gradient)
        best_loss = torch.where(better, loss, best_loss)

        if iteration in checkpoints:
            too_few = improvements < progress_share * (iteration - last_checkpoint)
            stuck = ~halved_last & (best_at_checkpoint >= best_loss)
            halve = too_few | stuck
            step_size = torch.where(halve.view(-1, 1, 1, 1), step_size / 2, step_size)
            current = torch.where(halve.view(-1, 1, 1, 1), best, current)
            gradient = torch.where(halve.view(-1, 1, 1, 1), best_gradient, gradient)
            previous = torch.where(halve.view(-1, 1, 1, 1), best, previous)
            halved_last, best_at_checkpoint = halve, best_loss.clone()
            improvements.zero_()
            last_checkpoint = iteration

        proposal = _within(images_01, current + step_size * _direction(gradient, norm), epsilon, norm)
        moved = current + momentum * (proposal - current) + (1 - momentum) * (current - previous)
        previous, current = current, _within(images_01, moved, epsilon, norm)
    return best


def _apgd_checkpoints(steps: int) -> set[int]:
    """The iterations at which APGD reconsiders its step size: 0.22 of the way, then ever closer together."""
    percent = [0, 22]
    while percent[-1] < 100:
        percent.append(percent[-1] + max(percent[-1] - percent[-2] - 3, 6))
    return {-(-position * steps // 100) for position in percent[1:]}  # rounded up


def square(
    oracle: Oracle,
    images_01: torch.Tensor,
    epsilon: float,
    queries: int,
    stop_when_wrong: bool = False,
    initial_share: float = 0.8,
) -> torch.Tensor:
    """Square attack, L-inf: random squares are kept when they raise the margin loss, averaged over the oracle's draws.

    `queries` counts the model's answers per image, every draw of an average included. `stop_when_wrong` ends an image at its
    first wrong answer. For a randomised model that would reward one lucky draw, so it is for deterministic ones; and there
    the loss that a square was kept for is the luckiest of many, so it is measured again before anything is compared with it.
    """
    batch, channels, height, width = images_01.shape
    device = images_01.device
    generators = oracle.generators(torch.device("cpu"))  # its choices are few numbers, used on the host
    stripes = torch.stack([_random_signs((channels, 1, width), generator) for generator in generators]).to(device)
    adversarial = (images_01 + epsilon * stripes).clamp(0, 1)
    best_loss = oracle.loss(adversarial)
    measure_again = not stop_when_wrong
    while True:
        left = oracle.queries <= queries - oracle.eot_samples * (2 if measure_again else 1)
        if stop_when_wrong:
            left &= (best_loss < 0).cpu()
        active = left.nonzero().flatten().tolist()
        if not active:
            return adversarial
        candidates = adversarial[active].clone()
        for row, image in enumerate(active):
            generator = generators[image]
            side = _square_side(initial_share, int(oracle.queries[image]) / queries, height, width)
            top = int(torch.randint(height - side + 1, (), generator=generator))
            left_edge = int(torch.randint(width - side + 1, (), generator=generator))
            window = (slice(None), slice(top, top + side), slice(left_edge, left_edge + side))
            signs = _random_signs((channels, 1, 1), generator).to(device)
            candidates[row][window] = (images_01[image][window] + epsilon * signs).clamp(0, 1)
        losses = oracle.loss(candidates, active)
        index = torch.tensor(active, device=device)
        better = losses > best_loss[index]
        kept = index[better]
        adversarial[kept] = candidates[better]
        best_loss[kept] = losses[better]
        if measure_again and len(kept):
            best_loss[kept] = oracle.loss(adversarial[kept], kept.tolist())


def _random_signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 2.0 * torch.randint(2, shape, generator=generator) - 1.0


def _square_side(initial_share: float, progress: float, height: int, width: int) -> int:
    """Side of the square: the share of pixels is halved at fixed fractions of the budget (the paper's schedule)."""
    halvings = sum(progress > limit / 10_000 for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    side = round(math.sqrt(initial_share / 2**halvings * height * width))
    return min(max(side, 1), height, width)


def choose_worst(
    oracle: Oracle,
    forward: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
    candidates: list[torch.Tensor],
    labels: torch.Tensor,
    num_draws: int,
) -> torch.Tensor:
    """Per image, the candidate with the lowest accuracy, and among equals the largest margin loss.

    Judged on selection draws, which are neither the attack's nor the ones that will be scored; an attacker who knows the
    scored draw judges on that.
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
    forward: Callable[[torch.Tensor, Sequence[int]], torch.Tensor],
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


def target_forward(target: Target) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
    """The whole target as a function of images and draw seeds."""
    return lambda images_01, seeds: target.logits(images_01, target.draw(seeds))
