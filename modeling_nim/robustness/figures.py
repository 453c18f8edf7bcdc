"""The paper's figures from records alone; no model, no data set. Each function draws into a new matplotlib figure.

A function whose figure the records do not allow raises NothingToDraw; `figures_of` draws those that they do.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ..noise_nim import parse_sigma
from .pictures import load_pictures
from .records import Certificate, Record, read_jsonl
from .scores import scores
from .statistics import accuracy_interval, certified_radius


Entry = dict[str, Any]
THREAT_NAMES = {
    "white_box": "white-box",
    "white_box_known_draw": "white-box, noise known",
    "gray_box": "gray-box",
    "black_box": "black-box",
}
# colors that stay apart for color-blind readers (Okabe & Ito, and a gray)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


class NothingToDraw(ValueError):
    """The records do not hold what a figure shows."""


def figures_of(directories: Sequence[str | os.PathLike], sigma: float = 75) -> dict[str, Figure]:
    """Every figure that the records in output directories of runs allow, by the name of the file it is to have.

    Records of several directories are drawn together where they are of one kind; pictures are the first directory's
    that has any. Of a defense with several sigmas, panel and defenses show the nearest to `sigma`.

    Raises NothingToDraw with the reasons where they allow none, FileNotFoundError where a directory is missing.
    """
    for directory in directories:
        if not os.path.isdir(directory):
            raise FileNotFoundError(f"there is no directory {str(directory)!r}: make one with scripts/run_attack.py")
    rows = [row for file in _files(directories, "summary.json") for row in json.loads(file.read_text())["rows"]]
    records = [Record.from_json(line) for line in _lines(directories, "records.jsonl")]
    reconstructed = _lines(directories, "reconstruction.jsonl")
    certificates = [Certificate.from_json(line) for line in _lines(directories, "certificates.jsonl")]
    content, pixels = {"entries": [], "class_names": []}, {}
    for file in _files(directories, "pictures.json")[:1]:
        content, pixels = load_pictures(file.parent)
    pictures = (content["entries"], pixels, content["class_names"], sigma)
    functions = {
        "models": lambda: accuracy_of_models(rows),
        "sigma_curve": lambda: accuracy_against_sigma(records),
        "panel": lambda: panel(*pictures),
        "defenses": lambda: defenses(*pictures),
        "degradations": lambda: degradations(content["entries"], pixels),
        "reconstruction": lambda: reconstruction_loss(reconstructed),
        "reconstruction_fixed": lambda: reconstruction_loss(_of_fixed_sigma(reconstructed)),
        "certified": lambda: certified_accuracy(certificates),
    }
    drawn, reasons = {}, []
    for name, draw in functions.items():
        try:
            drawn[name] = draw()
        except NothingToDraw as reason:
            reasons.append(f"{name}: {reason}")
    if not drawn:
        raise NothingToDraw(f"{', '.join(map(str, directories))}: no records to draw; {'; '.join(reasons)}")
    return drawn


def _files(directories: Sequence[str | os.PathLike], name: str) -> list[Path]:
    return [Path(directory, name) for directory in directories if Path(directory, name).exists()]


def _lines(directories: Sequence[str | os.PathLike], name: str) -> list[Entry]:
    return [line for file in _files(directories, name) for line in read_jsonl(file)]


def accuracy_against_sigma(records: Sequence[Record]) -> Figure:
    """Figure 7: clean and robust accuracy of defenses against their sigma, with 95% intervals.

    Takes `records.read_records`: of the models with two sigmas or more, the three with the most, as far as they
    have images in common; the attack and budget made at the most sigmas of the first; on the images that all of these
    met, so that the points can be compared. Undefended models are horizontal lines.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.model, record.sigma, record.name, record.epsilon_255, record.threat_model].append(record)
    sigmas: dict[str, set[float]] = defaultdict(set)
    for model, sigma, *_ in groups:
        if isinstance(sigma, float):
            sigmas[model].add(sigma)
    swept = sorted((name for name in sigmas if len(sigmas[name]) > 1), key=lambda name: -len(sigmas[name]))
    if not swept:
        raise NothingToDraw("accuracy against sigma needs records of one model at two sigmas or more")
    sweeps: dict[tuple, int] = defaultdict(int)
    for name, sigma, attack, epsilon, _ in groups:
        sweeps[attack, epsilon] += name == swept[0] and isinstance(sigma, float) and attack != "none"
    if not max(sweeps.values()):
        raise NothingToDraw("accuracy against sigma needs records of an attack")
    attack, epsilon = max(sweeps, key=sweeps.get)
    shown = {key: members for key, members in groups.items() if key[2:4] in ((attack, epsilon), ("none", 0.0))}
    own = [key for key in shown if key[0] in swept and isinstance(key[1], float)]
    common: set = set()
    styles = {}
    for model, style in zip(swept, (("o", "-"), ("s", "--"), ("^", "-.")), strict=False):
        met = [{record.image_id for record in shown[key]} for key in own if key[0] == model]
        if shared := set.intersection(*met, *([common] if common else [])):
            common, styles[model] = shared, style
    if not styles:
        raise NothingToDraw(f"the images that {swept[0]} met differ from sigma to sigma")

    def point(key: tuple) -> tuple[float, tuple[float, float]] | None:
        values = scores([record for record in shown[key] if record.image_id in common])["mean"]
        return (100 * sum(values) / len(values), accuracy_interval(values)) if values else None

    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    axes = figure.subplots()
    curves = [("no attack", "clean"), *((name, threat) for threat, name in THREAT_NAMES.items())]
    undefended = list(dict.fromkeys(key[0] for key in shown if key[1] is None))
    for (name, threat), color in zip(curves, ("#000000", *COLORS), strict=False):
        for model, (marker, line) in styles.items():
            keys = sorted((key for key in own if key[0] == model and key[4] == threat), key=lambda key: key[1])
            points = [point(key) for key in keys]
            if not points:
                continue
            x = [key[1] for key in keys]
            low, high = zip(*(interval for _, interval in points), strict=True)
            drawn = {"color": color, "marker": marker, "linestyle": line, "markersize": 4}
            axes.plot(x, [mean for mean, _ in points], label=f"{model}: {name}", **drawn)
            axes.fill_between(x, low, high, color=color, alpha=0.15 / len(styles), linewidth=0)
        for other, style in zip(undefended, (":", "-.", "--"), strict=False):
            key = next((key for key in shown if key[0] == other and key[4] == threat), None)
            if key is not None and point(key) is not None:
                axes.axhline(point(key)[0], color=color, linestyle=style, linewidth=1, label=f"{other}: {name}")
    axes.set(xlabel="sigma of the defense (0..255)", ylabel="accuracy (%)", ylim=(0, 100.5))
    axes.set_title(f"{attack}, epsilon {epsilon:g}/255; {len(common)} images, bands are 95% intervals", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    return figure


def _is(row: Entry, attack: tuple[str, float, str], model: tuple[str, Any]) -> bool:
    return (row["name"], row["epsilon_255"], row["threat_model"]) == attack and (row["model"], row["sigma"]) == model


def accuracy_of_models(rows: Sequence[Entry]) -> Figure:
    """Figure 5: clean and robust accuracy of several models, one group of bars per model, with 95% intervals.

    Shows the attacks that most of the models met, as many as there are colors. The title says on how many images, the
    legend where an attack met fewer.
    """
    attacked = [row for row in rows if row["name"] != "none"]
    if not attacked:
        raise NothingToDraw("accuracy of models needs records of an attack")
    # of a defense at several sigmas, the one that met the most attacks
    met: dict[tuple, int] = defaultdict(int)
    for row in attacked:
        met[row["model"], row["sigma"]] += row["num_images"]
    models = [key for key in met if met[key] == max(met[other] for other in met if other[0] == key[0])]
    by_attack: dict[tuple, set] = defaultdict(set)
    for row in attacked:
        if (row["model"], row["sigma"]) in models:
            by_attack[row["name"], row["epsilon_255"], row["threat_model"]].add((row["model"], row["sigma"]))
    shown = sorted(by_attack, key=lambda key: (-len(by_attack[key]), key[1]))[: len(COLORS) - 1]
    # budgets of an attack side by side
    series = [
        ("none", 0.0, "clean"),
        *sorted(shown, key=lambda key: (list(THREAT_NAMES).index(key[2]), key[0], key[1])),
    ]
    bars = {
        (attack, model): next((row for row in rows if _is(row, attack, model)), None)
        for attack in series
        for model in models
    }
    most = max(row["num_images"] for row in bars.values() if row is not None)
    figure = Figure(figsize=(max(6.5, 1.9 * len(models) + 2.5), 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(series)
    for index, attack in enumerate(series):
        name, epsilon, threat = attack
        label = "no attack" if name == "none" else f"{name}, {THREAT_NAMES[threat]}, {epsilon:g}/255"
        numbers = sorted({bars[attack, model]["num_images"] for model in models if bars[attack, model] is not None})
        if numbers != [most]:
            label += f" ({' or '.join(map(str, numbers))} images)"
        for position, model in enumerate(models):
            row = bars[attack, model]
            if row is None:
                continue
            x = position + (index - (len(series) - 1) / 2) * width
            axes.bar(x, row["accuracy"], width, color=COLORS[index], label=label)
            label = None  # named once
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
    axes.set(ylabel="accuracy (%)", ylim=(0, 105), xlim=(-0.5, len(models) - 0.5))
    left_out = len(by_attack) - len(shown)
    note = f"; {left_out} more attacks are not shown" if left_out else ""
    title = f"{most} images where the legend gives no other number, 95% intervals{note}"
    axes.set_title(title + "\nneither bar nor interval: not attacked this way", fontsize=9)
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    return figure


def reconstruction_loss(records: Sequence[Entry], with_deviation: bool | None = None) -> Figure:
    """Figures 3 and 6: pre-training loss against the noise of the input, one curve per purifier.

    The band is the standard deviation over images; by default it is drawn for up to four curves (Figure 3) and left out
    for more (Figure 6).
    """
    losses: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["loss"] is not None:
            losses[record["model"]][record["sigma_255"]].append(record["loss"])
    if not losses:
        raise NothingToDraw("the reconstruction records hold no loss: the images were larger than the purifier")
    if with_deviation is None:
        with_deviation = len(losses) <= 4
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (model, by_sigma) in enumerate(losses.items()):
        sigmas = sorted(by_sigma)
        mean = np.array([np.mean(by_sigma[sigma]) for sigma in sigmas])
        axes.plot(sigmas, mean, marker="o", markersize=4, color=COLORS[index % len(COLORS)], label=model)
        if with_deviation:
            deviation = np.array([np.std(by_sigma[sigma]) for sigma in sigmas])
            axes.fill_between(
                sigmas, mean - deviation, mean + deviation, color=COLORS[index % len(COLORS)], alpha=0.15, linewidth=0
            )
    number = len(next(iter(next(iter(losses.values())).values())))
    suffix = "; bands: standard deviation over images" if with_deviation else ""
    axes.set(xlabel="sigma of the input's noise (0..255)", ylabel="pre-training loss", ylim=(0, None))
    axes.set_title(f"{number} images{suffix}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="purifier, or the sigma it was pre-trained with", fontsize=8, frameon=False)
    return figure


def _of_fixed_sigma(records: Sequence[Entry]) -> list[Entry]:
    """Of more than four purifiers those that are named by one sigma, and the last: Figure 3."""
    models = list(dict.fromkeys(record["model"] for record in records))
    fixed = [model for model in models if model.isdecimal()]
    if len(models) <= 4 or not 0 < len(fixed) < 4:
        raise NothingToDraw("Figure 3 needs one to three purifiers of one sigma among more than four")
    return [record for record in records if record["model"] in (*fixed, models[-1])]


def panel(
    entries: Sequence[Entry], pixels: dict[str, torch.Tensor], class_names: Sequence[str], sigma: float = 75
) -> Figure:
    """For some images: what undefended and defended models see and say, clean and attacked (Figure 4, and the demo's).

    Of a defense with several sigmas the one nearest to `sigma` is shown, and beside it a second defense of that sigma.
    Captions give prediction and confidence of the shown draw, green where right and red where wrong.
    """
    undefended = list(dict.fromkeys(entry["model"] for entry in entries if "purified" not in entry["stages"]))
    defended = list(dict.fromkeys(_key(entry) for entry in entries if "purified" in entry["stages"]))
    defended.sort(key=lambda key: abs(_sigma_mean(key[1]) - sigma))
    columns: list[tuple[str, tuple, str, str, bool]] = []  # title, model, kind, stage, whether the answer is shown
    for model in undefended[:1]:
        columns.append((f"clean image\n{model}", (model, None), "clean", "input", True))
        columns.append((f"attacked image\n{model}", (model, None), "attacked", "input", True))
    for model, own in [key for key in defended if key[1] == defended[0][1]][:2]:
        where = model if own == "mask" else f"{model}, sigma {_number(own)}"
        columns += [
            (f"clean, purified\n{model}", (model, own), "clean", "purified", True),
            (f"attacked, degraded\n{where}", (model, own), "attacked", "degraded", False),
            (f"attacked, purified\n{model}", (model, own), "attacked", "purified", True),
        ]
    if not columns:
        raise NothingToDraw("the pictures hold no model to show")
    figure = _grid(entries, pixels, class_names, columns)
    attacked = next(entry for entry in entries if entry["kind"] == "attacked")
    title = f"{_attack_line(attacked)}, each model attacked on its own"
    title += "; images that are wrong already stay as they are"
    figure.suptitle(title + "\nunder the images: prediction (confidence), one noise draw", fontsize=9)
    return figure


def defenses(
    entries: Sequence[Entry], pixels: dict[str, torch.Tensor], class_names: Sequence[str], sigma: float = 30
) -> Figure:
    """Figure 4: for each defense, the degraded image and the reconstructions of the clean and of the attacked image.

    Each defense met an attack of its own. Of one with several sigmas the nearest to `sigma` is shown. Captions as in
    `panel`.
    """
    chosen: dict[str, tuple] = {}
    for key in sorted(
        {_key(entry) for entry in entries if "purified" in entry["stages"]},
        key=lambda key: abs(_sigma_mean(key[1]) - sigma),
    ):
        chosen.setdefault(key[0], key)
    if len(chosen) < 2:
        raise NothingToDraw("the pictures hold fewer than two defended models")
    names = [name for name in dict.fromkeys(entry["model"] for entry in entries) if name in chosen]
    columns = [("clean image", chosen[names[0]], "clean", "input", False)]
    for name in names:
        how = "masked" if chosen[name][1] == "mask" else f"sigma {_number(chosen[name][1])}"
        columns += [
            (f"{name}\nattacked, {how}", chosen[name], "attacked", "degraded", False),
            (f"{name}\nclean, reconstructed", chosen[name], "clean", "purified", True),
            (f"{name}\nattacked, reconstructed", chosen[name], "attacked", "purified", True),
        ]
    figure = _grid(entries, pixels, class_names, columns)
    attacked = next(entry for entry in entries if entry["kind"] == "attacked")
    title = f"{_attack_line(attacked)}, each defense attacked on its own"
    figure.suptitle(title + "\nunder the images: prediction (confidence), one draw", fontsize=9)
    return figure


def _attack_line(entry: Entry) -> str:
    return f"{entry['attack']}, white-box, epsilon {entry['epsilon_255']:g}/255"


def _grid(
    entries: Sequence[Entry],
    pixels: dict[str, torch.Tensor],
    class_names: Sequence[str],
    columns: Sequence[tuple[str, tuple, str, str, bool]],
) -> Figure:
    """A row per image; columns are title, model, kind, stage, and whether the model's answer stands under the image."""
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
    return figure


def degradations(entries: Sequence[Entry], pixels: dict[str, torch.Tensor], num_images: int = 3) -> Figure:
    """Figure 8: noisy and reconstructed images, one row per sigma."""
    clean = [entry for entry in entries if entry["kind"] == "clean" and "purified" in entry["stages"]]
    if not clean:
        raise NothingToDraw("the pictures hold no defended model")
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
    figure.suptitle(f"{model}: clean images, degraded and reconstructed; one noise draw", fontsize=9)
    return figure


def certified_accuracy(certificates: Sequence[Certificate]) -> Figure:
    """Certified accuracy against the L2 radius in [0, 1] units, one curve per sigma; abstentions count as wrong."""
    by_sigma: dict[tuple, list[Certificate]] = defaultdict(list)
    for certificate in certificates:
        by_sigma[certificate.model, certificate.sigma_255].append(certificate)
    if not by_sigma:
        raise NothingToDraw("the certification records are empty")
    largest = max(item.radius for item in certificates)
    radii = np.linspace(0, 1.05 * largest if largest > 0 else 1, 400)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, ((model, sigma), members) in enumerate(by_sigma.items()):
        correct = np.array([item.radius if item.prediction == item.label else -1 for item in members])
        curve = [100 * np.mean(correct >= radius) for radius in radii]
        number = members[0].num_draws
        label = f"{model}, sigma {sigma:g}/255 ({len(members)} images, {number:,} draws)"
        axes.plot(radii, curve, color=COLORS[index % len(COLORS)], label=label)
        limit = certified_radius(number, number, sigma, members[0].alpha)
        axes.axvline(limit, color=COLORS[index % len(COLORS)], linestyle=":", linewidth=1)
    axes.set(
        xlabel="L2 radius ([0, 1] pixel units)", ylabel="certified accuracy (%)", ylim=(0, 101), xlim=(0, radii[-1])
    )
    axes.set_title("dotted: the largest radius that so many draws can certify", fontsize=9)
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
