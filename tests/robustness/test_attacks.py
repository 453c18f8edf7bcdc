"""Attacks against models whose robust accuracy is known."""

import itertools
import random

import numpy as np
import pytest
import reference
import torch
import torchattacks
from conftest import TINY, TINY_DECODER
from robustness_targets import (
    LinearTarget,
    LuckyTarget,
    NoisyTarget,
    QuietTarget,
    RoundingTarget,
    corner_attack,
    images,
    names,
)

from modeling_nim import (
    NIMConfig,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    NIMSimMIMConfig,
    NIMSimMIMForPreTraining,
)
from modeling_nim.robustness import attacks
from modeling_nim.robustness.attacks import ATTACKS
from modeling_nim.robustness.checks import inspect_target
from modeling_nim.robustness.draws import EVALUATE, SELECT, evaluation_order, stream_seed
from modeling_nim.robustness.evaluation import attack_images, score_batch
from modeling_nim.robustness.jobs import Job
from modeling_nim.robustness.loading import load_targets, project_patches_by_matrix_product
from modeling_nim.robustness.oracle import (
    Oracle,
    choose_worst,
    closeness_to_failing,
    cross_entropy_loss,
    decide,
    dlr_loss,
    margin_loss,
    target_forward,
)
from modeling_nim.robustness.recipes import SETTINGS, AttackRecipe, EvaluatedModelRecipe
from modeling_nim.robustness.targets import ClassifierTarget, PurifiedTarget


ALL_ATTACKS = [
    AttackRecipe("fgsm"),
    AttackRecipe("pgd", steps=4, eot_samples=2, restarts=2),
    AttackRecipe("fgsm", norm="l2"),
    AttackRecipe("mim", steps=4, eot_samples=2),
    AttackRecipe("mim", steps=4, norm="l2"),
    AttackRecipe("pgd_weighted", steps=4, eot_samples=3),
    AttackRecipe("pgd", norm="l2", steps=4),
    AttackRecipe("pgd", steps=3, targeted=True),
    AttackRecipe("pgd", threat_models=["white_box_known_draw"], steps=3),
    AttackRecipe("pgd", threat_models=["gray_box"], steps=3),
    AttackRecipe("patch_mean", steps=3, patch_size=4),
    AttackRecipe("apgd_ce", steps=5),
    AttackRecipe("apgd_dlr", steps=5, norm="l2"),
    AttackRecipe("autoattack_rand", steps=4, eot_samples=2),
    AttackRecipe("features", steps=3),
    AttackRecipe("square", queries=20, eot_samples=2),
    AttackRecipe("torchattacks", torchattacks_class="PGD", steps=3),
    AttackRecipe("torchattacks", torchattacks_class="Square", queries=10, arguments={"n_restarts": 1}),
]
ids = [f"{recipe.label} {recipe.threat_models[0]}" for recipe in ALL_ATTACKS]


def attack_and_score(target, recipe, images_01, labels, epsilon_255, num_draws=1, micro_batch=64, seed=0, threat=None):
    """Records and adversarial images of one batch, with the control's predictions beside them."""
    image_ids = names(len(images_01))
    control_job = Job(0, None, "clean", 0.0, seed, len(images_01))
    control = attack_images(control_job, [target], images_01, labels, image_ids, num_draws, micro_batch)
    control = score_batch(control_job, [target], control, images_01, labels, image_ids, {}, num_draws, micro_batch)
    clean = {record.image_id: record.predictions for record in control}
    job = Job(0, recipe, threat or recipe.threat_models[0], epsilon_255, seed, len(images_01))
    attacked = attack_images(job, [target], images_01, labels, image_ids, num_draws, micro_batch)
    records = score_batch(job, [target], attacked, images_01, labels, image_ids, clean, num_draws, micro_batch)
    return records, attacked


def accuracy(records):
    return np.mean([np.mean([p == record.label for p in record.predictions]) for record in records])


def control_accuracy(records):
    return np.mean([np.mean([p == record.label for p in record.clean_predictions]) for record in records])


@pytest.mark.parametrize("recipe", ALL_ATTACKS, ids=ids)
def test_a_model_that_ignores_its_input_keeps_its_accuracy(recipe):
    records, attacked = attack_and_score(
        LuckyTarget(), recipe, images(64), torch.zeros(64, dtype=torch.long), 8, num_draws=10
    )
    assert accuracy(records) == control_accuracy(records)  # the same draws decide both
    if recipe.threat_models[0] != "white_box_known_draw":
        assert abs(accuracy(records) - 0.9) < 4 * (0.9 * 0.1 / 640) ** 0.5
    if recipe.attack == "square":  # one lucky draw does not end the attack
        assert min(attacked.queries) > 20 - 4 and max(attacked.queries) <= 20


