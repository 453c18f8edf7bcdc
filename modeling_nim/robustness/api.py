"""The evaluation from Python: `attack`, `evaluate` and `certify` anything that makes logits of [0, 1] images."""

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Real
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data import ImageSource
from ..image_processing import image_processor_for
from ..modeling_nim_purified import NIMPurifiedImageClassification
from ..noise_nim import denormalize, normalize
from ..runs.bounds import check_value
from ..runs.models import load_processor
from .alarms import Alarm
from .certification import CertificationRun, CertifyRecipe
from .checks import check_processor, stated_accuracy
from .evaluation import attack_images
from .images import RowsSource, SourceImages, TensorImages, check_images
from .jobs import Job
from .loading import model_hash, project_patches_by_matrix_product
from .protocols import resolve
from .recipes import AttackRecipe, AttackRunRecipe, EvaluatedModelRecipe
from .records import model_key
from .run import AttackRun, look_at_target
from .summary import Summary
from .targets import ClassifierTarget, FunctionTarget, PurifiedTarget, SmoothedTarget, Target


@dataclass
class AttackResult:
    """Adversarial images `(B, C, H, W)` in [0, 1] and per image what they cost: `queries` rows were asked of the model.

    `zero_gradients` counts the steps that met a gradient of exactly zero, `skipped` are images that were wrong before.
    """

    images_01: torch.Tensor
    queries: list[int]
    zero_gradients: list[int]
    skipped: list[bool]
    seconds: float


