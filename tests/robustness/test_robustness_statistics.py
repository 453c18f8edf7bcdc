"""Intervals, paired tests, alarms, certificates and plans against values worked out elsewhere."""

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from robustness_targets import LuckyTarget, NoisyTarget, QuietTarget, RoundingTarget, SecretlyRandomTarget, images
from scipy.stats import binom, binomtest

from modeling_nim import NIMPurifiedImageClassification
from modeling_nim.robustness.certification import (
    CertifyRecipe,
    certified_comparisons,
    certified_rows,
    certify_image,
    check_certifiable,
    count_votes,
)
from modeling_nim.robustness.checks import inspect_target
from modeling_nim.robustness.cost import cost_table, measure_speed, seconds_per_image
from modeling_nim.robustness.draws import CERTIFY, distinct_seeds, stream_seed
from modeling_nim.robustness.evaluation import attack_images, score_batch
from modeling_nim.robustness.figures import accuracy_against_sigma, accuracy_of_models, certified_accuracy
from modeling_nim.robustness.jobs import Job, plan_jobs
from modeling_nim.robustness.loading import model_hash
from modeling_nim.robustness.protocols import protocol, resolve
from modeling_nim.robustness.recipes import AttackRecipe, AttackRunRecipe, EvaluatedModelRecipe
from modeling_nim.robustness.record_file import plan_units
from modeling_nim.robustness.records import Certificate, Record
from modeling_nim.robustness.scores import majority_is_right
from modeling_nim.robustness.statistics import accuracy_interval, certified_radius, lower_bound, paired_p_value
from modeling_nim.robustness.summary import summarize
from modeling_nim.robustness.targets import PurifiedTarget, Target, compiled


