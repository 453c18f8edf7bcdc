"""Randomized smoothing with the NIM denoiser: a certificate for every image, no attack involved (Cohen et al. 2019).

The smoothing noise is the defense's own noise, so it is added once. The certificate holds for the majority vote over
that noise, at L2 radii in [0, 1] pixel units, with probability 1 - alpha per image.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator

from ..data import DataRecipe
from ..noise_nim import normalize, parse_sigma
from ..runs.bounds import Bounds, Count, Seed, check_fields, check_list
from ..runs.files import write_json
from .alarms import of_models
from .checks import inspect_target
from .cost import measure_speed
from .draws import CERTIFY, distinct_seeds, stream_seed
from .images import SourceImages, TensorImages
from .loading import check_classes
from .recipes import EvaluatedModelRecipe
from .record_file import RecordFile, Unit, plan_units, run_settings
from .records import Certificate, model_key
from .run import look_at_target
from .scores import compare_pair, interval, percent
from .statistics import certified_radius
from .targets import PurifiedTarget, SmoothedTarget, Target, compiled


@dataclass
class CertifyRecipe:
    """The recipe of `scripts/run_certify.py`: `num_selection_draws` (n0) choose the class, `num_draws` (n) bound it."""

    output_dir: str  # where certificates and table go; a run there is continued
    models: list[EvaluatedModelRecipe]
    data: DataRecipe = field(default_factory=DataRecipe)
    split: Literal["test", "validation", "train"] = "test"  # of the data that is certified on
    seed: Seed = 0  # of the noise
    num_images: Count | None = None  # null: all
    num_selection_draws: Annotated[int, Bounds(least=1, most=2**31)] = 100  # n0 of Cohen et al.: they choose the class
    num_draws: Annotated[int, Bounds(least=1, most=2**31)] = 10_000  # n: they bound its probability
    alpha: Annotated[float, Bounds(above=0, below=0.5)] = 0.001  # probability that a certificate is wrong
    # of the votes; the certificate is that of the classifier computed so
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False  # torch.compile of purifier and classifier: faster votes, rounded in another order
    # whose classes are bounded; right: leaves out those where the chosen class is wrong, mistakes at any radius
    bounded: Literal["all", "right"] = "all"
    micro_batch: Count = 256  # most rows of one forward pass: memory
    # L2 radii of the table, in [0, 1] pixels
    radii: list[Annotated[float, Bounds(least=0)]] = field(default_factory=lambda: [0.0, 0.1, 0.25, 0.5, 0.75, 1.0])

    def __post_init__(self):
        check_fields(self)
        check_list(self.radii, "radii")
        check_list(self.models, "models")


def check_certifiable(target: Target, images_01: torch.Tensor) -> float:
    """The target's sigma on 0..255, or ValueError saying why no certificate of it would be valid.

    The answer must depend on the noisy image alone. So the configuration is read, and the model is tested: the answer
    must stay the same when the image is shifted and the noise shifted back.
    """
    if isinstance(target, SmoothedTarget):
        if target.base.is_random or not inspect_target(target.base, images_01)["repeatable"]:
            raise ValueError(f"{target.name} is random on its own: a certificate needs all of the noise to be known")
        return target.sigma_255  # what it sees is the noisy image alone, by construction
    if not isinstance(target, PurifiedTarget) or target.without_purifier:
        raise ValueError(f"{target.name} has no noise to certify with; certify a purified model")
    if not target.adds_noise:
        raise ValueError(f"{target.name} hides patches and adds no noise; certificates are for Gaussian noise")
    config = target.model.config.purifier_config
    spec = parse_sigma(target.sigma)
    if spec.kind != "fixed" or spec.a == 0:
        raise ValueError(f"{target.name}: sigma must be one number above 0 to certify, got {target.sigma!r}")
    if target.num_votes != 1:
        raise ValueError(f"{target.name}: certify single votes (num_votes: 1), the certificate does the voting itself")
    if getattr(config, "norm_pix_loss", False) and getattr(config, "patch_statistics", "noisy") == "input":
        raise ValueError(
            f'{target.name}: its purifier has patch_statistics="input": it takes patch means and contrasts from the '
            "un-noised image, so the answer is no function of the noisy image and no certificate would be valid. Use a "
            'purifier with patch_statistics="noisy" (or norm_pix_loss=False)'
        )
    if not _sees_the_noisy_image_alone(target, images_01, spec.a):
        raise ValueError(
            f"{target.name}: its answer depends on more than the noisy image, so no certificate would be valid"
        )
    return spec.a


@torch.no_grad()
def _sees_the_noisy_image_alone(target: PurifiedTarget, images_01: torch.Tensor, sigma_255: float) -> bool:
    seeds = [stream_seed(0, "probe", "certify", row) for row in range(len(images_01))]
    draws = target.draw(seeds, images_01.shape[1:]) | {"sigma": sigma_255}  # masks, where there are some, are the same
    epsilon = draws.pop("epsilon")
    shift = 0.1 * torch.rand(images_01.shape, generator=torch.Generator().manual_seed(0)).to(images_01.device)
    pixel_values = [normalize(batch, target.image_mean, target.image_std) for batch in (images_01, images_01 + shift)]
    taken_back = epsilon - shift / (sigma_255 / 255)
    first = target.model(pixel_values[0], epsilon=epsilon, num_votes=1, **draws).logits
    second = target.model(pixel_values[1], epsilon=taken_back, num_votes=1, **draws).logits
    if not first.isfinite().all():
        raise ValueError(f"{target.name}: its logits hold NaN or infinity; mend the model first")
    return torch.allclose(first, second, atol=1e-3 * float(first.abs().max().clamp_min(1)))


@torch.no_grad()
def count_votes(
    target: Target, image_01: torch.Tensor, image_id: str, draws: range, recipe: CertifyRecipe
) -> torch.Tensor:
    """How often each class wins over numbered noise draws of one image `(3, H, W)`, `recipe.micro_batch` at a time.

    The draws are seeded one by one, so that the counts do not depend on the micro-batch.
    """
    counts = None
    for start in range(0, len(draws), recipe.micro_batch):
        seeds = distinct_seeds(recipe.seed, image_id, CERTIFY, draws[start : start + recipe.micro_batch])
        rows = image_01.expand(len(seeds), *image_01.shape)
        with torch.autocast(image_01.device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits = target.logits(rows, target.draw(seeds, image_01.shape))
        piece = logits.argmax(dim=-1).bincount(minlength=logits.shape[-1])
        counts = piece if counts is None else counts + piece
    return counts


def certify_image(
    target: Target, sigma_255: float, image_01: torch.Tensor, label: int, image_id: str, recipe: CertifyRecipe
) -> Certificate:
    """The certificate of one image; `prediction` is None and `radius` 0.0 where it abstains (Algorithm 2, CERTIFY).

    With `bounded: right` a wrong class gets neither draws (`num_draws` 0) nor prediction: it holds at no radius anyway.
    """
    num_selection = recipe.num_selection_draws
    # separate draws for the class and for its bound: shared ones would make the bound too high
    draws = range(num_selection), range(num_selection, num_selection + recipe.num_draws)
    top = int(count_votes(target, image_01, image_id, draws[0], recipe).argmax())
    count, num_draws, radius = 0, 0, 0.0
    if recipe.bounded == "all" or top == label:
        count, num_draws = int(count_votes(target, image_01, image_id, draws[1], recipe)[top]), recipe.num_draws
        radius = certified_radius(count, num_draws, sigma_255, recipe.alpha)
    return Certificate(
        model=target.name,
        sigma_255=sigma_255,
        image_id=image_id,
        label=label,
        top_class=top,
        count=count,
        num_draws=num_draws,
        alpha=recipe.alpha,
        prediction=top if radius > 0 else None,
        radius=radius,
    )


def certified_rows(certificates: Sequence[Certificate], radii: Sequence[float]) -> list[dict[str, Any]]:
    """Certified accuracy in percent per model, sigma and L2 radius; an abstention is a mistake."""
    rows = []
    for model, sigma in dict.fromkeys((item.model, item.sigma_255) for item in certificates):
        members = [item for item in certificates if (item.model, item.sigma_255) == (model, sigma)]
        for radius in radii:
            correct = [float(item.holds(radius)) for item in members]
            rows.append(
                {
                    "model": model,
                    "sigma": sigma,
                    "radius_l2": radius,
                    "certified_accuracy": percent(correct),
                    "ci95": interval(correct),
                    "abstained": percent([item.abstains for item in members]),
                    "num_images": len(members),
                }
            )
    return rows


def certified_comparisons(certificates: Sequence[Certificate], radii: Sequence[float]) -> list[dict[str, Any]]:
    """Models against each other at every L2 radius, on the images that both have a certificate of (exact McNemar)."""
    by_model: dict[str, dict[str, Certificate]] = {}
    for item in certificates:
        by_model.setdefault(model_key(item.model, item.sigma_255), {})[item.image_id] = item
    comparisons = []
    for pair in itertools.combinations(by_model.items(), 2):
        for radius in radii:
            holds = {name: {image: item.holds(radius) for image, item in found.items()} for name, found in pair}
            comparisons.append(compare_pair(holds, "certified_accuracy", radius_l2=radius))
    return [comparison for comparison in comparisons if comparison]


class CertificationRun:
    """Targets and images to be certified; creating one refuses what cannot be certified, and writes nothing.

    `warnings` are the alarms that come before the first certificate.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        images: SourceImages | TensorImages,
        recipe: CertifyRecipe,
        stated: Sequence[dict[str, Any] | None] | None = None,
    ):
        check_classes(targets, images)
        self.targets, self.images, self.recipe = list(targets), images, recipe
        self.num_images = min(len(images), recipe.num_images or len(images))
        self.sigmas, self.models, self.warnings, self.seconds_per_image = [], {}, [], 0.0
        for index, target in enumerate(self.targets):
            images_01 = images.batch(index, range(min(4, len(images))))[0]
            self.sigmas.append(check_certifiable(target, images_01))
            key = model_key(target.name, target.sigma)
            said = None if stated is None else stated[index]
            known, rings = look_at_target(index, target, images, recipe.micro_batch, said)
            self.models[key] = known["hash"]
            self.warnings += of_models({key: known}) + rings
            draws = recipe.num_selection_draws + recipe.num_draws
            self.seconds_per_image += draws * measure_speed(target, images_01, recipe.micro_batch)["full_forward"]

    def open(self, accelerator: Accelerator) -> RecordFile:
        """The certificates in `recipe.output_dir`, with those of a run that was stopped."""
        settings = run_settings(self.recipe, accelerator.device, models=self.models, data=self.images.fingerprint)
        settings["recipe"].pop("radii")  # only the table depends on it
        units = plan_units([self.num_images] * len(self.targets), batch_size=1)
        known = (self._identities, self._labels)
        return RecordFile(
            self.recipe.output_dir, settings, units, accelerator, *known, Certificate, name="certificates"
        )

    def _identities(self, unit: Unit) -> list[tuple]:
        names = self.images.image_ids(unit.positions)
        return [(self.targets[unit.job].name, self.sigmas[unit.job], name) for name in names]

    def _labels(self, unit: Unit) -> list[int]:
        return self.images.labels_at(unit.positions)

    def rounds(self, certificates: RecordFile) -> Iterator[list[Certificate]]:
        """Certifies image by image; yields what all processes wrote."""
        with compiled(self.targets) if self.recipe.compile else nullcontext():
            for unit in certificates.rounds():
                start, lines = time.perf_counter(), []
                if unit is not None:
                    images_01, labels, image_ids = self.images.batch(unit.job, unit.positions)
                    target, sigma = self.targets[unit.job], self.sigmas[unit.job]
                    lines = [certify_image(target, sigma, images_01[0], int(labels[0]), image_ids[0], self.recipe)]
                yield certificates.append(unit, lines, time.perf_counter() - start)

    def rows(self, certificates: RecordFile) -> list[dict[str, Any]]:
        """Certified accuracy per radius, written to `certified.json` beside them with the comparisons of models.

        For the main process alone.
        """
        read = certificates.read_here()
        rows = certified_rows(read, self.recipe.radii)
        provenance = certificates.settings | {"records_sha256": certificates.sha256}
        comparisons = certified_comparisons(read, self.recipe.radii)
        found = {"rows": rows, "comparisons": comparisons, "alarms": self.warnings, "provenance": provenance}
        write_json(certificates.directory / "certified.json", found)
        return rows
