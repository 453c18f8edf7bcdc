"""What is attacked: a function of [0, 1] images whose randomness is an argument.

Attacks see `Target` alone, so that a defense, a plain classifier and a toy with a known answer are attacked by the same
code.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modeling_nim_purified import NIMPurifiedImageClassification
from ..noise_nim import MAX_SIGMA_255, denormalize, normalize, parse_sigma
from .draws import isolated_global_rng


Draw = dict[str, Any]


class Target(nn.Module):
    """A classifier of [0, 1] images `(R, 3, H, W)`, R rows, each with its own noise draw.

    Subclasses implement `draw` and `logits`; `classifier_logits` and `features` where a gray-box attacker has something
    to differentiate. `is_random` says whether the answer depends on `draw`; `checks.inspect_target` finds a model that
    is random and does not say so.
    """

    name: str = "model"
    sigma: str | None = None  # None: there is no defense
    is_random: bool = False
    patch_size: int | None = None  # of the purifier, for the patch-mean attack
    bf16_gradients: bool = False  # attacks compute in bfloat16 what they differentiate; answers stay in float32
    rows_per_decision: int = 1  # forward passes of one decision (the votes), for the micro-batch and the cost

    def draw(self, seeds: Sequence[int], image_shape: Sequence[int]) -> Draw:
        """The noise of `len(seeds)` decisions on images `(C, H, W)`, for one call of `logits`; empty without noise."""
        return {}

    def logits(self, images_01: torch.Tensor, draw: Draw) -> torch.Tensor:
        """`(R, num_classes)`; differentiable with respect to the images."""
        raise NotImplementedError

    def forward(self, images_01: torch.Tensor) -> torch.Tensor:
        """The logits of a target without noise: as a function of images it can stand behind a purifier."""
        return self.logits(images_01, {})

    def classifier_logits(self, images_01: torch.Tensor) -> torch.Tensor:
        """What a gray-box attacker differentiates: the classifier, unaware of the defense."""
        return self.logits(images_01, {})

    def features(self, images_01: torch.Tensor) -> torch.Tensor:
        """`(R, D)` features of the classifier's encoder, for the feature attack."""
        raise ValueError(f"{self.name}: this model offers no encoder features; leave the 'features' attack out")

    @property
    def num_classes(self) -> int | None:
        """None where the model does not say."""
        return None

    @property
    def class_names(self) -> list[str] | None:
        """In the order of the logits; None where the model does not say."""
        return None

    @property
    def weights(self) -> nn.Module:
        """The module with the weights, for the hash."""
        return self


class _ModelTarget(Target):
    """A target around a model of transformers, which knows its classes."""

    model: nn.Module

    @property
    def num_classes(self) -> int | None:
        return getattr(self.model.config, "num_labels", None)

    @property
    def class_names(self) -> list[str] | None:
        names = getattr(self.model.config, "id2label", None) or {}
        return [str(names[number]) for number in sorted(names)] or None

    @property
    def weights(self) -> nn.Module:
        return self.model


class ClassifierTarget(_ModelTarget):
    """An undefended image classifier of transformers."""

    def __init__(self, name: str, model: nn.Module, image_mean: Sequence[float], image_std: Sequence[float]):
        super().__init__()
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def logits(self, images_01: torch.Tensor, draw: Draw) -> torch.Tensor:
        return self.model(normalize(images_01, self.image_mean, self.image_std)).logits

    def features(self, images_01: torch.Tensor) -> torch.Tensor:
        return _encoder_features(self.model, normalize(images_01, self.image_mean, self.image_std))


