"""Recipes of the evaluation: an attack, a model to evaluate, a run."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from ..configuration_nim_purified import MAX_VOTES
from ..data import DataRecipe
from ..noise_nim import MAX_SIGMA_255, parse_sigma
from ..runs.bounds import Bounds, Count, Draws, Pixels, Seed, check_fields, check_list
from .attacks import KEYWORDS, Attack, check_arguments, find_attack
from .functions import function_name, named_function, short_name
from .oracle import LOSSES, RowLoss
from .torchattacks_peer import torchattacks_arguments, torchattacks_class


ThreatModel = Literal["white_box", "white_box_known_draw", "gray_box", "black_box"]


Epsilon255 = Annotated[float, Bounds(least=0, most=1_000_000)]  # an L2 distance may be far above 255


@dataclass
class AttackRecipe:
    """One attack; lists multiply.

    - `attack`: a row of `attacks.ATTACKS`, or a function of one's own as `package.module:function` (in Python the
      function itself), with `arguments`.
    - `threat_models`: `white_box` (exact gradients through the defense, not the draw), `white_box_known_draw` (the
      scored draw as well), `gray_box` (the classifier, unaware of the defense), `black_box` (answers only).
    - `epsilon_255`: of the norm, on 0..255.
    - `models`, `sigmas`: restrict the attack to these models (by name) and these sigmas of the defended ones.
    - `num_images`, `seeds`: fewer than the run's.
    - `skip_misclassified`: images that are wrong without an attack on every selection draw are not attacked; None:
      where that saves more than finding them costs.

    The settings, of which each attack uses some and refuses the others:

    - `alpha_255`: the step; None means `alpha_ratio` times epsilon.
    - `eot_samples`: draws averaged in each step. `queries`: Square's budget of answers per image.
    - `loss`: `ce`, `dlr`, `margin`, or a function of logits and labels as `package.module:function`.
    - `source`: the model that `transfer` is made on.
    - `torchattacks_class`, with `arguments` that it knows.
    """

    attack: str
    name: str | None = None  # null: made of the settings that set attacks apart
    threat_models: list[ThreatModel] = field(default_factory=list)
    epsilon_255: list[Epsilon255] = field(default_factory=lambda: [2.0])
    norm: Literal["linf", "l2"] = "linf"  # which norm epsilon_255 bounds
    steps: Count = 10  # gradient steps
    alpha_255: Annotated[float, Bounds(above=0)] | None = None
    alpha_ratio: Annotated[float, Bounds(above=0)] = 0.25  # step over epsilon, where alpha_255 is null
    eot_samples: Draws = 1
    restarts: Count = 1  # the worst of so many runs is kept
    random_start: bool = True  # begin at a random place of the ball
    targeted: bool = False  # towards the likeliest wrong class
    loss: str = "ce"
    queries: Count = 1000  # Square's budget of answers per image
    patch_size: Pixels | None = None  # of patch_mean; null: the purifier's
    source: str | None = None
    torchattacks_class: str | None = None  # by name, with arguments that it knows
    arguments: dict[str, Any] = field(default_factory=dict)  # of torchattacks_class or of your own function
    models: list[str] | None = None
    sigmas: list[float | str] | None = None
    num_images: Count | None = None
    seeds: list[Seed] | None = None
    skip_misclassified: bool | None = None

    def __post_init__(self):
        row, who = self.row, f"attack {short_name(self.attack)!r}"
        check_fields(self, f"{who}: ")
        self.threat_models = self.threat_models or [row.threat_models[0]]
        for threat in self.threat_models:
            if threat not in row.threat_models:
                raise ValueError(f"{who} is not defined for threat model {threat!r}; use one of {row.threat_models}")
        unused = [key for key in self.changed_settings() if key not in row.settings]
        if unused:
            raise ValueError(
                f"{who} does not use {unused[0]!r}, leave it out; its settings are {', '.join(row.settings)}"
            )
        if self.steps < row.least_steps:
            first = "; its first step is a random start" if row.least_steps > 1 else ""
            raise ValueError(f"{who}: steps must be at least {row.least_steps}, got {self.steps}{first}")
        for key in ("epsilon_255", "threat_models", "models", "sigmas", "seeds"):
            check_list(getattr(self, key), f"{who}: {key}")
        self.epsilon_255 = [float(value) for value in self.epsilon_255]  # as a recipe's: records hold the same text
        if self.alpha_255 is not None and self.alpha_ratio != 0.25:
            raise ValueError(
                f"{who}: alpha_255 {self.alpha_255:g} and alpha_ratio {self.alpha_ratio:g} both set the step; give one"
            )
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"{who}: norm must be 'linf' or 'l2', got {self.norm!r}")
        if self.attack == "square" and self.queries < 2 * self.eot_samples:
            raise ValueError(f"square: {self.queries} queries allow no proposal with eot_samples {self.eot_samples}")
        for key in ("source", "torchattacks_class"):
            if key in row.settings and getattr(self, key) is None:
                raise ValueError(f"{who} needs {key!r}")
        check_arguments(row, self.arguments, who)
        self.losses  # noqa: B018  a loss that does not exist is an error here, not hours later

    @property
    def row(self) -> Attack:
        """The attack's row of the table, or one made of a function of one's own."""
        return find_attack(self.attack)

    def changed_settings(self) -> list[str]:
        """The settings that are not at their defaults."""
        fields = {item.name: item for item in dataclasses.fields(self)}
        return [key for key in SETTINGS if getattr(self, key) != _default(fields[key])]

    @property
    def kind(self) -> str:
        """What tables call the attack: torchattacks' classes and functions of one's own under their own names."""
        return self.torchattacks_class.lower() if self.attack == "torchattacks" else short_name(self.attack)

    @property
    def implementation(self) -> str:
        """Whose code attacks: "nim", "torchattacks" or `package.module:function`."""
        if self.attack == "torchattacks":
            return "torchattacks"
        name = function_name(self.attack)
        return name if ":" in name else "nim"

    @property
    def losses(self) -> tuple[RowLoss, ...]:
        """The functions that the attack makes large, one after the other."""
        names = (self.loss,) if "loss" in self.row.settings else self.row.losses
        return tuple(_find_loss(name) for name in names)

    @property
    def uses_own_code(self) -> bool:
        """Whether attack or loss are code from outside of this package."""
        return self.implementation != "nim" or self.loss not in LOSSES

    @property
    def uses_dlr(self) -> bool:
        """Whether it needs three classes."""
        return LOSSES["dlr"] in self.losses

    @property
    def uses_steps(self) -> bool:
        """Whether its label tells the steps."""
        return "steps" in self.row.settings and self.attack != "torchattacks"

    @property
    def label(self) -> str:
        """`name`, or one made of the settings that set attacks apart."""
        if self.name is not None:
            return self.name
        parts = [self.kind + (f"-{self.steps}" if self.uses_steps else "")]
        changed = self.changed_settings()
        for key, text in _LABELS.items():
            # Square's label always has its queries; labels of torchattacks never have them, as in earlier tables
            if self.attack == "square" if key == "queries" else key in changed:
                parts.append(text.format(short_name(getattr(self, key)) if key == "loss" else getattr(self, key)))
        return " ".join(parts + ["torchattacks"] * (self.attack == "torchattacks"))

    @property
    def gradients_per_image(self) -> int:
        """Gradient rows that the attack computes for one image."""
        return self.row.gradients(self)

    def skips(self, selection_draws: int) -> bool:
        """Whether images that are wrong anyway are found first and left alone."""
        if self.skip_misclassified is not None:
            return self.skip_misclassified
        passes = max(self.gradients_per_image, self.row.answers(self))
        return self.row.is_per_image and passes >= 10 * selection_draws

    def alpha(self, epsilon_255: float) -> float:
        """Step size on 0..255."""
        return self.alpha_ratio * epsilon_255 if self.alpha_255 is None else self.alpha_255

    def keywords(self, epsilon_255: float, restart: int, patch_size: int | None) -> dict[str, Any]:
        """Arguments of the attack's function, in [0, 1] units; `patch_size` is the model's, for recipes without one."""
        if self.attack == "torchattacks":
            arguments = torchattacks_arguments(self, epsilon_255)
            return {"attack_class": torchattacks_class(self), "arguments": arguments}
        values = {
            "norm": self.norm,
            "steps": self.steps,
            "alpha": self.alpha(epsilon_255) / 255,
            "queries": self.queries,
            "from_random_start": self.random_start or restart > 0,
            "patch_size": self.patch_size or patch_size,
        }
        return {KEYWORDS[key]: values[KEYWORDS[key]] for key in self.row.settings if key in KEYWORDS} | self.arguments

    def settings(self, epsilon_255: float) -> dict[str, Any]:
        """What a table's reader must know to repeat the attack."""
        settings: dict[str, Any] = {"implementation": self.implementation, "norm": self.norm}
        if self.attack == "torchattacks":
            return settings | {"class": self.torchattacks_class, "arguments": torchattacks_arguments(self, epsilon_255)}
        used = [key for key in SETTINGS if key in self.row.settings and key != "alpha_ratio"]
        settings |= {key: getattr(self, key) for key in used}
        if "alpha_255" in used:
            settings["alpha_255"] = self.alpha(epsilon_255)
        if "loss" in used:
            settings["loss"] = function_name(self.loss)
        return {key: value for key, value in settings.items() if value is not None and value != {}}


