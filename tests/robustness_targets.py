"""Targets with known answers, for the robustness tests."""

import torch
from torch import nn

from modeling_nim.robustness.targets import Target


SHAPE = (3, 8, 8)


class LuckyTarget(Target):
    """Ignores its input and answers class 0 with probability 0.9, else class 1."""

    name, sigma, is_random = "lucky", "1", True

    def draw(self, seeds, image_shape=SHAPE):
        uniform = [torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return {"right": torch.stack(uniform) < 0.9}

    def logits(self, images_01, draw):
        right = draw["right"] if draw else torch.ones(len(images_01), dtype=torch.bool)
        logits = torch.where(right[:, None], torch.tensor([4.0, 1, 0, 0]), torch.tensor([1.0, 4, 0, 0]))
        return logits + 0 * images_01.sum()  # torchattacks cannot do without a graph

    def features(self, images_01):
        return images_01.flatten(1)


class LinearTarget(Target):
    """Two classes, separated by w . (x - 0.5)."""

    name = "linear"

    def __init__(self, seed: int = 0):
        super().__init__()
        self.weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))

    def margin(self, images_01):
        return ((images_01 - 0.5) * self.weight).flatten(1).sum(1)

    def logits(self, images_01, draw):
        margin = self.margin(images_01)
        return torch.stack([-margin, margin], dim=1)


class RoundingTarget(LinearTarget):
    """The linear model behind a rounding step whose gradient is zero."""

    name, sigma = "rounding", "0"

    def logits(self, images_01, draw):
        return super().logits((images_01 * 32).round() / 32, draw)

    def classifier_logits(self, images_01):
        return super().logits(images_01, {})


class NoisyTarget(Target):
    """A small network behind Gaussian noise, in double precision: random, differentiable, the same in every batch."""

    name, sigma, is_random = "noisy", "30", True

    def __init__(self, num_classes: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = 0.3 * torch.randn(192, 16, generator=generator, dtype=torch.double)
        self.last = torch.randn(16, num_classes, generator=generator, dtype=torch.double)

    def draw(self, seeds, image_shape=SHAPE):
        draws = [
            torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.double) for seed in seeds
        ]
        return {"epsilon": torch.stack(draws)}

    def logits(self, images_01, draw):
        noisy = images_01.double() + (30 / 255 * draw["epsilon"] if draw else 0)
        return ((noisy - 0.5).flatten(1) @ self.first).tanh() @ self.last

    def features(self, images_01):
        return ((images_01.double() - 0.5).flatten(1) @ self.first).tanh()


class QuietTarget(NoisyTarget):
    """The same network without noise."""

    name, sigma, is_random = "quiet", None, False

    def draw(self, seeds, image_shape=SHAPE):
        return {}


class SecretlyRandomTarget(QuietTarget):
    """Random although it says that it is not."""

    name = "secretly random"

    def logits(self, images_01, draw):
        return super().logits(images_01, {}) + nn.functional.dropout(torch.ones(1, 4))


def images(number: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> torch.Tensor:
    return low + (high - low) * torch.rand((number, *SHAPE), generator=torch.Generator().manual_seed(seed))


def names(number: int) -> list[str]:
    return [f"image/{index}" for index in range(number)]


def corner_attack(oracle, images_01, epsilon, steps, share=1.0):
    """An attack of one's own: brightens every pixel, and asks the oracle as often as it is told to."""
    for _ in range(steps):
        oracle.loss(images_01)
    return (images_01 + share * epsilon).clamp(0, 1)


def climbing_loss(logits, labels):
    """A loss of one's own: the logit of class 2."""
    return logits[:, 2]


def pixel_noise(images_01, generator):
    """A purifier of one's own, which only adds noise."""
    return (images_01 + 0.1 * torch.randn(images_01.shape, generator=generator)).clamp(0, 1)
