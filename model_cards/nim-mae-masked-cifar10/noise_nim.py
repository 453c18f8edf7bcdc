"""The degradation of noisy image modeling (the paper's Eq. 3 and section 2.4): sigma, epsilon, x + sigma * epsilon.

`sigma` is on the scale of 0..255 everywhere, as in the paper. Images are either `images_01` in [0, 1] or normalized
`pixel_values`; `add_noise` is the one place where sigma meets the normalization.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


Generators = torch.Generator | Sequence[torch.Generator] | None

# Four times the range of levels: a network finds nothing of the image in such noise, and 1e9 overflows in float16.
MAX_SIGMA_255 = 1000


@dataclass(frozen=True)
class Distribution:
    """A distribution of sigma with two parameters, a and b.

    Args:
        form: how it is written, and what its parameters must fulfill.
        holds: whether two numbers, each >= 0, fulfill that.
        mean: of the distribution, from a and b.
        large: its largest value where it has one, else a value of its middle, from a and b.
        draw: `(n,)` float32 draws, from a, b, n, a generator or None, and a device.
    """

    form: str
    holds: Callable[[float, float], bool]
    mean: Callable[[float, float], float]
    large: Callable[[float, float], float]
    draw: Callable[[float, float, int, torch.Generator | None, torch.device | str | None], torch.Tensor]


def _draw_uniform(low, high, n, generator, device) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, generator=generator, device=device)


def _draw_gamma(shape, scale, n, generator, device) -> torch.Tensor:
    # torch.distributions.Gamma takes no generator; this is the sampler beneath it.
    return torch._standard_gamma(torch.full((n,), shape, device=device), generator=generator) * scale


def _draw_laplace(center, scale, n, generator, device) -> torch.Tensor:
    # The difference of two exponential draws follows Laplace's law; 1 - u of u in [0, 1) has a finite logarithm.
    first, second = (torch.log1p(-torch.rand(n, generator=generator, device=device)) for _ in range(2))
    return (center + scale * (first - second)).abs()


# A new distribution is one more row: how it is written, checked, described and drawn follows from here.
DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": Distribution(
        "uniform(low, high) with 0 <= low < high",
        lambda low, high: low < high,
        lambda low, high: (low + high) / 2,
        lambda low, high: high,
        _draw_uniform,
    ),
    "gamma": Distribution(
        "gamma(shape, scale) with both above 0",
        lambda shape, scale: min(shape, scale) > 0,
        lambda shape, scale: shape * scale,
        lambda shape, scale: shape * scale,
        _draw_gamma,
    ),
    "laplace": Distribution(
        "laplace(center, scale) with a scale above 0, reflected at 0",
        lambda center, scale: scale > 0,
        lambda center, scale: center + scale * math.exp(-center / scale),
        lambda center, scale: center + scale,
        _draw_laplace,
    ),
}

_SPEC = re.compile(rf"^\s*({'|'.join(DISTRIBUTIONS)})\s*\(\s*([^,()]+)\s*,\s*([^,()]+)\s*\)\s*$")
_SPEC_HELP = f'write a number such as "30", or {", or ".join(law.form for law in DISTRIBUTIONS.values())}'


@dataclass(frozen=True)
class SigmaSpec:
    """A parsed sigma: `kind` is "fixed" (a = sigma), or a name in `DISTRIBUTIONS` (a and b are its parameters)."""

    kind: str
    a: float
    b: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of the distribution, on the scale of 0..255."""
        return self.a if self.kind == "fixed" else DISTRIBUTIONS[self.kind].mean(self.a, self.b)


