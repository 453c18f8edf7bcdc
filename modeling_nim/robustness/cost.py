"""What an evaluation will take, before it starts: from counts of passes and this machine's speed."""

import time
from collections.abc import Sequence

import torch

from ..runs.machine import synchronize
from .jobs import Job
from .oracle import Oracle, rows_per_pass, target_forward, without_draws
from .targets import Target


def measure_speed(target: Target, images_01: torch.Tensor, micro_batch: int) -> dict[str, float]:
    """Seconds per row of a forward pass, a gradient, and a gradient of the classifier alone, on this machine."""
    rows = min(rows_per_pass(micro_batch, target), 64)
    images = images_01[torch.arange(rows) % len(images_01)]
    labels = torch.zeros(rows, dtype=torch.long, device=images.device)
    ids = [f"speed/{row}" for row in range(rows)]
    speed = {}
    for name, forward in (("full", target_forward(target)), ("classifier", without_draws(target.classifier_logits))):
        oracle = Oracle(forward, labels, ids, seed=0, micro_batch=rows, bf16_gradients=target.bf16_gradients)
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
    """Expected seconds that the job spends on one image, from its counts of passes and each model's `measure_speed`."""
    target, recipe = targets[job.target], job.attack
    draws = num_draws if target.is_random and job.threat_model != "white_box_known_draw" else 1
    speed = speeds[target.name]
    seconds = draws * speed["full_forward"]  # scoring
    if recipe is None:
        return seconds
    part = "full"
    if recipe.row.sees == "source":
        speed = speeds[recipe.source]
    elif job.threat_model == "gray_box":
        part = "classifier"
    seconds += recipe.gradients_per_image * speed[f"{part}_gradient"]
    seconds += recipe.row.answers(recipe) * speed[f"{part}_forward"]
    candidates = recipe.restarts * len(recipe.losses)
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
