"""One step of fine-tuning: what the images meet before the classifier, the attack on it, and the loss."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .. import NIMPurifiedImageClassification, normalize
from ..data.randomness import generators, image_seeds
from .adversary import adversarial_images, as_attacked
from .optimization import soft_cross_entropy


class Finetuning:
    """The model of a fine-tuning recipe as training, attack and validation use it.

    Args:
        recipe: with `seed`, `images`, `sigma` and `adversary`, as `scripts/run_finetune.py` declares them.
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
        self.trains_purifier = self.purified_model is not None and recipe.adversary.trains != "classifier"
        self.unwrapped = accelerator.unwrap_model(model)
        self.config = (self.purified_model or accelerator.unwrap_model(model, keep_torch_compile=False)).config

    def train(self) -> None:
        """Training mode for what learns; what is frozen stays in evaluation mode."""
        self.model.train()
        if self.trains_purifier and self.recipe.adversary.trains == "purifier":
            self.purified_model.classifier.eval()

    def normalize(self, images_01: torch.Tensor) -> torch.Tensor:
        return normalize(images_01, self.config.image_mean, self.config.image_std)

    @torch.no_grad()
    def targets(self, labels: torch.Tensor, clean_01: torch.Tensor) -> torch.Tensor:
        """`(B, num_labels)` probabilities to learn: `labels`, or what the frozen classifier says of the clean images."""
        if self.recipe.adversary.targets == "labels":
            return labels
        with self.accelerator.autocast():
            pixel_values = self.purified_model.prepare_for_classifier(self.normalize(clean_01))
            return self.purified_model.classifier(pixel_values).logits.float().softmax(dim=-1)

    def draw(self, seeds: np.ndarray | Sequence[int]) -> dict[str, torch.Tensor]:
        """The degradation of one image for each seed; nothing where images are taken as they are."""
        if self.purified_model is None:
            return {}
        named = generators(np.asarray(seeds, np.uint64), self.accelerator.device)
        return self.purified_model.purifier.draw(len(seeds), named, self.recipe.sigma)

    def attack(
        self, images_01: torch.Tensor, targets: torch.Tensor, which: tuple[np.ndarray, np.ndarray], epsilon_255: float
    ) -> torch.Tensor:
        """Adversarial images, made through noise, purifier, clamp and classifier; see `adversarial_images`.

        The noise has the sigma that the image will meet in training, and draws that nothing else uses. `which` are the
        epochs and indices of the images.
        """
        if epsilon_255 == 0:
            return images_01
        sigma = self.draw(image_seeds(self.recipe.seed, *which, "degradation")).get("sigma")

        def forward(images_01: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
            draws = self.draw(seeds) | ({} if sigma is None else {"sigma": sigma})
            with self.accelerator.autocast():
                return self._answer(self.unwrapped, self.normalize(images_01), draws)[0]

        names = [str(seed) for seed in image_seeds(self.recipe.seed, *which, "adversary")]
        with as_attacked(self.unwrapped):
            return adversarial_images(
                forward, images_01, targets, names, self.recipe.seed, epsilon_255, self.recipe.adversary
            )

    def loss(
        self,
        images_01: torch.Tensor,
        targets: torch.Tensor,
        which: tuple[np.ndarray, np.ndarray],
        clean_01: torch.Tensor,
    ) -> torch.Tensor:
        """Eq. 10 on `images_01` `(B, 3, H, W)`, and the distance of what is purified to `clean_01` where that counts."""
        draws = self.draw(image_seeds(self.recipe.seed, *which, "degradation"))
        logits, purified = self._answer(self.model, self.normalize(images_01), draws)
        loss = soft_cross_entropy(logits, targets)
        if weight := self.recipe.adversary.reconstruction_weight:
            loss = loss + weight * (purified.float() - self.normalize(clean_01)).square().mean()
        return loss

    def predict(self, model: nn.Module, images_01: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        """Logits in validation, at the defence's own sigma; an image meets the same noise every time.

        `model` is the trained one or a moving average of it.
        """
        draws = {}
        if self.purified_model is not None:
            seeds = image_seeds(self.recipe.seed, 0, indices, "validation")
            draws = {"generator": generators(seeds, self.accelerator.device)}
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
        return model(pixel_values).logits, None