@pytest.mark.parametrize("recipe", ALL_ATTACKS, ids=ids)
def test_every_attack_stays_in_its_ball_and_in_the_image_range(recipe):
    target = NoisyTarget()
    records, attacked = attack_and_score(target, recipe, images(8), torch.arange(8) % 4, 16)
    key = "l2_255" if recipe.norm == "l2" else "linf_255"
    assert max(getattr(record, key) for record in records) <= 16 + 1e-4
    assert max(getattr(record, key) for record in records) > 4  # and it does use its budget
    assert attacked.adversarial_01.min() >= 0 and attacked.adversarial_01.max() <= 1
    perturbation = (attacked.adversarial_01 - images(8)).flatten(1) * 255
    for index, record in enumerate(records):
        assert record.linf_255 == pytest.approx(float(perturbation[index].abs().max()), abs=1e-3)
        assert record.l2_255 == pytest.approx(float(perturbation[index].norm()), abs=1e-2)


def test_projection_is_the_nearest_point_of_the_ball():
    flat = torch.zeros(3, 3, 8, 8)
    flat[0, 0, 0, :2], flat[1, 0, 0, :2], flat[2, 0, 0, :2] = (torch.tensor(v) for v in ([3, 4], [0.3, 0.4], [0, 0]))
    in_l2, in_linf = attacks.project(flat, 1.0, "l2"), attacks.project(flat, 1.0, "linf")
    torch.testing.assert_close(in_l2[:, 0, 0, :2], torch.tensor([[0.6, 0.8], [0.3, 0.4], [0, 0]]))
    torch.testing.assert_close(in_linf[:, 0, 0, :2], torch.tensor([[1, 1], [0.3, 0.4], [0, 0]]))
    assert torch.equal(attacks.project(-flat, 1.0, "linf"), -in_linf) and in_l2[..., 2:].abs().max() == 0


@pytest.mark.parametrize("recipe", ALL_ATTACKS, ids=ids)
def test_without_a_budget_the_accuracy_is_the_clean_one(recipe):
    records, attacked = attack_and_score(NoisyTarget(), recipe, images(8), torch.arange(8) % 4, 0.0, num_draws=5)
    assert [record.predictions for record in records] == [record.clean_predictions for record in records]
    assert torch.equal(attacked.adversarial_01, images(8))


@pytest.mark.parametrize("recipe", ALL_ATTACKS, ids=ids)
def test_the_global_generators_are_left_as_they_were(recipe):
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = state()
    attack_and_score(NoisyTarget(), recipe, images(4), torch.arange(4), 8)
    assert state() == before


@pytest.mark.parametrize("recipe", [recipe for recipe in ALL_ATTACKS if recipe.attack != "torchattacks"], ids=ids[:-2])
def test_results_do_not_depend_on_batch_or_micro_batch(recipe):
    target, labels = NoisyTarget(), torch.arange(6) % 4
    whole, attacked = attack_and_score(target, recipe, images(6), labels, 8, num_draws=3)
    _, small = attack_and_score(target, recipe, images(6), labels, 8, num_draws=3, micro_batch=1)
    torch.testing.assert_close(small.adversarial_01, attacked.adversarial_01, atol=1e-6, rtol=0)
    job = Job(0, recipe, recipe.threat_models[0], 8.0, 0, 6)
    alone = attack_images(job, [target], images(6)[4:], labels[4:], names(6)[4:], 3, 64)
    torch.testing.assert_close(alone.adversarial_01, attacked.adversarial_01[4:], atol=1e-6, rtol=0)


def test_every_attack_runs_its_own_function():
    """No two kinds give the same images."""
    target, x, labels = NoisyTarget(), images(40), torch.arange(40) % 4  # so many that AutoAttack takes some of each
    made = {}
    for kind, row in ATTACKS.items():
        if kind in ("torchattacks", "transfer", "features"):  # these have tests of their own
            continue
        fewer = {"queries": 40} if kind == "square" else {"patch_size": 4} if kind == "patch_mean" else {}
        settings = {"steps": 5, "eot_samples": 2} if "eot_samples" in row.settings else {"steps": 5}
        settings = {key: value for key, value in settings.items() if key in row.settings} | fewer
        recipe = AttackRecipe(kind, threat_models=[row.threat_models[0]], skip_misclassified=False, **settings)
        made[kind] = attack_and_score(target, recipe, x, labels, 8, num_draws=2)[1].adversarial_01
    for first, second in itertools.combinations(made, 2):
        assert not torch.equal(made[first], made[second]), f"{first} and {second} are one attack"


@pytest.mark.parametrize("kind", ATTACKS)
def test_settings_that_an_attack_does_not_use_are_refused(kind):
    others = {"norm": "l2", "steps": 7, "alpha_255": 1.0, "alpha_ratio": 0.5, "eot_samples": 2, "restarts": 2}
    others |= {"random_start": False, "targeted": True, "loss": "margin", "queries": 50, "patch_size": 4}
    others |= {"source": "m", "torchattacks_class": "PGD", "arguments": {"a": 1}}
    assert set(others) == set(SETTINGS)
    needed = {"transfer": {"source": "m"}, "torchattacks": {"torchattacks_class": "PGD"}}.get(kind, {})
    used = set(ATTACKS[kind].settings)
    for key, value in others.items():
        if key in used:
            recipe = AttackRecipe(kind, **(needed | {key: value}))
            assert getattr(recipe, key) == value
        else:
            with pytest.raises(ValueError, match=f"does not use '{key}'"):
                AttackRecipe(kind, **(needed | {key: value}))
    # and what is used is written down
    written = AttackRecipe(kind, **needed).settings(8.0)
    if kind != "torchattacks":
        assert used - set(written) <= {"alpha_ratio", "patch_size"} and set(written) - used <= {
            "implementation",
            "norm",
        }