def test_intervals():
    # the widths that 50,000, 5,000, 1,024 and 512 images give at 50%
    for number, half_width in ((50_000, 0.44), (5_000, 1.4), (1_024, 3.05), (512, 4.3)):
        low, high = accuracy_interval([1.0, 0.0] * (number // 2))
        assert (high - low) / 2 == pytest.approx(half_width, abs=0.05)
    low, high = accuracy_interval([1.0] * 50)
    assert high == 100 and low == pytest.approx(100 * 50 / (50 + 1.96**2), abs=0.01)  # Wilson at 100%
    assert accuracy_interval([0.5] * 10) == accuracy_interval([1.0, 0.0] * 5)
    with pytest.raises(ValueError, match="no images"):
        accuracy_interval([])


def test_paired_p_value_is_the_sign_test_on_disagreements():
    first = [True] * 40 + [True] * 12 + [False] * 3 + [False] * 5
    second = [True] * 40 + [False] * 12 + [True] * 3 + [False] * 5
    assert paired_p_value(first, second) == pytest.approx(binomtest(3, 15).pvalue)
    assert paired_p_value(first, first) == 1.0
    with pytest.raises(ValueError, match="same images"):
        paired_p_value(first, second[:-1])


def test_certified_radii_are_the_closed_form():
    # all n draws agree: the lower bound is alpha^(1/n), and the radii are those of the literature
    for sigma_255, draws, radius in (
        (30, 1_000, 0.290), (30, 10_000, 0.376), (30, 100_000, 0.448),
        (63.75, 1_000, 0.616), (63.75, 10_000, 0.800), (63.75, 100_000, 0.953), (127.5, 100_000, 1.906),
    ):  # fmt: skip
        assert lower_bound(draws, draws, 0.001) == pytest.approx(0.001 ** (1 / draws))
        assert certified_radius(draws, draws, sigma_255, 0.001) == pytest.approx(radius, abs=6e-4)
    # elsewhere the bound is the p whose chance of so many hits is alpha
    bound = lower_bound(930, 1000, 0.001)
    assert binom.sf(929, 1000, bound) == pytest.approx(0.001, rel=1e-6)
    assert certified_radius(930, 1000, 63.75, 0.001) == pytest.approx(0.25 * _normal_quantile(bound), rel=1e-6)
    assert certified_radius(540, 1000, 30, 0.001) == 0.0  # the bound is below one half: abstain
    with pytest.raises(ValueError, match="0 <= count"):
        lower_bound(11, 10, 0.001)


def _normal_quantile(p):
    low, high = 0.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * (1 + math.erf(middle / math.sqrt(2))) < p else (low, middle)
    return low


def certify_recipe(**keys):
    return CertifyRecipe("out", [EvaluatedModelRecipe("x", "x")], **keys)


def test_votes_are_counted_over_named_draws_whatever_the_micro_batch():
    draws, recipe = range(100, 600), certify_recipe(micro_batch=64)
    image = images(1)[0]
    recipes = [certify_recipe(micro_batch=batch) for batch in (500, 64, 7)]
    counts = [count_votes(LuckyTarget(), image, "a", draws, other) for other in recipes]
    assert counts[0].tolist() == counts[1].tolist() == counts[2].tolist()
    assert counts[0].sum() == 500 and abs(int(counts[0][0]) - 450) < 4 * math.sqrt(500 * 0.09)
    parts = [count_votes(LuckyTarget(), image, "a", part, recipe) for part in (range(100, 260), range(260, 600))]
    assert (parts[0] + parts[1]).tolist() == counts[0].tolist()
    assert count_votes(LuckyTarget(), image, "b", draws, recipe).tolist() != counts[0].tolist()


def test_votes_are_computed_in_the_precision_that_the_recipe_names(purifier, classifier):
    purifier.config.patch_statistics = "noisy"
    target = PurifiedTarget("p", NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30))
    computed = []
    target.model.classifier.classifier.register_forward_hook(lambda _, __, output: computed.append(output.dtype))
    for precision in ("float32", "bf16"):
        count_votes(target, torch.rand(3, 16, 16), "a", range(3), certify_recipe(precision=precision))
    assert computed == [torch.float32, torch.bfloat16]


def test_compiled_votes_are_those_of_the_parts_that_are_compiled_and_afterwards_nothing_is(
    purifier, classifier, monkeypatch
):
    purifier.config.patch_statistics = "noisy"
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)
    targets = [PurifiedTarget("p", model, sigma) for sigma in (30, 60)]  # of one model
    image, recipe = torch.rand(3, 16, 16), certify_recipe()
    before = count_votes(targets[0], image, "a", range(20), recipe)
    compile_it, compiled_functions = torch.compile, []

    def noted(function, **keys):
        compiled_functions.append(function)
        return compile_it(function, backend="eager", **keys)  # traced by dynamo, without a compiler's seconds

    monkeypatch.setattr(torch, "compile", noted)
    with compiled(targets):
        assert torch.equal(count_votes(targets[0], image, "a", range(20), recipe), before)
        assert "reconstruct" in vars(model.purifier) and model.classifier._compiled_call_impl is not None
    assert len(compiled_functions) == 2
    assert "reconstruct" not in vars(model.purifier) and model.classifier._compiled_call_impl is None
    assert torch.equal(count_votes(targets[0], image, "a", range(20), recipe), before)


def test_the_draws_of_a_certificate_are_all_different_to_a_generator_of_32_bits():
    generator = torch.Generator()
    assert torch.rand((), generator=generator.manual_seed(5)) == torch.rand(
        (), generator=generator.manual_seed(5 + 2**40)
    )
    seeds = distinct_seeds(0, "a", "certify", range(300_000))
    assert len({seed % 2**32 for seed in seeds}) == 300_000 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({stream_seed(0, "a", "certify", draw) % 2**32 for draw in range(300_000)}) < 300_000  # these collide
    assert distinct_seeds(0, "a", "certify", range(70, 90)) == seeds[70:90]
    assert distinct_seeds(0, "b", "certify", range(3)) != seeds[:3] != distinct_seeds(1, "a", "certify", range(3))
    # neighbors are as good as independent: 200 x 1,000 products of standard normal numbers
    normal = torch.stack([torch.randn(1000, generator=generator.manual_seed(seed)) for seed in seeds[:201]])
    assert abs(float((normal[1:] * normal[:-1]).mean())) < 4 / 200_000**0.5
    assert abs(float(normal.mean())) < 4 / 201_000**0.5 and abs(float(normal.var()) - 1) < 4 * (2 / 201_000) ** 0.5


