"""The defended classifier of Eq. 9: degrade, reconstruct, classify, as one model."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .configuration_nim_purified import MAX_VOTES, NIMPurifiedConfig
from .families_nim import CLASSIFIERS, PURIFIERS
from .image_processing import ImageProcessorMixin, image_processor_for, image_settings_of
from .loading_nim import LoadedAsBuiltMixin
from .modeling_nim import classification_loss, require_image_size
from .noise_nim import Generators, denormalize, generators_per_image, normalize
from .pipeline_nim import NIMImageClassificationPipeline  # noqa: F401  its file must travel with this one to the Hub


def _build_part(own: dict[str, type[PreTrainedModel]], auto_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    return own[config.model_type](config) if config.model_type in own else auto_class.from_config(config)


@dataclass
class NIMPurifiedOutput(ImageClassifierOutput):
    """
    Output of [`NIMPurifiedImageClassification`].

    Args:
        loss: scalar cross-entropy, where labels are given.
        logits: `(B, num_labels)`; with several votes, the log of their mean probabilities.
        hidden_states, attentions: the classifier's, of each image's first vote, where they are asked for.
        degraded_pixel_values: `(B, C, H, W)`, the images with the noise of the first vote (or with its hidden patches
            zero).
        purified_pixel_values: `(B, C, H, W)`, the purified images of the first vote, in the purifier's normalization.
    """

    degraded_pixel_values: torch.Tensor | None = None
    purified_pixel_values: torch.Tensor | None = None


class NIMPurifiedImageClassification(ImageProcessorMixin, LoadedAsBuiltMixin, PreTrainedModel):
    r"""
    An image classifier behind a purifier: `y = c(g(f(x + sigma * epsilon)))` (Eq. 9), differentiable from end to end.

    Images come in normalized for the purifier, of the size that the classifier takes or the purifier's, whichever is
    larger; between the parts they are resized and normalized for the classifier. The noise is drawn anew in each call,
    in evaluation mode too.

    Example:

    ```python
    >>> from modeling_nim import NIMForImageClassification, NIMForPreTraining, NIMPurifiedImageClassification
    >>> purifier = NIMForPreTraining.from_pretrained("org/nim-mae-base")
    >>> classifier = NIMForImageClassification.from_pretrained("org/nim-mae-base-finetuned")
    >>> model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)
    >>> logits = model(pixel_values, num_votes=8).logits
    ```
    """

    config_class = NIMPurifiedConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: NIMPurifiedConfig, part_classes: tuple[type[PreTrainedModel], type[PreTrainedModel]] | None = None
    ):
        super().__init__(config)
        self.num_labels = config.num_labels
        if part_classes is not None:
            self.purifier, self.classifier = (
                part(part_config)
                for part, part_config in zip(
                    part_classes, (config.purifier_config, config.classifier_config), strict=True
                )
            )
        else:
            self.purifier = _build_part(PURIFIERS, AutoModelForPreTraining, config.purifier_config)
            self.classifier = _build_part(CLASSIFIERS, AutoModelForImageClassification, config.classifier_config)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        """Does nothing: the parts initialize themselves, and there are no other weights."""

    def get_input_embeddings(self) -> nn.Module:
        """The purifier's projection of patches, the first weights that the images meet."""
        return self.purifier.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the purifier's projection of patches."""
        self.purifier.set_input_embeddings(value)

    @classmethod
    def from_parts(
        cls,
        purifier: PreTrainedModel,
        classifier: PreTrainedModel,
        sigma: str | float | int = 30,
        num_votes: int = 1,
        image_size: int | None = None,
        classifier_image_size: int | None = None,
        classifier_image_mean: Sequence[float] | None = None,
        classifier_image_std: Sequence[float] | None = None,
    ) -> "NIMPurifiedImageClassification":
        r"""
        Puts any purifier of this package before any image classifier of transformers; the parts are used, not copied.

        Args:
            purifier: [`NIMForPreTraining`] or [`NIMSimMIMForPreTraining`].
            classifier: any image classifier of transformers.
            sigma: scale of the defense's noise on 0..255.
            num_votes: noise draws whose class probabilities are averaged.
            image_size: side of the images that are purified. None is the classifier's where the purifier is smaller and
                has to work in tiles, else the purifier's; the purifier's own makes it purify first and enlarge
                afterwards.
            classifier_image_size, classifier_image_mean, classifier_image_std: what the classifier expects. Each is
                looked for, when None, in the classifier's configuration and then in the image processor saved beside
                its weights.

        Raises:
            ValueError: the purifier cannot reconstruct images, or the parts differ in their number of channels.
        """
        _check_parts(purifier, classifier)
        found = image_settings_of(classifier.config)
        size = classifier_image_size or found.size
        mean, std = classifier_image_mean or found.mean, classifier_image_std or found.std
        own_size = purifier.config.image_size
        if size is None and image_size is None:
            warnings.warn(
                f"{type(classifier).__name__} does not say which image size it was trained for; it gets the "
                f"purifier's, {own_size}x{own_size}. Pass classifier_image_size if it was trained with another.",
                stacklevel=2,
            )
        if image_size is None and size is not None and size > own_size:
            image_size = size
            warnings.warn(
                f"the purifier is made for {own_size}x{own_size} images and the classifier for {size}x{size}: images "
                f"are purified at {size}x{size}, in overlapping tiles. Pass image_size={own_size} to purify at the "
                "purifier's size and enlarge what comes out.",
                stacklevel=2,
            )
        if mean is None or std is None:
            warnings.warn(
                f"{type(classifier).__name__} does not say how its images are normalized; the purifier's normalization "
                "is used. Pass classifier_image_mean and classifier_image_std if the classifier was trained with "
                "another.",
                stacklevel=2,
            )
        # Several classifiers may share a configuration (DeiT's do): this names the class, as save_pretrained does.
        classifier.config.architectures = [type(classifier).__name__]
        config = NIMPurifiedConfig(
            purifier_config=purifier.config,
            classifier_config=classifier.config,
            sigma=sigma,
            num_votes=num_votes,
            image_size=image_size,
            classifier_image_size=size,
            classifier_image_mean=None if mean is None else list(mean),
            classifier_image_std=None if std is None else list(std),
        )
        if found.geometry and found.size == config.image_size:
            default = image_processor_for(config).to_dict()
            if any(default.get(name) != value for name, value in found.geometry.items()):
                config.image_geometry = found.geometry
        model = cls._from_built_parts(config, purifier, classifier)
        return model.train(purifier.training or classifier.training)

    @classmethod
    def _from_built_parts(cls, config, purifier, classifier) -> "NIMPurifiedImageClassification":
        with torch.device("meta"):  # the skeleton's own weights are never used
            model = cls(config, part_classes=(type(purifier), type(classifier)))
        model.purifier, model.classifier = purifier, classifier
        return model

    def draw(
        self,
        batch_size: int,
        generators: Generators = None,
        sigma: str | float | int | None = None,
        num_votes: int | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The purifier's `draw` at the defense's sigma, as arguments of `forward`; with K votes `(B, K, ...)` each.

        An image's votes are drawn one after the other, so that they are those of `forward(..., generator=generators)`.
        """
        votes = self._checked_votes(num_votes)
        arguments = {"sigma": self._sigma(sigma)}
        arguments["image_size"] = self.config.image_size if image_size is None else image_size
        draws = self.purifier.draw(batch_size * votes, _one_per_vote(generators, batch_size, votes), **arguments)
        return draws if votes == 1 else {name: draw.unflatten(0, (batch_size, votes)) for name, draw in draws.items()}

    def purify(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        The purifier's `purify` at the defense's sigma.

        Returns:
            `(B, 3, H, W)`, of the images' size, in the purifier's normalization, clamped to the range of [0, 1] images.
        """
        return self.purifier.purify(
            pixel_values, sigma=self._sigma(sigma), epsilon=epsilon, generator=generator, noise=noise
        )

    def _sigma(self, sigma: str | float | int | torch.Tensor | None) -> str | float | int | torch.Tensor | None:
        """The defense's own sigma where none is given and the purifier adds noise."""
        own = sigma is None and self.config.purifier_config.adds_noise
        return self.config.sigma if own else sigma

    def _checked_votes(self, num_votes: int | None) -> int:
        votes = self.config.num_votes if num_votes is None else num_votes
        if isinstance(votes, bool) or not isinstance(votes, int):
            raise ValueError(f"num_votes must be a whole number, got {votes!r}")
        if not 1 <= votes <= MAX_VOTES:
            raise ValueError(f"num_votes must be at least 1 and at most {MAX_VOTES}, got {votes}")
        return votes

    def prepare_for_classifier(self, pixel_values: torch.Tensor) -> torch.Tensor:
        r"""
        Images in the purifier's normalization to the classifier's size, normalization and precision; differentiable.

        Without purification in between, this is the gray-box attacker's way into `model.classifier`.
        """
        config = self.config
        size, mean, std = config.classifier_image_size, config.classifier_image_mean, config.classifier_image_std
        if size is not None and (size, size) != tuple(pixel_values.shape[-2:]):
            pixel_values = nn.functional.interpolate(
                pixel_values, size=(size, size), mode="bicubic", align_corners=False, antialias=True
            )
        own = (config.image_mean, config.image_std)
        target = (own[0] if mean is None else list(mean), own[1] if std is None else list(std))
        if target != own:
            pixel_values = normalize(denormalize(pixel_values, *own), *target)
        return pixel_values.to(next((weight.dtype for weight in self.classifier.parameters()), pixel_values.dtype))

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        num_votes: int | None = None,
        noise: torch.Tensor | None = None,
        **kwargs,
    ) -> NIMPurifiedOutput | tuple:
        r"""
        Args:
            pixel_values: `(B, 3, H, W)`, `config.image_size` pixels on each side, in the purifier's normalization.
            labels: adds `loss`, see `classification_loss`; the classifier's `problem_type` counts.
            sigma: scale of the noise on 0..255, a specification, one per image `(B,)` or one per vote `(B, K)`; None is
                the configuration's.
            epsilon: `(B, 3, H, W)`, or `(B, K, 3, H, W)` for K votes; drawn when None.
            generator: None is the global RNG; one generator is drawn image by image and within an image vote by vote,
                so that the answer does not depend on the batch size; a list gives each image its own.
            num_votes: K noise draws per image; None is the configuration's.
            noise: `(B, M)`, or `(B, K, M)` for K votes; orders the patches of a purifier that hides some.
            kwargs: for the classifier, such as `output_hidden_states`.

        Returns:
            [`NIMPurifiedOutput`]; with K votes, `logits` `(B, num_labels)` are the log of the mean probabilities.

        Raises:
            ValueError: images of another size, `num_votes` below 1, or a draw that does not fit the images and votes.
        """
        votes = self._checked_votes(num_votes)
        require_image_size(pixel_values, (self.config.image_size, self.config.image_size))
        batch_size = pixel_values.shape[0]
        if num_votes is None:  # given draws tell the number of votes
            per_vote = [draw for draw, ndim in ((epsilon, 5), (noise, 3)) if draw is not None and draw.ndim == ndim]
            votes = per_vote[0].shape[1] if per_vote else votes
        if votes > 1:
            pixel_values = pixel_values.repeat_interleave(votes, dim=0)  # (B * K, 3, H, W)
        epsilon = _flatten_votes("epsilon", epsilon, ("3", "H", "W"), votes)
        noise = _flatten_votes("noise", noise, ("M",), votes)
        if isinstance(sigma, torch.Tensor) and sigma.ndim == 1 and sigma.shape[0] == batch_size:
            sigma = sigma.repeat_interleave(votes)
        elif isinstance(sigma, torch.Tensor) and sigma.ndim == 2:
            sigma = _flatten_votes("sigma", sigma, (), votes)
        generator = _one_per_vote(generator, batch_size, votes)

        degraded, hidden = self.purifier.degrade(pixel_values, self._sigma(sigma), epsilon, generator, noise)
        purified = self.purifier.restore(degraded, hidden, pixel_values)  # (B * K, 3, H, W)
        asked = {name: True for name in ("output_hidden_states", "output_attentions") if getattr(self.config, name)}
        classified = self.classifier(self.prepare_for_classifier(purified), **(asked | kwargs))
        logits = classified.logits  # (B * K, num_labels)
        problem_type = self.config.problem_type or self.config.classifier_config.problem_type
        if votes > 1:
            logits = _mean_of_votes(logits.float().view(batch_size, votes, -1), problem_type)  # (B, num_labels)
        return NIMPurifiedOutput(
            loss=None if labels is None else classification_loss(logits, labels, problem_type),
            logits=logits,
            hidden_states=_of_first_vote(getattr(classified, "hidden_states", None), votes),
            attentions=_of_first_vote(getattr(classified, "attentions", None), votes),
            degraded_pixel_values=self.purifier.hide(degraded[::votes], None if hidden is None else hidden[::votes]),
            purified_pixel_values=purified[::votes],
        )


