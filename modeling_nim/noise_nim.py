"""The degradation of noisy image modeling (Eq. 3 and section 2.4 of the paper): sigma, epsilon, and x + sigma * epsilon.

`sigma` is on the scale of 0..255 everywhere, as in the paper. Images are either `images_01` in [0, 1] or normalised
`pixel_values`; `add_noise` is the one place where sigma meets the normalisation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch


Generators = torch.Generator | Sequence[torch.Generator] | None

# Four times the range of levels: of the image nothing is left that a network could use, and 1e9 overflows in float16.
MAX_SIGMA_255 = 1000

_SPEC = re.compile(r"^\s*(uniform|gamma)\s*\(\s*([^,()]+)\s*,\s*([^,()]+)\s*\)\s*$")
_SPEC_HELP = 'write a number such as "30", "uniform(low, high)" with 0 <= low < high, or "gamma(shape, scale)"'


@dataclass(frozen=True)
class SigmaSpec:
    """A parsed sigma: `kind` is "fixed" (a = sigma), "uniform" (a = low, b = high) or "gamma" (a = shape, b = scale)."""

    kind: str
    a: float
    b: float = 0.0

    @property
    def mean(self) -> float:
        """Mean of the distribution, on the scale of 0..255."""
        return {"fixed": self.a, "uniform": (self.a + self.b) / 2, "gamma": self.a * self.b}[self.kind]


def parse_sigma(spec: str | float | int) -> SigmaSpec:
    """Reads a sigma specification: `30`, `"30"`, `"uniform(0, 30)"` or `"gamma(25, 3)"` (shape, scale; section 2.4).

    Raises:
        ValueError: the text is no specification, or a number in it is negative, infinite, out of order or so large that
            sigma is above `MAX_SIGMA_255` (for "gamma", on average).
    """
    if isinstance(spec, SigmaSpec):
        return spec
    kind, numbers = "fixed", (spec,)  # a number stays one: in a compiled graph it may be symbolic
    if isinstance(spec, bool) or not isinstance(spec, (int, float)):
        match = _SPEC.match(str(spec))
        try:
            kind, numbers = (match[1], (float(match[2]), float(match[3]))) if match else ("fixed", (float(str(spec)),))
        except ValueError:
            raise ValueError(f"sigma {spec!r} is not understood: {_SPEC_HELP}") from None
    if not all(0 <= number < float("inf") for number in numbers):
        raise ValueError(f"sigma must be >= 0 and finite, got {spec!r}: {_SPEC_HELP}")
    if kind == "uniform" and numbers[0] >= numbers[1]:
        raise ValueError(f"sigma {spec!r} is an empty range: {_SPEC_HELP}")
    if kind == "gamma" and min(numbers) == 0:
        raise ValueError(f"sigma {spec!r} needs a shape and a scale above 0: {_SPEC_HELP}")
    parsed = SigmaSpec(kind, *numbers)
    largest = parsed.b if kind == "uniform" else parsed.mean
    if not largest <= MAX_SIGMA_255:
        raise ValueError(f"sigma {spec!r} leaves nothing of an image: it is on 0..255, so use at most {MAX_SIGMA_255}")
    return parsed


def _draw_sigma(spec: SigmaSpec, batch_size: int, generator: torch.Generator | None, device) -> torch.Tensor:
    if spec.kind == "uniform":
        unit = torch.rand(batch_size, generator=generator, device=device)
        return spec.a + (spec.b - spec.a) * unit
    # torch.distributions.Gamma takes no generator; this is the sampler beneath it.
    shape = torch.full((batch_size,), spec.a, device=device)
    return torch._standard_gamma(shape, generator=generator) * spec.b


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
    if generator is None:
        return _draw_sigma(spec, batch_size, None, device)
    draws = [_draw_sigma(spec, 1, g, g.device) for g in generators_per_image(generator, batch_size)]
    return torch.cat(draws).to(device)


def generators_per_image(generator: Generators, batch_size: int) -> list[torch.Generator | None]:
    """One generator for each image: the given one shared by all, or the given list, whose length is checked."""
    if not isinstance(generator, Sequence):
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
    """Uniform noise, `(B, M)`, whose order decides which of M pieces of an image are hidden (Eq. 1); image by image when a
    generator is given (see `sample_sigma`)."""
    if generator is None:
        return torch.rand(shape, device=device)
    generators = generators_per_image(generator, shape[0])
    return torch.stack([torch.rand(shape[1:], generator=g, device=g.device) for g in generators]).to(device)


def draw_noise(
    spec: str | float | int,
    shape: tuple[int, ...],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigma and epsilon of a batch; under a generator image by image, sigma before epsilon (see `sample_sigma`).

    Args:
        spec: see `parse_sigma`.
        shape: `(B, C, H, W)`, that of the images.

    Returns:
        `(B,)` on the scale of 0..255, float32, and standard normal noise of `shape`.
    """
    if generator is None:
        return sample_sigma(spec, shape[0], None, device), sample_epsilon(shape, None, device, dtype)
    sigmas, epsilons = [], []
    for g in generators_per_image(generator, shape[0]):
        sigmas.append(sample_sigma(spec, 1, g, device))
        epsilons.append(sample_epsilon((1, *shape[1:]), g, device, dtype))
    return torch.cat(sigmas), torch.cat(epsilons)