def test_a_certificate_needs_an_answer_that_sees_the_noisy_image_alone(purifier, classifier):
    x = torch.rand(2, 3, 16, 16)
    purifier.config.patch_statistics = "noisy"
    target = PurifiedTarget("p", NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30))
    assert check_certifiable(target, x) == 30
    # a purifier that says "noisy" and does otherwise is found out
    target.model.config.purifier_config.patch_statistics = "noisy"
    purifier.config.norm_pix_loss, original = True, purifier.restore
    purifier.restore = lambda degraded, hidden, pixel_values, *rest: (
        original(degraded, hidden, pixel_values, *rest) + pixel_values.mean(dim=(2, 3), keepdim=True)
    )
    with pytest.raises(ValueError, match="depends on more than the noisy image"):
        check_certifiable(target, x)
    purifier.restore = original
    for sigma, message in (("uniform(0, 30)", "one number above 0"), (0, "one number above 0")):
        with pytest.raises(ValueError, match=message):
            check_certifiable(PurifiedTarget("p", target.model, sigma=sigma), x)
    with torch.no_grad():
        classifier.classifier.bias += float("nan")
    with pytest.raises(ValueError, match="p: its logits hold NaN or infinity"):
        check_certifiable(target, x)
    target.model.config.purifier_config.patch_statistics = "input"
    with pytest.raises(ValueError, match='patch_statistics="input"'):
        check_certifiable(target, x)


class ListedTarget(Target):
    """Answers 1 to the draws whose seeds are among `ones`, else 0."""

    name, is_random = "listed", True

    def __init__(self, ones):
        super().__init__()
        self.ones = set(ones)

    def draw(self, seeds, image_shape):
        return {"answers": torch.tensor([int(seed in self.ones) for seed in seeds])}

    def logits(self, images_01, draw):
        return torch.nn.functional.one_hot(draw["answers"], 2).float()


@pytest.mark.parametrize(
    ("selected", "bounding", "top", "count", "prediction"),
    [  # of 5 draws that choose the class and of 20 that bound it, how many say 1
        (3, 20, 1, 20, 1),
        (3, 3, 1, 3, None),  # the class stays what the first draws chose, and the others do not bear it out
        (2, 20, 0, 0, None),
        (2, 0, 0, 20, 0),
    ],
)
def test_the_class_is_chosen_on_draws_that_do_not_bound_it(selected, bounding, top, count, prediction):
    seeds = distinct_seeds(0, "a", CERTIFY, range(25))
    target = ListedTarget(seeds[:selected] + seeds[5 : 5 + bounding])
    recipe = certify_recipe(num_selection_draws=5, num_draws=20, alpha=0.01)
    found = certify_image(target, 51.0, images(1)[0], 1, "a", recipe)
    assert (found.top_class, found.count, found.prediction) == (top, count, prediction)
    # 20 of 20: the bound is 0.01^(1/20), and sigma is 0.2
    expected = 0.2 * NormalDist().inv_cdf(0.01 ** (1 / 20)) if prediction is not None else 0.0
    assert found.radius == pytest.approx(expected, rel=1e-6) and (prediction is None or found.radius > 0.16)


def test_a_wrong_class_is_not_bounded_where_right_ones_alone_are_and_the_accuracies_stay():
    seeds = distinct_seeds(0, "a", CERTIFY, range(25))
    target, found = ListedTarget(seeds), {}
    for bounded in ("all", "right"):
        recipe = certify_recipe(num_selection_draws=5, num_draws=20, alpha=0.01, bounded=bounded)
        found[bounded] = [certify_image(target, 51.0, images(1)[0], label, "a", recipe) for label in (0, 1)]
    assert found["right"][1] == found["all"][1] and found["all"][0].prediction == 1
    wrong = found["right"][0]
    assert (wrong.top_class, wrong.count, wrong.num_draws, wrong.prediction, wrong.radius) == (1, 0, 0, None, 0.0)
    accuracies = {
        bounded: [(row["certified_accuracy"], row["abstained"]) for row in certified_rows(items, [0.0, 0.1, 1.0])]
        for bounded, items in found.items()
    }
    assert accuracies["right"] == accuracies["all"] == [(50.0, 0.0), (50.0, 0.0), (0.0, 0.0)]