def test_settings_that_a_class_of_torchattacks_does_not_use_are_refused():
    recipe = AttackRecipe("torchattacks", torchattacks_class="FGSM", steps=7)
    with pytest.raises(ValueError, match="FGSM does not use 'steps'"):
        recipe.settings(8.0)


def test_labels_say_what_sets_attacks_apart():
    assert AttackRecipe("pgd", steps=40, eot_samples=10, restarts=2, alpha_255=2).label == "pgd-40 eot10 r2 a2"
    assert AttackRecipe("transfer", steps=5, source="m", loss="margin").label == "transfer-5 from m margin"
    assert AttackRecipe("square").label == "square q1000" and AttackRecipe("fgsm", norm="l2").label == "fgsm l2"
    assert AttackRecipe("torchattacks", torchattacks_class="PGD", steps=3).label == "pgd torchattacks"
    assert AttackRecipe("apgd_ce", targeted=True).label == "apgd_ce-10 targeted"
    assert AttackRecipe("pgd", loss="robustness_targets:climbing_loss").label == "pgd-10 climbing_loss"
    assert AttackRecipe("robustness_targets:corner_attack", steps=3).label == "corner_attack-3"


def test_transfer_attacks_the_model_that_it_names():
    source, target = QuietTarget(), LinearTarget()
    x, labels = images(6), torch.arange(6) % 2
    recipe = AttackRecipe("transfer", source="quiet", steps=3, skip_misclassified=False)
    job = Job(1, recipe, "gray_box", 8.0, 0, 6)
    found = attack_images(job, [source, target], x, labels, names(6), 1, 64).adversarial_01
    oracle = Oracle(target_forward(source), labels, names(6), seed=0)
    torch.testing.assert_close(found, attacks.pgd(oracle, x, 8 / 255, 2 / 255, 3), atol=1e-6, rtol=0)