def degrade(
    pixel_values: torch.Tensor,
    sigma: str | float | int | torch.Tensor,
    epsilon: torch.Tensor | None,
    generator: Generators,
    image_std: Sequence[float],
) -> torch.Tensor:
    """Draws what is not given (for each image sigma first, then epsilon) and adds the noise.

    Args:
        pixel_values: `(B, C, H, W)`, normalised.
        sigma: a specification, a number, or a `(B,)` tensor, on the scale of 0..255.
        epsilon: `(B, C, H, W)` standard normal noise, drawn when None.

    Returns:
        `(B, C, H, W)`, normalised and not clamped.
    """
    shape, device, dtype = pixel_values.shape, pixel_values.device, pixel_values.dtype
    if isinstance(sigma, torch.Tensor):
        epsilon = sample_epsilon(shape, generator, device, dtype) if epsilon is None else epsilon
    elif epsilon is not None:
        sigma = sample_sigma(sigma, shape[0], generator, device)
    else:
        sigma, epsilon = draw_noise(sigma, shape, generator, device, dtype)
    return add_noise(pixel_values, sigma, epsilon, image_std)


def per_channel(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Per-channel constants as a `(1, C, 1, 1)` tensor with the dtype and device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def add_noise(
    pixel_values: torch.Tensor, sigma: torch.Tensor | float | int, epsilon: torch.Tensor, image_std: Sequence[float]
) -> torch.Tensor:
    """Eq. 3 on normalised images: `pixel_values + (sigma / 255) * epsilon / std`; the result is not clamped.

    Args:
        pixel_values: `(B, C, H, W)`, normalised.
        sigma: a number, or one per image `(B,)`, on the scale of 0..255.
        epsilon: `(B, C, H, W)`, standard normal.
        image_std: the standard deviation that the images were normalised with.

    Raises:
        ValueError: a negative number for sigma, or shapes that do not fit.
    """
    if not isinstance(sigma, torch.Tensor):
        sigma = torch.full((1,), parse_sigma(sigma).a, device=pixel_values.device)
    if sigma.ndim > 1 or (sigma.ndim == 1 and sigma.shape[0] not in (1, pixel_values.shape[0])):
        raise ValueError(
            f"sigma has shape {tuple(sigma.shape)} for {pixel_values.shape[0]} images: pass one number or one per image"
        )
    if epsilon.shape != pixel_values.shape:
        raise ValueError(f"epsilon has shape {tuple(epsilon.shape)}, the images {tuple(pixel_values.shape)}")
    if not torch.compiler.is_compiling() and (sigma < 0).any():  # the check would break a compiled graph
        raise ValueError(f"sigma must be >= 0, got {sigma.min().item():g}")
    scale = (sigma.to(pixel_values) / 255).view(-1, 1, 1, 1) / per_channel(image_std, pixel_values)
    return pixel_values + scale * epsilon.to(pixel_values)


def normalize(images_01: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> torch.Tensor:
    """[0, 1] images `(B, C, H, W)` to normalised `pixel_values`."""
    return (images_01 - per_channel(image_mean, images_01)) / per_channel(image_std, images_01)


def denormalize(pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]) -> torch.Tensor:
    """Normalised `pixel_values` `(B, C, H, W)` to [0, 1] images; values outside the range stay outside."""
    return pixel_values * per_channel(image_std, pixel_values) + per_channel(image_mean, pixel_values)


def clamp_to_image_range(
    pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]
) -> torch.Tensor:
    """Clamps normalised images to what [0, 1] becomes under the normalisation; differentiable inside the range."""
    mean, std = per_channel(image_mean, pixel_values), per_channel(image_std, pixel_values)
    return torch.clamp(pixel_values, min=-mean / std, max=(1 - mean) / std)
