"""Robust accuracy with confidence intervals, as a metric of the `evaluate` library.

metric = evaluate.load("metrics/robust_accuracy")
metric.compute(predictions=[[3, 3, 5], [1, 1, 1]], references=[3, 1])
"""

import math
from statistics import NormalDist

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Robust accuracy is the share of attacked images that are still classified correctly. A model that is random by design
(a randomized purifier) decides differently from draw to draw, so several predictions per image can be given, each from
fresh noise: the metric then reports the mean over draws, the majority vote, and the worst of the draws.
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions: for each ATTACKED image the predicted class, or a list of k predicted classes, one for each noise draw.
        Every image must have the same k. The draws must be fresh: those the attack has seen are not evidence.
    references: for each image its true class.
    confidence: level of the two-sided intervals, between 0 and 1. Default 0.95.

Returns:
    robust_accuracy: share of right decisions, 0..1; with k draws the mean over images and draws.
    robust_accuracy_interval: [low, high].
    num_images, num_draws: what the numbers rest on.
    With k > 1 draws also, each with its interval:
    majority_vote: share of images whose most frequent prediction is right (a tie counts as wrong).
    worst_of_draws: share of images that are right in every draw.

Intervals are Wilson score intervals with n = number of IMAGES: draws of one image are not further images. For the mean
over draws this is conservative, since averaging can only lower the variance between images.

Examples:
    >>> metric = evaluate.load("metrics/robust_accuracy")
    >>> metric.compute(predictions=[3, 1, 0, 2], references=[3, 1, 0, 0])["robust_accuracy"]
    0.75
"""

_CITATION = """
@article{wilson1927probable,
  title={Probable inference, the law of succession, and statistical inference},
  author={Wilson, Edwin B.},
  journal={Journal of the American Statistical Association},
  volume={22}, number={158}, pages={209--212}, year={1927}
}
"""


def wilson_interval(share: float, num_images: int, confidence: float) -> list[float]:
    """Wilson score interval [low, high] of a share in 0..1 observed on `num_images` independent images."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    center = share + z * z / (2 * num_images)
    half_width = z * math.sqrt(share * (1 - share) / num_images + (z / (2 * num_images)) ** 2)
    scale = 1 + z * z / num_images
    # The ends are exactly 0 and 1 at shares 0 and 1; the formula misses them by rounding only.
    low = 0.0 if share == 0 else (center - half_width) / scale
    high = 1.0 if share == 1 else (center + half_width) / scale
    return [low, high]


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class RobustAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        one_draw = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        several_draws = datasets.Features(
            {"predictions": datasets.Sequence(datasets.Value("int64")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=[one_draw, several_draws],
        )

    def _compute(self, predictions, references, confidence: float = 0.95) -> dict[str, float | int | list[float]]:
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {confidence}; for 95% write 0.95")
        if len(references) == 0:
            raise ValueError("there are no images to score: predictions and references are empty")
        draws_per_image = {np.size(prediction) for prediction in predictions}
        if len(draws_per_image) > 1 or 0 in draws_per_image:
            raise ValueError(
                f"every image needs the same number of draws, at least one; got {sorted(draws_per_image)} draws"
            )
        labels = np.asarray(references)  # (N,)
        predicted = np.asarray(predictions).reshape(len(labels), -1)  # (N, k)
        correct = predicted == labels[:, None]  # (N, k)
        num_images, num_draws = correct.shape
        shares = {"robust_accuracy": correct.mean()}
        if num_draws > 1:
            shares["majority_vote"] = np.mean(
                [_vote(row) == label for row, label in zip(predicted, labels, strict=True)]
            )
            shares["worst_of_draws"] = correct.all(axis=1).mean()
        result: dict[str, float | int | list[float]] = {"num_images": num_images, "num_draws": num_draws}
        for name, share in shares.items():
            result[name] = float(share)
            result[f"{name}_interval"] = wilson_interval(float(share), num_images, confidence)
        return result


def _vote(predicted: np.ndarray) -> int | None:
    """The most frequent class of one image's draws (k,); None where two classes share the first place."""
    classes, counts = np.unique(predicted, return_counts=True)
    winners = classes[counts == counts.max()]
    return int(winners[0]) if len(winners) == 1 else None
