"""One batch of one job: attack it, score it on fresh noise, write it down."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..runs.machine import synchronize
from . import attacks
from .attacks import LOSSES, Oracle, choose_worst, decide, target_forward
from .draws import ATTACK, EVALUATE, SELECT, isolated_global_rng, stream_seed
from .protocols import Job, torchattacks_arguments, torchattacks_class
from .targets import Target


@dataclass
class Attacked:
    """Adversarial images `(B, 3, H, W)` in [0, 1], and per image what they cost."""

    adversarial_01: torch.Tensor
    queries: list[int]
    zero_gradients: list[int]
    skipped: list[bool]


def attack_images(
    job: Job,
    targets: Sequence[Target],
    images_01: torch.Tensor,
    labels: torch.Tensor,
    image_ids: Sequence[str],
    num_draws: int,
    micro_batch: int,
) -> Attacked:
    """Runs the job's attack on a batch; images that are wrong without it are left alone where the attack says so."""
    target, recipe = targets[job.target], job.attack
    batch = len(images_01)
    if recipe is None:
        return Attacked(images_01, [0] * batch, [0] * batch, [False] * batch)
    known_draw = job.threat_model == "white_box_known_draw"
    kept = list(range(batch))
    selection_draws = num_draws if target.is_random and not known_draw else 1
    if recipe.skips(selection_draws):
        purpose = EVALUATE if known_draw else SELECT  # who knows the draw need not guess whether it is right
        rows = _rows(micro_batch, target)
        logits = decide(target_forward(target), images_01, image_ids, job.seed, purpose, selection_draws, rows)
        ever_right = (logits.argmax(dim=-1) == labels[:, None]).any(dim=1)
        kept = ever_right.nonzero().flatten().tolist()
    result = Attacked(images_01.clone(), [0] * batch, [0] * batch, [image not in set(kept) for image in range(batch)])
    if kept:
        ids = [image_ids[image] for image in kept]
        adversarial, oracle = _attack(job, targets, images_01[kept], labels[kept], ids, selection_draws, micro_batch)
        result.adversarial_01[kept] = adversarial.detach()
        for position, image in enumerate(kept):
            result.queries[image] = int(oracle.queries[position])
            result.zero_gradients[image] = int(oracle.zero_gradients[position])
    return result


def _rows(micro_batch: int, target: Target) -> int:
    return max(1, micro_batch // target.rows_per_decision)


def _attack(job, targets, images_01, labels, image_ids, selection_draws, micro_batch) -> tuple[torch.Tensor, Oracle]:
    target, recipe = targets[job.target], job.attack
    epsilon, alpha = job.epsilon_255 / 255, recipe.alpha(job.epsilon_255) / 255
    forward, view = target_forward(target), target
    if recipe.attack == "transfer":
        view = next(other for other in targets if other.name == recipe.source)
        forward = target_forward(view)
    elif job.threat_model == "gray_box":
        forward = _without_draws(target.classifier_logits)
    sees_randomness = view.is_random and (job.threat_model != "gray_box" or recipe.attack == "transfer")
    known_draw = job.threat_model == "white_box_known_draw"

    def oracle_for(row_loss: str) -> Oracle:
        return Oracle(
            forward,
            labels,
            image_ids,
            job.seed,
            eot_samples=recipe.eot_samples if sees_randomness and not known_draw else 1,
            known_draw=known_draw,
            micro_batch=_rows(micro_batch, view),
            row_loss=LOSSES[row_loss],
            targeted=recipe.targeted,
        )

    if recipe.attack == "torchattacks":
        oracle = oracle_for("ce")
        return _torchattacks(job, oracle, images_01, labels), oracle
    if recipe.attack == "square":
        oracle = oracle_for("margin")
        stop = not target.is_random
        return attacks.square(oracle, images_01, epsilon, recipe.queries, stop_when_wrong=stop), oracle
    if recipe.attack == "features":
        oracle = oracle_for("ce")
        oracle.forward = _without_draws(target.features)
        with torch.no_grad():
            clean = torch.cat([target.features(piece) for piece in images_01.split(oracle.micro_batch)])
        oracle.labels = torch.arange(len(labels), device=labels.device)
        oracle.row_loss = lambda features, rows: (features - clean[rows]).square().mean(dim=1)
    else:
        oracle = oracle_for(
            {"apgd_ce": "ce", "apgd_dlr": "dlr", "autoattack_rand": "ce"}.get(recipe.attack, recipe.loss)
        )
    if recipe.targeted:
        # the likeliest wrong class, as the attacker sees it
        logits = decide(forward, images_01, image_ids, job.seed, SELECT, selection_draws, oracle.micro_batch)
        logits = logits.mean(dim=1)  # (B, num_classes)
        oracle.labels = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)

    candidates = []
    losses = ("ce", "dlr") if recipe.attack == "autoattack_rand" else (None,)
    for part, loss in enumerate(losses):
        if loss is not None:
            oracle.row_loss = LOSSES[loss]
        for restart in range(recipe.restarts):
            oracle.begin(part * recipe.restarts + restart)
            if recipe.attack == "fgsm":
                candidates.append(attacks.fgsm(oracle, images_01, epsilon))
            elif recipe.attack in ("apgd_ce", "apgd_dlr", "autoattack_rand"):
                candidates.append(attacks.apgd(oracle, images_01, epsilon, recipe.steps, recipe.norm))
            else:
                patch_size = None
                if recipe.attack == "patch_mean":
                    patch_size = recipe.patch_size or target.patch_size
                    if patch_size is None:
                        raise ValueError(f"attack 'patch_mean': {target.name} has no patch size; set patch_size")
                from_random_start = recipe.random_start or restart > 0 or recipe.attack == "features"
                candidates.append(
                    attacks.pgd(
                        oracle, images_01, epsilon, alpha, recipe.steps, recipe.norm, from_random_start, patch_size
                    )
                )
    # a gray-box attacker chooses by what it sees, too
    judge = _without_draws(target.classifier_logits) if recipe.attack == "features" else forward
    draws = selection_draws if sees_randomness else 1
    return choose_worst(oracle, judge, candidates, labels, draws), oracle