def test_the_attack_on_features_moves_those_of_the_encoder():
    target, x, labels = NoisyTarget(), images(6), torch.arange(6) % 4
    recipe = AttackRecipe("features", steps=3, skip_misclassified=False)
    found = attack_and_score(target, recipe, x, labels, 8)[1].adversarial_01
    clean = target.features(x)
    expected = attacks.random_start(x, 8 / 255, "linf", Oracle(None, labels, names(6), 0).generators(x.device), None)
    for _ in range(3):
        leaf = expected.clone().requires_grad_()
        distance = (target.features(leaf) - clean).square().sum()
        direction = torch.autograd.grad(distance, leaf)[0].sign()
        expected = (x + (expected + 2 / 255 * direction - x).clamp(-8 / 255, 8 / 255)).clamp(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_mim_is_its_algorithm():
    target, x, labels = QuietTarget(), images(5, 0.3, 0.7), torch.arange(5) % 4
    oracle = Oracle(target_forward(target), labels, names(5), seed=0)
    adversarial = attacks.mim(oracle, x, 8 / 255, 2 / 255, 3)
    expected, momentum = x.clone(), torch.zeros_like(x)
    for _ in range(3):
        leaf = expected.clone().requires_grad_()
        gradient = torch.autograd.grad(cross_entropy_loss(target.logits(leaf, {}), labels).sum(), leaf)[0]
        momentum += gradient / gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
        expected = x + (expected + 2 / 255 * momentum.sign() - x).clamp(-8 / 255, 8 / 255)
    torch.testing.assert_close(adversarial, expected, atol=1e-6, rtol=0)


def test_fgsm_under_l2_is_a_step_of_full_l2_length():
    target, x = LinearTarget(), images(5, 0.3, 0.7)
    labels = (target.margin(x) > 0).long()
    _, attacked = attack_and_score(target, AttackRecipe("fgsm", norm="l2"), x, labels, 40)
    direction = torch.where(labels == 1, -1.0, 1.0).view(-1, 1, 1, 1) * target.weight / target.weight.norm()
    torch.testing.assert_close(attacked.adversarial_01, x + 40 / 255 * direction, atol=1e-5, rtol=0)


def test_weighted_gradients_are_the_weighted_mean_over_the_named_draws():
    target, x, labels = NoisyTarget(), images(3), torch.arange(3)
    for micro_batch in (1, 4, 100):
        oracle = Oracle(target_forward(target), labels, names(3), seed=0, eot_samples=5, micro_batch=micro_batch)
        seeds = [oracle.seeds(image, range(5)) for image in range(3)]
        loss, gradient = oracle.gradient(x, weigh=closeness_to_failing)
        for image in range(3):
            leaf = x[image : image + 1].clone().requires_grad_()
            logits = torch.cat([target.logits(leaf, target.draw([seed])) for seed in seeds[image]]).float()
            own = labels[image : image + 1].expand(5)
            share = torch.sigmoid(margin_loss(logits, own)).detach()
            weights = share * (1 - share) / (share * (1 - share)).sum()
            mean = (weights * cross_entropy_loss(logits, own)).sum()
            assert float(loss[image]) == pytest.approx(mean.item(), rel=1e-5)
            torch.testing.assert_close(gradient[image], torch.autograd.grad(mean, leaf)[0][0], atol=1e-5, rtol=1e-4)
    hopeless = closeness_to_failing(torch.tensor([[500.0, 0, 0], [0, 500.0, 0], [1, 1, 0]]), torch.tensor([0, 0, 0]))
    assert (hopeless > 0).all() and hopeless[2] == 0.25  # on the border the weight is largest, and it is never zero


def test_an_attack_and_a_loss_of_ones_own():
    target, x, labels = QuietTarget(), images(6), torch.arange(6) % 4
    named = AttackRecipe("robustness_targets:corner_attack", steps=2, arguments={"share": 0.5}, loss="margin")
    records, attacked = attack_and_score(target, named, x, labels, 8)
    torch.testing.assert_close(attacked.adversarial_01, (x + 0.5 * 8 / 255).clamp(0, 1))
    assert {(record.attack, record.name) for record in records} == {("corner_attack", "corner_attack-2 margin")}
    assert named.settings(8.0)["implementation"] == "robustness_targets:corner_attack"
    assert named.settings(8.0)["arguments"] == {"share": 0.5}
    passed = AttackRecipe(corner_attack, steps=2, arguments={"share": 0.5}, loss=margin_loss)
    assert torch.equal(attack_and_score(target, passed, x, labels, 8)[1].adversarial_01, attacked.adversarial_01)
    assert passed.settings(8.0)["implementation"] == named.settings(8.0)["implementation"]
    with pytest.raises(ValueError, match="does not use 'patch_size'"):
        AttackRecipe("robustness_targets:corner_attack", patch_size=4)
    with pytest.raises(ValueError, match="takes no argument 'shares'"):
        AttackRecipe("robustness_targets:corner_attack", arguments={"shares": 0.5})
    with pytest.raises(ValueError, match="a black box gives no gradients"):
        recipe = AttackRecipe(attacks.mim, threat_models=["black_box"], skip_misclassified=False)
        attack_and_score(target, recipe, x, labels, 8)
    # the attack climbs the loss that it is given
    recipe = AttackRecipe("pgd", loss="robustness_targets:climbing_loss", random_start=False, alpha_ratio=1.0, steps=1)
    climbed = attack_and_score(target, recipe, x, labels, 8)[1].adversarial_01
    leaf = x.clone().requires_grad_()
    direction = torch.autograd.grad(target.logits(leaf, {})[:, 2].sum(), leaf)[0].sign()
    torch.testing.assert_close(climbed, (x + 8 / 255 * direction.float()).clamp(0, 1))


LINEAR_ATTACKS = [
    AttackRecipe("fgsm"),
    AttackRecipe("mim", steps=10),
    AttackRecipe("pgd", steps=10),
    AttackRecipe("apgd_ce", steps=20),
    AttackRecipe("torchattacks", torchattacks_class="FGSM"),
]


@pytest.mark.parametrize("recipe", LINEAR_ATTACKS, ids=[recipe.label for recipe in LINEAR_ATTACKS])
def test_a_linear_model_loses_exactly_what_its_closed_form_says(recipe):
    target, x = LinearTarget(), images(200, 0.3, 0.7)  # far enough from 0 and 1 for the ball to fit
    labels = (target.margin(x) > 0).long()
    epsilon_255 = 2.0
    closed_form = target.margin(x).abs() > epsilon_255 / 255 * target.weight.abs().sum()
    records, _ = attack_and_score(target, recipe, x, labels, epsilon_255)
    assert [record.predictions[0] == record.label for record in records] == closed_form.tolist()
    assert 0.1 < closed_form.float().mean() < 0.9


def test_a_linear_model_under_l2():
    target, x = LinearTarget(), images(200, 0.3, 0.7)
    labels = (target.margin(x) > 0).long()
    closed_form = target.margin(x).abs() > 40 / 255 * target.weight.norm()
    for recipe in (AttackRecipe("pgd", norm="l2", steps=20), AttackRecipe("apgd_ce", norm="l2", steps=20)):
        records, _ = attack_and_score(target, recipe, x, labels, 40.0)
        assert [record.predictions[0] == record.label for record in records] == closed_form.tolist()
    assert 0.1 < closed_form.float().mean() < 0.9


def test_pgd_agrees_with_torchattacks(classifier):
    target = ClassifierTarget("tiny", classifier, [0.5] * 3, [0.5] * 3)
    images_01, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 5
    model = torch.nn.Sequential()
    model.forward = lambda x: target.logits(x, {})
    model.register_parameter("anchor", torch.nn.Parameter(torch.zeros(())))
    theirs = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=True)
    torch.manual_seed(5)
    start = (images_01 + torch.empty_like(images_01).uniform_(-8 / 255, 8 / 255)).clamp(0, 1)
    torch.manual_seed(5)
    expected = theirs(images_01, labels)
    oracle = Oracle(target_forward(target), labels, names(6), seed=0)
    ours = attacks.pgd(oracle, images_01, 8 / 255, 2 / 255, 10, start_01=start)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    assert (ours - start).abs().max() > 4 / 255