def test_certified_rows_count_abstentions_as_mistakes():
    radii = [(1, 1, 0.5), (1, 1, 0.2), (0, 1, 0.9), (None, 1, 0.0)]
    records = [Certificate("m", 30.0, f"{r}", y, 1, 0, 1000, 0.001, prediction=p, radius=r) for p, y, r in radii]
    rows = certified_rows(records, [0.0, 0.25, 0.75])
    assert [row["certified_accuracy"] for row in rows] == [50.0, 25.0, 0.0]
    assert rows[0]["abstained"] == 25.0


def test_certificates_of_two_models_are_compared_on_the_images_of_both():
    def certificates(model, radii):
        return [Certificate(model, 30.0, f"{i}", 1, 1, 0, 1000, 0.001, 1, radius) for i, radius in enumerate(radii)]

    # at 0.5 the second holds six images that the first does not, and no other way round: p = 2 / 2**6
    records = certificates("a", [0.2] * 6 + [0.6] * 2) + certificates("b", [0.6] * 8 + [0.9])
    at_zero, at_half = certified_comparisons(records, [0.0, 0.5])
    assert at_half == {
        "radius_l2": 0.5,
        "models": ["a @ sigma 30", "b @ sigma 30"],
        "certified_accuracy": [25.0, 100.0],
        "num_images": 8,
        "p_value": pytest.approx(0.03125),
    }
    assert (at_zero["certified_accuracy"], at_zero["p_value"]) == ([100.0, 100.0], 1.0)
    others = [Certificate("c", 30.0, "other", 1, 1, 0, 1000, 0.001, 1, 0.5)]
    assert certified_comparisons(certificates("a", [0.2]) + others, [0.0]) == []


def run(targets, attacks, x, labels, epsilons, seeds=(0,), num_draws=3):
    """Records and summary of a small run without files."""
    records, settings = [], {}
    ids = [f"image/{index}" for index in range(len(x))]
    for index in range(len(targets)):
        for seed in seeds:
            jobs = [Job(index, None, "clean", 0.0, seed, len(x))]
            jobs += [
                Job(index, a, threat, e, seed, len(x)) for a in attacks for threat in a.threat_models for e in epsilons
            ]
            clean = {}
            for job in jobs:
                attacked = attack_images(job, targets, x, labels, ids, num_draws, 64)
                lines = score_batch(job, targets, attacked, x, labels, ids, clean, num_draws, 64)
                clean = clean or {line.image_id: line.predictions for line in lines}
                records += lines
                if job.attack is not None:
                    group = lines[0].group
                    settings[group] = {"kind": job.attack.kind} | job.attack.settings(job.epsilon_255)
    models = {target.name: inspect_target(target, x[:4]) for target in targets}
    return records, summarize(records, settings, models, {}).to_json(), settings, models


def alarms(summary):
    return {alarm["alarm"] for alarm in summary["alarms"]}


def test_hidden_gradients_ring():
    target, x = RoundingTarget(), images(60, 0.3, 0.7)
    labels = (target.margin(x) > 0).long()
    attacks = [AttackRecipe("pgd", threat_models=["white_box", "gray_box"], skip_misclassified=False)]
    _, summary, _, _ = run([target], attacks, x, labels, [8.0, 128.0])
    assert {"zero_gradients", "white_box_weaker", "survives_large_epsilon"} <= alarms(summary)
    message = next(alarm for alarm in summary["alarms"] if alarm["alarm"] == "zero_gradients")["message"]
    assert "100.0%" in message


def test_an_honest_defense_rings_nothing():
    target, x = NoisyTarget(), images(80)
    labels = target.logits(x, {}).argmax(1)
    attacks = [AttackRecipe("pgd", threat_models=["white_box", "gray_box"], eot_samples=4)]
    _, summary, _, _ = run([target], attacks, x, labels, [2.0, 128.0])
    assert alarms(summary) == set()
    rows = {(row["threat_model"], row["epsilon_255"]): row for row in summary["rows"]}
    assert (
        rows["white_box", 128.0]["accuracy"] < 5 < rows["white_box", 2.0]["accuracy"] < rows["clean", 0.0]["accuracy"]
    )
    # the worst case over attacks is no better than any of them
    worst = next(w for w in summary["worst_case"] if w["epsilon_255"] == 2.0)
    assert worst["accuracy_majority"] <= min(rows[t, 2.0]["accuracy_majority"] for t in ("white_box", "gray_box"))


