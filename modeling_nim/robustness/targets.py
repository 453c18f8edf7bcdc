"""What is attacked: a function of [0, 1] images whose randomness is an argument.

Attacks see `Target` alone, so that a defence, a plain classifier and a toy with a known answer are attacked by the same
code. `load_targets` builds the targets that users run: the model and the normalisation of its
`pipeline("image-classification", ...)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    ViTMAEConfig,
)

from modeling_nim.data import ImageSource
from modeling_nim.modeling_nim import NIMForPreTraining
from modeling_nim.modeling_nim_purified import NIMPurifiedImageClassification
from modeling_nim.noise_nim import denormalize, normalize, parse_sigma
from modeling_nim.runs.errors import naming_damaged_weights
from modeling_nim.training.models import load_config


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
        self.image_shape = (purifier_config.num_channels, purifier_config.image_size, purifier_config.image_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def draw(self, seeds: Sequence[int]) -> Noise:
        if self.without_purifier:
            return {}
        if self.masks or parse_sigma(self.sigma).kind != "fixed":
            return {"generator": [torch.Generator(self.device).manual_seed(seed) for seed in seeds]}
        # The numbers the model itself would draw from these generators, without the cost of making them one by one.
        generator = torch.Generator(self.device)
        epsilon = torch.empty(len(seeds), self.num_votes, *self.image_shape, device=self.device)
        for row, seed in enumerate(seeds):
            generator.manual_seed(seed)
            for vote in range(self.num_votes):
                epsilon[row, vote].normal_(generator=generator)
        return {"epsilon": epsilon if self.num_votes > 1 else epsilon.squeeze(1)}

    def logits(self, images_01: torch.Tensor, noise: Noise) -> torch.Tensor:
        if self.without_purifier:
            return self.classifier_logits(images_01)
        sigma = None if self.masks else self.sigma
        pixel_values = normalize(images_01, self.image_mean, self.image_std)
        return self.model(pixel_values, sigma=sigma, num_votes=self.num_votes, **noise).logits

    @torch.no_grad()
    def stages(self, images_01: torch.Tensor, seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the defence sees on its way, for one vote: degraded and purified images in [0, 1] units, and logits."""
        pixel_values = normalize(images_01, self.image_mean, self.image_std)
        sigma = None if self.masks else self.sigma

        def generators():
            return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

        degraded = self.model.purifier(pixel_values, sigma=sigma, generator=generators()).degraded_pixel_values
        purified = self.model.purify(pixel_values, sigma=sigma, generator=generators())
        logits = self.model.classifier(self.model.prepare_for_classifier(purified)).logits
        return (
            denormalize(degraded, self.image_mean, self.image_std),
            denormalize(purified, self.image_mean, self.image_std),
            logits,
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


class PatchProjection(nn.Module):
    """A convolution whose windows tile the image, as the matrix product that it is; weights and names are the same.

    Attacks need its gradient with respect to the image, which as a convolution takes a quarter of a small model's pass on
    CPUs.
    """

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.kernel_size = convolution.kernel_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = images.shape
        down, across = self.kernel_size
        rows, columns = height // down, width // across  # a convolution, too, leaves out what does not fill a window
        images = images[..., : rows * down, : columns * across]
        patches = images.reshape(batch, channels, rows, down, columns, across).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, rows * columns, -1)  # (B, N, C * patch * patch)
        features = F.linear(patches, self.weight.flatten(1), self.bias)  # (B, N, D)
        return features.transpose(1, 2).reshape(batch, -1, rows, columns)  # (B, D, rows, columns)