def test_apgd_and_square_leave_what_those_of_torchattacks_leave():
    target, x = QuietTarget(), images(300)
    labels = target.logits(x, {}).argmax(1)
    theirs = {"torchattacks_class": "APGD", "steps": 20}
    pairs = [
        (AttackRecipe("pgd"), AttackRecipe("torchattacks", torchattacks_class="PGD")),
        (AttackRecipe("apgd_ce", steps=20), AttackRecipe("torchattacks", **theirs)),
        (AttackRecipe("apgd_dlr", steps=20), AttackRecipe("torchattacks", **theirs, arguments={"loss": "dlr"})),
        (AttackRecipe("square", queries=200), AttackRecipe("torchattacks", torchattacks_class="Square", queries=200)),
    ]
    for pair in pairs:
        ours, peer = (accuracy(attack_and_score(target, recipe, x, labels, 4)[0]) for recipe in pair)
        assert 0.1 < ours < 0.9  # an attack that did nothing would agree, too
        # 0.08: 95% of the differences of 300 independent images. torchattacks' squares omit the last row and column
        assert abs(ours - peer) < 0.08, f"{pair[0].label}: {ours}, torchattacks {peer}"


def test_losses_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 1.5, -2.0]])
    labels = torch.tensor([0, 2])
    assert margin_loss(logits, labels).tolist() == [-2.0, 0.5]
    # -(z_y - best other) / (z_1 - z_3)
    assert dlr_loss(logits, labels).tolist() == pytest.approx([-2 / 3, 0.5 / 2])
    assert dlr_loss(10 * logits, labels).tolist() == pytest.approx([-2 / 3, 0.5 / 2])
    assert cross_entropy_loss(logits, labels)[0] == pytest.approx(float(-logits[0].log_softmax(0)[0]))
    with pytest.raises(ValueError, match="at least 3 classes"):
        dlr_loss(logits[:, :2], labels.clamp_max(1))


def test_apgd_checkpoints_are_the_papers():
    assert sorted(attacks._apgd_checkpoints(100))[:8] == [22, 41, 57, 70, 80, 87, 93, 99]


def test_apgd_is_no_weaker_than_pgd():
    target, x, labels = QuietTarget(), images(40), torch.zeros(40, dtype=torch.long)
    oracles = [Oracle(target_forward(target), labels, names(40), seed=0) for _ in range(2)]
    adversarial = {
        "pgd": attacks.pgd(oracles[0], x, 4 / 255, 1 / 255, 20),
        "apgd": attacks.apgd(oracles[1], x, 4 / 255, 20),
    }
    losses = {name: cross_entropy_loss(target.logits(batch, {}), labels) for name, batch in adversarial.items()}
    assert losses["apgd"].mean() >= losses["pgd"].mean() - 1e-3
    assert losses["apgd"].mean() > cross_entropy_loss(target.logits(x, {}), labels).mean() + 0.1


def test_square_lowers_the_margin_within_its_budget():
    target, x = QuietTarget(), images(20)
    labels = target.logits(x, {}).argmax(1)
    oracle = Oracle(target_forward(target), labels, names(20), seed=0, row_loss=margin_loss)
    adversarial = attacks.square(oracle, x, 8 / 255, queries=200, stop_when_wrong=True)
    before, after = (margin_loss(target.logits(batch, {}), labels) for batch in (x, adversarial))
    assert (after > before).all() and (after > 0).any()
    assert oracle.queries.max() <= 200
    assert oracle.queries[after > 0].max() < 200  # a deterministic model needs no query after its first mistake
    inside = (x > 8 / 255) & (x < 1 - 8 / 255)
    torch.testing.assert_close((adversarial - x).abs()[inside], torch.full_like(x, 8 / 255)[inside])


def test_square_averages_over_draws_and_never_stops_early():
    target, x = NoisyTarget(), images(5)
    oracle = Oracle(target_forward(target), torch.arange(5) % 4, names(5), seed=0, eot_samples=4, row_loss=margin_loss)
    attacks.square(oracle, x, 16 / 255, queries=43)
    assert all(35 < spent <= 43 and spent % 4 == 0 for spent in oracle.queries.tolist())  # averages of four


def test_patch_mean_is_constant_over_patches_and_its_gradient_is_the_mean():
    x, target = images(3, 0.3, 0.7), NoisyTarget()
    oracle = Oracle(target_forward(target), torch.arange(3), names(3), seed=0, eot_samples=3)
    perturbation = attacks.pgd(oracle, x, 8 / 255, 2 / 255, 5, patch_size=4) - x
    patches = perturbation.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)  # (B, C, 2, 2, 16)
    torch.testing.assert_close(patches, patches[..., :1].expand_as(patches), atol=1e-6, rtol=0)
    assert perturbation.abs().amax(dim=(1, 2, 3)).allclose(torch.tensor(8 / 255), atol=1e-6)
    with pytest.raises(ValueError, match="do not tile"):
        attacks.average_over_patches(x, 3)