def _without_draws(function):
    return lambda images_01, seeds: function(images_01)


class _TensorModel(nn.Module):
    """A target as torchattacks wants it: [0, 1] images in, a tensor of logits out; fresh noise in each call."""

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


def _torchattacks(job: Job, oracle: Oracle, images_01: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    attack_class = torchattacks_class(job.attack)
    arguments = torchattacks_arguments(job.attack, job.epsilon_255)
    model = _TensorModel(oracle, images_01.device)
    with isolated_global_rng(stream_seed(oracle.seed, oracle.image_ids[0], ATTACK)):
        adversarial = attack_class(model, **arguments)(images_01, labels)
    oracle.queries += model.calls  # of the batch: the most that any of its images was asked
    return adversarial.detach()


# ----------------------------------------------------------------------------------------------------------------------


def score_batch(
    job: Job,
    targets: Sequence[Target],
    attacked: Attacked,
    images_01: torch.Tensor,
    labels: torch.Tensor,
    image_ids: Sequence[str],
    clean_predictions: dict[str, list[int]],
    num_draws: int,
    micro_batch: int,
) -> list[dict[str, Any]]:
    """One record per image: predictions on the evaluation draws, and the perturbation measured on what was scored.

    `clean_predictions` are those of the control with the same seed, on the same draws; images that are not among them are
    put to the model once more (with more processes than batches, the control may be under way elsewhere).
    """
    target = targets[job.target]
    draws = num_draws if target.is_random and job.threat_model != "white_box_known_draw" else 1
    adversarial_01 = attacked.adversarial_01
    forward = target_forward(target)
    logits = decide(forward, adversarial_01, image_ids, job.seed, EVALUATE, draws, _rows(micro_batch, target))
    predictions = logits.argmax(dim=-1)  # (B, draws)
    if job.attack is not None and not set(image_ids) <= set(clean_predictions):
        clean = decide(forward, images_01, image_ids, job.seed, EVALUATE, draws, _rows(micro_batch, target))
        clean_predictions = dict(zip(image_ids, clean.argmax(dim=-1).tolist(), strict=True))
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(draws), reduction="none").view(-1, draws)
    perturbation = (adversarial_01.double() - images_01.double()).flatten(1) * 255
    records = []
    for index, image_id in enumerate(image_ids):
        own = predictions[index].tolist()
        records.append(
            {
                "model": target.name,
                "sigma": target.sigma,
                "attack": job.label,
                "threat_model": job.threat_model,
                "epsilon_255": job.epsilon_255,
                "seed": job.seed,
                "image_id": image_id,
                "label": int(labels[index]),
                "clean_predictions": own if job.attack is None else clean_predictions[image_id][:draws],
                "predictions": own,
                "linf_255": float(perturbation[index].abs().max()),
                "l2_255": float(perturbation[index].norm()),
                "pixel_min": float(adversarial_01[index].min()),
                "pixel_max": float(adversarial_01[index].max()),
                "loss": float(losses[index].mean()),
                "queries": attacked.queries[index],
                "zero_gradients": attacked.zero_gradients[index],
                "skipped": attacked.skipped[index],
            }
        )
    return records


