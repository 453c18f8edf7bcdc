"""Recomputes what docs/evaluation.md says about other libraries; their code runs where it is installed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from robustness_targets import NoisyTarget, images

from modeling_nim.robustness import attack
from modeling_nim.robustness.records import Record, read_records


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "digits"
X = images(12, 0.2, 0.8)
TARGET = NoisyTarget()
Y = TARGET.logits(X, {}).argmax(1)


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "bench"))
    import peers

    return peers


def test_optimality_by_hand(peers):
    """Three images: the best attack needs 0 (wrong anyway), 2 and 4 of 255; the curves end at 4."""
    record = Record("m", None, "a", "a", "white_box", 2.0, 0, "x", 1, [1], [1])

    def tried(name, image, *wrong_at, clean=1):
        made = [
            replace(record, name=name, image_id=image, epsilon_255=e, clean_predictions=[clean]) for e in (2.0, 4.0)
        ]
        return [replace(one, predictions=[0] if one.epsilon_255 in wrong_at else [1]) for one in made]

    records = tried("best", "p", clean=0) + tried("best", "q", 2.0, 4.0) + tried("best", "r", 4.0)
    records += tried("late", "p", clean=0) + tried("late", "q", 4.0) + tried("late", "r")
    records += tried("blind", "p", clean=0) + tried("blind", "q") + tried("blind", "r")
    # areas: (0 + 2 + 4) / 3 = 2, (0 + 4 + 4) / 3, the same; without an attack 4 * 2/3, the same again
    assert peers.optimalities(records) == {"best": 1.0, "late": pytest.approx(0.0), "blind": pytest.approx(0.0)}
    assert peers.distances(records)["late"] == {"p": 0.0, "q": 4.0, "r": float("inf")}
    more = records + [replace(one, epsilon_255=8.0, predictions=[0]) for one in tried("late", "r")[:1]]
    more += [replace(one, epsilon_255=8.0, predictions=[0]) for one in tried("late", "s")[:1]]
    more += [replace(one, epsilon_255=8.0) for one in tried("best", "s")[:1] + tried("blind", "s")[:1]]
    # the curves end at 8 now: best 2.0, 4.0 and never, late 4, 8 and 8
    best, late = (0 + 2 + 4 + 8) / 4, (0 + 4 + 8 + 8) / 4
    found = peers.optimalities(more)
    assert found["late"] == pytest.approx(1 - (late - best) / (8 * 3 / 4 - best)) and found["best"] == 1.0
    with pytest.raises(ValueError, match="1 of 3 images withstand every attack: name larger epsilons"):
        peers.optimalities([one for one in records if one.name != "best" or one.image_id != "r"] + tried("best", "r"))


def test_the_optimality_that_is_shown_is_that_of_the_records(peers):
    shown = json.loads((RESULTS / "peers_optimality.json").read_text())["optimality"]
    assert shown == pytest.approx(peers.optimalities(read_records(RESULTS / "records/peers_optimality.jsonl.gz")))
    assert max(shown[name] for name in ("PGD, ours", "APGD, ours")) >= 0.95 > shown["FGSM, ours"]


def test_no_peer_leaves_less_than_ours_beyond_chance():
    records = read_records(RESULTS / "records/peers_eot.jsonl.gz")
    right: dict[str, dict[str, float]] = {}
    for record in records:
        share = sum(prediction == record.label for prediction in record.predictions) / len(record.predictions)
        right.setdefault(record.name, {})[record.image_id] = share
    ours = right["PGD, ours"]
    for name in right.keys() - {"none", "PGD, ours", "APGD, ours"}:
        differences = torch.tensor([ours[image] - right[name][image] for image in ours])
        assert float(differences.mean()) < 1.96 * float(differences.std()) / len(differences) ** 0.5 + 0.01, name


def test_radii_are_those_of_another_interval(peers):
    certificates = peers.kept_certificates()
    assert len(certificates) >= 60 and peers.scipy_difference(certificates) < 1e-9
    wrong = [replace(certificates[0], radius=certificates[0].radius + 0.01)]
    assert peers.scipy_difference(wrong) == pytest.approx(0.01, rel=1e-3)


SMOOTHING = """
from scipy.stats import binom_test, norm, beta

class Smooth:
    ABSTAIN = -1
    def __init__(self, base_classifier, num_classes, sigma):
        self.num_classes, self.sigma = num_classes, sigma
    def certify(self, x, n0, n, alpha, batch_size):
        top = self._sample_noise(x, n0, batch_size).argmax()
        count = self._sample_noise(x, n, batch_size)[top]
        low = beta.ppf(alpha, count, n - count + 1)
        return (-1, 0.0) if low <= 0.5 else (top, self.sigma * norm.ppf(low))
"""


def test_their_procedure_gets_our_votes(peers, tmp_path, monkeypatch):
    """With a stand-in that has the interface of `core.py` of locuslab/smoothing."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "core.py").write_text(SMOOTHING)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "core", raising=False)
    certificates = peers.kept_certificates()
    assert peers.smoothing_difference(certificates, tmp_path) < 1e-9
    with pytest.raises(ValueError, match="theirs answers"):
        known = next(item for item in certificates if item.prediction is not None)
        peers.smoothing_difference([replace(known, prediction=None)], tmp_path)
    monkeypatch.delitem(sys.modules, "core")


@pytest.mark.parametrize(
    ("name", "module", "gradients_per_step"),
    [
        ("foolbox_pgd", "foolbox", 1),
        ("secml_pgd", "secmlt", 1),
        ("secml_eot", "secmlt", 1),
        ("art_apgd", "art", None),
        ("foolbox_fmn", "foolbox", None),
    ],
)
def test_attacks_of_others_stay_within_epsilon_and_are_counted(peers, name, module, gradients_per_step):
    pytest.importorskip(module)
    settings = {"steps": 4, "eot_samples": 2, "skip_misclassified": False}
    if gradients_per_step is not None:
        settings["alpha_255"] = 2.0
    state = torch.get_rng_state()
    found = attack(TARGET, X, Y, f"peer_attacks:{name}", epsilon_255=8, **settings)
    assert torch.equal(state, torch.get_rng_state())  # theirs draw from the global generators
    change = (found.images_01 - X).abs().max() * 255
    assert 0 < change <= 8 + 1e-3 and 0 <= found.images_01.min() <= found.images_01.max() <= 1
    expected = {8} if gradients_per_step is not None else set(found.queries)
    assert set(found.queries) == expected and min(found.queries) > 0
