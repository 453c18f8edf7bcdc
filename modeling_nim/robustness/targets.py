"""What is attacked: a function of [0, 1] images whose randomness is an argument.

Attacks see `Target` alone, so that a defence, a plain classifier and a toy with a known answer are attacked by the same
code.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..modeling_nim_purified import NIMPurifiedImageClassification
from ..noise_nim import denormalize, normalize, parse_sigma


Noise = dict[str, Any]


class Target(nn.Module):
    """A classifier of [0, 1] images `(R, 3, H, W)`, R rows, each with its own noise draw.

    Subclasses implement `draw` and `logits`; `classifier_logits` and `features` where a gray-box attacker has something to
    differentiate. `is_random` says whether `draw` matters; a model that is random without saying so is found out by
    `repeats_itself`.
    """

    name: str = "model"
    sigma: str | None = None  # None: there is no defence
    is_random: bool = False
    patch_size: int | None = None  # of the purifier, for the patch-mean attack
    rows_per_decision: int = 1  # forward passes of one decision (the votes), for the micro-batch and the cost

    def draw(self, seeds: Sequence[int]) -> Noise:
        """The noise of `len(seeds)` decisions, to be handed to `logits` once; empty where there is none."""
        return {}

    def logits(self, images_01: torch.Tensor, noise: Noise) -> torch.Tensor:
        """`(R, num_classes)`; differentiable with respect to the images."""
        raise NotImplementedError

    def classifier_logits(self, images_01: torch.Tensor) -> torch.Tensor:
        """What a gray-box attacker differentiates: the classifier, unaware of the defence."""
        return self.logits(images_01, {})

    def features(self, images_01: torch.Tensor) -> torch.Tensor:
        """`(R, D)` features of the classifier's encoder, for the feature attack."""
        raise ValueError(f"{self.name}: this model offers no encoder features; leave the 'features' attack out")

    @torch.no_grad()
    def repeats_itself(self, images_01: torch.Tensor) -> bool:
        """Whether the same images with the same draws give the same logits, as they must."""
        seeds = range(len(images_01))
        return torch.equal(self.logits(images_01, self.draw(seeds)), self.logits(images_01, self.draw(seeds)))


class ClassifierTarget(Target):
    """An undefended image classifier of transformers."""

    def __init__(self, name: str, model: nn.Module, image_mean: Sequence[float], image_std: Sequence[float]):
        super().__init__()
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def logits(self, images_01: torch.Tensor, noise: Noise) -> torch.Tensor:
        return self.model(normalize(images_01, self.image_mean, self.image_std)).logits

    def features(self, images_01: torch.Tensor) -> torch.Tensor:
        return _encoder_features(self.model, normalize(images_01, self.image_mean, self.image_std))


class PurifiedTarget(Target):
    """The defended classifier (Eq. 9) at one sigma; gradients pass through noise, purifier, clamp and classifier."""

    def __init__(
        self,
        name: str,
        model: NIMPurifiedImageClassification,
        sigma: str | float | int | None = None,
        num_votes: int | None = None,
        without_purifier: bool = False,
    ):
        super().__init__()
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.without_purifier = without_purifier
        config = model.config
        purifier_config = config.purifier_config
        self.image_mean, self.image_std = list(config.image_mean), list(config.image_std)
        self.patch_size = purifier_config.patch_size
        self.num_votes = config.num_votes if num_votes is None else num_votes
        self.masks = purifier_config.degradation == "mask"
        if without_purifier:
            return
        if self.masks and sigma is not None:
            raise ValueError(f"{name}: its purifier hides patches instead of adding noise; leave sigma={sigma!r} out")
        spec = config.sigma if sigma is None else sigma
        parse_sigma(spec)
        self.sigma = "mask" if self.masks else f"{spec:g}" if isinstance(spec, (int, float)) else str(spec)
        # sigma 0 still draws noise, and multiplies it by zero: such a defence is deterministic
        self.is_random = self.masks or parse_sigma(spec) != parse_sigma(0)
        self.rows_per_decision = self.num_votes

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def draw(self, seeds: Sequence[int]) -> Noise:
        if self.without_purifier:
            return {}
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return self.model.draw(len(seeds), generators, self._sigma, self.num_votes)

    def logits(self, images_01: torch.Tensor, noise: Noise) -> torch.Tensor:
        if self.without_purifier:
            return self.classifier_logits(images_01)
        pixel_values = normalize(images_01, self.image_mean, self.image_std)
        return self.model(pixel_values, num_votes=self.num_votes, **{"sigma": self._sigma, **noise}).logits

    @property
    def _sigma(self) -> str | None:
        return None if self.masks else self.sigma

    @torch.no_grad()
    def stages(self, images_01: torch.Tensor, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the defence sees on its way, for one vote: degraded and purified images in [0, 1] units, and logits."""
        pixel_values = normalize(images_01, self.image_mean, self.image_std)
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        output = self.model(pixel_values, sigma=self._sigma, generator=generators, num_votes=1)
        return (
            denormalize(output.degraded_pixel_values, self.image_mean, self.image_std),
            denormalize(output.purified_pixel_values, self.image_mean, self.image_std),
            output.logits,
        )

    def classifier_logits(self, images_01: torch.Tensor) -> torch.Tensor:
        return self.model.classifier(self._for_classifier(images_01)).logits

    def features(self, images_01: torch.Tensor) -> torch.Tensor:
        return _encoder_features(self.model.classifier, self._for_classifier(images_01))

    def _for_classifier(self, images_01: torch.Tensor) -> torch.Tensor:
        return self.model.prepare_for_classifier(normalize(images_01, self.image_mean, self.image_std))


def _encoder_features(classifier: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Last hidden states of a transformers classifier, flattened."""
    hidden_states = classifier(pixel_values, output_hidden_states=True).hidden_states
    if hidden_states is None:
        raise ValueError(f"{type(classifier).__name__} returns no hidden states; leave the 'features' attack out")
    return hidden_states[-1].flatten(1)