def as_target(
    model: Any,
    purifier: Callable | None = None,
    *,
    name: str = "model",
    sigma: float | str | None = None,
    num_votes: int | None = None,
    is_random: bool | None = None,
    num_classes: int | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Target:
    """What attacks see of a model, with or without a purifier before it.

    Modules are put into evaluation mode and frozen; patch projections of models of transformers become matrix products
    of the same weights, as in `run_attack.py`.

    Args:
        model: a purified model of ours; an image classifier of transformers; a module or function from [0, 1] images
            `(B, C, H, W)` to logits; or a `Target`, which is returned as it is.
        purifier: a model of ours with `purify`; or a module or function from [0, 1] images to [0, 1] images of the same
            shape. A parameter `generators` receives a list of one generator per image, a parameter `generator` one
            generator, image by image; with neither it is seeded through the global generators, image by image.
        name: what rows call it.
        sigma: of a purifier of ours, on 0..255; None is the model's own.
        is_random: whether the answers are; None: where there is a purifier.
        num_classes: of a function, so that labels can be checked.
        image_mean, image_std: of a classifier of transformers; None: its configuration's or its processor's.

    Raises:
        ValueError: the normalization of a classifier's images is not known, or the parts do not fit.
    """
    if isinstance(model, Target):
        return model
    if hasattr(purifier, "purify") and isinstance(model, PreTrainedModel):
        given = {"classifier_image_mean": image_mean, "classifier_image_std": image_std}
        model, purifier = NIMPurifiedImageClassification.from_parts(purifier, model, **given), None
    if isinstance(model, PreTrainedModel):
        _check_own_processor(name, model)
        project_patches_by_matrix_product(model)
    if isinstance(model, NIMPurifiedImageClassification) and purifier is None:
        return PurifiedTarget(name, model, sigma, num_votes)
    if hasattr(purifier, "purify"):
        purifier = _Purifier01(purifier, sigma)
    if isinstance(model, PreTrainedModel):
        mean, std = _normalization(model, image_mean, image_std)
        plain = ClassifierTarget(name, model, mean, std)
        if purifier is None:
            return plain
        return FunctionTarget(name, plain, purifier, is_random, plain.num_classes)
    if not callable(model):
        raise ValueError(f"model must be a module or a function of [0, 1] images, got {type(model).__name__}")
    return FunctionTarget(name, model, purifier, is_random, num_classes)


def attack(
    model: Any,
    images_01: torch.Tensor,
    labels: torch.Tensor,
    attack: str | Callable = "pgd",
    *,
    epsilon_255: float = 8.0,
    threat_model: str | None = None,
    seed: int = 0,
    image_ids: Sequence[str] | None = None,
    num_draws: int = 10,
    micro_batch: int = 256,
    target: dict[str, Any] | None = None,
    **settings: Any,
) -> AttackResult:
    """Adversarial images and what they cost.

    Args:
        model: whatever `as_target` takes; `target` are its further arguments.
        images_01, labels: `(B, C, H, W)` in [0, 1], `(B,)`.
        attack: a row of `attacks.ATTACKS`, "package.module:function", or a function of
            `(oracle, images_01, epsilon, ...)`.
        epsilon_255: of the norm, on 0..255. `threat_model`: None is the attack's usual one.
        seed, image_ids: name the noise draws. `num_draws`: on which images that are wrong anyway are found.
        micro_batch: most rows of a forward pass.
        settings: of `AttackRecipe`, e.g. `steps`, `eot_samples`, `norm`; one that the attack does not use is refused.

    Warns where ten images or more are right no oftener than guesses.

    Raises:
        ValueError: pixels are outside of [0, 1], labels are no classes, ids do not fit, or a setting cannot be.
    """
    if not isinstance(epsilon_255, Real):
        raise ValueError(f"epsilon_255 must be a number, got {epsilon_255!r}; evaluate takes several")
    for key, value in (("num_draws", num_draws), ("micro_batch", micro_batch), ("seeds", seed)):
        check_value(value, AttackRunRecipe, key, key.removesuffix("s") if key == "seeds" else key)
    check_images(images_01)
    seen = as_target(model, **(target or {}))
    images = TensorImages(images_01, labels, image_ids, seen.num_classes, images_01.device)
    recipe = AttackRecipe(
        attack, threat_models=[threat_model] if threat_model else [], epsilon_255=[epsilon_255], **settings
    )
    if recipe.source is not None:
        raise ValueError(f"attack {recipe.label!r} is made on one model and tried on another: use evaluate with both")
    job = Job(0, recipe, recipe.threat_models[0], epsilon_255, seed, len(images))
    if len(images) >= 10:  # fewer may all be wrong
        _warn(look_at_target(0, seen, images, micro_batch)[1])
    start = time.perf_counter()
    found = attack_images(
        job, [seen], images_01, images.labels.to(images_01.device), images.ids, num_draws, micro_batch
    )
    return AttackResult(
        found.adversarial_01, found.queries, found.zero_gradients, found.skipped, time.perf_counter() - start
    )


def evaluate(
    model: Any,
    data: Any,
    attacks: Sequence[Any] | Any = (),
    *,
    protocol: str | None = None,
    epsilon_255: Sequence[float] | float | None = None,
    num_images: int | None = None,
    seeds: Sequence[int] | int | None = None,
    num_draws: int | None = None,
    batch_size: int = 64,
    micro_batch: int = 256,
    output_dir: str | None = None,
    processor: Any = None,
    progress: bool = False,
) -> Summary:
    """What attacks leave of a model's accuracy: rows, worst case, comparisons and alarms, as of `run_attack.py`.

    Args:
        model: whatever `as_target` takes, or a list of targets, or a dictionary of names to models.
        data: `(images_01, labels)` or `(images_01, labels, image_ids)`; a DataLoader of such batches, or of
            dictionaries; a `datasets` split; or an `ImageSource` of ours.
        attacks: kinds, functions, dictionaries or `AttackRecipe`s; `protocol` is "smoke", "paper", "neurips" or
            "standard".
        epsilon_255, num_images, seeds, num_draws: as in a recipe of `run_attack.py`; `epsilon_255` is also that of the
            attacks named by kind or function.
        output_dir: keeps `records.jsonl` and `summary.json`; the same call continues there after a stop.
        batch_size: images attacked at a time. `micro_batch`: most rows of a forward pass.
        processor: makes images of a source; None is the model's own.
        progress: shows a bar.

    Returns:
        A `Summary`: `rows` (percent, with 95% Wilson intervals), `worst_case`, `comparisons` (exact McNemar
        tests), `alarms` (warnings, too) and `provenance`.

    Raises:
        ValueError: data, a model, a setting or the records in `output_dir` cannot be; the message names it.
    """
    targets = _targets(model)
    accelerator = Accelerator()
    images = _images(data, targets, processor, _device(targets))
    if isinstance(attacks, (str, AttackRecipe, dict)) or callable(attacks):
        attacks = [attacks]
    attacks, epsilon_255, seeds = (
        _list(value, name) for value, name in ((attacks, "attacks"), (epsilon_255, "epsilon_255"), (seeds, "seeds"))
    )
    with nullcontext(output_dir) if output_dir else TemporaryDirectory() as directory:
        recipe = AttackRunRecipe(
            str(directory),
            models=[EvaluatedModelRecipe(name) for name in dict.fromkeys(target.name for target in targets)],
            protocol=protocol,
            attacks=[_attack_recipe(one, epsilon_255) for one in attacks or ()],
            epsilon_255=None if protocol is None else epsilon_255,
            num_images=num_images,
            seeds=seeds,
            num_draws=num_draws,
            batch_size=batch_size,
            micro_batch=micro_batch,
        )
        plan = resolve(recipe, undefended=[target.name for target in targets if target.sigma is None])
        run = AttackRun(targets, images, plan, micro_batch, [_stated(target) for target in targets])
        _warn(run.warnings)
        records = run.open(recipe, batch_size, accelerator)
        total = sum(job.num_images for job in run.jobs)
        done = sum(unit.num_lines for unit in records.units[: records.done])
        with tqdm(total=total, initial=done, unit="image", disable=not progress) as bar:
            for _, written in run.rounds(records):
                bar.update(len(written))
        summary = run.summary(records, accelerator.num_processes)
        records.close()
    _warn(alarm for alarm in summary.alarms if alarm["alarm"] not in {early["alarm"] for early in run.warnings})
    return summary


def certify(
    model: Any,
    data: Any,
    sigma_255: float | None = None,
    *,
    num_images: int | None = None,
    num_draws: int = 10_000,
    num_selection_draws: int = 100,
    alpha: float = 0.001,
    radii: Sequence[float] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
    seed: int = 0,
    precision: str = "float32",
    compile: bool = False,
    bounded: str = "all",
    micro_batch: int = 256,
    output_dir: str | None = None,
    processor: Any = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Certified accuracy per L2 radius in [0, 1] units (Cohen et al. 2019), as `run_certify.py` finds it.

    A purified model of ours is certified with its own noise; any other model is smoothed with Gaussian noise of
    `sigma_255`, unclipped.

    Args:
        num_selection_draws, num_draws: n0 and n of their Algorithm 2, which choose the class and bound its probability.
        alpha: the probability that a certificate is wrong.
        radii: of the table, L2 in [0, 1] pixels.
        precision, compile: `float32` or `bf16`, of the votes, and whether purifier and classifier are compiled; the
            certificate is that of the classifier computed so.
        bounded: whose classes are bounded, `all`, or `right` for the same accuracies without draws for wrong classes,
            which `abstained` then leaves out.
        model, data, num_images, seed, micro_batch, output_dir, processor, progress: as in `evaluate`.

    Returns:
        A dictionary per model, sigma and radius: `certified_accuracy` and `abstained` in percent, `ci95`, `num_images`.

    Raises:
        ValueError: no certificate of the model would be valid (`certification.check_certifiable`), or an argument
            cannot be.
    """
    targets = _targets(model)
    if sigma_255 is not None:
        targets = [
            PurifiedTarget(target.name, target.model, sigma_255, target.num_votes)
            if isinstance(target, PurifiedTarget)
            else SmoothedTarget(target, sigma_255)
            for target in targets
        ]
    images = _images(data, targets, processor, _device(targets))
    keys = {
        "num_images": num_images,
        "num_draws": num_draws,
        "num_selection_draws": num_selection_draws,
        "alpha": alpha,
        "precision": precision,
        "compile": compile,
        "bounded": bounded,
    }
    with nullcontext(output_dir) if output_dir else TemporaryDirectory() as directory:
        models = [EvaluatedModelRecipe(target.name) for target in targets]
        recipe = CertifyRecipe(
            str(directory), models, seed=seed, micro_batch=micro_batch, radii=_list(radii, "radii"), **keys
        )
        run = CertificationRun(targets, images, recipe, [_stated(target) for target in targets])
        _warn(run.warnings)
        certificates = run.open(Accelerator())
        shown = {"total": len(certificates.units), "initial": certificates.done, "unit": "image"}
        with tqdm(**shown, disable=not progress) as bar:
            for written in run.rounds(certificates):
                bar.update(len(written))
        rows = run.rows(certificates)
        certificates.close()
    return rows


def _warn(alarms: Iterable[Alarm]) -> None:
    """Gives as Python warnings the alarms that the scripts print."""
    for alarm in alarms:
        warnings.warn(f"{alarm['alarm']} [{alarm['where']}]: {alarm['message']}", stacklevel=3)


def _stated(target: Target) -> dict[str, Any] | None:
    """What the directory that a model was loaded from states about its accuracy."""
    path = getattr(getattr(getattr(target, "model", None), "config", None), "name_or_path", "")
    return stated_accuracy(path, target, model_hash(target.weights)) if os.path.isdir(path) else None


def _targets(model: Any) -> list[Target]:
    if isinstance(model, dict):
        return [as_target(one, name=name) for name, one in model.items()]
    targets = [as_target(one) for one in (model if isinstance(model, (list, tuple)) else [model])]
    keys = [model_key(target.name, target.sigma) for target in targets]
    if len(set(keys)) < len(keys):
        raise ValueError(f"models need different names, got {keys}: pass a dictionary of names to models")
    return targets


def _list(values: Any, name: str) -> list[Any] | None:
    """An argument as a list, whether it holds one value or several; None stays None."""
    if values is None:
        return None
    if isinstance(values, (str, Real)):
        return [values]
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list, got {type(values).__name__}")
    return list(values)


def _attack_recipe(one: Any, epsilon_255: Sequence[float] | None) -> AttackRecipe:
    if isinstance(one, AttackRecipe):
        return one
    if not isinstance(one, (dict, str)) and not callable(one):
        raise ValueError(f"an attack must be a name, a function, a dictionary or an AttackRecipe, got {one!r}")
    settings = dict(one) if isinstance(one, dict) else {"attack": one}
    if epsilon_255 is not None:
        settings.setdefault("epsilon_255", epsilon_255)
    return AttackRecipe(**settings)


def _device(targets: Sequence[Target]) -> torch.device:
    return next((weight.device for target in targets for weight in target.parameters()), torch.device("cpu"))


def _images(data: Any, targets: Sequence[Target], processor: Any, device: torch.device) -> SourceImages | TensorImages:
    if not isinstance(data, (ImageSource, tuple, list, DataLoader)) and hasattr(data, "column_names"):
        data = RowsSource(data)
    if isinstance(data, ImageSource):
        for target in targets if hasattr(processor, "image_mean") else []:
            if hasattr(target, "model"):
                check_processor(target.name, target.model, processor)
        return SourceImages(data, [processor or _processor(target) for target in targets], device)
    if isinstance(data, DataLoader):
        batches = [_batch(batch) for batch in data]
        if not batches:
            raise ValueError("the DataLoader gives no batch")
        data = tuple(torch.cat(pieces) for pieces in zip(*batches, strict=True))
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        raise ValueError(
            f"data must be (images_01, labels), a DataLoader, a datasets split or a source, got {type(data)}"
        )
    classes = {target.num_classes for target in targets} - {None}
    return TensorImages(*data, num_classes=min(classes, default=None), device=device)


def _batch(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(batch, dict):
        if len(batch) != 2:
            raise ValueError(
                f"a batch needs images_01 and labels, got {len(batch)} things; ids go beside tensors alone"
            )
        return batch[0], batch[1]
    images_01 = next((batch[key] for key in ("images_01", "image", "images", "pixel_values") if key in batch), None)
    labels = next((batch[key] for key in ("labels", "label") if key in batch), None)
    if images_01 is None or labels is None:
        raise ValueError(f"a batch needs images_01 and labels, got the keys {sorted(batch)}")
    return images_01, labels


def _processor(target: Target) -> Any:
    model = getattr(target, "model", None)
    if model is not None and getattr(model.config, "image_mean", None) is not None:
        return image_processor_for(model.config)
    if model is not None and model.config.name_or_path:
        return load_processor(model.config.name_or_path)
    raise ValueError(f"{target.name}: who makes [0, 1] images of this data? pass processor=, or tensors")


def _check_own_processor(name: str, model: PreTrainedModel) -> None:
    """ValueError where the processor in the directory that a model was loaded from contradicts its configuration."""
    path = model.config.name_or_path
    if os.path.isfile(os.path.join(path or "", "preprocessor_config.json")):
        check_processor(name, model, load_processor(path))


def _normalization(model: PreTrainedModel, mean: Any, std: Any) -> tuple[Sequence[float], Sequence[float]]:
    mean, std = mean or getattr(model.config, "image_mean", None), std or getattr(model.config, "image_std", None)
    if (mean is None or std is None) and model.config.name_or_path:
        processor = load_processor(model.config.name_or_path)
        mean, std = mean or processor.image_mean, std or processor.image_std
    if mean is None or std is None:
        raise ValueError(
            f"{type(model).__name__} does not say how its images are normalized: pass image_mean and image_std"
        )
    return mean, std


class _Purifier01(nn.Module):
    """A purifier of ours as a function of [0, 1] images and generators."""

    def __init__(self, purifier: PreTrainedModel, sigma: float | str | None):
        super().__init__()
        self.purifier, self.sigma = purifier, sigma

    def forward(self, images_01: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        config = self.purifier.config
        pixel_values = normalize(images_01, config.image_mean, config.image_std)
        purified = self.purifier.purify(pixel_values, sigma=self.sigma, generator=generators)
        return denormalize(purified, config.image_mean, config.image_std)
