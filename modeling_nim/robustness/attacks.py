"""The attacks: each is a function of an `Oracle` and [0, 1] images, and one row of `ATTACKS`.

The row says in which threat models the attack makes sense, which settings of a recipe it uses and how many gradients it
takes; label, allowed settings and cost follow from it. A new attack is a function and a row, here; an attack of one's
own stays outside, as `package.module:function` in a recipe. Distances are in [0, 1] units (`epsilon` is `epsilon_255 /
255`; its L2 norm likewise).

Sources: FGSM, Goodfellow et al. 2015; PGD, Madry et al. 2018; MI-FGSM, Dong et al. 2018; APGD, Croce & Hein 2020;
Square, Andriushchenko et al. 2020; draws weighted inside EOT, after a finding of DiffHammer (Wang et al. 2024). Written
from those papers.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .functions import named_function
from .oracle import Oracle, RowLoss, closeness_to_failing
from .torchattacks_peer import run_torchattacks, torchattacks_answers, torchattacks_gradients


Norm = Literal["linf", "l2"]


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


def check_patches(images: torch.Tensor, patch_size: int) -> None:
    """ValueError where patches do not tile the images `(B, C, H, W)`."""
    height, width = images.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"patches of {patch_size} pixels do not tile images of {height}x{width}: set patch_size")


def average_over_patches(tensor: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Each patch of `(B, C, H, W)` replaced by its mean."""
    check_patches(tensor, patch_size)
    return F.interpolate(F.avg_pool2d(tensor, patch_size), scale_factor=patch_size, mode="nearest")


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
    weigh: RowLoss | None = None,
) -> torch.Tensor:
    """Projected gradient ascent; returns the last iterate.

    With `patch_size`, start and steps are constant over each patch, so that the perturbation moves patch means alone:
    the patch-mean attack. Pixels that were clipped at 0 or 1 move less than their patch. Clipping the image instead of
    the iterate would prevent that; on digits it left the same accuracy.
    `start_01` overrides the start; `weigh` weights the draws of each step (`Oracle.gradient`).
    """
    if patch_size is not None:
        check_patches(images_01, patch_size)
    if start_01 is not None:
        adversarial = start_01.clone()
    elif from_random_start:
        generators = oracle.generators(images_01.device)
        adversarial = random_start(images_01, epsilon, norm, generators, patch_size)
    else:
        adversarial = images_01.clone()
    for _ in range(steps):
        gradient = oracle.gradient(adversarial, weigh)[1]
        if patch_size is not None:
            gradient = average_over_patches(gradient, patch_size)
        adversarial = _within(images_01, adversarial + alpha * _direction(gradient, norm), epsilon, norm)
    return adversarial


def pgd_weighted(oracle: Oracle, images_01: torch.Tensor, epsilon: float, **settings: Any) -> torch.Tensor:
    """PGD whose gradient gives most weight to the draws that are about to fail; `pgd` weights all draws equally.

    On 100 digits it was no stronger than `pgd` at equal cost: 20 steps of 10 draws at 8 and 16/255 left a
    hardened model 91.4 and 76.7 (`pgd`: 91.4 and 76.8), an unhardened one 69.9 and 25.4 (70.3 and 25.3).
    """
    return pgd(oracle, images_01, epsilon, weigh=closeness_to_failing, **settings)


def fgsm(oracle: Oracle, images_01: torch.Tensor, epsilon: float, norm: Norm = "linf") -> torch.Tensor:
    """One step of full length from the image itself."""
    return pgd(oracle, images_01, epsilon, alpha=epsilon, steps=1, norm=norm, from_random_start=False)


