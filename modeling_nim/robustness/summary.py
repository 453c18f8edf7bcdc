"""From records to a table, paired comparisons and alarms; nothing here runs a model."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ..noise_nim import parse_sigma
from .statistics import accuracy_interval, paired_p_value


Record = dict[str, Any]
_GROUP = ("model", "sigma", "attack", "threat_model", "epsilon_255")


def summarise(
    records: Sequence[Record],
    attacks: dict[tuple, dict[str, Any]],
    models: dict[str, dict[str, Any]],
    seconds: dict[tuple, float],
) -> dict[str, Any]:
    """`{"rows", "worst_case", "comparisons", "alarms"}`.

    Args:
        records: the lines of `records.jsonl`.
        attacks: by the row's group (model, sigma, attack, threat model, epsilon), `{"kind": ..., **settings}`.
        models: by `model_key`, at least `{"repeatable": bool}`.
        seconds: by the row's group.
    """
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in _GROUP)].append(record)
    rows = [_row(group, members, attacks, seconds.get(group, 0.0)) for group, members in groups.items()]
    comparisons = _comparisons(groups)
    return {
        "rows": rows,
        "worst_case": _worst_case(groups, attacks),
        "comparisons": comparisons,
        "alarms": _alarms(groups, attacks, models, comparisons),
    }


def model_key(name: str, sigma: str | None) -> str:
    return name if sigma is None else f"{name} @ sigma {sigma}"


def majority_is_right(predictions: Sequence[int], label: int) -> bool:
    """Whether the label has more votes than any other class; a tie is no majority."""
    votes = Counter(predictions)
    right = votes.pop(label, 0)
    return right > max(votes.values(), default=0)


def scores(members: Sequence[Record], predictions_key: str) -> dict[str, list[float]]:
    """Per image, averaged over seeds: mean over draws, majority vote, worst draw."""
    by_image: dict[str, list[Record]] = defaultdict(list)
    for record in members:
        by_image[record["image_id"]].append(record)
    scores: dict[str, list[float]] = {"mean": [], "majority": [], "worst": []}
    for image_records in by_image.values():
        per_seed = [
            (
                sum(prediction == record["label"] for prediction in record[predictions_key])
                / len(record[predictions_key]),
                majority_is_right(record[predictions_key], record["label"]),
                all(prediction == record["label"] for prediction in record[predictions_key]),
            )
            for record in image_records
        ]
        for name, values in zip(scores, zip(*per_seed, strict=True), strict=True):
            scores[name].append(sum(values) / len(values))
    return scores


def _percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 4)


def _interval(values: Sequence[float]) -> list[float]:
    return [round(bound, 4) for bound in accuracy_interval(values)]


def _row(group: tuple, members: list[Record], attacks: dict, seconds: float) -> dict[str, Any]:
    model, sigma, label, threat, epsilon = group
    attacked, control = scores(members, "predictions"), scores(members, "clean_predictions")
    queries = [record["queries"] for record in members if not record["skipped"]]  # of the images that were attacked
    settings = dict(attacks.get(group, {}))
    perturbation = f"{_norm(attacks, group)}_255"
    return {
        "model": model,
        "sigma": _sigma_value(sigma),
        "attack": settings.pop("kind", label),
        "name": label,
        "threat_model": threat,
        "epsilon_255": epsilon,
        "accuracy": _percent(attacked["mean"]),
        "ci95": _interval(attacked["mean"]),
        "num_images": len(attacked["mean"]),
        "seconds": round(seconds, 2),
        "accuracy_majority": _percent(attacked["majority"]),
        "ci95_majority": _interval(attacked["majority"]),
        "accuracy_worst_draw": _percent(attacked["worst"]),
        "ci95_worst_draw": _interval(attacked["worst"]),
        "control_accuracy": _percent(control["mean"]),
        "control_accuracy_majority": _percent(control["majority"]),
        "control_accuracy_worst_draw": _percent(control["worst"]),
        "num_draws": len(members[0]["predictions"]),
        "seeds": sorted({record["seed"] for record in members}),
        "mean_perturbation_255": round(sum(record[perturbation] for record in members) / len(members), 4),
        "mean_loss": round(sum(record["loss"] for record in members) / len(members), 6),
        "mean_queries": round(sum(queries) / max(len(queries), 1), 1),
        "settings": settings,
    }


def _sigma_value(sigma: str | None) -> float | str | None:
    if sigma is None or sigma == "mask":
        return sigma
    spec = parse_sigma(sigma)
    return spec.a if spec.kind == "fixed" else sigma


def _pooled(members: Sequence[Record]) -> dict[str, bool]:
    """Per image, whether the majority over all seeds and draws is right."""
    predictions: dict[str, list[int]] = defaultdict(list)
    labels = {}
    for record in members:
        predictions[record["image_id"]] += record["predictions"]
        labels[record["image_id"]] = record["label"]
    return {image: majority_is_right(values, labels[image]) for image, values in predictions.items()}


def _norm(attacks: dict[tuple, dict[str, Any]], group: tuple) -> str:
    """What the group's epsilon is measured in; budgets of different norms have nothing to do with each other."""
    return attacks.get(group, {}).get("norm", "linf")