def test_budgets_of_different_norms_are_not_compared():
    target, x = NoisyTarget(), images(80)
    labels = target.logits(x, {}).argmax(1)
    attacks = [
        AttackRecipe("pgd", norm="l2", steps=4),  # 8/255 in L2 is next to nothing, 128/255 is half a unit
        AttackRecipe("pgd", threat_models=["gray_box"], steps=4),
        AttackRecipe("patch_mean", threat_models=["gray_box"], steps=4, patch_size=4),
    ]
    _, summary, _, _ = run([target], attacks, x, labels, [8.0])
    rows = {(row["name"], row["threat_model"]): row["accuracy"] for row in summary["rows"]}
    assert rows["pgd-4 l2", "white_box"] > rows["pgd-4", "gray_box"] + 20
    assert "white_box_weaker" not in alarms(summary)
    (worst,) = summary["worst_case"]
    assert worst["norm"] == "linf" and worst["attacks"] == ["patch_mean-4 (gray_box)", "pgd-4 (gray_box)"]
    _, summary, _, _ = run([target], attacks[:1], x, labels, [128.0])
    assert summary["rows"][-1]["accuracy"] > 5 and "survives_large_epsilon" not in alarms(summary)


def test_mean_queries_are_those_of_the_images_that_were_attacked():
    target, x = QuietTarget(), images(30)
    labels = torch.zeros(30, dtype=torch.long)
    records, summary, _, _ = run([target], [AttackRecipe("pgd", steps=10)], x, labels, [8.0])
    assert 0 < sum(record.skipped for record in records) < 30
    assert [row["mean_queries"] for row in summary["rows"]] == [0, 10]


def test_a_secretly_random_model_rings():
    target = SecretlyRandomTarget()
    _, summary, _, _ = run([target], [AttackRecipe("fgsm")], images(8), torch.zeros(8, dtype=torch.long), [1.0])
    assert "undeclared_randomness" in alarms(summary)
    assert inspect_target(QuietTarget(), images(4)) == {"repeatable": True, "continuous": True, "independent": True}
    honest = {"repeatable": True, "draws_differ": True, "continuous": True, "independent": True}
    assert inspect_target(NoisyTarget(), images(4)) == honest


def test_alarms_on_what_records_hold():
    target, x = QuietTarget(), images(10)
    records, summary, settings, models = run([target], [AttackRecipe("pgd")], x, torch.arange(10) % 4, [8.0])
    assert not alarms(summary) & {"beyond_epsilon", "pixels_out_of_range", "step_not_smaller_than_epsilon"}

    def changed(**values):
        altered = [record if record.name == "none" else replace(record, **values) for record in records]
        return alarms(summarize(altered, settings, models, {}).to_json())

    assert "beyond_epsilon" in changed(linf_255=8.01) and "beyond_epsilon" not in changed(linf_255=8.0005)
    assert "pixels_out_of_range" in changed(pixel_max=1.001) and "pixels_out_of_range" in changed(pixel_min=-0.001)
    large = {group: values | {"alpha_255": 8.0} for group, values in settings.items()}
    assert "step_not_smaller_than_epsilon" in alarms(summarize(records, large, models, {}).to_json())


@pytest.mark.parametrize(
    "right, p_value, rings",
    [  # of 30 images, how many both models have right, the first alone, the second alone
        ((10, 4, 2), 0.6875, True),  # 46.7 and 40.0%: two more of six images, as a coin does
        ((10, 8, 0), 2 / 2**8, False),  # all eight images that differ speak for the first
        ((10, 4, 4), 1.0, False),  # equal: nothing to rank
        ((10, 6, 0), 2 / 2**6, False),  # 0.03
        ((10, 5, 0), 2 / 2**5, True),  # 0.06
    ],
)
def test_too_few_images_to_rank_two_models(right, p_value, rings):
    both, first, second = right
    records = [
        Record(name, None, "none", "none", "clean", 0.0, 0, f"image/{index}", 1, [int(hit)], [int(hit)])
        for name, hits in (
            ("a", [index < both + first for index in range(30)]),
            ("b", [index < both or both + first <= index < both + first + second for index in range(30)]),
        )
        for index, hit in enumerate(hits)
    ]
    summary = summarize(records, {}, {}, {}).to_json()
    (comparison,) = summary["comparisons"]
    assert comparison["p_value"] == pytest.approx(p_value, abs=1e-4)
    messages = [alarm["message"] for alarm in summary["alarms"] if alarm["alarm"] == "too_few_images"]
    assert len(messages) == rings
    if rings:
        assert f"a ({100 * (both + first) / 30:.1f}) and b ({100 * (both + second) / 30:.1f};" in messages[0]


