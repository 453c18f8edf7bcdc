"""Attacks of torchattacks, wired to an oracle: the same model, the same noise rules, another implementation."""

import inspect
from typing import Any

import torch
from torch import nn

from .draws import ATTACK, EVALUATE, isolated_global_rng, stream_seed
from .oracle import Oracle


# What the settings of a recipe are called there.
THEIR_NAMES = {"alpha_255": "alpha", "alpha_ratio": "alpha", "steps": "steps", "queries": "n_queries"}
THEIR_NAMES |= {"eot_samples": "eot_iter"}
COUNTS = ("steps", "n_queries", "eot_iter", "n_restarts")


def torchattacks_class(recipe: Any) -> type:
    """The class that a recipe names; ValueError when torchattacks has none, or when it takes no such argument."""
    import torchattacks

    found = getattr(torchattacks, recipe.torchattacks_class, None)
    if not inspect.isclass(found):
        raise ValueError(
            f"torchattacks has no class {recipe.torchattacks_class!r}; known: {', '.join(torchattacks.__all__)}"
        )
    known = inspect.signature(found.__init__).parameters
    unknown = sorted(set(recipe.arguments) - set(known))
    if unknown:
        raise ValueError(f"torchattacks.{recipe.torchattacks_class} takes no argument {unknown[0]!r}")
    for name, value in recipe.arguments.items():
        least = 1 if name in COUNTS else 0
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(known[name].default, (int, float)) and not isinstance(known[name].default, bool):
            if not is_number or not least <= value < float("inf"):
                raise ValueError(
                    f"torchattacks.{recipe.torchattacks_class}: {name} must be a number from {least} up, got {value!r}"
                )
    for setting in recipe.changed_settings():
        if setting in THEIR_NAMES and THEIR_NAMES[setting] not in known:
            raise ValueError(
                f"torchattacks.{recipe.torchattacks_class} does not use {setting!r}: it has no {THEIR_NAMES[setting]!r}"
            )
    return found


def torchattacks_arguments(recipe: Any, epsilon_255: float) -> dict[str, Any]:
    """What the class is called with: the recipe's settings under torchattacks' names where it knows them, in [0, 1]
    units, and over them `arguments`."""
    ours = {"eps": epsilon_255 / 255, "alpha": recipe.alpha(epsilon_255) / 255, "steps": recipe.steps}
    ours |= {"n_queries": recipe.queries, "eot_iter": recipe.eot_samples}
    known = inspect.signature(torchattacks_class(recipe).__init__).parameters
    return {key: value for key, value in ours.items() if key in known} | recipe.arguments


def torchattacks_gradients(recipe: Any) -> int:
    """Gradient rows per image, as far as the arguments tell."""
    arguments = torchattacks_arguments(recipe, 0.0)
    return 0 if "n_queries" in arguments else arguments.get("steps", 1) * arguments.get("eot_iter", 1)


def torchattacks_answers(recipe: Any) -> int:
    """Forward rows per image of a class that asks for answers alone."""
    return torchattacks_arguments(recipe, 0.0).get("n_queries", 0)


def run_torchattacks(
    oracle: Oracle, images_01: torch.Tensor, epsilon: float, attack_class: type, arguments: dict[str, Any]
) -> torch.Tensor:
    """The class on the oracle's model; epsilon is among its `arguments`, whose names are torchattacks'."""
    model = TensorModel(oracle, images_01.device)
    with isolated_global_rng(stream_seed(oracle.seed, oracle.image_ids[0], ATTACK)):
        adversarial = attack_class(model, **arguments)(images_01, oracle.labels)
    oracle.queries += model.calls  # of the batch: the most that any of its images was asked
    return adversarial.detach()


class TensorModel(nn.Module):
    """A target as the libraries of others want it: [0, 1] images in, a tensor of logits out; fresh noise in each call.

    `calls` counts its passes, each of which is one query of every image in it.
    """

    def __init__(self, oracle: Oracle, device: torch.device):
        super().__init__()
        self.oracle = oracle
        self.calls = 0
        # torchattacks reads the device from the first parameter
        self.anchor = nn.Parameter(torch.zeros((), device=device), requires_grad=False)

    def forward(self, images_01: torch.Tensor) -> torch.Tensor:
        pieces = []
        for start in range(0, len(images_01), self.oracle.micro_batch):
            piece = images_01[start : start + self.oracle.micro_batch]
            rows = range(start, start + len(piece))
            # torchattacks passes subsets without saying which: draws are named by the batch, the call and the row
            name = (self.oracle.seed, self.oracle.image_ids[0], ATTACK, self.calls)
            seeds = [stream_seed(*name, row) for row in rows]
            if self.oracle.known_draw:
                ids = self.oracle.image_ids
                if len(images_01) != len(ids):
                    raise ValueError(
                        "torchattacks took a subset of the images: the known draw cannot be matched to them"
                    )
                seeds = [stream_seed(self.oracle.seed, ids[row], EVALUATE, 0) for row in rows]
            pieces.append(self.oracle.forward(piece, seeds))
        self.calls += 1
        return torch.cat(pieces)
