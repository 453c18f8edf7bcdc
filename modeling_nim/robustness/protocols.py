"""What is evaluated: the attack recipe, the four protocols, and the jobs they expand to."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from modeling_nim.data import DataRecipe
from modeling_nim.noise_nim import parse_sigma

from .targets import Target


ThreatModel = Literal["white_box", "white_box_known_draw", "gray_box", "black_box"]
AttackKind = Literal[
    "fgsm",
    "pgd",
    "patch_mean",
    "apgd_ce",
    "apgd_dlr",
    "autoattack_rand",
    "features",
    "transfer",
    "square",
    "torchattacks",
]

# The threat models in which an attack makes sense, the usual one first.
ALLOWED_THREATS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("fgsm", "pgd", "patch_mean", "apgd_ce", "apgd_dlr", "autoattack_rand"),
        ("white_box", "white_box_known_draw", "gray_box"),
    ),
    # what its classes ask for is theirs: name black_box for those that need answers alone
    "torchattacks": ("white_box", "white_box_known_draw", "gray_box", "black_box"),
    "features": ("gray_box",),  # from the features of the classifier's own encoder
    "transfer": ("gray_box",),  # from another model, `source`
    "square": ("black_box",),
}


@dataclass
class AttackRecipe:
    """One attack; lists multiply.

    - `attack`: `fgsm`; `pgd`; `patch_mean` (PGD whose steps are constant over each patch); `apgd_ce`, `apgd_dlr`;
      `autoattack_rand` (both, the worse of the two per image); `features` (moves the classifier's encoder features away);
      `transfer` (PGD on the model named `source`); `square`; `torchattacks` (`torchattacks_class` with `arguments`).
    - `threat_models`: `white_box` (exact gradients through the defence, not the draw), `white_box_known_draw` (the scored
      draw as well), `gray_box` (the classifier, unaware of the defence), `black_box` (answers only).
    - `epsilon_255`: of the norm, on 0..255. `alpha_255` is the step; None means `alpha_ratio` times epsilon.
    - `eot_samples`: draws averaged in each step. `queries`: Square's budget of answers per image.
    - `models`, `sigmas`: restrict the attack to these models (by name) and these sigmas of the defended ones.
    - `num_images`, `seeds`: fewer than the run's.
    - `skip_misclassified`: images that are wrong without an attack on every selection draw are not attacked; None: where
      that saves more than finding them costs.
    """

    attack: AttackKind
    name: str | None = None
    threat_models: list[ThreatModel] = field(default_factory=list)
    epsilon_255: list[float] = field(default_factory=lambda: [2.0])
    norm: Literal["linf", "l2"] = "linf"
    steps: int = 10
    alpha_255: float | None = None
    alpha_ratio: float = 0.25
    eot_samples: int = 1
    restarts: int = 1
    random_start: bool = True
    targeted: bool = False
    loss: Literal["ce", "dlr", "margin"] = "ce"
    queries: int = 1000
    patch_size: int | None = None
    source: str | None = None
    torchattacks_class: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    models: list[str] | None = None
    sigmas: list[float | str] | None = None
    num_images: int | None = None
    seeds: list[int] | None = None
    skip_misclassified: bool | None = None

    def __post_init__(self):
        allowed = ALLOWED_THREATS[self.attack]
        self.threat_models = self.threat_models or [allowed[0]]
        wrong = [threat for threat in self.threat_models if threat not in allowed]
        if wrong:
            raise ValueError(
                f"attack {self.attack!r} is not defined for threat model {wrong[0]!r}; use one of {allowed}"
            )
        for key in ("steps", "eot_samples", "restarts", "queries"):
            if getattr(self, key) < 1:
                raise ValueError(f"attack {self.attack!r}: {key} must be at least 1, got {getattr(self, key)}")
        if min(self.epsilon_255, default=0) < 0 or not self.epsilon_255:
            raise ValueError(
                f"attack {self.attack!r}: epsilon_255 must be a list of numbers >= 0, got {self.epsilon_255}"
            )
        if self.attack == "square" and self.norm != "linf":
            raise ValueError("attack 'square' is implemented for norm: linf")
        if self.attack == "square" and self.queries < 2 * self.eot_samples:
            raise ValueError(f"square: {self.queries} queries allow no proposal with eot_samples {self.eot_samples}")
        if self.attack.startswith(("apgd", "autoattack")) and self.steps < 2:
            raise ValueError(
                f"attack {self.attack!r}: its first step is a random start, so steps must be at least 2, got 1"
            )
        if (self.attack == "transfer") != (self.source is not None):
            raise ValueError(
                "'source' names the model that attack 'transfer' is made on; it belongs to no other attack"
            )
        if (self.attack == "torchattacks") != (self.torchattacks_class is not None):
            raise ValueError("'torchattacks_class' belongs to attack 'torchattacks' and to no other")
        if self.targeted and self.attack in ("square", "features", "autoattack_rand", "apgd_dlr", "torchattacks"):
            raise ValueError(f"attack {self.attack!r} has no targeted form here; use pgd, fgsm, patch_mean or apgd_ce")

    @property
    def kind(self) -> str:
        """What tables call the attack: torchattacks' classes under their own names, in lower case."""
        return self.torchattacks_class.lower() if self.attack == "torchattacks" else self.attack

    @property
    def implementation(self) -> str:
        return "torchattacks" if self.attack == "torchattacks" else "nim"

    @property
    def uses_steps(self) -> bool:
        return self.attack not in ("fgsm", "square", "torchattacks")

    @property
    def uses_dlr(self) -> bool:
        return self.attack in ("apgd_dlr", "autoattack_rand") or self.loss == "dlr"

    @property
    def label(self) -> str:
        """`name`, or one made of the settings that set attacks apart."""
        if self.name is not None:
            return self.name
        parts = [self.kind + (f"-{self.steps}" if self.uses_steps else "")]
        if self.attack == "square":
            parts.append(f"q{self.queries}")
        if self.attack == "transfer":
            parts.append(f"from {self.source}")
        if self.eot_samples > 1:
            parts.append(f"eot{self.eot_samples}")
        if self.restarts > 1:
            parts.append(f"r{self.restarts}")
        if self.alpha_255 is not None:
            parts.append(f"a{self.alpha_255:g}")
        if self.loss != "ce":
            parts.append(self.loss)
        if self.norm == "l2":
            parts.append("l2")
        if self.targeted:
            parts.append("targeted")
        if self.attack == "torchattacks":
            parts.append("torchattacks")
        return " ".join(parts)

    @property
    def gradients_per_image(self) -> int:
        """Gradient rows that the attack computes for one image."""
        if self.attack in ("square", "torchattacks"):
            return 0
        passes = (
            1 if self.attack == "fgsm" else self.steps * self.restarts * (2 if self.attack == "autoattack_rand" else 1)
        )
        return passes * self.eot_samples

    def skips(self, selection_draws: int) -> bool:
        if self.skip_misclassified is not None:
            return self.skip_misclassified
        return max(self.gradients_per_image, self.queries * (self.attack == "square")) >= 10 * selection_draws

    def alpha(self, epsilon_255: float) -> float:
        """Step size on 0..255."""
        if self.attack == "fgsm":
            return epsilon_255
        return self.alpha_ratio * epsilon_255 if self.alpha_255 is None else self.alpha_255

    def settings(self, epsilon_255: float) -> dict[str, Any]:
        """What a table's reader must know to repeat the attack."""
        settings: dict[str, Any] = {"implementation": self.implementation, "norm": self.norm}
        if self.attack == "torchattacks":
            return settings | {"class": self.torchattacks_class, "arguments": torchattacks_arguments(self, epsilon_255)}
        settings |= {"eot_samples": self.eot_samples}
        if self.uses_steps:
            settings |= {"steps": self.steps, "restarts": self.restarts, "targeted": self.targeted}
        if self.attack in ("pgd", "patch_mean", "features", "transfer"):
            settings |= {"alpha_255": self.alpha(epsilon_255), "random_start": self.random_start, "loss": self.loss}
        if self.attack == "square":
            settings |= {"queries": self.queries}
        if self.patch_size is not None:
            settings |= {"patch_size": self.patch_size}
        return settings | ({"source": self.source} if self.source else {})


def torchattacks_class(recipe: AttackRecipe) -> type:
    """The class that the recipe names; ValueError when torchattacks has none, or when it takes no such arguments."""
    import torchattacks

    found = getattr(torchattacks, recipe.torchattacks_class, None)
    if not inspect.isclass(found):
        raise ValueError(
            f"torchattacks has no class {recipe.torchattacks_class!r}; known: {', '.join(torchattacks.__all__)}"
        )
    unknown = sorted(set(recipe.arguments) - set(inspect.signature(found.__init__).parameters))
    if unknown:
        raise ValueError(f"torchattacks.{recipe.torchattacks_class} takes no argument {unknown[0]!r}")
    return found


def torchattacks_arguments(recipe: AttackRecipe, epsilon_255: float) -> dict[str, Any]:
    """What the class is called with: the recipe's settings under torchattacks' names where it knows them, in [0, 1] units,
    and over them `arguments`."""
    ours = {"eps": epsilon_255 / 255, "alpha": recipe.alpha(epsilon_255) / 255, "steps": recipe.steps}
    ours |= {"n_queries": recipe.queries, "eot_iter": recipe.eot_samples}
    known = inspect.signature(torchattacks_class(recipe).__init__).parameters
    return {key: value for key, value in ours.items() if key in known} | recipe.arguments


@dataclass
class ModelRecipe:
    """A model to evaluate: `path` (purified or any transformers image classifier), or `purifier` and `classifier` paths.

    `sigma` of the defence: a number, a specification, or a list of them; None means the model's own.
    `without_purifier` evaluates the classifier inside a purified model alone.
    """

    name: str
    path: str | None = None
    purifier: str | None = None
    classifier: str | None = None
    sigma: float | str | list[float | str] | None = None
    num_votes: int | None = None
    without_purifier: bool = False

    def sigmas(self) -> list[float | str | None]:
        sigmas = self.sigma if isinstance(self.sigma, list) else [self.sigma]
        for sigma in sigmas:
            if sigma is not None:
                parse_sigma(sigma)
        return sigmas


@dataclass
class PicturesRecipe:
    """Which images `reports/figures.py` can show: the attack `attack` (a label) at `epsilon_255` on the first images."""

    num_images: int = 6
    attack: str = "pgd-10"
    epsilon_255: float = 8.0
    models: list[str] | None = None
    sigmas: list[float | str] | None = None


@dataclass
class ReconstructionRecipe:
    """The pre-training loss of `purifiers` (name: path) against sigma (Figures 3 and 6), on the first `num_images` images."""

    purifiers: dict[str, str]
    sigmas_255: list[float]
    num_images: int = 64


@dataclass
class AttackRunRecipe:
    """The recipe of `scripts/run_attack.py`.

    `protocol` gives attacks, number of images, seeds and draws; `attacks` come on top, and `num_images`, `seeds`,
    `num_draws`, `epsilon_255` override what the protocol says (`epsilon_255`: its main budgets).
    `micro_batch` bounds memory: no forward pass has more rows (images x draws x votes).
    """

    output_dir: str
    models: list[ModelRecipe] = field(default_factory=list)
    data: DataRecipe = field(default_factory=DataRecipe)
    split: Literal["test", "validation", "train"] = "test"
    protocol: Literal["smoke", "paper", "neurips", "standard"] | None = None
    attacks: list[AttackRecipe] = field(default_factory=list)
    epsilon_255: list[float] | None = None
    num_images: int | None = None
    seeds: list[int] | None = None
    num_draws: int | None = None
    batch_size: int = 64
    micro_batch: int = 256
    pictures: PicturesRecipe | None = None
    reconstruction: ReconstructionRecipe | None = None

    def __post_init__(self):
        for key in ("num_images", "num_draws", "batch_size", "micro_batch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        if self.seeds == []:
            raise ValueError("seeds is an empty list; name at least one, such as [0]")


@dataclass
class Protocol:
    """Attacks with the numbers that belong to them."""

    attacks: list[AttackRecipe]
    num_images: int | None
    seeds: list[int]
    num_draws: int
    sigmas: list[float | str] | None = None  # of defended models whose recipe gives none


def protocol(
    name: str, epsilon_255: list[float] | None = None, sources: Sequence[str] = (), num_images: int | None = None
) -> Protocol:
    """A protocol by name.

    - `smoke`: 64 images, PGD-10. Says that everything runs, and nothing else.
    - `paper`: what the paper reports: PGD-10 at 2/255 with its step of 2/255 (and with 0.5/255 beside it), white-box and
      gray-box on all images; Square at 16/255 with 1,000 queries on 1,024 images.
    - `neurips`: the other version of the paper: sigma 70 and 140, 4/255, FGSM, PGD-10, AutoAttack.
    - `standard`: what a randomised defence has to stand today: 512 images, PGD-100 with EOT-20 and 2 restarts, AutoAttack's
      `rand`, transfer from the classifier, from its features and from `sources`, averaged Square, the patch-mean attack,
      the known draw, 3 seeds, 10 draws; on a quarter of the images sweeps over steps and EOT samples, and 128/255, where
      nothing may survive.

    `epsilon_255` replaces the main budgets (2/255; `neurips` 4/255; `standard` 2 and 4/255), `num_images` the images.
    """
    if name == "smoke":
        return Protocol([AttackRecipe("pgd", epsilon_255=epsilon_255 or [2.0])], 64, [0], 10)
    if name == "paper":
        main = epsilon_255 or [2.0]
        both = ["white_box", "gray_box"]
        # the paper's step equals its epsilon; other budgets keep both ratios
        full = [AttackRecipe("pgd", threat_models=both, epsilon_255=[e], alpha_255=e) for e in main]
        attacks = [*full, AttackRecipe("pgd", threat_models=both, epsilon_255=main)]
        attacks.append(AttackRecipe("square", epsilon_255=[16.0], num_images=1024))
        return Protocol(attacks, None, [0], 10)
    if name == "neurips":
        main = epsilon_255 or [4.0]
        attacks = [
            AttackRecipe("fgsm", epsilon_255=main),
            AttackRecipe("pgd", epsilon_255=main),
            AttackRecipe("autoattack_rand", epsilon_255=main, steps=100, eot_samples=20),
        ]
        return Protocol(attacks, 512, [0], 10, sigmas=[70.0, 140.0])
    if name == "standard":
        main = epsilon_255 or [2.0, 4.0]
        strong = {"steps": 100, "eot_samples": 20}
        total = num_images or 512
        sweep = {"epsilon_255": main[-1:], "seeds": [0], "num_images": max(1, total // 4)}
        attacks = [
            AttackRecipe("pgd", epsilon_255=main, restarts=2, **strong),
            AttackRecipe("autoattack_rand", epsilon_255=main, **strong),
            AttackRecipe("patch_mean", epsilon_255=main, **strong),
            AttackRecipe("pgd", threat_models=["white_box_known_draw"], epsilon_255=main, steps=100),
            AttackRecipe("pgd", threat_models=["gray_box"], epsilon_255=main, steps=100, restarts=2),
            AttackRecipe("features", epsilon_255=main, steps=100),
            *(AttackRecipe("transfer", epsilon_255=main, steps=100, source=source) for source in sources),
            AttackRecipe("square", epsilon_255=main, queries=5000, eot_samples=5),
            *(AttackRecipe("pgd", steps=steps, eot_samples=20, **sweep) for steps in (10, 20, 50, 100)),
            *(AttackRecipe("pgd", steps=20, eot_samples=eot, **sweep) for eot in (1, 5, 40)),
            AttackRecipe("pgd", steps=20, eot_samples=20, **(sweep | {"epsilon_255": [128.0]})),
        ]
        return Protocol(attacks, total, [0, 1, 2], 10)
    raise ValueError(f"unknown protocol {name!r}; known: smoke, paper, neurips, standard")


@dataclass(frozen=True)
class Job:
    """One model under one attack with one budget, threat model and seed; its images are the first `num_images`."""

    target: int  # index into the targets
    attack: AttackRecipe | None  # None: the control without an attack
    threat_model: str
    epsilon_255: float
    seed: int
    num_images: int

    @property
    def label(self) -> str:
        return "none" if self.attack is None else self.attack.label


def resolve(recipe: AttackRunRecipe, undefended: Sequence[str] = ()) -> Protocol:
    """The protocol and the recipe's own attacks, with the recipe's overrides; transfer is made on the `undefended`."""
    base = Protocol([], None, [0], 10)
    if (recipe.protocol is not None or recipe.attacks) and not recipe.models:
        raise ValueError("the recipe names attacks and no models; add a 'models' list")
    if recipe.protocol is not None:
        base = protocol(recipe.protocol, recipe.epsilon_255, undefended, recipe.num_images)
    elif not recipe.attacks and recipe.reconstruction is None:
        raise ValueError("the recipe names neither a protocol nor attacks; add e.g. protocol: smoke")
    attacks = [*base.attacks, *recipe.attacks]
    for attack in attacks:
        if attack.attack == "torchattacks":
            torchattacks_class(attack)
    seen: dict[tuple, AttackRecipe] = {}
    for attack in attacks:
        for threat in attack.threat_models:
            for epsilon in attack.epsilon_255:
                for sigma in attack.sigmas or [None]:
                    for model in attack.models or [None]:
                        key = (attack.label, threat, epsilon, sigma, model)
                        if key in seen and seen[key] is not attack:
                            raise ValueError(
                                f"two attacks are called {attack.label!r} ({threat}, epsilon {epsilon:g}/255); give one of "
                                "them a 'name'"
                            )
                        seen[key] = attack
    return Protocol(
        attacks,
        base.num_images if recipe.num_images is None else recipe.num_images,
        base.seeds if recipe.seeds is None else recipe.seeds,
        base.num_draws if recipe.num_draws is None else recipe.num_draws,
        base.sigmas,
    )


def plan_jobs(plan: Protocol, targets: list[Target], num_images: int) -> list[Job]:
    """All jobs in the order of their records: model by model, the control first.

    A model without a defence has no draw to be unaware of: it is attacked in the white-box and black-box settings, and
    by transfer. EOT and known draws mean nothing to it either.
    """
    names = {target.name for target in targets}
    total = min(num_images, plan.num_images or num_images)
    jobs: list[Job] = []
    for index, target in enumerate(targets):
        planned = set()  # of a model without randomness, on which many settings come to the same
        attacked: list[Job] = []
        for attack in plan.attacks:
            for missing in {*(attack.models or []), *([attack.source] if attack.source else [])} - names:
                raise ValueError(f"attack {attack.label!r} names model {missing!r}; the recipe has {sorted(names)}")
            defences = {str(target.sigma) for target in targets if target.sigma is not None}
            for sigma in attack.sigmas or []:
                if defences and not any(is_among(own, [sigma]) for own in defences):
                    raise ValueError(
                        f"attack {attack.label!r} names sigma {sigma!r}; the models have {sorted(defences)}"
                    )
            if attack.models is not None and target.name not in attack.models:
                continue
            if attack.sigmas is not None and target.sigma is not None and not is_among(target.sigma, attack.sigmas):
                continue
            if attack.source == target.name or (attack.attack == "patch_mean" and target.sigma is None):
                continue
            defended = target.sigma is not None
            for threat in attack.threat_models:
                if not defended and (threat == "white_box_known_draw" or (threat == "gray_box" and not attack.source)):
                    continue
                used = attack if target.is_random else dataclasses.replace(attack, eot_samples=1, name=attack.label)
                for epsilon in attack.epsilon_255:
                    same = (
                        attack.kind,
                        str(used.settings(epsilon)),
                        threat,
                        epsilon,
                        attack.num_images,
                        str(attack.seeds),
                    )
                    if same in planned and not target.is_random:
                        continue
                    planned.add(same)
                    for seed in plan.seeds if attack.seeds is None else attack.seeds:
                        images = min(total, attack.num_images or total)
                        attacked.append(Job(index, used, threat, epsilon, seed, images))
        # the control answers for every image that is attacked, with every seed
        seeds = sorted({*plan.seeds, *(job.seed for job in attacked)})
        images = max((job.num_images for job in attacked), default=total)
        jobs += [Job(index, None, "clean", 0.0, seed, images) for seed in seeds] + attacked
    return jobs


def is_among(sigma: str, sigmas: list[float | str]) -> bool:
    """Whether a target's sigma is one of those a recipe lists; masking has none and always is."""
    if sigma == "mask":
        return True
    return any(parse_sigma(sigma) == parse_sigma(other) for other in sigmas)