def _check_parts(purifier: PreTrainedModel, classifier: PreTrainedModel) -> None:
    """Raises ValueError for a purifier that cannot reconstruct images, and for parts whose channels differ."""
    if not hasattr(purifier, "purify"):
        raise ValueError(
            f"{type(purifier).__name__} cannot purify: pass a pre-trained model with its decoder, such as "
            "NIMForPreTraining"
        )
    if not isinstance(classifier, PreTrainedModel):
        raise ValueError(
            f"the classifier must be an image classifier of transformers, got {type(classifier).__name__}; "
            "modeling_nim.robustness.as_target(classifier, purifier) takes any module"
        )
    channels = [getattr(part.config, "num_channels", 3) for part in (purifier, classifier)]
    if channels[0] != channels[1]:
        raise ValueError(
            f"the purifier gives {channels[0]} channels and the classifier takes {channels[1]}: use parts that agree"
        )


def _mean_of_votes(logits: torch.Tensor, problem_type: str | None) -> torch.Tensor:
    """Logits `(B, K, L)` of K votes to those `(B, L)` of their mean probabilities, or to their means."""
    if problem_type == "regression":
        return logits.mean(dim=1)
    if problem_type == "multi_label_classification":
        votes = nn.functional.logsigmoid(torch.stack([logits, -logits]))  # in logs: the mean may round to 0 or 1
        for_it, against_it = votes.logsumexp(dim=2)
        return for_it - against_it
    return torch.logsumexp(logits.log_softmax(dim=-1), dim=1) - torch.tensor(float(logits.shape[1])).log()