def mim(
    oracle: Oracle, images_01: torch.Tensor, epsilon: float, alpha: float, steps: int, norm: Norm = "linf"
) -> torch.Tensor:
    """MI-FGSM (Dong et al. 2018, Algorithm 1; decay 1): steps along a running sum of gradients of mean length one."""
    adversarial, momentum = images_01.clone(), torch.zeros_like(images_01)
    for _ in range(steps):
        gradient = oracle.gradient(adversarial)[1]
        momentum += gradient / gradient.flatten(1).abs().mean(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
        adversarial = _within(images_01, adversarial + alpha * _direction(momentum, norm), epsilon, norm)
    return adversarial


def apgd(oracle: Oracle, images_01: torch.Tensor, epsilon: float, steps: int, norm: Norm = "linf") -> torch.Tensor:
    """Auto-PGD (Croce & Hein 2020, Algorithm 1): momentum, and a step size that is halved when progress stops.

    Returns the iterate with the largest loss, averaged over the draws that the oracle gave it. `steps` counts
    gradients, as for PGD, the one at the random start included: the paper's algorithm makes one step more and evaluates
    its end point.
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
    stop_when_wrong: bool | None = None,
    initial_share: float = 0.8,
) -> torch.Tensor:
    """Square attack, L-inf: random squares are kept when they raise the margin loss, averaged over the oracle's draws.

    `queries` counts the model's answers per image, every draw of an average included. `stop_when_wrong` ends an image
    at its first wrong answer; None: where the model is not random. On a random model one lucky draw would end the
    image, so there the attack goes on. The loss of a kept square, the largest of many, is measured again before each
    comparison.
    """
    batch, channels, height, width = images_01.shape
    device = images_01.device
    generators = oracle.generators(torch.device("cpu"))  # its choices are few numbers, used on the host
    stripes = torch.stack([_random_signs((channels, 1, width), generator) for generator in generators]).to(device)
    adversarial = (images_01 + epsilon * stripes).clamp(0, 1)
    best_loss = oracle.loss(adversarial)
    if stop_when_wrong is None:
        stop_when_wrong = not oracle.is_random
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


# ---- the table


def _gradients(recipe: Any) -> int:
    passes = recipe.steps if "steps" in recipe.row.settings else 1
    return passes * recipe.restarts * recipe.eot_samples * len(recipe.losses)


@dataclass(frozen=True)
class Attack:
    """One attack.

    - `run(oracle, images_01, epsilon, **settings)` gives adversarial images of the same shape.
    - `threat_models` in which it makes sense, the usual one first.
    - `settings`: the keys of `AttackRecipe` that it uses; any other that is set is refused. Those in `KEYWORDS` are
      arguments of `run`, the others shape the oracle.
    - `losses`: what is made large where `loss` is no setting; of several, the worst result per image counts.
    - `sees`: whether the attacker asks the model itself, another one (`source`) or the features of its encoder.
    - `gradients`, `answers`: gradient rows and forward rows that an `AttackRecipe` costs per image.
    - `least_steps`; `needs_purifier`: pointless without one; `is_per_image`: images may be left out of a batch.
    """

    run: Callable[..., torch.Tensor]
    threat_models: tuple[str, ...]
    settings: tuple[str, ...]
    losses: tuple[str, ...] = ("ce",)
    sees: Literal["model", "source", "features"] = "model"
    gradients: Callable[[Any], int] = _gradients
    answers: Callable[[Any], int] = lambda recipe: 0
    least_steps: int = 1
    needs_purifier: bool = False
    is_per_image: bool = True


# Settings that are arguments of an attack's function, and their names there.
KEYWORDS = {"norm": "norm", "steps": "steps", "alpha_255": "alpha", "alpha_ratio": "alpha", "queries": "queries"}
KEYWORDS |= {"random_start": "from_random_start", "patch_size": "patch_size"}

WHITE_OR_GRAY = ("white_box", "white_box_known_draw", "gray_box")
_ALPHA = ("alpha_255", "alpha_ratio")
_APGD = ("norm", "steps", "eot_samples", "restarts")
_PGD = (*_APGD, *_ALPHA, "random_start", "targeted", "loss")
_TORCHATTACKS = ("torchattacks_class", "arguments", "steps", *_ALPHA, "queries", "eot_samples")

ATTACKS: dict[str, Attack] = {
    "fgsm": Attack(fgsm, WHITE_OR_GRAY, ("norm", "eot_samples", "targeted", "loss")),
    "mim": Attack(mim, WHITE_OR_GRAY, ("norm", "steps", *_ALPHA, "eot_samples", "targeted", "loss")),
    "pgd": Attack(pgd, WHITE_OR_GRAY, _PGD),
    "pgd_weighted": Attack(pgd_weighted, WHITE_OR_GRAY, _PGD),
    "patch_mean": Attack(pgd, WHITE_OR_GRAY, (*_PGD, "patch_size"), needs_purifier=True),
    "apgd_ce": Attack(apgd, WHITE_OR_GRAY, (*_APGD, "targeted"), least_steps=2),
    "apgd_dlr": Attack(apgd, WHITE_OR_GRAY, _APGD, losses=("dlr",), least_steps=2),
    "autoattack_rand": Attack(apgd, WHITE_OR_GRAY, _APGD, losses=("ce", "dlr"), least_steps=2),
    "features": Attack(pgd, ("gray_box",), ("norm", "steps", "restarts", *_ALPHA), sees="features"),
    "transfer": Attack(pgd, ("gray_box",), (*_PGD, "source"), sees="source"),
    "square": Attack(
        square,
        ("black_box",),
        ("queries", "eot_samples"),
        losses=("margin",),
        gradients=lambda recipe: 0,
        answers=lambda recipe: recipe.queries,
    ),
    # its classes need gradients or answers: name black_box for those that need answers alone
    "torchattacks": Attack(
        run_torchattacks,
        (*WHITE_OR_GRAY, "black_box"),
        _TORCHATTACKS,
        gradients=torchattacks_gradients,
        answers=torchattacks_answers,
        is_per_image=False,
    ),
}


def find_attack(attack: str | Callable[..., torch.Tensor]) -> Attack:
    """The row of an attack: of the table, or made from the signature of a function of one's own.

    Such a function is `(oracle, images_01, epsilon, ...)`. Of its further arguments, those that are in the values of
    `KEYWORDS` are the settings of that name, the rest come from `arguments`.
    """
    if attack in ATTACKS:
        return ATTACKS[attack]
    if isinstance(attack, str) and ":" not in attack:
        close = difflib.get_close_matches(attack, ATTACKS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown attack {attack!r}{hint}; known: {', '.join(ATTACKS)}, or package.module:function")
    function = named_function(attack, "attack") if isinstance(attack, str) else attack
    named = tuple(key for key, keyword in KEYWORDS.items() if keyword in inspect.signature(function).parameters)
    settings = (*named, "eot_samples", "restarts", "targeted", "loss", "arguments")
    return Attack(function, (*WHITE_OR_GRAY, "black_box"), settings)


def check_arguments(row: Attack, arguments: dict[str, Any], who: str) -> None:
    """ValueError when `arguments` name what the function does not take, or leave out what it cannot do without."""
    if "arguments" not in row.settings or "torchattacks_class" in row.settings:  # torchattacks_peer checks them
        return
    parameters = inspect.signature(row.run).parameters
    positional = [item for item in parameters.values() if item.kind <= item.VAR_POSITIONAL]
    if len(positional) < 3 and not any(item.kind == item.VAR_POSITIONAL for item in positional):
        raise ValueError(
            f"{who} is called with (oracle, images_01, epsilon) and takes {', '.join(parameters) or 'nothing'}"
        )
    takes_any = any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    own = {name: item for name, item in list(parameters.items())[3:] if name not in KEYWORDS.values()}
    unknown = [] if takes_any else sorted(set(arguments) - set(own))
    if unknown:
        raise ValueError(f"{who} takes no argument {unknown[0]!r}; its own are {', '.join(own) or 'none'}")
    for name, item in own.items():
        if (
            item.default is item.empty
            and item.kind not in (item.VAR_KEYWORD, item.VAR_POSITIONAL)
            and name not in arguments
        ):
            raise ValueError(f"{who} needs the argument {name!r}: give it under 'arguments'")