def project_patches_by_matrix_product(model: nn.Module) -> nn.Module:
    """Replaces, in place, every convolution that is a projection of patches by `PatchProjection`."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if (
                type(child) is nn.Conv2d
                and child.kernel_size == child.stride
                and max(child.kernel_size) > 1
                and set(child.padding) == {0}
                and set(child.dilation) == {1}
                and child.groups == 1
            ):
                setattr(parent, name, PatchProjection(child))
    return model


def load_targets(
    recipes: Sequence[Any], device: torch.device | str, default_sigmas: Sequence[float | str] | None = None
) -> tuple[list[Target], list[Any]]:
    """One target per model and sigma of a recipe (`ModelRecipe`), and for each the processor of its pipeline.

    A checkpoint named several times is loaded once. `default_sigmas` are for defended models whose recipe gives none;
    where that is None too, a model's own sigma counts.

    Raises:
        ValueError: a recipe contradicts itself, or a checkpoint lacks weights.
        FileNotFoundError: there is no such directory.
    """
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise ValueError(f"models need different names, got {names}; several sigmas go into one model's list")
    loaded: dict[tuple, tuple[nn.Module, Any]] = {}
    targets, processors = [], []
    for recipe in recipes:
        paths = (recipe.path, recipe.purifier, recipe.classifier)
        if paths not in loaded:
            model, processor = _load_model(recipe.name, *paths)
            loaded[paths] = project_patches_by_matrix_product(model).to(device), processor
        model, processor = loaded[paths]
        sigmas = recipe.sigmas()
        defended = isinstance(model, NIMPurifiedImageClassification) and not recipe.without_purifier
        if sigmas == [None] and default_sigmas and defended and model.config.purifier_config.degradation == "noise":
            sigmas = list(default_sigmas)
        for sigma in sigmas:
            targets.append(_make_target(recipe, model, processor, sigma))
            processors.append(processor)
    return targets, processors


def _load_model(name: str, path: str | None, purifier: str | None, classifier: str | None) -> tuple[nn.Module, Any]:
    if (path is None) == (purifier is None) or (purifier is None) != (classifier is None):
        raise ValueError(f"model {name!r}: give either 'path', or both 'purifier' and 'classifier'")
    if path is None:
        model = NIMPurifiedImageClassification.from_parts(
            _load(AutoModelForPreTraining, purifier), _load(AutoModelForImageClassification, classifier)
        )
    else:
        model = _load(AutoModelForImageClassification, path)
    return model, AutoImageProcessor.from_pretrained(path or purifier, backend="pil")


def _make_target(recipe: Any, model: nn.Module, processor: Any, sigma: str | float | None) -> Target:
    if isinstance(model, NIMPurifiedImageClassification):
        return PurifiedTarget(recipe.name, model, sigma, recipe.num_votes, recipe.without_purifier)
    if sigma is not None or recipe.num_votes is not None or recipe.without_purifier:
        raise ValueError(
            f"model {recipe.name!r} at {recipe.path!r} has no purifier: leave sigma, num_votes and without_purifier out, or "
            "give 'purifier' and 'classifier' paths"
        )
    if getattr(processor, "do_normalize", True):
        return ClassifierTarget(recipe.name, model, processor.image_mean, processor.image_std)
    return ClassifierTarget(recipe.name, model, [0.0] * 3, [1.0] * 3)


def check_classes(targets: Sequence[Target], source: ImageSource) -> None:
    """ValueError when a model has another number of classes than the data: its accuracy would mean nothing."""
    num_classes = len(source.class_names)
    for target in targets:
        known = target.model.config.num_labels
        if known < num_classes or (known > num_classes and not source.classes_are_counted):
            raise ValueError(
                f"{target.name} tells {known} classes apart, the data have {num_classes}: name the data it was trained for"
            )


def check_losses(targets: Sequence[Target], attacks: Sequence[Any]) -> None:
    """ValueError when an attack (`AttackRecipe`) ranks three classes and a model has two: better now than hours into a run."""
    for target in targets:
        for attack in attacks:
            if attack.uses_dlr and target.model.config.num_labels < 3:
                raise ValueError(
                    f"attack {attack.label!r} needs 3 classes for its DLR loss, {target.name} has "
                    f"{target.model.config.num_labels}: use the CE loss, e.g. apgd_ce"
                )


def load_purifier(path: str, device: torch.device | str) -> tuple[nn.Module, Any]:
    """A pre-trained model and its processor."""
    model = _load(AutoModelForPreTraining, path).eval().requires_grad_(False).to(device)
    return model, AutoImageProcessor.from_pretrained(path, backend="pil")


def _load(auto_class: type, path: str) -> nn.Module:
    config = load_config(path)
    classifies = auto_class is AutoModelForImageClassification
    if not classifies and config.model_type == ViTMAEConfig.model_type:
        auto_class = NIMForPreTraining  # transformers' own MAE cannot purify; its checkpoints load into ours
    elif type(config) not in auto_class._model_mapping:
        raise ValueError(
            f"{path!r} is a {config.model_type!r} model, no {'classifier' if classifies else 'purifier'}; name "
            + ("a fine-tuned or purified one" if classifies else "a pre-trained NIM or MIM model")
        )
    with naming_damaged_weights(path):
        model, info = auto_class.from_pretrained(path, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        missing = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"{path!r} lacks {len(missing)} weights of a {type(model).__name__}, e.g. {missing[0]!r}: it would be "
            "evaluated with random ones. Name a fine-tuned checkpoint"
        )
    return model


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of the weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