def _one_per_vote(generator: Generators, batch_size: int, votes: int) -> Generators:
    if generator is None or votes == 1:
        return generator
    return [g for g in generators_per_image(generator, batch_size) for _ in range(votes)]


def _flatten_votes(name: str, draw: torch.Tensor | None, shape: tuple[str, ...], votes: int) -> torch.Tensor | None:
    """Draws `(B, K, *shape)` as `(B * K, *shape)`; `(B, *shape)`, of a single vote, as they are."""
    if draw is None or (votes == 1 and draw.ndim == 1 + len(shape)):
        return draw
    if draw.ndim != 2 + len(shape):
        expected = ", ".join(("B", str(votes), *shape))
        raise ValueError(f"num_votes={votes} needs as many draws per image: pass {name} as ({expected})")
    if draw.shape[1] != votes:
        raise ValueError(f"{name} holds {draw.shape[1]} draws for num_votes={votes}")
    return draw.flatten(0, 1)


def _of_first_vote(tensors: tuple[torch.Tensor, ...] | None, votes: int) -> tuple[torch.Tensor, ...] | None:
    if tensors is None or votes == 1:
        return tensors  # the same tensors, so that a caller can retain their gradient
    return tuple(None if tensor is None else tensor[::votes] for tensor in tensors)