# What an attack may use, in the order in which tables name them.
SETTINGS = ("norm", "eot_samples", "steps", "restarts", "targeted", "alpha_255", "alpha_ratio", "random_start", "loss")
SETTINGS += ("queries", "patch_size", "source", "torchattacks_class", "arguments")

# How a setting that is not at its default stands in a label.
_LABELS = {"queries": "q{}", "source": "from {}", "eot_samples": "eot{}", "restarts": "r{}", "alpha_255": "a{:g}"}
_LABELS |= {"loss": "{}", "norm": "{}", "targeted": "targeted"}

# How a setting stands in the text of a card or a table, in this order; those of `_TOLD` at their defaults too.
_TEXTS = {"norm": "{}", "steps": "{} steps", "alpha_255": "alpha {:g}", "eot_samples": "EOT {}"}
_TEXTS |= {"restarts": "{} restarts", "queries": "{} queries", "loss": "loss {}", "targeted": "targeted"}
_TEXTS |= {"random_start": "no random start", "patch_size": "patches of {}", "source": "from {}", "arguments": "{}"}
_TOLD = ("steps", "alpha_255", "queries")


def attack_text(row: dict[str, Any]) -> str:
    """The attack of a row of a summary with the settings that set attacks apart: `"pgd (10 steps, alpha 2)"`."""
    defaults = {item.name: _default(item) for item in dataclasses.fields(AttackRecipe) if item.name != "attack"}
    texts = []
    for key, text in _TEXTS.items():
        value = row.get("settings", {}).get(key)
        if value is not None and (key in _TOLD or value != defaults[key]):
            value = ", ".join(f"{name}={item}" for name, item in value.items()) if key == "arguments" else value
            texts.append(text.format(value))
    return f"{row['attack']} ({', '.join(texts)})" if texts else row["attack"]


