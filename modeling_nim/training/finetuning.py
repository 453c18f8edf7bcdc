"""One step of fine-tuning: noise and purifier before the classifier, the attack, and the loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .. import NIMPurifiedImageClassification, normalize
from ..data.augment import augment
from ..data.loader import to_images_01
from ..data.randomness import generators, image_seeds
from ..noise_nim import add_noise, draw_by_image, noise_samplers
from ..runs.bounds import Weight, check_fields, check_list
from .adversary import adversarial_images, as_attacked
from .consistency import consistent_cross_entropy


@dataclass
class FeatureLossRecipe:
    """The `feature_loss` section, for a purifier in front of a frozen classifier.

    `weight` times the squared error of the classifier's features, purified image against clean one, as a share of the
    clean one's square, summed over `layers` (the stability of Salman et al. 2020, on features).
    """

    # of the squared error of the classifier's features, purified against clean
    weight: Weight = 0.0
    # names of the classifier's modules whose outputs are the features; null: what its last linear layer gets
    layers: list[str] | None = None

    def __post_init__(self):
        check_fields(self, "feature_loss.")
        check_list(self.layers, "feature_loss.layers")


@dataclass
class CleanImages:
    """Images before the attack `(B, 3, H, W)`, what is to be learned of them `(B, num_labels)`, and, for the feature
    loss, the classifier's features `(B, ...)` in each layer."""

    images_01: torch.Tensor
    targets: torch.Tensor
    features: Sequence[torch.Tensor] = ()


