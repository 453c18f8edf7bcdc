"""Jobs: one model under one attack with one budget, threat model and seed each, in the order of their records."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..noise_nim import parse_sigma
from .protocols import Protocol
from .recipes import AttackRecipe
from .targets import Target


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
        """What rows call the attack."""
        return "none" if self.attack is None else self.attack.label

    @property
    def kind(self) -> str:
        """The row of `attacks.ATTACKS`, or the name of a function of one's own."""
        return "none" if self.attack is None else self.attack.kind


def plan_jobs(plan: Protocol, targets: Sequence[Target], num_images: int) -> list[Job]:
    """All jobs in the order of their records: model by model, the control first.

    A model without a defense has no noise that an attacker could know: it is attacked in the white-box and black-box
    settings and by transfer, without EOT and known draws.
    """
    for attack in plan.attacks:
        _check_names(attack, targets)
    total = min(num_images, plan.num_images or num_images)
    jobs: list[Job] = []
    for index, target in enumerate(targets):
        attacked = _jobs_of(index, target, plan, total)
        # the control covers every image that is attacked, with every seed
        seeds = sorted({*plan.seeds, *(job.seed for job in attacked)})
        images = max((job.num_images for job in attacked), default=total)
        jobs += [Job(index, None, "clean", 0.0, seed, images) for seed in seeds] + attacked
    return jobs


def _jobs_of(index: int, target: Target, plan: Protocol, total: int) -> list[Job]:
    """The attacks on one target, without its control."""
    planned = set()  # on a model without randomness, many settings give the same attack
    jobs: list[Job] = []
    for attack in plan.attacks:
        if not _meets(attack, target):
            continue
        used = attack if target.is_random else dataclasses.replace(attack, eot_samples=1, name=attack.label)
        images = min(total, attack.num_images or total)
        seeds = plan.seeds if attack.seeds is None else attack.seeds
        for threat in attack.threat_models:
            if target.sigma is None and threat == "white_box_known_draw":
                continue
            if target.sigma is None and threat == "gray_box" and attack.source is None:
                continue
            for epsilon in attack.epsilon_255:
                same = (attack.kind, str(used.settings(epsilon)), threat, epsilon, attack.num_images, str(attack.seeds))
                if same in planned and not target.is_random:
                    continue
                planned.add(same)
                jobs += [Job(index, used, threat, epsilon, seed, images) for seed in seeds]
    return jobs


def _meets(attack: AttackRecipe, target: Target) -> bool:
    """Whether the attack is made on the target at all."""
    if attack.models is not None and target.name not in attack.models:
        return False
    if target.sigma is None:
        return attack.source != target.name and not attack.row.needs_purifier
    return attack.source != target.name and (attack.sigmas is None or is_among(target.sigma, attack.sigmas))


def _check_names(attack: AttackRecipe, targets: Sequence[Target]) -> None:
    names = {target.name for target in targets}
    for missing in sorted({*(attack.models or []), *([attack.source] if attack.source else [])} - names):
        raise ValueError(f"attack {attack.label!r} names model {missing!r}; the recipe has {sorted(names)}")
    defenses = {target.sigma for target in targets if target.sigma is not None}
    for sigma in attack.sigmas or []:
        if defenses and not any(is_among(own, [sigma]) for own in defenses):
            raise ValueError(f"attack {attack.label!r} names sigma {sigma!r}; the models have {sorted(defenses)}")


def is_among(sigma: str, sigmas: list[float | str]) -> bool:
    """Whether a target's sigma is one of those a recipe lists; a defense by masks has none, and always is."""
    if sigma == "mask":
        return True
    return any(parse_sigma(sigma) == parse_sigma(other) for other in sigmas)