def test_the_pair_that_is_named_is_the_farthest_apart():
    records = [
        Record(name, None, "none", "none", "clean", 0.0, 0, f"image/{index}", 1, [0], [int(index < right)])
        for name, right in (("a", 10), ("b", 12), ("c", 15))  # 2 or 5 images differ, p = 0.5 and 0.06
        for index in range(30)
    ]
    (alarm,) = [alarm for alarm in summarize(records, {}, {}, {}).to_json()["alarms"] if "few" in alarm["alarm"]]
    assert "3 pair(s) of models, such as a (33.3) and c (50.0; McNemar p = 0.062)" in alarm["message"]


def test_majority_of_draws():
    assert majority_is_right([1, 1, 0], 1) and not majority_is_right([1, 0, 0], 1)
    assert not majority_is_right([1, 0], 1)  # a tie decides nothing
    assert majority_is_right([1, 1, 0, 2, 3], 1)


def test_rows_average_seeds_per_image():
    def record(image, seed, predictions):
        return Record("m", 30.0, "none", "none", "clean", 0.0, seed, image, 1, predictions, predictions)

    records = [
        record("a", 0, [1, 1, 0]),
        record("a", 1, [1, 1, 1]),
        record("b", 0, [0, 0, 1]),
        record("b", 1, [0, 0, 0]),
    ]
    row = summarize(records, {}, {}, {}).to_json()["rows"][0]
    assert row["accuracy"] == pytest.approx(100 * (5 / 6 + 1 / 6) / 2, abs=1e-3)
    assert row["accuracy_majority"] == 50 and row["accuracy_worst_draw"] == 25
    assert (row["num_images"], row["num_draws"], row["seeds"], row["sigma"]) == (2, 3, [0, 1], 30.0)
    assert row["ci95"] == [round(bound, 4) for bound in accuracy_interval([5 / 6, 1 / 6])]


def test_the_curve_over_sigma_compares_equal_images_alone():
    def lines(sigma, threat, name, epsilon, right):
        return [
            Record("m", sigma, name, name, threat, epsilon, 0, f"{index}", 1, [], [int(hit)])
            for index, hit in enumerate(right)
        ]

    records = lines(30.0, "clean", "none", 0.0, [1, 1, 1, 1]) + lines(75.0, "clean", "none", 0.0, [1, 0])
    records += lines(30.0, "white_box", "pgd-10", 8.0, [0, 1, 1, 1]) + lines(75.0, "white_box", "pgd-10", 8.0, [0, 1])
    axes = accuracy_against_sigma(records).axes[0]
    curves = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    # images 2 and 3 were seen at sigma 30 alone, and do not count
    assert curves == {"m: no attack": [100, 50], "m: white-box": [50, 50]}
    assert "2 images" in axes.get_title()
    with pytest.raises(ValueError, match="two sigmas or more"):
        accuracy_against_sigma(records[:4])
    # a second defense on the same images has curves beside it, one that met other images has none
    others = [replace(record, model="n") for record in records]
    others += [replace(record, model="o", image_id=f"other {record.image_id}") for record in records]
    labels = [line.get_label() for line in accuracy_against_sigma(records + others).axes[0].lines]
    assert labels == ["m: no attack", "n: no attack", "m: white-box", "n: white-box"]