def parse_sigma(spec: str | float | int) -> SigmaSpec:
    """Reads a sigma specification (section 2.4): a number, or a distribution such as `"uniform(0, 30)"`.

    Raises:
        ValueError: the text is no specification, or a number in it is negative, infinite, out of order or so large that
            sigma is above `MAX_SIGMA_255` (for "gamma", on average).
    """
    kind, numbers = "fixed", (spec,)  # not converted: in a compiled graph a number may be symbolic
    if isinstance(spec, bool) or not isinstance(spec, (int, float)):
        match = _SPEC.match(str(spec))
        try:
            kind, numbers = (match[1], (float(match[2]), float(match[3]))) if match else ("fixed", (float(str(spec)),))
        except ValueError:
            raise ValueError(f"sigma {spec!r} is not understood: {_SPEC_HELP}") from None
    if not all(0 <= number < float("inf") for number in numbers):
        raise ValueError(f"sigma must be >= 0 and finite, got {spec!r}: {_SPEC_HELP}")
    if kind != "fixed" and not DISTRIBUTIONS[kind].holds(*numbers):
        raise ValueError(f"sigma {spec!r} must be {DISTRIBUTIONS[kind].form}: {_SPEC_HELP}")
    parsed = SigmaSpec(kind, *numbers)
    largest = parsed.a if kind == "fixed" else DISTRIBUTIONS[kind].large(parsed.a, parsed.b)
    if not largest <= MAX_SIGMA_255:
        raise ValueError(f"sigma {spec!r} leaves nothing of an image: it is on 0..255, so use at most {MAX_SIGMA_255}")
    return parsed


