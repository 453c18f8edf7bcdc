"""Checks of a model and of its files, before an evaluation that takes hours."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers.utils import cached_file

from .records import model_key, sigma_value
from .targets import Target


@torch.no_grad()
def inspect_target(target: Target, images_01: torch.Tensor) -> dict[str, bool]:
    """Checks a model by its answers to images `(B, C, H, W)` in [0, 1].

    - `repeatable`: equal draws give equal answers.
    - `draws_differ`, of a random model: other draws give other answers, in another batch and within one.
    - `continuous`: the answer to equal draws hardly changes when each pixel's last bit changes, or two pixels by one
      step of 8 bits. Noise that is made from the image is `repeatable`; this check finds it.
    - `independent`: the answer to an image does not depend on the others in its batch.

    Raises ValueError where logits are NaN or infinite.
    """
    number = len(images_01)

    def answer(batch_01: torch.Tensor, seeds: range) -> torch.Tensor:
        return target.logits(batch_01, target.draw(seeds, images_01.shape[1:])).float()  # a draw can be used once

    logits = answer(images_01, range(number))
    if not logits.isfinite().all():
        raise ValueError(f"{target.name}: its logits of images in [0, 1] hold NaN or infinity; mend the model first")
    size = float(logits.abs().max())
    result = {"repeatable": torch.equal(logits, answer(images_01, range(number)))}
    if target.is_random:
        alike = answer(images_01[:1].expand(images_01.shape), range(number))
        result["draws_differ"] = not torch.equal(logits, answer(images_01, range(number, 2 * number))) and (
            number == 1 or float((alike - alike[0]).abs().max()) > 1e-6 * size
        )
    if not result["repeatable"]:  # the other checks would fail for the same reason
        return result | {"continuous": True, "independent": True}
    stepped = images_01.clone()
    for row, column in ((0, 0), (images_01.shape[-2] // 2, images_01.shape[-1] // 2)):
        pixel = stepped[..., row, column]
        pixel += torch.where(pixel < 0.5, 1 / 255, -1 / 255)
    moved = (torch.nextafter(images_01, torch.full_like(images_01, 0.5)), stepped)
    changes = [float((answer(batch_01, range(number)) - logits).abs().max()) for batch_01 in moved]
    alone = float((answer(images_01[:1], range(1)) - logits[:1]).abs().max())
    return result | {"continuous": max(changes) <= 0.02 * size, "independent": alone <= 0.02 * size}


def check_processor(name: str, model: nn.Module, processor: Any) -> None:
    """ValueError where the processor beside the weights and the model's configuration want different images.

    `pipeline()` runs the processor, attacks run the model on [0, 1] images that it normalizes with its configuration:
    where these two differ, one of the results is wrong.
    """
    config = model.config
    if not getattr(processor, "do_rescale", True):
        raise ValueError(f"{name}: its processor leaves pixels on 0..255 (do_rescale: false); attacks need [0, 1]")
    factor = getattr(processor, "rescale_factor", 1 / 255)
    if abs(factor - 1 / 255) > 1e-6:
        raise ValueError(f"{name}: its processor scales pixels by {factor:g} instead of 1/255: they would leave [0, 1]")
    mean, std = getattr(config, "image_mean", None), getattr(config, "image_std", None)
    if mean is None or std is None:
        return  # the processor alone says how its images look
    for key, own, theirs in (("image_mean", mean, processor.image_mean), ("image_std", std, processor.image_std)):
        if not getattr(processor, "do_normalize", True) or theirs is None:
            raise ValueError(f"{name}: its configuration has {key} {list(own)}, its processor does not normalize")
        if len(own) != len(theirs) or max(abs(a - b) for a, b in zip(own, theirs, strict=True)) > 1e-4:
            raise ValueError(f"{name}: its configuration has {key} {list(own)}, its processor {list(theirs)}: mend one")
    size = getattr(config, "image_size", None)  # of a defense what it purifies, in tiles or in one piece
    given = (processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size) or {}
    sides = given.get("height"), given.get("width")
    if isinstance(size, int) and None not in sides and sides != (size, size):
        gives = "x".join(map(str, sides))
        raise ValueError(f"{name}: its configuration has image_size {size}, its processor gives {gives}: mend one")


def stated_accuracy(path: str | None, target: Target, weights_hash: str) -> dict[str, Any] | None:
    """The clean accuracy that the model's own card or a `summary.json` beside it states, at the target's sigma.

    `{"accuracy", "low", "source"}` in percent, `low` the lower end of its 95% interval; None where nothing is stated.
    """
    if path is None:
        return None
    for file in (Path(path) / "summary.json", Path(path).parent / "summary.json"):
        found = _from_summary(file, target, weights_hash) if file.is_file() else None
        if found is not None:
            return found
    card = cached_file(path, "README.md", _raise_exceptions_for_missing_entries=False) if path else None
    return None if card is None else _from_card(Path(card), target)


def _from_summary(file: Path, target: Target, weights_hash: str) -> dict[str, Any] | None:
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        models, rows = summary["provenance"]["models"], summary["rows"]
        for row in rows:
            stated = models.get(model_key(row["model"], row["sigma"]), {})
            if row["name"] == "none" and row["sigma"] == sigma_value(target.sigma) and stated["hash"] == weights_hash:
                return {"accuracy": row["accuracy"], "low": row["ci95"][0], "source": str(file)}
    except (ValueError, KeyError, TypeError):
        return None  # another program's summary
    return None


def _from_card(file: Path, target: Target) -> dict[str, Any] | None:
    header = file.read_text(encoding="utf-8").split("---")
    try:
        results = [result for entry in yaml.safe_load(header[1])["model-index"] for result in entry["results"]]
        for result in results:
            for metric in result["metrics"]:
                arguments = metric.get("args", {})
                own = arguments.get("sigma_255", sigma_value(target.sigma))
                if metric["type"] != "accuracy" or own != sigma_value(target.sigma):
                    continue
                value = float(metric["value"])
                value = 100 * value if value <= 1 else value
                low = arguments.get("ci95", [value - 1.0])[0]
                return {"accuracy": value, "low": low, "source": f"{file} on {result['dataset']['name']}"}
    except (yaml.YAMLError, IndexError, KeyError, TypeError, ValueError):
        return None  # a card without results of this form
    return None