class PurifiedTarget(_ModelTarget):
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
        self.adds_noise = purifier_config.adds_noise
        if without_purifier:
            return
        if not self.adds_noise and sigma is not None:
            raise ValueError(f"{name}: its purifier hides patches instead of adding noise; leave sigma={sigma!r} out")
        spec = config.sigma if sigma is None else sigma
        parse_sigma(spec)
        named = f"{spec:g}" if isinstance(spec, (int, float)) else str(spec)
        self.sigma = named if self.adds_noise else "mask"
        # sigma 0 still draws noise, and multiplies it by zero: such a defense is deterministic
        self.is_random = purifier_config.hides_patches or parse_sigma(spec) != parse_sigma(0)
        self.rows_per_decision = self.num_votes

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def draw(self, seeds: Sequence[int], image_shape: Sequence[int]) -> Draw:
        if self.without_purifier:
            return {}
        generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return self.model.draw(len(seeds), generators, self._sigma, self.num_votes, tuple(image_shape[-2:]))

    def logits(self, images_01: torch.Tensor, draw: Draw) -> torch.Tensor:
        if self.without_purifier:
            return self.classifier_logits(images_01)
        pixel_values = normalize(images_01, self.image_mean, self.image_std)
        return self.model(pixel_values, num_votes=self.num_votes, **{"sigma": self._sigma, **draw}).logits

    @property
    def _sigma(self) -> str | None:
        return self.sigma if self.adds_noise else None

    @torch.no_grad()
    def stages(self, images_01: torch.Tensor, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the defense sees on its way, for one vote: degraded and purified images in [0, 1] units, and logits."""
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


class FunctionTarget(Target):
    """A classifier that is any function of [0, 1] images to logits (a tensor, or an output with `.logits`).

    `purifier` stands before it: a function or module of [0, 1] images to [0, 1] images. How it gets its noise is told
    by its parameters: with `generators`, a list of one generator per image beside the batch; with `generator`, one
    generator, image by image; with neither, image by image under seeded global generators. `is_random` says whether
    there is noise; without a purifier the noise is the classifier's, which then runs as the last kind.
    """

    def __init__(
        self,
        name: str,
        classifier: Callable[..., Any],
        purifier: Callable[..., Any] | None = None,
        is_random: bool | None = None,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.name, self.is_random = name, purifier is not None if is_random is None else is_random
        self.sigma = "external" if purifier is not None or self.is_random else None
        self.classifier, self.purifier = _frozen(classifier), _frozen(purifier)
        self._num_classes = num_classes
        self.takes = None
        if purifier is not None:
            call = purifier.forward if isinstance(purifier, nn.Module) else purifier
            parameters = inspect.signature(call).parameters
            self.takes = next((kind for kind in ("generators", "generator") if kind in parameters), None)

    @property
    def num_classes(self) -> int | None:
        return self._num_classes

    @property
    def class_names(self) -> list[str] | None:
        return getattr(self.classifier, "class_names", None)

    def draw(self, seeds: Sequence[int], image_shape: Sequence[int]) -> Draw:
        return {"seeds": list(seeds)} if self.is_random else {}

    def logits(self, images_01: torch.Tensor, draw: Draw) -> torch.Tensor:
        if self.purifier is None:
            return self._by_image(self._classify, images_01, draw["seeds"]) if draw else self._classify(images_01)
        return self._classify(self._purify(images_01, draw.get("seeds")))

    def classifier_logits(self, images_01: torch.Tensor) -> torch.Tensor:
        if self.purifier is None and self.is_random:
            raise ValueError(
                f"{self.name}: its noise is inside; there is no classifier apart that a gray box could know"
            )
        return self._classify(images_01)

    def _classify(self, images_01: torch.Tensor) -> torch.Tensor:
        output = self.classifier(images_01)
        logits = getattr(output, "logits", output)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(images_01):
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise ValueError(f"{self.name}: expected logits ({len(images_01)}, num_classes), the model gave {found}")
        return logits

    def _purify(self, images_01: torch.Tensor, seeds: Sequence[int] | None) -> torch.Tensor:
        if seeds is None:
            seeds = [0] * len(
                images_01
            )  # of a purifier that is declared deterministic: whatever it draws stays the same
        device = images_01.device
        if self.takes == "generators":
            purified = self.purifier(
                images_01, generators=[torch.Generator(device).manual_seed(seed) for seed in seeds]
            )
        elif self.takes == "generator":
            rows = zip(images_01.split(1), seeds, strict=True)
            purified = torch.cat(
                [self.purifier(row, generator=torch.Generator(device).manual_seed(s)) for row, s in rows]
            )
        elif self.is_random:
            purified = self._by_image(self.purifier, images_01, seeds)
        else:
            purified = self.purifier(images_01)
        if purified.shape != images_01.shape:
            raise ValueError(
                f"{self.name}: the purifier made {tuple(purified.shape)} of images {tuple(images_01.shape)}: they "
                "must agree"
            )
        return purified

    def _by_image(self, function: Callable[..., Any], images_01: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        pieces = []
        for row, seed in zip(images_01.split(1), seeds, strict=True):
            with isolated_global_rng(seed):
                pieces.append(function(row))
        return torch.cat(pieces)


class SmoothedTarget(Target):
    """Another target behind Gaussian noise of its own, unclipped: `f(x + sigma * epsilon)` (Cohen et al. 2019)."""

    is_random = True

    def __init__(self, base: Target, sigma_255: float):
        super().__init__()
        if not 0 < sigma_255 <= MAX_SIGMA_255:
            raise ValueError(
                f"sigma_255 of the smoothing noise must be above 0 and at most {MAX_SIGMA_255}, got {sigma_255}"
            )
        self.base, self.name, self.sigma_255, self.sigma = base, base.name, sigma_255, f"{sigma_255:g}"

    @property
    def num_classes(self) -> int | None:
        return self.base.num_classes

    @property
    def class_names(self) -> list[str] | None:
        return self.base.class_names

    @property
    def weights(self) -> nn.Module:
        return self.base.weights

    def draw(self, seeds: Sequence[int], image_shape: Sequence[int]) -> Draw:
        draws = [torch.randn(tuple(image_shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return {"epsilon": torch.stack(draws)}

    def logits(self, images_01: torch.Tensor, draw: Draw) -> torch.Tensor:
        return self.base.logits(images_01 + self.sigma_255 / 255 * draw["epsilon"].to(images_01.device), {})

    def classifier_logits(self, images_01: torch.Tensor) -> torch.Tensor:
        return self.base.logits(images_01, {})


@contextmanager
def compiled(targets: Sequence[Target]) -> Iterator[None]:
    """Compiles what the targets compute with, for as long as the block runs; a model of several targets once.

    Of a purifier it is the reconstruction alone: noise and tiles are cut outside of it.
    """
    modules = [module for target in targets for module in target.modules()]
    purifiers = {module.purifier for module in modules if isinstance(module, NIMPurifiedImageClassification)}
    classifiers = {module.classifier for module in modules if isinstance(module, NIMPurifiedImageClassification)}
    classifiers |= {module.model for module in modules if isinstance(module, ClassifierTarget)}
    for purifier in purifiers:
        purifier.reconstruct = torch.compile(purifier.reconstruct, dynamic=False)
    for classifier in classifiers:
        classifier.compile(dynamic=False)
    try:
        yield
    finally:
        for purifier in purifiers:
            del purifier.reconstruct
        for classifier in classifiers:
            classifier._compiled_call_impl = None


def _frozen(function: Any) -> Any:
    return function.eval().requires_grad_(False) if isinstance(function, nn.Module) else function


def _encoder_features(classifier: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Last hidden states of a transformers classifier, flattened."""
    hidden_states = classifier(pixel_values, output_hidden_states=True).hidden_states
    if hidden_states is None:
        raise ValueError(f"{type(classifier).__name__} returns no hidden states; leave the 'features' attack out")
    return hidden_states[-1].flatten(1)