def test_targeted_attacks_reach_the_likeliest_wrong_class():
    target, x = QuietTarget(), images(20)
    logits = target.logits(x, {})
    labels = logits.argmax(1)
    runner_up = logits.topk(2).indices[:, 1]
    records, _ = attack_and_score(target, AttackRecipe("pgd", steps=20, targeted=True), x, labels, 32)
    assert [record.predictions[0] for record in records] == runner_up.tolist()


def test_the_gradient_is_the_exact_mean_over_the_named_draws():
    target, x, labels = NoisyTarget(), images(3), torch.arange(3)
    for micro_batch in (1, 4, 7, 100):
        oracle = Oracle(target_forward(target), labels, names(3), seed=0, eot_samples=5, micro_batch=micro_batch)
        seeds = [oracle.seeds(image, range(5)) for image in range(3)]
        loss, gradient = oracle.gradient(x)
        for image in range(3):
            leaf = x[image : image + 1].clone().requires_grad_()
            rows = [
                cross_entropy_loss(target.logits(leaf, target.draw([seed])), labels[image : image + 1])
                for seed in seeds[image]
            ]
            mean = torch.stack(rows).mean()
            assert float(loss[image]) == pytest.approx(mean.item(), abs=1e-6)
            torch.testing.assert_close(gradient[image], torch.autograd.grad(mean, leaf)[0][0], atol=1e-6, rtol=1e-4)
        asked = seeds + [oracle.seeds(image, range(5)) for image in range(3)]
        assert len({seed for each in asked for seed in each}) == 30  # the next question meets fresh noise


def test_a_model_without_a_graph_has_gradient_zero():
    oracle = Oracle(lambda x, seeds: torch.ones(len(x), 4), torch.arange(3), names(3), seed=0)
    loss, gradient = oracle.gradient(images(3))
    assert loss.tolist() == pytest.approx([np.log(4)] * 3) and not gradient.any()
    assert oracle.zero_gradients.tolist() == [1, 1, 1]


def test_known_draw_is_the_scored_one():
    target, x = NoisyTarget(), images(2)
    oracle = Oracle(target_forward(target), torch.arange(2), names(2), seed=4, known_draw=True)
    for _ in range(2):
        assert oracle.seeds(1, range(1)) == [stream_seed(4, "image/1", EVALUATE, 0)]
        oracle.gradient(x)
    records, attacked = attack_and_score(
        target, AttackRecipe("pgd", threat_models=["white_box_known_draw"]), x, torch.arange(2), 8, num_draws=10, seed=4
    )
    shown = target.logits(
        attacked.adversarial_01, target.draw([stream_seed(4, f"image/{i}", EVALUATE, 0) for i in range(2)])
    )
    assert [record.predictions for record in records] == shown.argmax(1)[:, None].tolist()


def test_the_control_is_made_again_where_it_is_under_way_elsewhere():
    target, x, labels = NoisyTarget(), images(4), torch.arange(4)
    records, attacked = attack_and_score(target, AttackRecipe("pgd", steps=2), x, labels, 8, num_draws=5)
    job = Job(0, AttackRecipe("pgd", steps=2), "white_box", 8, 0, 4)
    assert score_batch(job, [target], attacked, x, labels, names(4), {}, 5, 64) == records


def test_knowing_the_draw_is_worth_more_than_not_knowing_it():
    target, x = NoisyTarget(), images(100)
    clean = decide(target_forward(target), x, names(100), 9, EVALUATE, 50, 256).argmax(-1)
    labels = clean.mode(dim=1).values
    left = {}
    for threat in ("white_box", "white_box_known_draw"):
        recipe = AttackRecipe("pgd", threat_models=[threat], steps=20)
        left[threat] = accuracy(attack_and_score(target, recipe, x, labels, 3, num_draws=10)[0])
    assert left["white_box_known_draw"] < left["white_box"]


def test_images_that_are_wrong_anyway_are_not_attacked():
    target, x = QuietTarget(), images(30)
    labels = torch.zeros(30, dtype=torch.long)
    wrong = target.logits(x, {}).argmax(1) != 0
    records, attacked = attack_and_score(target, AttackRecipe("pgd", steps=10), x, labels, 8)
    assert attacked.skipped == wrong.tolist() and 0 < sum(attacked.skipped) < 30
    assert [record.queries for record in records] == [0 if skipped else 10 for skipped in attacked.skipped]
    assert torch.equal(attacked.adversarial_01[wrong], x[wrong])
    everything, _ = attack_and_score(target, AttackRecipe("pgd", steps=10, skip_misclassified=False), x, labels, 8)
    assert min(record.queries for record in everything) == 10
    assert accuracy(everything) == accuracy(records)


