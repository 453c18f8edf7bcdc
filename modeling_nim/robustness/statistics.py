"""Intervals and tests; the formulas are scipy's and statsmodels'."""

from collections.abc import Sequence

from scipy.stats import norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint


def accuracy_interval(per_image: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Wilson interval, in percent, for the mean of per-image accuracies in [0, 1].

    Images are sampled independently; the draws and seeds of an image are not. An average over draws varies less than a
    single yes or no with the same mean, so the binomial interval is, if anything, too wide.
    """
    if not per_image:
        raise ValueError("no images to make an interval from")
    low, high = proportion_confint(sum(per_image), len(per_image), alpha=1 - confidence, method="wilson")
    return 100 * max(0.0, float(low)), 100 * min(1.0, float(high))


def paired_p_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact McNemar test on the same images: how surprising their disagreements are if both models are equally good."""
    if len(first) != len(second):
        raise ValueError(f"paired tests need the same images, got {len(first)} and {len(second)}")
    table = [[0, 0], [0, 0]]
    for a, b in zip(first, second, strict=True):
        table[int(a)][int(b)] += 1
    if table[0][1] + table[1][0] == 0:
        return 1.0
    return float(mcnemar(table, exact=True).pvalue)


def lower_bound(count: int, num_draws: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower bound on a probability, from `count` hits in `num_draws`."""
    if not 0 <= count <= num_draws or num_draws < 1:
        raise ValueError(f"need 0 <= count <= num_draws and num_draws >= 1, got {count} of {num_draws}")
    return float(proportion_confint(count, num_draws, alpha=2 * alpha, method="beta")[0])


def certified_radius(count: int, num_draws: int, sigma_255: float, alpha: float) -> float:
    """L2 radius in [0, 1] units that Cohen et al. 2019 (Algorithm 2) certify; 0.0 means abstain."""
    probability = lower_bound(count, num_draws, alpha)
    return sigma_255 / 255 * float(norm.ppf(probability)) if probability > 0.5 else 0.0
