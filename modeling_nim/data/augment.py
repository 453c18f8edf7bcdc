"""Fine-tuning augmentation in batches on the device: RandAugment, erasing, mixup, cutmix.

kornia does the image operations. The draws of an image follow from its own seed (`data.randomness`), whereas kornia's
augmentation classes draw once per batch from the global random state. So an image is augmented alike in any process and
after any interruption. Mixup and cutmix mix neighbors of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import kornia.enhance as enhance
import kornia.geometry.transform as geometry
import numpy as np
import torch
from scipy.special import betaincinv, ndtri

from ..runs.bounds import Bounds, Share, check_fields
from .loader import NUM_CROP_ATTEMPTS, random_window
from .randomness import generators, image_seeds, uniforms


MAX_MAGNITUDE = 10.0
OPERATION_PROBABILITY = 0.5  # of each chosen operation, as in the rand-m9-mstd0.5-inc1 that MAE's recipe names
ERASE_SCALE = (0.02, 1 / 3)
ERASE_RATIO = (0.3, 10 / 3)


@dataclass
class AugmentationRecipe:
    """The `augmentation` section of fine-tuning; everything is off by default."""

    rand_augment_ops: Annotated[int, Bounds(least=0, most=100)] = 0  # operations drawn per image; MAE: 2
    rand_augment_magnitude: Annotated[float, Bounds(least=0, most=MAX_MAGNITUDE)] = 9.0  # 0 to 10; MAE: 9
    # of the magnitude from image to image
    rand_augment_std: Annotated[float, Bounds(least=0, most=MAX_MAGNITUDE)] = 0.5
    erase_probability: Share = 0.0  # of a random rectangle; MAE: 0.25
    mixup_alpha: Annotated[float, Bounds(least=0, most=1000)] = 0.0  # of mixing two images; MAE: 0.8
    cutmix_alpha: Annotated[float, Bounds(least=0, most=1000)] = 0.0  # of pasting one into another; MAE: 1.0
    switch_probability: Share = 0.5  # of cutmix where both are on

    def __post_init__(self):
        check_fields(self, "augmentation.")


def _shift(x: torch.Tensor, amount: torch.Tensor, axis: int) -> torch.Tensor:
    pixels = torch.zeros(len(x), 2, device=x.device)
    pixels[:, axis] = amount * x.shape[-1 - axis]
    return geometry.translate(x, pixels)


def _shear(x: torch.Tensor, amount: torch.Tensor, axis: int) -> torch.Tensor:
    factors = torch.zeros(len(x), 2, device=x.device)
    factors[:, axis] = amount
    return geometry.shear(x, factors)


# (B, 3, H, W) in [0, 1], strength (B,) in 0..1, sign (B,) of -1 or 1. Strength 0 of the "increasing" ones
# changes nothing.
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "auto_contrast": lambda x, strength, sign: enhance.normalize_min_max(x),
    "equalize": lambda x, strength, sign: enhance.equalize(x),
    "invert": lambda x, strength, sign: enhance.invert(x),
    "rotate": lambda x, strength, sign: geometry.rotate(x, sign * strength * 30),
    "posterize": lambda x, strength, sign: enhance.posterize(x, 4 - (strength * 4).int()),
    "solarize": lambda x, strength, sign: torch.where(x < (1 - strength.view(-1, 1, 1, 1)) * 256 / 255, x, 1 - x),
    "solarize_add": lambda x, strength, sign: torch.where(
        x < 0.5, (x + strength.view(-1, 1, 1, 1) * 110 / 255).clamp(max=1), x
    ),
    "color": lambda x, strength, sign: enhance.adjust_saturation_with_gray_subtraction(x, 1 + sign * strength * 0.9),
    "contrast": lambda x, strength, sign: enhance.adjust_contrast_with_mean_subtraction(x, 1 + sign * strength * 0.9),
    "brightness": lambda x, strength, sign: enhance.adjust_brightness_accumulative(x, 1 + sign * strength * 0.9),
    "sharpness": lambda x, strength, sign: enhance.sharpness(x, 1 + sign * strength * 0.9),
    "shear_x": lambda x, strength, sign: _shear(x, sign * strength * 0.3, 0),
    "shear_y": lambda x, strength, sign: _shear(x, sign * strength * 0.3, 1),
    "translate_x": lambda x, strength, sign: _shift(x, sign * strength * 0.45, 0),
    "translate_y": lambda x, strength, sign: _shift(x, sign * strength * 0.45, 1),
}


def rand_augment(images_01: torch.Tensor, recipe: AugmentationRecipe, seeds: np.ndarray) -> torch.Tensor:
    """`rand_augment_ops` operations per image, drawn with replacement; images that drew the same go together."""
    names = list(OPERATIONS)
    numbers = uniforms(seeds, 4 * recipe.rand_augment_ops).reshape(len(seeds), recipe.rand_augment_ops, 4)
    for layer in range(recipe.rand_augment_ops):
        choice = (numbers[:, layer, 0] * len(names)).astype(int)
        applied = numbers[:, layer, 1] < OPERATION_PROBABILITY
        magnitude = recipe.rand_augment_magnitude + recipe.rand_augment_std * ndtri(numbers[:, layer, 2].clip(1e-9))
        strength = (magnitude.clip(0, MAX_MAGNITUDE) / MAX_MAGNITUDE).astype(np.float32)
        sign = np.where(numbers[:, layer, 3] < 0.5, -1.0, 1.0).astype(np.float32)
        for number, name in enumerate(names):
            chosen = np.flatnonzero(applied & (choice == number))
            if len(chosen):
                where = torch.from_numpy(chosen).to(images_01.device)
                arguments = (torch.from_numpy(values[chosen]).to(images_01.device) for values in (strength, sign))
                images_01[where] = OPERATIONS[name](images_01[where], *arguments).clamp(0, 1)
    return images_01


def erase(images_01: torch.Tensor, probability: float, seeds: np.ndarray, image_mean, image_std) -> torch.Tensor:
    """Fill a rectangle of some images with noise that is standard normal in the normalized image (MAE's "pixel")."""
    numbers = uniforms(seeds, 2 * NUM_CROP_ATTEMPTS + 3)
    height, width = images_01.shape[-2:]
    chosen = np.flatnonzero(numbers[:, -1] < probability)
    mean, std = (torch.tensor(values, device=images_01.device).view(-1, 1, 1) for values in (image_mean, image_std))
    for index, generator in zip(chosen, generators(seeds[chosen], images_01.device), strict=True):
        window = random_window(height, width, numbers[index, :-1], ERASE_SCALE, ERASE_RATIO)
        top, left, window_height, window_width = window
        noise = torch.randn(len(mean), window_height, window_width, generator=generator, device=images_01.device)
        images_01[index, :, top : top + window_height, left : left + window_width] = mean + std * noise
    return images_01


def mix(
    images_01: torch.Tensor, targets: torch.Tensor, recipe: AugmentationRecipe, seeds: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019) of neighbors: images 0 and 1, 2 and 3, ...

    Each image keeps the share lambda ~ Beta(alpha, alpha) of itself, its target likewise; `targets` are (B, num_labels)
    probabilities. An odd image at the end stays as it is.
    """
    num_pairs = len(seeds) // 2
    numbers = uniforms(seeds[: 2 * num_pairs], 4)  # drawn per image, so that the two of a pair differ
    both = recipe.mixup_alpha > 0 and recipe.cutmix_alpha > 0
    cuts = numbers[:, 0] < recipe.switch_probability if both else np.full(2 * num_pairs, recipe.cutmix_alpha > 0)
    alphas = np.where(cuts, recipe.cutmix_alpha, recipe.mixup_alpha)
    kept = betaincinv(alphas, alphas, numbers[:, 1])  # the inverse of Beta's distribution function

    height, width = images_01.shape[-2:]
    side = np.sqrt(1 - kept)
    rows, columns = np.arange(height), np.arange(width)

    def span(center: np.ndarray, length: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        low = np.rint(center * size - length * size / 2).clip(0, size)
        return low, np.rint(low + length * size).clip(0, size)

    top, bottom = span(numbers[:, 2], side, height)
    left, right = span(numbers[:, 3], side, width)
    kept = np.where(cuts, 1 - (bottom - top) * (right - left) / (height * width), kept)  # the share really kept
    in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])  # (2 * pairs, H)
    in_columns = (columns >= left[:, None]) & (columns < right[:, None])
    cut_weights = 1.0 - (in_rows[:, :, None] & in_columns[:, None, :])  # (2 * pairs, H, W)
    weights = np.where(cuts[:, None, None], cut_weights, kept[:, None, None]).astype(np.float32)

    weights = torch.from_numpy(weights).to(images_01.device)[:, None]  # (2 * pairs, 1, H, W)
    shares = torch.from_numpy(kept.astype(np.float32)).to(images_01.device)[:, None]  # (2 * pairs, 1)
    paired, paired_targets = images_01[: 2 * num_pairs], targets[: 2 * num_pairs]
    partners = paired.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    partner_targets = paired_targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    mixed = torch.lerp(partners, paired, weights)
    mixed_targets = torch.lerp(partner_targets, paired_targets, shares)
    return torch.cat([mixed, images_01[2 * num_pairs :]]), torch.cat([mixed_targets, targets[2 * num_pairs :]])


def augment(
    images_01: torch.Tensor,
    targets: torch.Tensor,
    recipe: AugmentationRecipe,
    seed: int,
    epochs: np.ndarray,
    indices: np.ndarray,
    image_mean,
    image_std,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All that the recipe turns on, in MAE's order: RandAugment, erasing, then mixup or cutmix.

    `images_01` (B, 3, H, W) in [0, 1] may be changed in place; `targets` (B, num_labels) are probabilities; `epochs`
    and `indices` (B,) say which image in which epoch it is. Returns both, augmented.
    """
    if recipe.rand_augment_ops:
        images_01 = rand_augment(images_01, recipe, image_seeds(seed, epochs, indices, "rand_augment"))
    if recipe.erase_probability:
        seeds = image_seeds(seed, epochs, indices, "erase")
        images_01 = erase(images_01, recipe.erase_probability, seeds, image_mean, image_std)
    if recipe.mixup_alpha or recipe.cutmix_alpha:
        images_01, targets = mix(images_01, targets, recipe, image_seeds(seed, epochs, indices, "mix"))
    return images_01, targets