def _default(item: dataclasses.Field) -> Any:
    return item.default_factory() if item.default is dataclasses.MISSING else item.default


def _find_loss(loss: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> RowLoss:
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES and ":" not in loss:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}, or package.module:function")
    return LOSSES[loss] if loss in LOSSES else named_function(loss, "loss")


@dataclass
class EvaluatedModelRecipe:
    """A model to evaluate: `path` (purified, or any image classifier of transformers), or `purifier` and `classifier`.

    `sigma` of the defense: a number, a specification, or a list of them; None means the model's own.
    `without_purifier` evaluates the classifier inside a purified model alone; `smoothed` a classifier that sees its
    images with the noise of `sigma` and no purifier (`images: noisy` in fine-tuning).
    `classifier_image_size`, `_mean`, `_std` say what a classifier behind a purifier expects where its files do not.
    `trust_remote_code` runs the Python code beside the weights: only for a repository whose code was read.
    """

    name: str  # what tables call it
    path: str | None = None  # a purified model or any image classifier: directory or Hub id
    purifier: str | None = None  # instead of path: one of its two parts, or package.module:function
    classifier: str | None = None  # instead of path: the other part
    # of the defense: a number, a specification, or a list; null: the model's own
    sigma: float | str | list[float | str] | None = None
    # draws averaged for one answer; null: the model's own
    num_votes: Annotated[int, Bounds(least=1, most=MAX_VOTES)] | None = None
    without_purifier: bool = False  # the classifier inside a purified model alone
    smoothed: bool = False  # a classifier behind the noise of sigma alone, without a purifier
    # share of patches that a purifier trained with masks hides; 0: it sees all of the noisy image; null: its own
    mask_ratio: Annotated[float, Bounds(least=0, below=1)] | None = None
    classifier_image_size: Pixels | None = None  # what the classifier expects, where its files do not say
    # of the normalization that the classifier expects
    classifier_image_mean: list[Annotated[float, Bounds(least=-1000, most=1000)]] | None = None
    classifier_image_std: list[Annotated[float, Bounds(above=0)]] | None = None  # likewise
    # of what attacks differentiate; answers are always computed in float32
    gradient_precision: Literal["float32", "bf16"] = "float32"
    trust_remote_code: bool = False  # run the code beside the weights; read it first

    def __post_init__(self):
        check_fields(self, f"model {self.name!r}: ")
        if isinstance(self.sigma, list):
            check_list(self.sigma, f"model {self.name!r}: sigma")
        means, stds = self.classifier_image_mean, self.classifier_image_std
        if (means is None) != (stds is None) or any(len(values) != 3 for values in (means, stds) if values is not None):
            raise ValueError(
                f"model {self.name!r}: classifier_image_mean {means} and classifier_image_std {stds} go together, "
                f"three numbers each"
            )
        if self.classifier_settings() and self.classifier is None:
            given = next(iter(self.classifier_settings()))
            raise ValueError(f"model {self.name!r}: {given} is for 'purifier' and 'classifier' paths; leave it out")

    def classifier_settings(self) -> dict[str, Any]:
        """Those that are given, as `NIMPurifiedImageClassification.from_parts` takes them."""
        keys = ("classifier_image_size", "classifier_image_mean", "classifier_image_std")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    def sigmas(self) -> list[float | str | None]:
        """`sigma` as a list; ValueError where one of them is no sigma."""
        sigmas = self.sigma if isinstance(self.sigma, list) else [self.sigma]
        for sigma in sigmas:
            if sigma is not None:
                parse_sigma(sigma)
        return sigmas