def _worst_case(groups: dict[tuple, list[Record]], attacks: dict[tuple, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and budget, the images whose majority vote withstands every attack that was made on all of them.

    The attacker who knows the draw is left out: no deployed defence meets one.
    """
    families: dict[tuple, dict[str, dict[str, bool]]] = defaultdict(dict)
    for group, members in groups.items():
        model, sigma, label, threat, epsilon = group
        if label != "none" and threat != "white_box_known_draw":
            families[model, sigma, epsilon, _norm(attacks, group)][f"{label} ({threat})"] = _pooled(members)
    worst = []
    for (model, sigma, epsilon, norm), by_attack in families.items():
        num_images = max(len(decisions) for decisions in by_attack.values())
        full = {name: decisions for name, decisions in by_attack.items() if len(decisions) == num_images}
        if len(full) < 2:
            continue
        images = next(iter(full.values()))
        survived = [float(all(decisions[image] for decisions in full.values())) for image in images]
        worst.append(
            {
                "model": model,
                "sigma": _sigma_value(sigma),
                "epsilon_255": epsilon,
                "norm": norm,
                "accuracy_majority": _percent(survived),
                "ci95_majority": _interval(survived),
                "num_images": num_images,
                "attacks": sorted(full),
            }
        )
    return worst


def _comparisons(groups: dict[tuple, list[Record]]) -> list[dict[str, Any]]:
    """Models against each other under the same attack, on the images that both met (McNemar, majority votes)."""
    by_attack: dict[tuple, list[tuple[str, list[Record]]]] = defaultdict(list)
    for (model, sigma, *attack), members in groups.items():
        by_attack[tuple(attack)].append((model_key(model, sigma), members))
    comparisons = []
    for (label, threat, epsilon), contestants in by_attack.items():
        decisions = [(name, _pooled(members)) for name, members in contestants]
        for (first, a), (second, b) in itertools.combinations(decisions, 2):
            images = sorted(set(a) & set(b))
            if not images:
                continue
            comparisons.append(
                {
                    "name": label,
                    "threat_model": threat,
                    "epsilon_255": epsilon,
                    "models": [first, second],
                    "accuracy_majority": [_percent([float(d[image]) for image in images]) for d in (a, b)],
                    "num_images": len(images),
                    "p_value": paired_p_value([a[image] for image in images], [b[image] for image in images]),
                }
            )
    return comparisons


# ----------------------------------------------------------------------------------------------------------------------
# Alarms


def _alarms(groups: dict, attacks: dict, models: dict, comparisons: list) -> list[dict[str, str]]:
    alarms: list[dict[str, str]] = []

    def ring(alarm: str, where: str, message: str) -> None:
        alarms.append({"alarm": alarm, "where": where, "message": message})

    for name, model in models.items():
        if not model.get("repeatable", True):
            message = "the same images and draws gave other logits: the model is random beyond its declared noise"
            ring("undeclared_randomness", name, message + "; no result here can be repeated")

    for group, members in groups.items():
        model, sigma, label, threat, epsilon = group
        settings = attacks.get(group, {})
        where = f"{model_key(model, sigma)}, {label}, {threat}, epsilon {epsilon:g}/255"
        low, high = min(record["pixel_min"] for record in members), max(record["pixel_max"] for record in members)
        if low < 0 or high > 1:
            ring("pixels_out_of_range", where, f"scored pixels lie in [{low:g}, {high:g}], images are [0, 1]")
        if label == "none":
            continue
        norm = _norm(attacks, group)
        perturbation = f"{norm}_255"
        largest = max(record[perturbation] for record in members)
        if largest > epsilon + 1e-3:
            ring("beyond_epsilon", where, f"a scored perturbation measures {largest:.4f}/255")
        zero = sum(record["zero_gradients"] > 0 for record in members) / len(members)
        if zero > 0:
            message = f"{100 * zero:.1f}% of the attacks met a gradient of exactly zero: the model hides its gradients"
            ring("zero_gradients", where, message + ", and a high accuracy says little")
        alpha = settings.get("alpha_255")
        if alpha is not None and settings.get("steps", 1) > 1 and epsilon > 0 and alpha >= epsilon:
            message = f"the step {alpha:g}/255 is not smaller than epsilon: iterates jump between corners"
            ring("step_not_smaller_than_epsilon", where, message + ", so the attack is weaker than its step count says")
        accuracy = _percent(scores(members, "predictions")["mean"])
        if norm == "linf" and epsilon >= 128 and threat.startswith("white_box") and accuracy > 5:
            message = f"{accuracy:.1f}% survive a budget that can turn any image grey: the attack does not work here"
            ring("survives_large_epsilon", where, message)

    _ring_where_white_box_is_weaker(groups, attacks, ring)

    undecided: dict[tuple, list[dict]] = defaultdict(list)
    for comparison in comparisons:
        first, second = comparison["accuracy_majority"]
        if first != second and comparison["p_value"] >= 0.05:
            key = (comparison["name"], comparison["threat_model"], comparison["epsilon_255"])
            undecided[key].append(comparison)
    for (label, threat, epsilon), pairs in undecided.items():
        closest = max(pairs, key=lambda pair: abs(pair["accuracy_majority"][0] - pair["accuracy_majority"][1]))
        (first, second), (a, b) = closest["models"], closest["accuracy_majority"]
        ring(
            "too_few_images",
            f"{label}, {threat}, epsilon {epsilon:g}/255",
            f"{closest['num_images']} images do not rank {len(pairs)} pair(s) of models, such as {first} ({a:.1f}) and "
            f"{second} ({b:.1f}; McNemar p = {closest['p_value']:.2g})",
        )
    return alarms


def _ring_where_white_box_is_weaker(groups: dict, attacks: dict, ring) -> None:
    """The attacker who knows more must not do worse, beyond what chance explains (paired over the images)."""
    families: dict[tuple, dict[str, list[tuple[str, dict[str, float]]]]] = defaultdict(lambda: defaultdict(list))
    for group, members in groups.items():
        model, sigma, label, threat, epsilon = group
        if label == "none":
            continue
        accuracies: dict[str, list[float]] = defaultdict(list)
        for record in members:
            right = sum(prediction == record["label"] for prediction in record["predictions"])
            accuracies[record["image_id"]].append(right / len(record["predictions"]))
        means = {image: sum(values) / len(values) for image, values in accuracies.items()}
        families[model, sigma, epsilon, _norm(attacks, group)][threat].append((label, means))
    for (model, sigma, epsilon, _), threats in families.items():
        for threat in ("gray_box", "black_box"):
            for label, weaker in threats.get(threat, []):
                verdicts = []
                for white_label, white in threats.get("white_box", []):
                    images = sorted(set(white) & set(weaker))
                    differences = [white[image] - weaker[image] for image in images]
                    if images:
                        verdicts.append((_mean_beyond_chance(differences), white_label, differences))
                if verdicts and all(beyond for beyond, _, _ in verdicts):  # no white-box attack is as good
                    _, white_label, differences = min(verdicts, key=lambda verdict: sum(verdict[2]) / len(verdict[2]))
                    ring(
                        "white_box_weaker",
                        f"{model_key(model, sigma)}, epsilon {epsilon:g}/255",
                        f"{white_label} with full knowledge leaves {100 * sum(differences) / len(differences):.1f} points more "
                        f"than {label} ({threat}): the white-box attack is not to be believed",
                    )


def _mean_beyond_chance(differences: Sequence[float]) -> bool:
    """Whether a mean of paired differences is above zero by more than its 95% half-width."""
    mean = sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / max(len(differences) - 1, 1)
    return mean > 1.96 * math.sqrt(variance / len(differences))


# ----------------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, for people."""
    header = ("model", "sigma", "attack", "threat model", "eps/255", "accuracy", "95% interval")
    header += ("majority", "worst draw", "no attack", "images")
    body = [
        (
            row["model"],
            "-" if row["sigma"] is None else f"{row['sigma']:g}" if isinstance(row["sigma"], float) else row["sigma"],
            row["name"],
            row["threat_model"],
            f"{row['epsilon_255']:g}",
            f"{row['accuracy']:.1f}",
            f"{row['ci95'][0]:.1f} - {row['ci95'][1]:.1f}",
            f"{row['accuracy_majority']:.1f}",
            f"{row['accuracy_worst_draw']:.1f}",
            f"{row['control_accuracy']:.1f}",
            str(row["num_images"]),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
