"""What an evaluation writes down: a record per image, attack and seed, a row per table line, a certificate per image.

The same name means the same thing in all of them: `attack` is the kind of attack and `name` its label, `sigma` is a
number on 0..255, or a text where the defense has no such number ("uniform(0, 30)", "mask"), or None without a defense.
"""

import dataclasses
import gzip
import json
import os
import zlib
from dataclasses import dataclass
from typing import Any

from ..noise_nim import parse_sigma
from .attacks import ATTACKS


Sigma = float | str | None


def sigma_value(sigma: str | float | None) -> Sigma:
    """A defense's sigma as records name it: a number where it is one."""
    if not isinstance(sigma, str):
        return sigma
    try:
        spec = parse_sigma(sigma)
    except ValueError:
        return sigma  # "mask", or a purifier from elsewhere
    return spec.a if spec.kind == "fixed" else sigma


def model_key(name: str, sigma: str | float | None) -> str:
    """A model at a sigma, in words."""
    if sigma is None:
        return name
    return f"{name} @ sigma {sigma:g}" if isinstance(sigma, (int, float)) else f"{name} @ sigma {sigma}"


class _Jsonable:
    def to_json(self) -> dict[str, Any]:
        """The fields as JSON takes them, in their order."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Record(_Jsonable):
    """One image under one attack with one seed; `predictions` are those on the evaluation draws.

    Distances and the range of pixels are measured on what was scored. `clean_predictions` are those of the image
    without an attack, on the same draws.
    """

    model: str
    sigma: Sigma
    attack: str
    name: str
    threat_model: str
    epsilon_255: float
    seed: int
    image_id: str
    label: int
    clean_predictions: list[int]
    predictions: list[int]
    linf_255: float = 0.0
    l2_255: float = 0.0
    pixel_min: float = 0.0
    pixel_max: float = 1.0
    loss: float = 0.0
    queries: int = 0
    zero_gradients: int = 0
    skipped: bool = False

    @property
    def group(self) -> tuple:
        """The key of the record's row: model, sigma, label, threat model, epsilon."""
        return self.model, self.sigma, self.name, self.threat_model, self.epsilon_255

    @property
    def identity(self) -> tuple:
        """The key of the record, unique in its run."""
        return (*self.group, self.seed, self.image_id)

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "Record":
        """Of a line of `records.jsonl`; lines from before `name` was written have the label under `attack`."""
        values = line if "name" in line else line | {"name": line["attack"], "attack": _kind_of(line["attack"])}
        if not values["predictions"]:
            raise ValueError("it has no prediction")
        return cls(**(values | {"sigma": sigma_value(values["sigma"])}))


@dataclass(frozen=True)
class Row(_Jsonable):
    """A line of a table: the records of one group, averaged over draws and seeds per image, in percent."""

    model: str
    sigma: Sigma
    attack: str
    name: str
    threat_model: str
    epsilon_255: float
    accuracy: float
    ci95: list[float]
    num_images: int
    seconds: float
    accuracy_majority: float
    ci95_majority: list[float]
    accuracy_worst_draw: float
    ci95_worst_draw: list[float]
    control_accuracy: float
    control_accuracy_majority: float
    control_accuracy_worst_draw: float
    num_draws: int
    seeds: list[int]
    mean_perturbation_255: float
    mean_loss: float
    mean_queries: float
    settings: dict[str, Any]

    @property
    def group(self) -> tuple:
        """`Record.group` of the records that the row is made of."""
        return self.model, self.sigma, self.name, self.threat_model, self.epsilon_255

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "Row":
        return cls(**line)


@dataclass(frozen=True)
class Certificate(_Jsonable):
    """What randomized smoothing certifies of one image: `prediction` is None and `radius` 0.0 where it abstains, and
    where `num_draws` is 0, since the class was wrong and was not bounded."""

    model: str
    sigma_255: float
    image_id: str
    label: int
    top_class: int
    count: int
    num_draws: int
    alpha: float
    prediction: int | None
    radius: float

    @property
    def identity(self) -> tuple:
        """The key of the certificate, unique in its run."""
        return self.model, self.sigma_255, self.image_id

    @property
    def abstains(self) -> bool:
        """Whether the draws do not bear out the class that was chosen."""
        return self.prediction is None and self.num_draws > 0

    def holds(self, radius_l2: float) -> bool:
        """Whether the class is right and certified up to this L2 radius; an abstention is a mistake."""
        return self.prediction == self.label and self.radius >= radius_l2

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> "Certificate":
        return cls(**line)


def _kind_of(label: str) -> str:
    """The kind in a label that was made of settings; a label of another origin is its own kind."""
    kind = label.split(" ")[0].partition("-")[0]
    return kind if kind in ATTACKS or label.endswith(" torchattacks") else label


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, compressed or not; errors name the file, the line and the remedy."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there are no records {str(path)!r}; make them with scripts/run_attack.py or run_certify.py"
        )
    opened, lines = gzip.open if str(path).endswith(".gz") else open, []
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for line in file:
                lines.append(json.loads(line))
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:  # not UTF-8, no JSON, cut off
        raise ValueError(f"{path}, line {len(lines) + 1} is broken ({error}): make the records again") from None
    return lines


def read_records(path: str | os.PathLike, model_prefix: str = "") -> list[Record]:
    """The records of an attack run, those of earlier versions too. The prefix, put before the names of its models,
    tells them from those of another run."""
    return [Record.from_json(line | {"model": model_prefix + line["model"]}) for line in read_jsonl(path)]
