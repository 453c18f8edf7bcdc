"""Scores per image, from records: for the table and the alarms."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .records import Record
from .statistics import accuracy_interval, paired_p_value


def majority_is_right(predictions: Sequence[int], label: int) -> bool:
    """Whether the label has more votes than any other class; a tie is no majority."""
    votes = Counter(predictions)
    right = votes.pop(label, 0)
    return right > max(votes.values(), default=0)


def scores(members: Sequence[Record], predictions_key: str = "predictions") -> dict[str, list[float]]:
    """Per image, averaged over seeds: mean over draws, majority vote, worst draw."""
    by_image: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for record in members:
        predictions, label = getattr(record, predictions_key), record.label
        right = [prediction == label for prediction in predictions]
        by_image[record.image_id].append((sum(right) / len(right), majority_is_right(predictions, label), all(right)))
    means = [[sum(values) / len(values) for values in zip(*seeds, strict=True)] for seeds in by_image.values()]
    return {name: [mean[column] for mean in means] for column, name in enumerate(("mean", "majority", "worst"))}


def percent(values: Sequence[float]) -> float:
    """The mean of values in [0, 1], in percent."""
    return round(100 * sum(values) / len(values), 4)


def interval(values: Sequence[float]) -> list[float]:
    """The 95% Wilson interval of that mean, in percent."""
    return [round(bound, 4) for bound in accuracy_interval(values)]


def compare_pair(decisions: Mapping[str, Mapping[str, bool]], accuracy: str, **condition: Any) -> dict[str, Any] | None:
    """Two models on the images that both met (exact McNemar), or None where there are none.

    Args:
        decisions: by model, in order; whether it is right, by image.
        accuracy: the key of their accuracies in percent.
        condition: the attack, or the radius, under which they are compared.
    """
    images = sorted(set.intersection(*map(set, decisions.values())))
    if not images:
        return None
    right = [[found[image] for image in images] for found in decisions.values()]
    found = {"models": list(decisions), accuracy: [percent(each) for each in right], "num_images": len(images)}
    return condition | found | {"p_value": paired_p_value(*right)}


def length(record: Record, norm: str) -> float:
    """Length of the perturbation that was scored, on 0..255."""
    return record.l2_255 if norm == "l2" else record.linf_255


def norm_of(attacks: dict[tuple, dict[str, Any]], group: tuple) -> str:
    """The norm of the group's epsilon; budgets of different norms cannot be compared."""
    return attacks.get(group, {}).get("norm", "linf")
