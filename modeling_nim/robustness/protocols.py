"""The four protocols, and what a recipe adds to one."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .recipes import AttackRecipe, AttackRunRecipe
from .torchattacks_peer import torchattacks_class


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

    - `smoke`: 64 images, PGD-10. It shows only that everything runs.
    - `paper`: what the paper reports: PGD-10 at 2/255 with its step of 2/255 (and with 0.5/255 beside it), white-box
      and gray-box on all images; Square at 16/255 with 1,000 queries on 1,024 images.
    - `neurips`: the other version of the paper: sigma 70 and 140, 4/255, FGSM, PGD-10, AutoAttack.
    - `standard`: the attacks that a randomized defense must withstand: 512 images, PGD-100 with EOT-20 and 2 restarts,
      AutoAttack's `rand`, transfer from the classifier, from its features and from `sources`, averaged Square, the
      patch-mean attack, the known draw, 3 seeds, 10 draws; on a quarter of the images sweeps over steps and EOT
      samples, and 128/255, where no accuracy may be left.

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


def default_sigmas(recipe: AttackRunRecipe) -> list[float | str] | None:
    """The sigmas of defended models whose recipe gives none; the only thing of a protocol that its models need."""
    return None if recipe.protocol is None else protocol(recipe.protocol).sigmas


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
    _check_labels(attacks)
    return Protocol(
        attacks,
        base.num_images if recipe.num_images is None else recipe.num_images,
        base.seeds if recipe.seeds is None else recipe.seeds,
        base.num_draws if recipe.num_draws is None else recipe.num_draws,
        base.sigmas,
    )


def _check_labels(attacks: Sequence[AttackRecipe]) -> None:
    """ValueError when two attacks would stand under one name in one row of a table."""
    places = Counter(
        (attack.label, threat, epsilon, sigma, model)
        for attack in attacks
        for threat, epsilon in dict.fromkeys(itertools.product(attack.threat_models, attack.epsilon_255))
        for sigma, model in dict.fromkeys(itertools.product(attack.sigmas or [None], attack.models or [None]))
    )
    for (label, threat, epsilon, _, _), number in places.items():
        if number > 1:
            raise ValueError(
                f"two attacks are called {label!r} ({threat}, epsilon {epsilon:g}/255); give one of them a 'name'"
            )
