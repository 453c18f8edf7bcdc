"""Models as users run them: the model and the normalization of its `pipeline("image-classification", ...)`."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..data import ImageSource
from ..image_processing import image_processor_for
from ..modeling_nim_purified import NIMPurifiedImageClassification
from ..noise_nim import parse_sigma
from ..runs.models import (
    CLASSIFIER,
    COMPOSED_TYPE,
    load_config,
    load_model,
    load_processor,
    load_purifier,
    set_attention,
    set_mask_ratio,
)
from .checks import check_processor
from .functions import is_function, named_function
from .images import TensorImages
from .recipes import AttackRecipe, EvaluatedModelRecipe
from .targets import ClassifierTarget, FunctionTarget, PurifiedTarget, SmoothedTarget, Target


class PatchProjection(nn.Module):
    """A convolution whose windows tile the image, as the matrix product that it is; weights and names are the same.

    Attacks need its gradient with respect to the image, which on CPUs, as a convolution, takes a quarter of a small
    model's pass.
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
    recipes: Sequence[EvaluatedModelRecipe],
    device: torch.device | str,
    default_sigmas: Sequence[float | str] | None = None,
) -> tuple[list[Target], list[Any]]:
    """One target per model and sigma of a recipe, and for each the processor of its pipeline.

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
        key = (
            recipe.path,
            recipe.purifier,
            recipe.classifier,
            str(recipe.classifier_settings()),
            recipe.mask_ratio,
            recipe.trust_remote_code,
            recipe.gradient_precision,
        )
        if key not in loaded:
            model, processor = _load_model(recipe)
            check_processor(recipe.name, model, processor)
            if recipe.gradient_precision == "bf16":
                composed = isinstance(model, NIMPurifiedImageClassification)
                parts = [model.purifier, model.classifier] if composed else [model]
                set_attention(parts, "auto", recipe.gradient_precision, torch.device(device))
            loaded[key] = project_patches_by_matrix_product(model).to(device), processor
        model, processor = loaded[key]
        sigmas = recipe.sigmas()
        defended = isinstance(model, NIMPurifiedImageClassification) and not recipe.without_purifier
        if sigmas == [None] and default_sigmas and defended and model.config.purifier_config.adds_noise:
            sigmas = list(default_sigmas)
        for sigma in sigmas:
            target = _make_target(recipe, model, processor, sigma)
            target.bf16_gradients = recipe.gradient_precision == "bf16"
            targets.append(target)
            processors.append(processor)
    return targets, processors


def _load_model(recipe: EvaluatedModelRecipe) -> tuple[nn.Module, Any]:
    path, purifier, classifier, trust = recipe.path, recipe.purifier, recipe.classifier, recipe.trust_remote_code
    if (path is None) == (purifier is None) or (purifier is None) != (classifier is None):
        raise ValueError(f"model {recipe.name!r}: give either 'path', or both 'purifier' and 'classifier'")
    if path is None and is_function(purifier):
        if recipe.mask_ratio is not None or recipe.smoothed:
            raise ValueError(f"model {recipe.name!r}: {purifier!r} is a function; leave mask_ratio and smoothed out")
        model = load_model(classifier, CLASSIFIER, trust)
        return model, load_processor(classifier, trust)
    if path is None:
        parts = load_purifier(purifier, recipe.mask_ratio, trust), load_model(classifier, CLASSIFIER, trust)
        model = NIMPurifiedImageClassification.from_parts(*parts, **recipe.classifier_settings())
        return model, image_processor_for(model.config)
    model = load_model(path, CLASSIFIER, trust)
    if recipe.mask_ratio is not None:
        if not isinstance(model, NIMPurifiedImageClassification):
            raise ValueError(f"model {recipe.name!r} at {path!r} has no purifier: leave mask_ratio out")
        set_mask_ratio(model.purifier, recipe.mask_ratio)
        model.config.purifier_config.mask_ratio = recipe.mask_ratio
    return model, load_processor(path, trust)


def _make_target(recipe: EvaluatedModelRecipe, model: nn.Module, processor: Any, sigma: str | float | None) -> Target:
    if isinstance(model, NIMPurifiedImageClassification) and not recipe.smoothed:
        return PurifiedTarget(recipe.name, model, sigma, recipe.num_votes, recipe.without_purifier)
    if recipe.smoothed:
        return _smoothed_target(recipe, model, processor, sigma)
    if sigma is not None or recipe.num_votes is not None or recipe.without_purifier:
        own = recipe.path if recipe.purifier is None else recipe.purifier
        raise ValueError(
            f"model {recipe.name!r} at {own!r} has no purifier of ours: leave sigma, num_votes and without_purifier "
            "out, or give 'purifier' and 'classifier' paths"
        )
    plain = _classifier_target(recipe, model, processor)
    if recipe.purifier is None:
        return plain
    purifier = named_function(recipe.purifier, "purifier")
    return FunctionTarget(recipe.name, plain, purifier, num_classes=plain.num_classes)


def _classifier_target(recipe: EvaluatedModelRecipe, model: nn.Module, processor: Any) -> ClassifierTarget:
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(processor, "do_normalize", True):
        mean, std = processor.image_mean, processor.image_std
    given = recipe.classifier_settings()
    mean, std = given.get("classifier_image_mean", mean), given.get("classifier_image_std", std)
    return ClassifierTarget(recipe.name, model, mean, std)


def _smoothed_target(
    recipe: EvaluatedModelRecipe, model: nn.Module, processor: Any, sigma: str | float | None
) -> SmoothedTarget:
    if isinstance(model, NIMPurifiedImageClassification) or recipe.without_purifier or recipe.num_votes is not None:
        raise ValueError(
            f"model {recipe.name!r}: smoothed is for a classifier without a purifier, whose votes the certificate or "
            "num_draws counts: name it as path, and leave without_purifier and num_votes out"
        )
    spec = None if sigma is None else parse_sigma(sigma)
    if spec is None or spec.kind != "fixed":
        raise ValueError(f"model {recipe.name!r}: smoothed needs sigma as one number on 0..255, got {sigma!r}")
    return SmoothedTarget(_classifier_target(recipe, model, processor), spec.a)


def check_classes(targets: Sequence[Target], source: ImageSource | TensorImages) -> None:
    """ValueError when a model has other classes than the data, or in another order: its accuracy would mean nothing."""
    num_classes = len(source.class_names)
    has_names = not source.classes_are_counted and not isinstance(source, TensorImages)
    for target in targets:
        known = target.num_classes
        if known is None:
            continue
        if known < num_classes or (known > num_classes and not source.classes_are_counted):
            raise ValueError(
                f"{target.name} tells {known} classes apart, the data have {num_classes}: name the data it "
                "was trained for"
            )
        names = target.class_names or []
        for number, name in enumerate(source.class_names if has_names else ()):
            if name in names and names[number] != name:
                raise ValueError(
                    f"class {number} of the data is {name!r}, which {target.name} calls class {names.index(name)}: "
                    "name the data it was trained for, with all of its classes"
                )


def check_losses(targets: Sequence[Target], attacks: Sequence[AttackRecipe]) -> None:
    """ValueError when an attack ranks three classes and a model has two; raised before the run starts."""
    for target in targets:
        for attack in attacks:
            if attack.uses_dlr and target.num_classes is not None and target.num_classes < 3:
                raise ValueError(
                    f"attack {attack.label!r} needs 3 classes for its DLR loss, {target.name} has "
                    f"{target.num_classes}: "
                    "use the CE loss, e.g. apgd_ce"
                )


def load_with_processor(path: str, device: torch.device | str) -> tuple[nn.Module, Any]:
    """The purifier at `path`, its weights frozen, and the image processor that was saved with it.

    Of the purifier in a composed model, whose processor is made for the whole, it is the one of its configuration.
    """
    purifier = load_purifier(path).requires_grad_(False).to(device)
    if load_config(path).model_type == COMPOSED_TYPE:
        return purifier, image_processor_for(purifier.config)
    return purifier, load_processor(path)


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of the weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