@dataclass
class PicturesRecipe:
    """Images that `reports/figures.py` can show: the attack `attack` (a label) at `epsilon_255` on the first ones."""

    num_images: Count = 6  # the first images
    attack: str = "pgd-10"  # its label
    epsilon_255: Epsilon255 = 8.0  # on 0..255
    models: list[str] | None = None  # null: all
    sigmas: list[float | str] | None = None  # of defended models; null: all

    def __post_init__(self):
        check_fields(self, "pictures.")
        check_list(self.models, "pictures.models")
        check_list(self.sigmas, "pictures.sigmas")


@dataclass
class ReconstructionRecipe:
    """How well `purifiers` (name: path) undo noise of each sigma, on the first `num_images` images: PSNR, and the loss
    of pre-training (Figures 3 and 6) where the images have the purifier's size."""

    purifiers: dict[str, str]  # directories by name
    sigmas_255: list[Annotated[float, Bounds(least=0, most=MAX_SIGMA_255)]]  # the noise that is undone
    num_images: Count = 64  # the first images
    # side of the squares cut from the middle of the images and resized to it; null: as the purifier's processor does
    image_size: Pixels | None = None

    def __post_init__(self):
        check_fields(self, "reconstruction.")
        check_list(self.sigmas_255, "reconstruction.sigmas_255")
        check_list(list(self.purifiers), "reconstruction.purifiers")


@dataclass
class AttackRunRecipe:
    """The recipe of `scripts/run_attack.py`.

    `protocol` gives attacks, number of images, seeds and draws; `attacks` come on top, and `num_images`, `seeds`,
    `num_draws`, `epsilon_255` override what the protocol says (`epsilon_255`: its main budgets).
    `micro_batch` bounds memory: no forward pass has more rows (images x draws x votes).
    """

    output_dir: str  # where records and summary go; a run there is continued
    models: list[EvaluatedModelRecipe] = field(default_factory=list)
    data: DataRecipe = field(default_factory=DataRecipe)
    split: Literal["test", "validation", "train"] = "test"  # of the data that is attacked
    protocol: Literal["smoke", "paper", "neurips", "standard"] | None = None  # gives attacks, images, seeds and draws
    attacks: list[AttackRecipe] = field(default_factory=list)
    epsilon_255: list[Epsilon255] | None = None  # instead of the protocol's main budgets
    num_images: Count | None = None  # instead of the protocol's; null: all
    seeds: list[Seed] | None = None  # instead of the protocol's
    num_draws: Draws | None = None  # noise draws that score an image, instead of the protocol's
    batch_size: Count = 64  # images attacked at a time
    micro_batch: Count = 256  # most rows of one forward pass (images x draws x votes): memory
    pictures: PicturesRecipe | None = None
    reconstruction: ReconstructionRecipe | None = None

    def __post_init__(self):
        check_fields(self)
        check_list(self.seeds, "seeds")
        check_list(self.epsilon_255, "epsilon_255")
        if self.epsilon_255 is not None and self.protocol is None:
            raise ValueError(
                f"epsilon_255 {self.epsilon_255} replaces a protocol's budgets and none is named; set each attack's own"
            )