# ----------------------------------------------------------------------------------------------------------------------
# Cost


def measure_speed(target: Target, images_01: torch.Tensor, micro_batch: int) -> dict[str, float]:
    """Seconds per row of a forward pass, a gradient, and a gradient of the classifier alone, on this machine."""
    rows = min(_rows(micro_batch, target), 64)
    images = images_01[torch.arange(rows) % len(images_01)]
    labels = torch.zeros(rows, dtype=torch.long, device=images.device)
    ids = [f"speed/{row}" for row in range(rows)]
    speed = {}
    for name, forward in (("full", target_forward(target)), ("classifier", _without_draws(target.classifier_logits))):
        oracle = Oracle(forward, labels, ids, seed=0, micro_batch=rows)
        for kind, question in (("forward", oracle.loss), ("gradient", oracle.gradient)):
            question(images)  # the first call warms up
            synchronize(images.device)
            start = time.perf_counter()
            question(images)
            synchronize(images.device)
            speed[f"{name}_{kind}"] = (time.perf_counter() - start) / rows
    return speed


def seconds_per_image(
    job: Job, targets: Sequence[Target], speeds: dict[str, dict[str, float]], num_draws: int
) -> float:
    """Expected seconds that the job spends on one image, from the counts of its passes and each model's `measure_speed`."""
    target, recipe = targets[job.target], job.attack
    draws = num_draws if target.is_random and job.threat_model != "white_box_known_draw" else 1
    speed = speeds[target.name]
    seconds = draws * speed["full_forward"]  # scoring
    if recipe is None:
        return seconds
    part = "full"
    if recipe.attack == "transfer":
        speed = speeds[recipe.source]
    elif job.threat_model == "gray_box":
        part = "classifier"
    seconds += recipe.gradients_per_image * speed[f"{part}_gradient"]
    if recipe.attack == "square":
        seconds += recipe.queries * speed["full_forward"]
    if recipe.attack == "torchattacks":
        arguments = torchattacks_arguments(recipe, job.epsilon_255)
        if "n_queries" in arguments:
            seconds += arguments["n_queries"] * speed[f"{part}_forward"]
        else:
            passes = arguments.get("steps", 1) * arguments.get("eot_iter", 1)
            seconds += passes * speed[f"{part}_gradient"]
    candidates = recipe.restarts * (2 if recipe.attack == "autoattack_rand" else 1)
    selections = (candidates if candidates > 1 else 0) + recipe.skips(draws)
    return seconds + selections * draws * speed["full_forward"]


def cost_table(
    jobs: Sequence[Job],
    targets: Sequence[Target],
    speeds: dict[str, dict[str, float]],
    num_draws: int,
    num_processes: int = 1,
) -> str:
    """What each attack costs per 1,000 images, and the whole run, before it starts."""
    costs: dict[tuple, list[float]] = {}
    total = 0.0
    for job in jobs:
        seconds = seconds_per_image(job, targets, speeds, num_draws)
        total += seconds * job.num_images
        entry = costs.setdefault((targets[job.target].name, job.label, job.threat_model), [0.0, 0.0])
        entry[0] = max(entry[0], 1000 * seconds)  # sigmas, budgets and seeds of an attack cost the same
        entry[1] += seconds * job.num_images
    lines = ["expected cost on this machine: seconds per 1,000 images (one budget, one seed), and in this run"]
    for (model, label, threat), (per_thousand, here) in costs.items():
        lines.append(f"  {per_thousand:10.1f} s {here:10.1f} s  {model}, {label}, {threat}")
    thousand = sum(1000 * seconds_per_image(job, targets, speeds, num_draws) for job in jobs)
    lines.append(f"all attacks, budgets and seeds: {thousand:.0f} s per 1,000 images")
    lines.append(f"this run: about {total / num_processes:.0f} s with {num_processes} process(es)")
    return "\n".join(lines)
