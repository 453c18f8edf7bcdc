"""The paper's figures from records alone; no model, no data set. Each function draws into a new matplotlib figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from modeling_nim.noise_nim import parse_sigma


Entry = dict[str, Any]
THREAT_NAMES = {
    "white_box": "white-box",
    "white_box_known_draw": "white-box, noise known",
    "gray_box": "gray-box",
    "black_box": "black-box",
}
# colours that stay apart for colour-blind readers (Okabe & Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def accuracy_against_sigma(rows: Sequence[Entry]) -> Figure:
    """Figure 7: clean and robust accuracy of one defence against its sigma, with 95% intervals.

    Takes the model with the most sigmas and the attack and budget that were made at the most of them; undefended models
    are horizontal lines.
    """
    sigmas: dict[str, set[float]] = defaultdict(set)
    for row in rows:
        if isinstance(row["sigma"], (int, float)):
            sigmas[row["model"]].add(row["sigma"])
    model = max(sigmas, key=lambda name: len(sigmas[name]), default=None)
    if model is None or len(sigmas[model]) < 2:
        raise ValueError("accuracy against sigma needs records of one model at two sigmas or more")
    own = [row for row in rows if row["model"] == model]
    attack, epsilon = _most_swept(own)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    curves = [("no attack", "clean", [row for row in own if row["threat_model"] == "clean"])]
    for threat, name in THREAT_NAMES.items():
        curves.append((name, threat, [row for row in own if _is(row, attack, epsilon, threat)]))
    for (name, threat, points), colour in zip(curves, ("#000000", *COLOURS), strict=False):
        points = sorted(points, key=lambda row: row["sigma"])
        if not points:
            continue
        x, y = [row["sigma"] for row in points], [row["accuracy"] for row in points]
        low, high = zip(*(row["ci95"] for row in points), strict=True)
        axes.plot(x, y, marker="o", markersize=4, color=colour, label=f"{model}: {name}")
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        undefended = [row for row in rows if row["sigma"] is None and row["model"] != model]
        for row in undefended:
            if threat == "clean" and row["threat_model"] == "clean" or _is(row, attack, epsilon, threat):
                style = ":" if row is undefended[0] or row["model"] == undefended[0]["model"] else "-."
                axes.axhline(
                    row["accuracy"], color=colour, linestyle=style, linewidth=1, label=f"{row['model']}: {name}"
                )
    axes.set(xlabel="sigma of the defence (0..255)", ylabel="accuracy (%)", ylim=(0, 100.5))
    axes.set_title(
        f"{attack}, epsilon {epsilon:g}/255; {own[0]['num_images']} images, bands are 95% intervals", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    figure.set_size_inches(9.5, 4.6)
    return figure


def _is(row: Entry, attack: str, epsilon: float, threat: str) -> bool:
    return row["name"] == attack and row["epsilon_255"] == epsilon and row["threat_model"] == threat


def _most_swept(rows: Sequence[Entry]) -> tuple[str, float]:
    counts: dict[tuple[str, float], set] = defaultdict(set)
    for row in rows:
        if row["name"] != "none":
            counts[row["name"], row["epsilon_255"]].add((row["sigma"], row["threat_model"]))
    if not counts:
        raise ValueError("accuracy against sigma needs records of an attack")
    return max(counts, key=lambda key: len(counts[key]))


def accuracy_of_models(rows: Sequence[Entry]) -> Figure:
    """Figure 5: clean and robust accuracy of several models, one group of bars per model, with 95% intervals."""
    attacked = [row for row in rows if row["name"] != "none"]
    if not attacked:
        raise ValueError("accuracy of models needs records of an attack")
    # of a defence at several sigmas, the one that met the most attacks
    met: dict[tuple, int] = defaultdict(int)
    for row in attacked:
        met[row["model"], row["sigma"]] += row["num_images"]
    models = [key for key in met if met[key] == max(met[other] for other in met if other[0] == key[0])]
    by_attack: dict[tuple, set] = defaultdict(set)
    for row in attacked:
        if (row["model"], row["sigma"]) in models:
            by_attack[row["name"], row["epsilon_255"], row["threat_model"]].add((row["model"], row["sigma"]))
    shown = sorted(by_attack, key=lambda key: (-len(by_attack[key]), key[1]))[:6]
    series = [("none", 0.0, "clean"), *shown]
    figure = Figure(figsize=(max(5, 1.3 * len(models) + 3), 4.4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for index, (name, epsilon, threat) in enumerate(series):
        for position, (model, sigma) in enumerate(models):
            row = next(
                (r for r in rows if (r["model"], r["sigma"]) == (model, sigma) and _is(r, name, epsilon, threat)), None
            )
            if row is None:
                continue
            x = position + (index - (len(series) - 1) / 2) * width
            label = "no attack" if name == "none" else f"{name}, {THREAT_NAMES[threat]}, {epsilon:g}/255"
            known = axes.get_legend_handles_labels()[1]
            axes.bar(x, row["accuracy"], width, color=COLOURS[index], label=None if label in known else label)
            low, high = row["ci95"]
            error = [[max(0, row["accuracy"] - low)], [max(0, high - row["accuracy"])]]
            axes.errorbar(x, row["accuracy"], error, color="black", linewidth=1, capsize=2)
    labels = [model if sigma is None else f"{model}\nsigma {_number(sigma)}" for model, sigma in models]
    axes.set_xticks(
        range(len(models)),
        labels,
        fontsize=8,
        rotation=30 if len(models) > 5 else 0,
        ha="right" if len(models) > 5 else "center",
    )
    axes.set(ylabel="accuracy (%)", ylim=(0, 105))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
    return figure


def reconstruction_loss(records: Sequence[Entry], with_deviation: bool | None = None) -> Figure:
    """Figures 3 and 6: pre-training loss against the noise of the input, one curve per purifier.

    The band is the standard deviation over images; by default it is drawn for up to four curves (Figure 3) and left out
    for more (Figure 6).
    """
    losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        losses[record["model"]][record["sigma_255"]].append(record["loss"])
    if not losses:
        raise ValueError("the reconstruction records are empty")
    if with_deviation is None:
        with_deviation = len(losses) <= 4
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (model, by_sigma) in enumerate(losses.items()):
        sigmas = sorted(by_sigma)
        mean = np.array([np.mean(by_sigma[sigma]) for sigma in sigmas])
        axes.plot(sigmas, mean, marker="o", markersize=4, color=COLOURS[index % len(COLOURS)], label=model)
        if with_deviation:
            deviation = np.array([np.std(by_sigma[sigma]) for sigma in sigmas])
            axes.fill_between(
                sigmas, mean - deviation, mean + deviation, color=COLOURS[index % len(COLOURS)], alpha=0.15, linewidth=0
            )
    number = len(next(iter(next(iter(losses.values())).values())))
    suffix = "; bands: standard deviation over images" if with_deviation else ""
    axes.set(xlabel="sigma of the input's noise (0..255)", ylabel="reconstruction loss", ylim=(0, None))
    axes.set_title(f"{number} images{suffix}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="pre-trained with sigma", fontsize=8, frameon=False)
    return figure


def panel(entries: Sequence[Entry], pixels: dict[str, torch.Tensor], class_names: Sequence[str]) -> Figure:
    """For some images: what undefended and defended models see and say, clean and attacked (Figure 4, and the demo's).

    Of a defence with several sigmas the one nearest to 75 is shown. Captions give prediction and confidence of the shown
    draw, green where right and red where wrong.
    """
    undefended = list(dict.fromkeys(entry["model"] for entry in entries if "purified" not in entry["stages"]))
    defended = list(dict.fromkeys(_key(entry) for entry in entries if "purified" in entry["stages"]))
    defended.sort(key=lambda key: abs(_sigma_mean(key[1]) - 75))
    columns: list[tuple[str, tuple, str, str, bool]] = []  # title, model, kind, stage, whether the answer is shown
    for model in undefended[:1]:
        columns.append((f"clean\n{model}", (model, None), "clean", "input", True))
        columns.append((f"attacked\n{model}", (model, None), "attacked", "input", True))
    for model, sigma in defended[:1]:
        where = "" if sigma == "mask" else f"\nsigma {_number(sigma)}"
        columns += [
            (f"clean, degraded{where}", (model, sigma), "clean", "degraded", False),
            (f"clean, purified\n{model}", (model, sigma), "clean", "purified", True),
            (f"attacked\n{model}", (model, sigma), "attacked", "input", False),
            (f"attacked, degraded{where}", (model, sigma), "attacked", "degraded", False),
            (f"attacked, purified\n{model}", (model, sigma), "attacked", "purified", True),
        ]
    if not columns:
        raise ValueError("the pictures hold no model to show")
    lookup = {(_key(entry), entry["kind"], entry["image_id"]): entry for entry in entries}
    image_ids = list(dict.fromkeys(entry["image_id"] for entry in entries))
    figure = Figure(figsize=(1.65 * len(columns), 1.9 * len(image_ids) + 0.9), layout="constrained")
    grid = figure.subplots(len(image_ids), len(columns), squeeze=False)
    for row, image_id in enumerate(image_ids):
        for column, (title, key, kind, stage, answers) in enumerate(columns):
            axes = grid[row][column]
            entry = lookup[key, kind, image_id]
            _show(axes, pixels[entry["stages"][stage]])
            if row == 0:
                axes.set_title(title, fontsize=8)
            if column == 0:
                axes.set_ylabel(f"label {class_names[entry['label']]}", fontsize=9)
            if answers:
                right = entry["prediction"] == entry["label"]
                text = f"{class_names[entry['prediction']]} ({100 * entry['confidence']:.0f}%)"
                axes.set_xlabel(
                    text, fontsize=9, color="#007a33" if right else "#c00000", weight="normal" if right else "bold"
                )
    attacked = next(entry for entry in entries if entry["kind"] == "attacked")
    title = (
        f"{attacked['attack']}, white-box, epsilon {attacked['epsilon_255']:g}/255 (each model is attacked on its own)"
    )
    figure.suptitle(title + "\nunder the images: prediction (confidence), one noise draw", fontsize=9)
    return figure


def degradations(entries: Sequence[Entry], pixels: dict[str, torch.Tensor], num_images: int = 3) -> Figure:
    """Figure 8: noisy and reconstructed images, one row per sigma."""
    clean = [entry for entry in entries if entry["kind"] == "clean" and "purified" in entry["stages"]]
    if not clean:
        raise ValueError("the pictures hold no defended model")
    model = clean[0]["model"]
    clean = [entry for entry in clean if entry["model"] == model]
    sigmas = sorted({entry["sigma"] for entry in clean}, key=_sigma_mean)
    image_ids = list(dict.fromkeys(entry["image_id"] for entry in clean))[:num_images]
    figure = Figure(figsize=(1.5 * 2 * len(image_ids), 1.6 * len(sigmas) + 0.5), layout="constrained")
    grid = figure.subplots(len(sigmas), 2 * len(image_ids), squeeze=False)
    for row, sigma in enumerate(sigmas):
        for column, image_id in enumerate(image_ids):
            entry = next(e for e in clean if e["sigma"] == sigma and e["image_id"] == image_id)
            for offset, stage in enumerate(("degraded", "purified")):
                axes = grid[row][2 * column + offset]
                _show(axes, pixels[entry["stages"][stage]])
                if row == 0:
                    axes.set_title("noisy" if stage == "degraded" else "reconstructed", fontsize=9)
        grid[row][0].set_ylabel("masked" if sigma == "mask" else f"sigma {_number(sigma)}", fontsize=9)
    return figure


def certified_accuracy(records: Sequence[Entry]) -> Figure:
    """Certified accuracy against the L2 radius in [0, 1] units, one curve per sigma; abstentions count as wrong."""
    by_sigma: dict[tuple, list[Entry]] = defaultdict(list)
    for record in records:
        by_sigma[record["model"], record["sigma_255"]].append(record)
    if not by_sigma:
        raise ValueError("the certification records are empty")
    largest = max(record["radius"] for record in records)
    radii = np.linspace(0, 1.05 * largest if largest > 0 else 1, 400)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, ((model, sigma), members) in enumerate(by_sigma.items()):
        correct = np.array([record["radius"] if record["prediction"] == record["label"] else -1 for record in members])
        curve = [100 * np.mean(correct >= radius) if radius > 0 else 100 * np.mean(correct >= 0) for radius in radii]
        axes.plot(
            radii,
            curve,
            color=COLOURS[index % len(COLOURS)],
            label=f"{model}, sigma {sigma:g}/255 ({len(members)} images)",
        )
    axes.set(
        xlabel="L2 radius ([0, 1] pixel units)", ylabel="certified accuracy (%)", ylim=(0, 101), xlim=(0, radii[-1])
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return figure


def _show(axes, image: torch.Tensor) -> None:
    axes.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _key(entry: Entry) -> tuple[str, str | None]:
    return entry["model"], entry["sigma"]


def _sigma_mean(sigma: str) -> float:
    return 0.0 if sigma == "mask" else parse_sigma(sigma).mean


def _number(sigma: float | str) -> str:
    return f"{sigma:g}" if isinstance(sigma, (int, float)) else sigma