def test_the_bars_of_models_say_what_they_stand_on():
    def row(model, name, threat, epsilon, accuracy, num_images):
        return {
            "model": model, "sigma": None, "name": name, "threat_model": threat, "epsilon_255": epsilon,
            "accuracy": accuracy, "ci95": [accuracy - 5, accuracy + 5], "num_images": num_images,
        }  # fmt: skip

    rows = [row(model, "none", "clean", 0.0, 90.0, 360) for model in ("a", "b")]
    rows += [row("a", "pgd-10", "white_box", 8.0, 50.0, 360), row("b", "pgd-10", "white_box", 8.0, 40.0, 120)]
    rows += [row("a", "square", "black_box", 8.0, 60.0, 128)]
    axes = accuracy_of_models(rows).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [90, 90, 50, 40, 60]
    labels = [label for label in axes.get_legend_handles_labels()[1] if not label.startswith("_")]
    assert labels == [
        "no attack",
        "pgd-10, white-box, 8/255 (120 or 360 images)",
        "square, black-box, 8/255 (128 images)",
    ]
    assert axes.get_title().startswith("360 images") and "not shown" not in axes.get_title()
    many = [row("a", "pgd-10", "white_box", float(epsilon), 1.0, 360) for epsilon in range(1, 11)]
    assert "3 more attacks are not shown" in accuracy_of_models(rows[:1] + many).axes[0].get_title()


def test_the_curve_of_certificates_shows_where_the_draws_end():
    records = [
        Certificate(
            "m", 63.75, f"{p} {r}", label=1, top_class=1, count=0, num_draws=1000, alpha=0.001, prediction=p, radius=r
        )
        for p, r in ((1, 0.6), (1, 0.2), (0, 0.5), (None, 0.0))
    ]
    axes = certified_accuracy(records).axes[0]
    curve, limit = axes.lines
    radii, accuracy = curve.get_xdata(), curve.get_ydata()
    assert accuracy[0] == 50 and accuracy[(radii > 0.2) & (radii < 0.6)].tolist()[0] == 25 and accuracy[-1] == 0
    assert limit.get_xdata()[0] == pytest.approx(0.616, abs=1e-3)
    assert "1,000 draws" in curve.get_label() and "4 images" in curve.get_label()


def test_protocols_say_what_the_bar_says():
    paper = protocol("paper")
    assert [(a.alpha(2), a.steps, a.epsilon_255) for a in paper.attacks[:2]] == [(2, 10, [2]), (0.5, 10, [2])]
    assert (paper.attacks[-1].queries, paper.attacks[-1].epsilon_255, paper.attacks[-1].num_images) == (
        1000,
        [16],
        1024,
    )
    smoke = protocol("smoke")
    assert smoke.num_images == 64 and [a.attack for a in smoke.attacks] == ["pgd"]
    neurips = protocol("neurips")
    assert neurips.sigmas == [70, 140] and [a.attack for a in neurips.attacks] == ["fgsm", "pgd", "autoattack_rand"]
    standard = protocol("standard", sources=["plain"])
    assert (standard.num_images, standard.seeds, standard.num_draws) == (512, [0, 1, 2], 10)
    main = standard.attacks[0]
    assert (main.steps, main.eot_samples, main.restarts, main.epsilon_255) == (100, 20, 2, [2, 4])
    kinds = {a.attack for a in standard.attacks}
    assert kinds == {"pgd", "autoattack_rand", "patch_mean", "features", "transfer", "square"}
    assert any(128 in a.epsilon_255 for a in standard.attacks)
    with pytest.raises(ValueError, match="unknown protocol 'strict'; known: smoke"):
        protocol("strict")


def test_jobs_of_a_plan():
    recipe = AttackRunRecipe(
        "out",
        models=[EvaluatedModelRecipe("noisy", "x"), EvaluatedModelRecipe("quiet", "y")],
        protocol="standard",
        epsilon_255=[8.0],
    )
    targets = [NoisyTarget(), QuietTarget()]
    plan = resolve(recipe, undefended=["quiet"])
    jobs = plan_jobs(plan, targets, 200)
    mine = [(job.label, job.threat_model) for job in jobs if job.target == 0 and job.seed == 0]
    assert ("transfer-100 from quiet", "gray_box") in mine and ("pgd-100", "white_box_known_draw") in mine
    assert mine[0] == ("none", "clean")
    other = [job for job in jobs if job.target == 1 and job.attack is not None]
    assert not {job.threat_model for job in other} & {"gray_box", "white_box_known_draw"}
    assert all(job.attack.eot_samples == 1 for job in other)
    # what differs in its EOT samples alone is one attack to a model without noise
    pgd = [job for job in other if job.attack.attack == "pgd" and (job.epsilon_255, job.seed) == (8, 0)]
    assert sum(job.attack.steps == 20 for job in pgd) == 1
    assert max(job.num_images for job in jobs) == 200
    duplicate = AttackRunRecipe(
        "out", models=recipe.models, attacks=[AttackRecipe("pgd"), AttackRecipe("pgd", alpha_ratio=0.1)]
    )
    with pytest.raises(ValueError, match="two attacks are called 'pgd-10'"):
        resolve(duplicate)