class Finetuning:
    """The model of a fine-tuning recipe as training, attack and validation use it.

    Args:
        recipe: with `seed`, `images`, `sigma`, `label_smoothing`, `augmentation`, `adversary`, `consistency` and
            `feature_loss`, as `scripts/run_finetune.py` declares them.
        model: what is trained, prepared by the accelerator: the classifier, or purifier and classifier composed.
        purified_model: the composed model, sharing its parts with `model`; None without a purifier.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: Any,
        model: nn.Module,
        purified_model: NIMPurifiedImageClassification | None,
    ):
        self.accelerator, self.recipe, self.model = accelerator, recipe, model
        self.purified_model = purified_model if recipe.images == "denoised" else None
        self.adds_noise = recipe.images == "noisy"
        self.trains_purifier = self.purified_model is not None and recipe.adversary.trains != "classifier"
        self.unwrapped = accelerator.unwrap_model(model)
        self.config = (self.purified_model or accelerator.unwrap_model(model, keep_torch_compile=False)).config
        self.feature_layers: list[FeatureLayer] = []
        if recipe.feature_loss.weight:
            self.feature_layers = find_layers(purified_model.classifier, recipe.feature_loss.layers)

    def train(self) -> None:
        """Training mode for what learns; what is frozen stays in evaluation mode."""
        self.model.train()
        if self.trains_purifier and self.recipe.adversary.trains == "purifier":
            self.purified_model.classifier.eval()

    def normalize(self, images_01: torch.Tensor) -> torch.Tensor:
        return normalize(images_01, self.config.image_mean, self.config.image_std)

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """`(B, num_labels)` smoothed probabilities of `labels` `(B,)`; zeros where the classifier is asked instead."""
        num_labels, smoothing = self.config.num_labels, self.recipe.label_smoothing
        if self.recipe.adversary.targets == "clean_answer":
            return torch.zeros(len(labels), num_labels, device=labels.device)
        targets = torch.nn.functional.one_hot(labels, num_labels).float()
        return targets * (1 - smoothing) + smoothing / num_labels

    def augmented(self, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The images `(B, 3, H, W)` of a loader's `batch` in [0, 1] and their targets `(B, num_labels)`, augmented."""
        images_01, targets = to_images_01(batch["pixels"]), self.targets(batch["labels"])
        which = (batch["epochs"], batch["indices"])
        statistics = (self.config.image_mean, self.config.image_std)  # for random erasing
        return augment(images_01, targets, self.recipe.augmentation, self.recipe.seed, *which, *statistics)

    @torch.no_grad()
    def clean(self, images_01: torch.Tensor, targets: torch.Tensor) -> CleanImages:
        """The images with what is to be learned of them: `targets`, or what the frozen classifier says."""
        asks = self.recipe.adversary.targets == "clean_answer"
        if not asks and not self.feature_layers:
            return CleanImages(images_01, targets)
        with self.accelerator.autocast(), features_of(self.feature_layers) as features:
            pixel_values = self.purified_model.prepare_for_classifier(self.normalize(images_01))
            logits = self.purified_model.classifier(pixel_values).logits
        return CleanImages(images_01, logits.float().softmax(dim=-1) if asks else targets, features)

    def draw(self, seeds: np.ndarray | Sequence[int]) -> dict[str, torch.Tensor]:
        """The degradation of one image for each seed; nothing where images are taken as they are."""
        named = generators(np.asarray(seeds, np.uint64), self.accelerator.device)
        if self.purified_model is None:
            return self._draw_noise(named, self.recipe.sigma) if self.adds_noise else {}
        sigma = self.recipe.sigma if self.config.purifier_config.adds_noise else None
        return self.purified_model.draw(len(seeds), named, sigma, num_votes=1)

    def _draw_noise(self, named: Sequence[torch.Generator], sigma: str | float) -> dict[str, torch.Tensor]:
        """`sigma` `(B,)` on 0..255 and `epsilon` `(B, C, H, W)` for images that are not denoised."""
        size = self.config.image_size
        samplers = noise_samplers(sigma, (self.config.num_channels, size, size), self.accelerator.device)
        return draw_by_image(samplers, len(named), named)

    def attack(self, clean: CleanImages, which: tuple[np.ndarray, np.ndarray], epsilon_255: float) -> torch.Tensor:
        """Adversarial images, made through noise, purifier, clamp and classifier; see `adversarial_images`.

        The noise has the sigma that the image will meet in training, and draws that nothing else uses. `which` are the
        epochs and indices of the images.
        """
        if epsilon_255 == 0:
            return clean.images_01
        sigma = self.draw(image_seeds(self.recipe.seed, *which, "degradation")).get("sigma")

        def forward(images_01: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
            draws = self.draw(seeds) | ({} if sigma is None else {"sigma": sigma})
            with self.accelerator.autocast():
                return self._answer(self.unwrapped, self.normalize(images_01), draws)[0]

        names = [str(seed) for seed in image_seeds(self.recipe.seed, *which, "adversary")]
        with as_attacked(self.unwrapped):
            return adversarial_images(
                forward, clean.images_01, clean.targets, names, self.recipe.seed, epsilon_255, self.recipe.adversary
            )

    def loss(self, images_01: torch.Tensor, clean: CleanImages, which: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
        """Eq. 10 on `images_01` `(B, 3, H, W)`, and what the recipe adds to it."""
        num_draws = self.recipe.consistency.num_draws
        purposes = ["degradation", *(f"degradation {number}" for number in range(1, num_draws))]
        seeds = np.stack([image_seeds(self.recipe.seed, *which, purpose) for purpose in purposes])  # (K, B)
        draws = self.draw(seeds.flatten())
        if "sigma" in draws:  # all draws of an image at the sigma of its first
            draws["sigma"] = draws["sigma"][: len(images_01)].repeat(num_draws)
        pixel_values = self.normalize(images_01).repeat(num_draws, 1, 1, 1)  # (K * B, 3, H, W)
        with features_of(self.feature_layers) as features:
            logits, purified = self._answer(self.model, pixel_values, draws)
        loss = self.recipe.adversary.classification_weight * consistent_cross_entropy(
            logits.unflatten(0, (num_draws, -1)).transpose(0, 1), clean.targets, self.recipe.consistency
        )
        if weight := self.recipe.adversary.reconstruction_weight:
            target = self.normalize(clean.images_01).repeat(num_draws, 1, 1, 1)
            loss = loss + weight * (purified.float() - target).square().mean()
        for purified_features, clean_features in zip(features, clean.features, strict=True):
            loss = loss + self.recipe.feature_loss.weight * feature_error(purified_features, clean_features)
        return loss

    def predict(self, model: nn.Module, images_01: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        """Logits in validation, at the defense's own sigma; an image meets the same noise every time.

        `model` is the trained one or a moving average of it.
        """
        draws = {}
        if self.purified_model is not None or self.adds_noise:
            named = generators(image_seeds(self.recipe.seed, 0, indices, "validation"), self.accelerator.device)
            draws = self._draw_noise(named, self.recipe.defense_sigma) if self.adds_noise else {"generator": named}
        with self.accelerator.autocast():
            return self._answer(model, self.normalize(images_01), draws)[0]

    def _answer(
        self, model: nn.Module, pixel_values: torch.Tensor, draws: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits and, where the purifier learns, purified images."""
        if self.trains_purifier:
            output = model(pixel_values, **draws)
            return output.logits, output.purified_pixel_values
        if self.purified_model is not None:
            # an attacker differentiates through the purifier; training stops before it
            with torch.set_grad_enabled(pixel_values.requires_grad), self.accelerator.autocast():
                purified = self.purified_model.purify(pixel_values, **draws)  # clamped
                pixel_values = self.purified_model.prepare_for_classifier(purified)
        elif self.adds_noise:
            pixel_values = add_noise(pixel_values, draws["sigma"], draws["epsilon"], self.config.image_std)
        return model(pixel_values).logits, None


@dataclass
class FeatureLayer:
    """A module of the classifier whose output, or whose input, is a feature."""

    module: nn.Module
    takes_input: bool = False


def find_layers(classifier: nn.Module, names: Sequence[str] | None) -> list[FeatureLayer]:
    """The modules called `names`, or the last linear layer that gives one number for each class, whose input counts.

    Raises ValueError for a name that the classifier does not have, or without such a linear layer.
    """
    modules = dict(classifier.named_modules())
    if names is not None:
        for name in names:
            if name not in modules or not name:
                raise ValueError(
                    f"feature_loss.layers: {type(classifier).__name__} has no module {name!r}; it has, among others, "
                    f"{', '.join(sorted(filter(None, modules), key=lambda known: (known.count('.'), known))[:12])}"
                )
        return [FeatureLayer(modules[name]) for name in names]
    num_labels = classifier.config.num_labels
    heads = [m for m in modules.values() if isinstance(m, nn.Linear) and m.out_features == num_labels]
    if not heads:
        raise ValueError(
            f"feature_loss needs a linear layer with {num_labels} outputs in {type(classifier).__name__} and finds "
            "none; name modules in feature_loss.layers, or use adversary.targets=clean_answer alone"
        )
    return [FeatureLayer(heads[-1], takes_input=True)]


@contextmanager
def features_of(layers: Sequence[FeatureLayer]) -> Iterator[list[torch.Tensor]]:
    """A list that gets the features `(B, ...)` in the order in which they are computed while the block runs."""
    features: list[torch.Tensor] = []

    def keep(value: Any) -> None:
        features.append(value if isinstance(value, torch.Tensor) else value[0])  # layers may return tuples

    handles = [
        layer.module.register_forward_pre_hook(lambda _, arguments: keep(arguments))
        if layer.takes_input
        else layer.module.register_forward_hook(lambda _, arguments, output: keep(output))
        for layer in layers
    ]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def feature_error(features: torch.Tensor, clean_features: torch.Tensor) -> torch.Tensor:
    """The mean over images of the squared error of `features` `(K * B, ...)` as a share of the square of
    `clean_features` `(B, ...)`."""
    target = clean_features.float().flatten(1).repeat(len(features) // len(clean_features), 1)
    errors = (features.float().flatten(1) - target).square().sum(dim=-1)
    return (errors / target.square().sum(dim=-1).clamp_min(1e-12)).mean()
