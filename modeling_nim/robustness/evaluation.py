"""One batch of one job: attack it, score it on fresh noise, write it down."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .draws import EVALUATE, SELECT
from .functions import naming_own_function
from .jobs import Job
from .oracle import Oracle, RowLoss, choose_worst, decide, rows_per_pass, target_forward, without_draws
from .records import Record, sigma_value
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
        purpose = EVALUATE if known_draw else SELECT  # who knows the draw checks on it
        rows = rows_per_pass(micro_batch, target)
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


def _attack(job, targets, images_01, labels, image_ids, selection_draws, micro_batch) -> tuple[torch.Tensor, Oracle]:
    """The worst of the attack's results per image, and the oracle that it asked."""
    target, recipe = targets[job.target], job.attack
    row = recipe.row
    view = target
    if row.sees == "source":
        view = next(other for other in targets if other.name == recipe.source)
    is_unaware = job.threat_model == "gray_box" and view is target
    forward = without_draws(target.classifier_logits) if is_unaware else target_forward(view)
    sees_randomness = view.is_random and not is_unaware
    known_draw = job.threat_model == "white_box_known_draw"
    oracle = Oracle(
        forward,
        labels,
        image_ids,
        job.seed,
        eot_samples=recipe.eot_samples if sees_randomness and not known_draw else 1,
        known_draw=known_draw,
        micro_batch=rows_per_pass(micro_batch, view),
        targeted=recipe.targeted,
        is_random=sees_randomness,
        answers_only=job.threat_model == "black_box",
        bf16_gradients=view.bf16_gradients,
    )
    row_losses = recipe.losses
    if row.sees == "features":
        row_losses = (_turn_to_features(oracle, target, images_01),)
    if recipe.targeted:
        # the likeliest wrong class, as the attacker sees it
        logits = decide(forward, images_01, image_ids, job.seed, SELECT, selection_draws, oracle.micro_batch)
        logits = logits.mean(dim=1)  # (B, num_classes)
        oracle.labels = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    candidates = []
    for part, row_loss in enumerate(row_losses):
        oracle.row_loss = row_loss
        for restart in range(recipe.restarts):
            oracle.begin(part * recipe.restarts + restart)
            keywords = recipe.keywords(job.epsilon_255, restart, target.patch_size)
            with naming_own_function(f"attack {recipe.label!r}") if recipe.uses_own_code else nullcontext():
                found = row.run(oracle, images_01, job.epsilon_255 / 255, **keywords)
            _check_shape(found, images_01, recipe.label)
            candidates.append(found)
    # a gray-box attacker chooses by what it sees, too
    return choose_worst(oracle, forward, candidates, labels, selection_draws if sees_randomness else 1), oracle


def _check_shape(found: Any, images_01: torch.Tensor, label: str) -> None:
    """ValueError for an attack whose result has not the shape of the images; broadcasting would hide that."""
    shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
    if shape != tuple(images_01.shape):
        raise ValueError(f"attack {label!r} was given images {tuple(images_01.shape)} and returned {shape}")


def _turn_to_features(oracle: Oracle, target: Target, images_01: torch.Tensor) -> RowLoss:
    """Makes the oracle answer with the classifier's features; the loss is their distance from those of the images."""
    oracle.forward = without_draws(target.features)
    with torch.no_grad():
        clean = torch.cat([target.features(piece) for piece in images_01.split(oracle.micro_batch)])  # (B, D)
    oracle.labels = torch.arange(len(images_01), device=images_01.device)
    return lambda features, rows: (features - clean[rows]).square().mean(dim=1)


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
) -> list[Record]:
    """One record per image: predictions on the evaluation draws, and the perturbation measured on what was scored.

    `clean_predictions` are those of the control with the same seed, on the same draws. Images that are not among them
    are classified here (with more processes than batches, another process may not have finished the control).
    """
    target = targets[job.target]
    draws = num_draws if target.is_random and job.threat_model != "white_box_known_draw" else 1
    adversarial_01 = attacked.adversarial_01
    forward = target_forward(target)
    logits = decide(forward, adversarial_01, image_ids, job.seed, EVALUATE, draws, rows_per_pass(micro_batch, target))
    predictions = logits.argmax(dim=-1)  # (B, draws)
    if job.attack is not None and not set(image_ids) <= set(clean_predictions):
        clean = decide(forward, images_01, image_ids, job.seed, EVALUATE, draws, rows_per_pass(micro_batch, target))
        clean_predictions = dict(zip(image_ids, clean.argmax(dim=-1).tolist(), strict=True))
    losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(draws), reduction="none").view(-1, draws)
    perturbation = (adversarial_01.double() - images_01.double()).flatten(1) * 255
    return [
        Record(
            model=target.name,
            sigma=sigma_value(target.sigma),
            attack=job.kind,
            name=job.label,
            threat_model=job.threat_model,
            epsilon_255=job.epsilon_255,
            seed=job.seed,
            image_id=image_id,
            label=int(labels[index]),
            clean_predictions=own if job.attack is None else clean_predictions[image_id][:draws],
            predictions=own,
            linf_255=float(perturbation[index].abs().max()),
            l2_255=float(perturbation[index].norm()),
            pixel_min=float(adversarial_01[index].min()),
            pixel_max=float(adversarial_01[index].max()),
            loss=float(losses[index].mean()),
            queries=attacked.queries[index],
            zero_gradients=attacked.zero_gradients[index],
            skipped=attacked.skipped[index],
        )
        for index, (image_id, own) in enumerate(zip(image_ids, predictions.tolist(), strict=True))
    ]