def test_settings_that_set_attacks_apart_are_kept_apart_and_written_down():
    recipe = AttackRunRecipe(
        "out",
        models=[EvaluatedModelRecipe("quiet", "y")],
        attacks=[
            AttackRecipe("torchattacks", name="short", torchattacks_class="PGD", steps=1),
            AttackRecipe("torchattacks", name="long", torchattacks_class="PGD", steps=50, arguments={"alpha": 0.01}),
            AttackRecipe("torchattacks", threat_models=["black_box"], torchattacks_class="Square", queries=70),
        ],
    )
    jobs = plan_jobs(resolve(recipe), [QuietTarget()], 10)
    assert [(job.label, job.threat_model) for job in jobs[1:]] == [
        ("short", "white_box"),
        ("long", "white_box"),
        ("square torchattacks", "black_box"),
    ]
    arguments = [job.attack.settings(4.0)["arguments"] for job in jobs[1:]]
    assert arguments[0] == {"eps": 4 / 255, "alpha": 1 / 255, "steps": 1}
    assert arguments[1] == {"eps": 4 / 255, "alpha": 0.01, "steps": 50}
    assert arguments[2] == {"eps": 4 / 255, "n_queries": 70}
    patches = [AttackRecipe("patch_mean", patch_size=size).settings(4.0) for size in (4, 8)]
    assert patches[0] != patches[1] and patches[1]["patch_size"] == 8


def test_units_cover_every_image_once():
    units = plan_units([10, 4], 4)
    assert [(u.job, u.start, u.stop) for u in units] == [(0, 0, 4), (0, 4, 8), (0, 8, 10), (1, 0, 4)]


def test_the_cost_before_the_start_counts_the_passes():
    target = NoisyTarget()
    speed = {"full_forward": 1.0, "full_gradient": 3.0, "classifier_forward": 0.5, "classifier_gradient": 1.5}
    speeds = {"noisy": speed}

    def seconds(recipe, threat):
        return seconds_per_image(Job(0, recipe, threat, 8.0, 0, 10), [target], speeds, num_draws=10)

    assert seconds_per_image(Job(0, None, "clean", 0.0, 0, 10), [target], speeds, 10) == 10
    assert seconds(AttackRecipe("pgd", steps=5), "white_box") == 5 * 3 + 10
    assert seconds(AttackRecipe("pgd", steps=5), "gray_box") == 5 * 1.5 + 10
    # two restarts are chosen between on 2 x 10 draws, and finding the wrong images costs 10 more
    assert seconds(AttackRecipe("pgd", steps=5, eot_samples=20, restarts=2), "white_box") == 200 * 3 + 10 + 20 + 10
    assert seconds(AttackRecipe("square", queries=500), "black_box") == 500 + 10 + 10
    theirs = AttackRecipe("torchattacks", torchattacks_class="EOTPGD", steps=5, eot_samples=4)
    assert seconds(theirs, "white_box") == 5 * 4 * 3 + 10
    theirs = AttackRecipe("torchattacks", threat_models=["black_box"], torchattacks_class="Square", queries=50)
    assert seconds(theirs, "black_box") == 50 + 10
    text = cost_table([Job(0, AttackRecipe("pgd", steps=5), "white_box", 8.0, 0, 10)], [target], speeds, 10, 2)
    assert "25000.0 s" in text and "about 125 s with 2 process(es)" in text
    assert set(measure_speed(target, images(2), 8)) == set(speed)


def test_model_hash_sees_every_weight(classifier):
    before = model_hash(classifier)
    assert before == model_hash(classifier)
    with torch.no_grad():
        classifier.classifier.bias[2] += 1e-6
    assert model_hash(classifier) != before
