"""The image-classification pipeline of transformers, with the purifier's arguments."""

import base64
import binascii
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from transformers.image_transforms import to_pil_image
from transformers.pipelines import PIPELINE_REGISTRY, ImageClassificationPipeline

from .image_processing import check_processor_fields, rgb_image
from .noise_nim import denormalize, parse_sigma


@dataclass(frozen=True)
class _ImageWithSigma:
    """One input of the pipeline where every image has a sigma of its own."""

    image: Any
    sigma_255: float


class NIMImageClassificationPipeline(ImageClassificationPipeline):
    r"""
    `pipeline("image-classification")` for any model of transformers, and the defense's arguments for purified ones.

    Without the arguments below it is the stock pipeline: same inputs (PIL images, paths, URLs, base64, arrays, lists,
    datasets, `batch_size`), same results.

    Arguments for [`NIMPurifiedImageClassification`], in the call or once for all in `pipeline(...)`:
        sigma: scale of the defense's noise on 0..255, or a specification as `"uniform(0, 30)"`. The model's if None.
            In a call with several images also a list of numbers, one for each image.
        num_votes: noise draws whose class probabilities are averaged. The model's if None.
        seed: a whole number that fixes the noise. EVERY image gets the noise of this seed, so its answer depends
            neither on its place in a list nor on the batch size, and the global random state is neither read nor
            changed. None draws anew.
        return_purified: also return what the classifier saw.

    Returns:
        For each image a list of `{"label", "score"}`, best first; with `return_purified=True` a dictionary of
        `"labels"`, that list, and `"purified"`, a PIL image of the input's size: the purified image of the first noise
        draw, in place. What the image processor cuts off (the margins of a center crop) is shown as it was: no model
        saw it.

    Example:

    ```python
    >>> pipe = pipeline("image-classification", "org/nim-purified", trust_remote_code=True)
    >>> result = pipe("digit.png", sigma=30, num_votes=8, seed=0, return_purified=True)
    >>> result["labels"][0], result["purified"].size
    ```
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.model.config.model_type.startswith("nim"):
            check_processor_fields(self.image_processor)

    def __call__(self, inputs=None, sigma=None, **kwargs):
        if isinstance(inputs, list) and not inputs:
            raise ValueError("the list of images is empty: pass at least one image")
        if isinstance(sigma, (list, tuple)) or (isinstance(sigma, (np.ndarray, torch.Tensor)) and sigma.ndim > 0):
            self._require_purifier(["sigma"])
            inputs = _with_sigma(kwargs.pop("images", inputs), [_fixed_sigma(value) for value in sigma])
        elif sigma is not None:
            kwargs["sigma"] = sigma
        return super().__call__(inputs, **kwargs)

    def _require_purifier(self, given: Sequence[str]) -> None:
        if given and not hasattr(self.model, "purify"):
            raise ValueError(
                f"{type(self.model).__name__} has no purifier, so {', '.join(given)} has no meaning for it: put one in "
                "front with NIMPurifiedImageClassification.from_parts, or leave the argument out"
            )

    def _sanitize_parameters(self, sigma=None, num_votes=None, seed=None, return_purified=None, **kwargs):
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        given = {"sigma": sigma, "num_votes": num_votes, "seed": seed, "return_purified": return_purified}
        given = {name: value for name, value in given.items() if value is not None}
        self._require_purifier(list(given))
        if isinstance(sigma, (list, tuple)):
            raise ValueError(f"sigma {sigma!r} is a list, one number per image: pass it in the call, with its images")
        if sigma is not None:
            parse_sigma(sigma)  # here, before any image is loaded
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
            raise ValueError(f"seed must be a whole number of at most 64 bits, got {seed!r}")
        if return_purified is not None:
            if not isinstance(return_purified, bool):
                raise ValueError(f"return_purified must be True or False, got {return_purified!r}")
            preprocess["keep_image"] = return_purified
        return preprocess, forward | given, postprocess

    def check_model_type(self, supported_models):
        # The parent's list holds transformers' own classes alone, and it logs an error for every other one.
        if not hasattr(self.model, "purify"):
            super().check_model_type(supported_models)

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        iterator = super().get_iterator(
            inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
        )
        if "seed" in forward_params:
            # A DataLoader draws its workers' base seed from the global random state, unless it has a generator.
            iterator.loader.loader.generator = torch.Generator()
        return iterator

    def preprocess(self, image, timeout=None, keep_image=False):
        if not self.model.config.model_type.startswith("nim"):
            return super().preprocess(image, timeout=timeout)
        own_sigma = {}
        if isinstance(image, _ImageWithSigma):
            own_sigma = {"own_sigma_255": [image.sigma_255]}
            image = image.image
        try:
            image = rgb_image(_opened_image(image, timeout))  # as training and evaluation see it
        except TypeError:  # not a type of image
            raise
        except Exception as error:  # Pillow's decoders raise many types for damaged files
            named = repr(image[:200]) if isinstance(image, str) else f"of type {type(image).__name__}"
            what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            if isinstance(error, UnidentifiedImageError):
                what = "not an image"
            raise ValueError(f"cannot read image {named}: {what}") from None
        model_inputs = super().preprocess(image)
        if keep_image:
            model_inputs["input_image"] = [image]
        model_inputs.update(own_sigma)
        return model_inputs

    def _forward(self, model_inputs, seed=None, return_purified=False, **purifier_arguments):
        input_images = model_inputs.pop("input_image", None)
        own_sigma_255 = model_inputs.pop("own_sigma_255", None)
        if own_sigma_255 is not None:  # of one image, or in a batch a list of such lists
            purifier_arguments["sigma"] = torch.tensor(own_sigma_255, device=self.device).flatten()  # (B,)
        if seed is not None:
            seeded = [torch.Generator().manual_seed(seed) for _ in model_inputs["pixel_values"]]
            purifier_arguments["generator"] = seeded
        output = self.model(**model_inputs, **purifier_arguments)
        if not return_purified:
            return {"logits": output["logits"]}
        config = self.model.config
        purified = output.purified_pixel_values.float()  # (B, 3, H, W), the first draw of each image
        images_01 = denormalize(purified, config.image_mean, config.image_std).clamp(0, 1)
        return {"logits": output.logits, "images_01": images_01, "input_image": input_images}

    def postprocess(self, model_outputs, **kwargs):
        labels = super().postprocess(model_outputs, **kwargs)
        if "images_01" not in model_outputs:
            return labels
        levels = (model_outputs["images_01"][0] * 255).round().to(torch.uint8)  # (3, H, W)
        seen = Image.fromarray(levels.permute(1, 2, 0).numpy())
        [shown] = model_outputs["input_image"]
        shown = shown.copy()
        left, top, right, bottom = _seen_box(shown.size, self.image_processor)
        shown.paste(seen.resize((right - left, bottom - top), Image.Resampling.BICUBIC), (left, top))
        return {"labels": labels, "purified": shown}


def _fixed_sigma(value: Any) -> float:
    """One image's sigma on 0..255; ValueError for a distribution, which gives no fixed number."""
    number = value.item() if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else value
    spec = parse_sigma(number)
    if spec.kind != "fixed":
        raise ValueError(f"sigma of an image must be a number on 0..255, got {value!r}: pass that for all images alike")
    return float(spec.a)


