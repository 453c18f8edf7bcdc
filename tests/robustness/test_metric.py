"""The `robust_accuracy` metric folder, loaded the way a user loads it."""

from pathlib import Path

import evaluate
import pytest
from statsmodels.stats.proportion import proportion_confint


FOLDER = Path(__file__).parents[2] / "metrics" / "robust_accuracy"


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    cache = tmp_path_factory.mktemp("metric_cache")
    with pytest.MonkeyPatch.context() as patch:
        # The folder is copied into the dynamic-modules cache on loading: keep the user's own out of the test.
        patch.setattr("evaluate.loading.init_dynamic_modules", lambda: _modules(cache))
        patch.syspath_prepend(str(cache))
        yield evaluate.load(str(FOLDER), cache_dir=str(cache / "data"))


def _modules(cache):
    modules = cache / "evaluate_modules"
    modules.mkdir(exist_ok=True)
    (modules / "__init__.py").touch()
    return str(modules)


@pytest.mark.parametrize("num_right, num_images", [(0, 20), (13, 20), (20, 20), (363, 500)])
def test_one_draw_agrees_with_statsmodels(metric, num_right, num_images):
    predictions = [0] * num_right + [1] * (num_images - num_right)
    result = metric.compute(predictions=predictions, references=[0] * num_images)
    low, high = proportion_confint(num_right, num_images, alpha=0.05, method="wilson")
    assert result["robust_accuracy"] == num_right / num_images
    assert result["robust_accuracy_interval"] == pytest.approx([low, high], abs=1e-9)
    assert (result["num_images"], result["num_draws"]) == (num_images, 1)
    assert "majority_vote" not in result


def test_several_draws_give_mean_vote_and_worst(metric):
    predictions = [[3, 3, 5, 3], [1, 1, 1, 1], [2, 2, 7, 7], [4, 0, 0, 0]]  # right 3/4, 4/4, 2/4 (a tie), 1/4
    result = metric.compute(predictions=predictions, references=[3, 1, 2, 4])
    assert result["robust_accuracy"] == 10 / 16
    assert result["majority_vote"] == 2 / 4
    assert result["worst_of_draws"] == 1 / 4
    assert (result["num_images"], result["num_draws"]) == (4, 4)
    # The interval counts four images, not sixteen draws.
    low, high = proportion_confint(2.5, 4, alpha=0.05, method="wilson")
    assert result["robust_accuracy_interval"] == pytest.approx([low, high])


def test_a_higher_confidence_widens_the_interval(metric):
    arguments = {"predictions": [0] * 6 + [1] * 4, "references": [0] * 10}
    low_95, high_95 = metric.compute(**arguments)["robust_accuracy_interval"]
    low_99, high_99 = metric.compute(**arguments, confidence=0.99)["robust_accuracy_interval"]
    assert low_99 < low_95 < 0.6 < high_95 < high_99


def test_batches_add_up(metric):
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add_batch(predictions=[1, 1], references=[1, 1])
    assert metric.compute()["robust_accuracy"] == 0.75


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"predictions": [0], "references": [0], "confidence": 95}, "for 95% write 0.95"),
        ({"predictions": [[0, 1], [0]], "references": [0, 0]}, "same number of draws"),
        ({"predictions": [[], []], "references": [0, 0]}, "at least one"),
    ],
)
def test_bad_input_is_named(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments)