@pytest.mark.parametrize(("threat", "purpose"), [("white_box", SELECT), ("white_box_known_draw", EVALUATE)])
def test_what_is_wrong_anyway_is_found_on_draws_that_will_not_be_scored_unless_these_are_known(threat, purpose):
    target, x, labels = NoisyTarget(), images(60), torch.arange(60) % 4
    recipe = AttackRecipe("pgd", threat_models=[threat], steps=1, skip_misclassified=True)
    _, attacked = attack_and_score(target, recipe, x, labels, 8)
    wrong = {
        name: (decide(target_forward(target), x, names(60), 0, name, 1, 64)[:, 0].argmax(dim=1) != labels).tolist()
        for name in (SELECT, EVALUATE)
    }
    assert attacked.skipped == wrong[purpose] and wrong[SELECT] != wrong[EVALUATE]


def test_restarts_begin_elsewhere_and_meet_other_noise():
    starts, seeds = [], []

    def note(oracle, images_01, epsilon):
        starts.append(attacks.random_start(images_01, epsilon, "linf", oracle.generators(images_01.device), None))
        seeds.append(oracle.seeds(0, range(4)))
        return starts[-1]

    x = images(5, 0.3, 0.7)
    attack_and_score(NoisyTarget(), AttackRecipe(note, restarts=3, skip_misclassified=False), x, torch.arange(5) % 4, 8)
    assert len({seed for each in seeds for seed in each}) == 3 * 4
    moves = torch.stack([(start - x).flatten() for start in starts]) * 255 / 8  # uniform in [-1, 1], 960 of each
    assert (moves @ moves.T / 960 - torch.eye(3) / 3).abs().max() < 0.05


def test_the_worse_restart_is_chosen_per_image():
    target = LinearTarget()
    x = images(10, 0.3, 0.7)
    labels = (target.margin(x) > 0).long()
    direction = torch.where(labels == 1, -1.0, 1.0).view(-1, 1, 1, 1) * target.weight.sign()
    weak, strong = (x + 0.001 * direction).clamp(0, 1), (x + 0.2 * direction).clamp(0, 1)
    mixed = [torch.cat([strong[:5], weak[5:]]), torch.cat([weak[:5], strong[5:]])]
    oracle = Oracle(target_forward(target), labels, names(10), seed=0)
    assert torch.equal(choose_worst(oracle, target_forward(target), mixed, labels, 1), strong)


@pytest.mark.parametrize(("known_draw", "purpose"), [(False, SELECT), (True, EVALUATE)])
def test_restarts_are_judged_on_draws_that_will_not_be_scored_unless_these_are_known(known_draw, purpose):
    target, x, labels = NoisyTarget(), images(40), torch.arange(40) % 4
    candidates = [
        attacks.random_start(x, 24 / 255, "linf", [torch.Generator().manual_seed(i)] * 40, None) for i in (1, 2)
    ]
    oracle = Oracle(target_forward(target), labels, names(40), seed=0, known_draw=known_draw)
    chosen = choose_worst(oracle, target_forward(target), candidates, labels, 3)
    choices = {}
    for name in (SELECT, EVALUATE):
        wrong, margins = [], []
        for candidate in candidates:
            logits = decide(target_forward(target), candidate, names(40), 0, name, 3, 64)  # (B, 3, 4)
            margin = torch.stack([margin_loss(logits[:, draw], labels) for draw in range(3)])  # (3, B)
            wrong.append((margin > 0).sum(dim=0))
            margins.append(margin.mean(dim=0))
        worse = (wrong[1] > wrong[0]) | ((wrong[1] == wrong[0]) & (margins[1] > margins[0]))
        choices[name] = torch.where(worse.view(-1, 1, 1, 1), candidates[1], candidates[0])
    assert torch.equal(chosen, choices[purpose]) and not torch.equal(choices[SELECT], choices[EVALUATE])


def test_rounding_hides_gradients_from_the_white_box_attack_alone():
    target, x = RoundingTarget(), images(60, 0.3, 0.7)
    labels = (target.margin(x) > 0).long()
    white, _ = attack_and_score(target, AttackRecipe("pgd", skip_misclassified=False), x, labels, 8)
    gray, _ = attack_and_score(target, AttackRecipe("pgd", threat_models=["gray_box"]), x, labels, 8)
    assert all(record.zero_gradients == 10 for record in white)
    assert accuracy(gray) < 0.5 < accuracy(white)


def test_a_purified_target_draws_what_the_model_draws(purifier, classifier):
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)
    images_01, seeds = torch.rand(3, 3, 16, 16), [5, 2**62, 7]
    for sigma, votes in ((30, 1), (30, 3), ("uniform(0, 60)", 2)):
        target = PurifiedTarget("p", model, sigma=sigma, num_votes=votes)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        pixel_values = (images_01 - torch.tensor(model.config.image_mean).view(3, 1, 1)) / torch.tensor(
            model.config.image_std
        ).view(3, 1, 1)
        expected = model(pixel_values, sigma=sigma, num_votes=votes, generator=generators).logits
        torch.testing.assert_close(
            target.logits(images_01, target.draw(seeds, images_01.shape[1:])), expected, atol=1e-6, rtol=0
        )
    degraded, purified, logits = PurifiedTarget("p", model, sigma=30).stages(images_01, seeds)
    target = PurifiedTarget("p", model, sigma=30)
    torch.testing.assert_close(
        logits, target.logits(images_01, target.draw(seeds, images_01.shape[1:])), atol=1e-6, rtol=0
    )
    assert purified.min() >= -1e-6 and purified.max() <= 1 + 1e-6 and degraded.max() > 1