def _with_sigma(inputs: Any, sigmas_255: list[float]) -> list[_ImageWithSigma] | Iterator[_ImageWithSigma]:
    """Images and their sigmas in pairs, listed or lazy as the images are.

    Raises:
        ValueError: the images are not as many as the sigmas (a stream raises it at its end), or are a single one.
    """
    if not isinstance(inputs, (list, Dataset, GeneratorType)):
        raise ValueError(
            f"sigma holds {len(sigmas_255)} numbers, one per image: pass the images as a list, or one sigma"
        )
    if hasattr(inputs, "__len__"):
        _check_counts(len(inputs), len(sigmas_255))
    return list(_pairs(inputs, sigmas_255)) if isinstance(inputs, list) else _pairs(inputs, sigmas_255)


def _pairs(images: Iterable[Any], sigmas_255: list[float]) -> Iterator[_ImageWithSigma]:
    count = 0
    for count, image in enumerate(images, start=1):
        if count > len(sigmas_255):
            break
        yield _ImageWithSigma(image, sigmas_255[count - 1])
    _check_counts(count, len(sigmas_255))


def _check_counts(num_images: int, num_sigmas: int) -> None:
    if num_images != num_sigmas:
        raise ValueError(f"sigma holds {num_sigmas} numbers for {num_images} images: pass one per image")


def _opened_image(source: Any, timeout: float | None) -> Image.Image:
    """A PIL image of whatever the pipeline takes: a PIL image, an array, a path, a URL, base64.

    The stock loader would clip 16-bit and float levels.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (np.ndarray, torch.Tensor)):
        levels = source
        if isinstance(source, torch.Tensor):
            source = source.detach().cpu()
            levels = np.asarray(source.float() if source.is_floating_point() else source)  # numpy has no bfloat16
        if np.issubdtype(levels.dtype, np.floating):
            if not ((levels >= 0) & (levels <= 1)).all():  # NaN fails, too
                raise ValueError("an array of floats must hold levels in 0..1; give levels in 0..255 as uint8")
            levels = np.rint(levels * 255).astype(np.uint8)
        if levels.dtype != np.uint8:
            raise ValueError(f"an image array must be uint8 (0..255) or float (0..1), got {levels.dtype}")
        if levels.ndim != 3:
            raise ValueError(f"an image array must be (H, W, 3) or (3, H, W), got {levels.shape}")
        return to_pil_image(levels)
    if not isinstance(source, str):
        raise TypeError(f"an image must be a PIL image, an array, a path, a URL or base64, got {type(source).__name__}")
    if source.startswith(("http://", "https://")):
        response = httpx.get(source, timeout=timeout, follow_redirects=True)
        return Image.open(io.BytesIO(response.raise_for_status().content))
    if os.path.exists(source):
        return Image.open(source)
    try:
        text = source.split(",")[1] if source.startswith("data:image/") else source
        return Image.open(io.BytesIO(base64.b64decode("".join(text.split()), validate=True)))
    except (binascii.Error, ValueError, IndexError, UnidentifiedImageError):
        raise ValueError("there is no such file, and it is no URL and no base64 of an image") from None


def _seen_box(image_size: tuple[int, int], processor: Any) -> tuple[int, int, int, int]:
    """The part (left, top, right, bottom) of a (width, height) image that is left after the processor's center crop."""
    width, height = image_size
    shortest_edge = processor.size.get("shortest_edge") if processor.do_resize else None
    if not getattr(processor, "do_center_crop", False) or shortest_edge is None:
        return (0, 0, width, height)
    scale = min(width, height) / shortest_edge  # input pixels per resized pixel
    seen_width = min(round(processor.crop_size["width"] * scale), width)
    seen_height = min(round(processor.crop_size["height"] * scale), height)
    left, top = (width - seen_width) // 2, (height - seen_height) // 2
    return (left, top, left + seen_width, top + seen_height)


def register_pipeline() -> None:
    """Makes `pipeline("image-classification")` build this class; for models without a purifier it is the stock one."""
    # `PIPELINE_REGISTRY.register_pipeline` would also mark every model saved through a pipeline as needing remote code.
    PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = NIMImageClassificationPipeline
