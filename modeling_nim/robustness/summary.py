"""From records to a table, paired comparisons and alarms; nothing here runs a model."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .alarms import of_comparisons, of_models, of_records
from .records import Record, Row, model_key
from .scores import compare_pair, interval, length, majority_is_right, norm_of, percent, scores


@dataclass
class Summary:
    """What an evaluation found; `provenance` is what it depends on."""

    rows: list[Row]
    worst_case: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    alarms: list[dict[str, str]]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As `summary.json` holds it."""
        return {"rows": [row.to_json() for row in self.rows]} | {
            key: getattr(self, key) for key in ("worst_case", "comparisons", "alarms", "provenance")
        }


def summarize(
    records: Sequence[Record],
    attacks: dict[tuple, dict[str, Any]],
    models: dict[str, dict[str, Any]],
    seconds: dict[tuple, float],
) -> Summary:
    """Rows, worst case, comparisons and alarms.

    Args:
        records: of all jobs.
        attacks: by `Record.group`, `{"kind": ..., **settings}`.
        models: by `model_key`, what is known of the model itself (`alarms.of_models`).
        seconds: by `Record.group`.
    """
    groups = _grouped(records)
    rows = [_row(group, members, attacks, seconds.get(group, 0.0)) for group, members in groups.items()]
    comparisons = _comparisons(groups)
    alarms = [*of_models(models), *of_records(groups, attacks, models), *of_comparisons(comparisons)]
    return Summary(rows, _worst_case(groups, attacks), comparisons, alarms)


def compare_models(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The `comparisons` of a summary, here of records that may come from several runs on the same images."""
    return _comparisons(_grouped(records))


def _grouped(records: Sequence[Record]) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.group].append(record)
    return groups


def _row(group: tuple, members: list[Record], attacks: dict, seconds: float) -> Row:
    model, sigma, label, threat, epsilon = group
    attacked, control = scores(members, "predictions"), scores(members, "clean_predictions")
    queries = [record.queries for record in members if not record.skipped]  # of the images that were attacked
    settings = dict(attacks.get(group, {}))
    return Row(
        model=model,
        sigma=sigma,
        attack=settings.pop("kind", members[0].attack),
        name=label,
        threat_model=threat,
        epsilon_255=epsilon,
        accuracy=percent(attacked["mean"]),
        ci95=interval(attacked["mean"]),
        num_images=len(attacked["mean"]),
        seconds=round(seconds, 2),
        accuracy_majority=percent(attacked["majority"]),
        ci95_majority=interval(attacked["majority"]),
        accuracy_worst_draw=percent(attacked["worst"]),
        ci95_worst_draw=interval(attacked["worst"]),
        control_accuracy=percent(control["mean"]),
        control_accuracy_majority=percent(control["majority"]),
        control_accuracy_worst_draw=percent(control["worst"]),
        num_draws=len(members[0].predictions),
        seeds=sorted({record.seed for record in members}),
        mean_perturbation_255=round(
            sum(length(record, norm_of(attacks, group)) for record in members) / len(members), 4
        ),
        mean_loss=round(sum(record.loss for record in members) / len(members), 6),
        mean_queries=round(sum(queries) / max(len(queries), 1), 1),
        settings=settings,
    )


def _pooled(members: Sequence[Record]) -> dict[str, bool]:
    """Per image, whether the majority over all seeds and draws is right."""
    predictions: dict[str, list[int]] = defaultdict(list)
    labels = {}
    for record in members:
        predictions[record.image_id] += record.predictions
        labels[record.image_id] = record.label
    return {image: majority_is_right(values, labels[image]) for image, values in predictions.items()}


def _worst_case(groups: dict[tuple, list[Record]], attacks: dict[tuple, dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and budget, the images whose majority vote withstands every attack that was made on all of them.

    The attacker who knows the draw is left out: an attacker of a deployed defense cannot know it.
    """
    families: dict[tuple, dict[str, dict[str, bool]]] = defaultdict(dict)
    for group, members in groups.items():
        model, sigma, label, threat, epsilon = group
        if label != "none" and threat != "white_box_known_draw":
            families[model, sigma, epsilon, norm_of(attacks, group)][f"{label} ({threat})"] = _pooled(members)
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
                "sigma": sigma,
                "epsilon_255": epsilon,
                "norm": norm,
                "accuracy_majority": percent(survived),
                "ci95_majority": interval(survived),
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
        for pair in itertools.combinations(decisions, 2):
            condition = {"name": label, "threat_model": threat, "epsilon_255": epsilon}
            comparisons.append(compare_pair(dict(pair), "accuracy_majority", **condition))
    return [comparison for comparison in comparisons if comparison]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, for people."""
    header = ("model", "sigma", "attack", "threat model", "eps/255", "accuracy", "95% interval")
    header += ("majority", "worst draw", "no attack", "images")
    body = [
        (
            row.model,
            "-" if row.sigma is None else f"{row.sigma:g}" if isinstance(row.sigma, float) else row.sigma,
            row.name,
            row.threat_model,
            f"{row.epsilon_255:g}",
            f"{row.accuracy:.1f}",
            f"{row.ci95[0]:.1f} - {row.ci95[1]:.1f}",
            f"{row.accuracy_majority:.1f}",
            f"{row.accuracy_worst_draw:.1f}",
            f"{row.control_accuracy:.1f}",
            str(row.num_images),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *body]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *body]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