@pytest.mark.parametrize("family", ["mae", "simmim", "nim-simmim"])
def test_every_kind_of_purifier_can_be_attacked(family, classifier):
    noise = family == "nim-simmim"
    if family == "mae":
        purifier = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, degradation="mask"))
    else:
        size = {key: value for key, value in TINY.items() if key != "patch_size"} | {
            "patch_size": 4,
            "mask_patch_size": 8,
        }
        purifier = NIMSimMIMForPreTraining(NIMSimMIMConfig(**size, degradation="noise" if noise else "mask"))
    model = NIMPurifiedImageClassification.from_parts(purifier.eval(), classifier, sigma=30)
    target = PurifiedTarget(family, model)
    assert target.is_random and target.sigma == ("30" if noise else "mask")
    x, labels = torch.rand(3, 3, 16, 16), torch.arange(3)
    assert inspect_target(target, x) == {
        "repeatable": True,
        "draws_differ": True,
        "continuous": True,
        "independent": True,
    }
    records, attacked = attack_and_score(target, AttackRecipe("pgd", steps=3, eot_samples=2), x, labels, 8, num_draws=4)
    assert max(record.linf_255 for record in records) == pytest.approx(8, abs=1e-3)
    assert all(record.zero_gradients == 0 for record in records)
    degraded, purified, _ = target.stages(x, [1, 2, 3])
    assert degraded.shape == purified.shape == x.shape


def test_patch_projections_become_matrix_products_of_the_same_value(purifier, classifier):
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)
    x, epsilon = torch.rand(2, 3, 16, 16, requires_grad=True), torch.randn(2, 3, 16, 16)
    before, keys = model(x, epsilon=epsilon).logits, list(model.state_dict())
    gradient = torch.autograd.grad(before.square().sum(), x)[0]
    assert project_patches_by_matrix_product(model) is model
    assert not [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert list(model.state_dict()) == keys
    after = model(x, epsilon=epsilon).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(after.square().sum(), x)[0], gradient, atol=1e-5, rtol=1e-4)
    ordinary = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(3, 4, 2, stride=1))
    project_patches_by_matrix_product(ordinary)  # these overlap, and stay
    assert all(isinstance(module, torch.nn.Conv2d) for module in ordinary)


def test_without_its_purifier_a_purified_model_is_its_classifier(purifier, classifier):
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)
    target = PurifiedTarget("p", model, without_purifier=True)
    assert target.sigma is None and not target.is_random
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(target.logits(x, {}), PurifiedTarget("p", model).classifier_logits(x))


def test_eot_gradients_converge_to_the_expectation_on_the_golden_defense(tmp_path):
    convert = reference.load_script("convert_checkpoint").main
    heads = ["--num_attention_heads", "4", "--decoder_num_attention_heads", "4"]
    for source, file in (("nim-mae", "nim_mae_pretrain.pt"), ("mae", "mae_finetune.pt")):
        convert(
            [
                "--source",
                source,
                "--checkpoint",
                str(reference.GOLDEN / file),
                "--output_dir",
                str(tmp_path / source),
                *heads,
            ]
        )
    recipe = EvaluatedModelRecipe(
        "golden", purifier=str(tmp_path / "nim-mae"), classifier=str(tmp_path / "mae"), sigma=30.0
    )
    (target,), _ = load_targets([recipe], "cpu")
    images_01, labels = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])

    def gradient(samples, seed):
        oracle = Oracle(target_forward(target), labels, names(2), seed=seed, eot_samples=samples, micro_batch=256)
        return oracle.gradient(images_01)[1]

    expectation = gradient(2048, seed=100)

    def error(samples):
        return np.mean([float((gradient(samples, s) - expectation).norm() / expectation.norm()) for s in range(4)])

    errors = {samples: error(samples) for samples in (4, 16, 64, 256)}
    for n in (4, 16, 64):
        assert 1.4 < errors[n] / errors[4 * n] < 2.8  # 1 / sqrt(n): four times the samples halve the error
    assert errors[256] < 0.25


def test_streams_are_apart_and_subsets_nest():
    seeds = {
        stream_seed(s, i, p, d) for s in (0, 1) for i in ("a", "b") for p in ("attack", "evaluate") for d in range(50)
    }
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(0, "a", "attack", 1, 12) != stream_seed(0, "a", "attack", 11, 2)
    order = evaluation_order(names(100))
    assert sorted(order) == list(range(100)) != order
    # an image keeps its place among the others when there are more of them
    assert [index for index in order if index < 50] == evaluation_order(names(50))