def sample_sigma(
    spec: str | float | int, batch_size: int, generator: Generators = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Draws one sigma per image from a specification (section 2.4); a fixed sigma draws nothing.

    Args:
        spec: see `parse_sigma`.
        generator: with a generator, or a list with one per image, the draws are made image by image, so that they do
            not depend on the batch size.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`, float32, on the scale of 0..255.
    """
    spec = parse_sigma(spec)
    if spec.kind == "fixed":
        return torch.full((batch_size,), spec.a, device=device)
    draw = DISTRIBUTIONS[spec.kind].draw
    if generator is None:
        return draw(spec.a, spec.b, batch_size, None, device)
    draws = [draw(spec.a, spec.b, 1, g, g.device) for g in generators_per_image(generator, batch_size)]
    return torch.cat(draws).to(device)


def generators_per_image(generator: Generators, batch_size: int) -> list[torch.Generator | None]:
    """One generator for each image: the given one shared by all, or the given list, whose length is checked."""
    if not isinstance(generator, Sequence):
        if not isinstance(generator, torch.Generator | None):
            raise ValueError(
                f"generator must be a torch.Generator or one per image, got {type(generator).__name__}; a seed makes "
                "one: torch.Generator().manual_seed(seed)"
            )
        return [generator] * batch_size
    if len(generator) != batch_size:
        raise ValueError(f"got {len(generator)} generators for {batch_size} images: pass one, or one per image")
    return list(generator)


def sample_epsilon(
    shape: tuple[int, ...],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal noise, the epsilon of Eq. 3; image by image when a generator is given (see `sample_sigma`)."""
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    generators = generators_per_image(generator, shape[0])
    # Drawn in float32 so that a seed means the same noise in every precision.
    return torch.stack([torch.randn(shape[1:], generator=g, device=g.device) for g in generators]).to(device, dtype)


def sample_mask_noise(
    shape: tuple[int, int], generator: Generators = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Uniform noise, `(B, M)`, whose order decides which of M pieces of an image are hidden (Eq. 1); image by image
    when a generator is given (see `sample_sigma`)."""
    if generator is None:
        return torch.rand(shape, device=device)
    generators = generators_per_image(generator, shape[0])
    return torch.stack([torch.rand(shape[1:], generator=g, device=g.device) for g in generators]).to(device)


def noise_samplers(
    sigma: str | float | int | None,
    shape: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Callable[[int, torch.Generator | None], torch.Tensor]]:
    """What `draw_by_image` needs for Eq. 3 on images of `shape` `(C, H, W)`, in the order of the draws.

    "sigma" draws `(n,)` on 0..255 from the specification `sigma`, "epsilon" draws `(n, C, H, W)`.
    """
    return {
        "sigma": lambda number, generator: sample_sigma(sigma, number, generator, device),
        "epsilon": lambda number, generator: sample_epsilon((number, *shape), generator, device, dtype),
    }


def draw_by_image(
    samplers: dict[str, Callable[[int, torch.Generator | None], torch.Tensor]],
    batch_size: int,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """What the samplers draw for a batch; under a generator image by image, one sampler after the other for each.

    Args:
        samplers: functions of a number of images and a generator, such as those of `noise_samplers`.

    Returns:
        A tensor `(B, ...)` for each sampler, under its name.
    """
    if generator is None:
        return {name: sample(batch_size, None) for name, sample in samplers.items()}
    draws: dict[str, list[torch.Tensor]] = {name: [] for name in samplers}
    for g in generators_per_image(generator, batch_size):
        for name, sample in samplers.items():
            draws[name].append(sample(1, g))
    return {name: torch.cat(pieces) for name, pieces in draws.items()}


def per_channel(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Per-channel constants as a `(1, C, 1, 1)` tensor with the dtype and device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def add_noise(
    pixel_values: torch.Tensor, sigma: torch.Tensor | float | int, epsilon: torch.Tensor, image_std: Sequence[float]
) -> torch.Tensor:
    """Eq. 3 on normalized images: `pixel_values + (sigma / 255) * epsilon / std`; the result is not clamped.

    Args:
        pixel_values: `(B, C, H, W)`, normalized.
        sigma: a number, or one per image `(B,)`, on the scale of 0..255.
        epsilon: `(B, C, H, W)`, standard normal.
        image_std: the standard deviation that the images were normalized with.

    Raises:
        ValueError: a negative number or a distribution for sigma, or shapes that do not fit.
    """
    if not isinstance(sigma, torch.Tensor):
        spec = parse_sigma(sigma)
        if spec.kind != "fixed":
            raise ValueError(f"sigma {sigma!r} is a distribution: draw one number per image from it with sample_sigma")
        sigma = torch.full((1,), spec.a, device=pixel_values.device)
    if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] not in (1, pixel_values.shape[0])):
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)} for {pixel_values.shape[0]} images: pass one number or one per image"
        )
    if not isinstance(epsilon, torch.Tensor):
        raise ValueError(f"epsilon must be a tensor of the images' shape, got {type(epsilon).__name__}")
    if epsilon.shape != pixel_values.shape:
        raise ValueError(f"epsilon has shape {tuple(epsilon.shape)}, the images {tuple(pixel_values.shape)}")
    # NaN fails, too; the check would break a compiled graph
    if not torch.compiler.is_compiling() and not ((sigma >= 0) & (sigma < torch.inf)).all():
        wrong = sigma.max() if (sigma >= 0).all() else sigma.min()
        raise ValueError(f"sigma must be >= 0 and finite, got {wrong.item():g}")
    scale = (sigma.to(pixel_values) / 255).view(-1, 1, 1, 1) / per_channel(image_std, pixel_values)
    return pixel_values + scale * epsilon.to(pixel_values)


def normalize(images_01: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> torch.Tensor:
    """[0, 1] images `(B, C, H, W)` to normalized `pixel_values`."""
    return (images_01 - per_channel(image_mean, images_01)) / per_channel(image_std, images_01)


def denormalize(pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> torch.Tensor:
    """Normalized `pixel_values` `(B, C, H, W)` to [0, 1] images; values outside the range stay outside."""
    return pixel_values * per_channel(image_std, pixel_values) + per_channel(image_mean, pixel_values)


def clamp_to_image_range(
    pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]
) -> torch.Tensor:
    """Clamps normalized images to what [0, 1] becomes under the normalization; differentiable inside the range."""
    mean, std = per_channel(image_mean, pixel_values), per_channel(image_std, pixel_values)
    return torch.clamp(pixel_values, min=-mean / std, max=(1 - mean) / std)
