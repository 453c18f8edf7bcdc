"""More planted mistakes of users, through Python and through files: each gives an error, an alarm or a repair."""

import json
import multiprocessing
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from robustness_targets import NoisyTarget, QuietTarget, images
from torch.utils.data import DataLoader, TensorDataset

from modeling_nim import NIMPurifiedImageClassification
from modeling_nim.data import DataRecipe, load_source
from modeling_nim.image_processing import image_processor_for
from modeling_nim.robustness import as_target, attack, certify, evaluate
from modeling_nim.robustness.alarms import of_records
from modeling_nim.robustness.checks import inspect_target
from modeling_nim.robustness.records import Record, read_records
from modeling_nim.robustness.run import look_at_target
from modeling_nim.robustness.targets import Target


ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "model_cards" / "nim-digits"
X = images(20, 0.2, 0.8)
QUIET = QuietTarget()
Y = QUIET.logits(X, {}).argmax(1)


def alarms(model, attacks="pgd", data=(X, Y), epsilon_255=8.0, **others):
    """The alarms of an evaluation, each of which was a warning too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = evaluate(model, data, attacks, epsilon_255=epsilon_255, num_draws=3, **others).alarms
    assert {alarm["alarm"] for alarm in found} == {str(item.message).split(" ")[0] for item in caught}
    return {alarm["alarm"] for alarm in found}


# ---- 1: labels and heads


def test_labels_shifted_by_one_are_warned_of_by_every_function(tmp_path):
    shifted = (Y + 1) % 4
    assert "no_better_than_chance" in alarms(QUIET, data=(X, shifted))
    with pytest.warns(UserWarning, match="no_better_than_chance .quiet.: 0.0% of 20 images"):
        attack(QUIET, X, shifted, "fgsm")
    with pytest.warns(UserWarning, match="no_better_than_chance"):
        certify(QUIET, (X, shifted), 5, num_draws=20, num_images=2, output_dir=tmp_path)
    stored = json.loads((tmp_path / "certified.json").read_text())
    assert [alarm["alarm"] for alarm in stored["alarms"]] == ["no_better_than_chance"]


def test_a_loaded_model_is_held_against_its_card_in_python_too():
    model = NIMPurifiedImageClassification.from_pretrained(RELEASED)
    source = load_source(DataRecipe(source="digits"), "test")
    assert alarms(model, "fgsm", source, 0.5, num_images=40) == set()
    with torch.no_grad():
        model.classifier.classifier.bias[:4] += 100  # the other six are never answered
    assert "below_what_is_stated" in alarms(model, "fgsm", source, 0.5, num_images=60)


def test_two_models_of_one_name_are_refused():
    with pytest.raises(ValueError, match="different names, got .'quiet', 'quiet'.: pass a dictionary"):
        evaluate([QUIET, QuietTarget()], (X, Y), "fgsm")


# ---- 2: processors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5]}, "image_mean .* its processor .0.5.: mend one"),
        ({"image_std": None}, "its processor does not normalize"),
        ({"do_normalize": False}, "its processor does not normalize"),
        ({"do_rescale": False}, "leaves pixels on 0..255"),
    ],
)
def test_processors_that_contradict_the_model_are_refused_in_python_too(tmp_path, changes, message):
    folder = shutil.copytree(RELEASED, tmp_path / "model")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    model = NIMPurifiedImageClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        as_target(model)
    processor = image_processor_for(NIMPurifiedImageClassification.from_pretrained(RELEASED).config)
    for name, value in changes.items():
        setattr(processor, name, value)
    source = load_source(DataRecipe(source="digits"), "test")
    untouched = as_target(NIMPurifiedImageClassification.from_pretrained(RELEASED))
    with pytest.raises(ValueError, match=message):
        evaluate(untouched, source, "fgsm", processor=processor)


# ---- 3: wrong gradients


class Altered(QuietTarget):
    """Right answers whose gradient is another one."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def logits(self, images_01, draw):
        return super().logits(images_01.detach() + self.change(images_01 - images_01.detach()), draw)


@pytest.mark.parametrize("attacks", ["pgd", "fgsm"])
@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        (lambda step: step.detach(), "zero_gradients"),
        (lambda step: 0 * step, "zero_gradients"),
        (lambda step: -step, "attack_without_effect"),
    ],
    ids=["detached", "zero", "sign flipped"],
)
def test_wrong_gradients_ring(attacks, change, alarm):
    assert alarm in alarms(Altered(change), attacks)


def test_two_of_255_is_not_small_where_there_are_many_pixels():
    record = Record("m", None, "pgd", "pgd-10", "white_box", 2.0, 0, "a", 1, [1], [1], linf_255=2.0, loss=0.5)
    control = replace(record, attack="none", name="none", threat_model="clean", epsilon_255=0.0, linf_255=0.0)
    for l2_255, rings in ((110.0, False), (776.0, True)):  # of 32 x 32 and of 224 x 224 pixels
        groups = {control.group: [control], record.group: [replace(record, l2_255=l2_255)]}
        found = {alarm["alarm"] for alarm in of_records(groups, {}, {})}
        assert ("attack_without_effect" in found) is rings


def test_answers_that_are_not_finite_stop_or_ring():
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        evaluate(lambda x: x.flatten(1)[:, :4] / 0, (X, Y), "fgsm")

    class BreaksWhenAttacked(QuietTarget):
        def logits(self, images_01, draw):
            far = (images_01 > 0.805).flatten(1).any(1)  # which X never is
            return super().logits(images_01, draw).masked_fill(far[:, None], float("nan"))

    assert "answers_not_finite" in alarms(BreaksWhenAttacked())


# ---- 4: randomness


class OneDrawForAll(NoisyTarget):
    """Every row of a batch gets the first one's noise: EOT averages over a single draw."""

    def draw(self, seeds, image_shape=(3, 8, 8)):
        return super().draw([seeds[0]] * len(seeds), image_shape)


class SeededByPixels(QuietTarget):
    """Declared deterministic; noise seeded by the image in 8 bits, so that the last bit of a float changes nothing."""

    def logits(self, images_01, draw):
        rows = []
        for row in (255 * images_01.detach()).round().long():
            seed = int((row.flatten() * torch.arange(1, row.numel() + 1)).sum())
            rows.append(0.3 * torch.randn(row.shape, generator=torch.Generator().manual_seed(seed)))
        return super().logits(images_01 + torch.stack(rows), {})


class NormalizedByBatch(QuietTarget):
    """What a batch normalization in training mode does."""

    def logits(self, images_01, draw):
        return super().logits(0.5 + images_01 - images_01.mean(dim=0), draw)


@pytest.mark.parametrize(
    ("target", "alarm"),
    [
        (OneDrawForAll(), "draws_never_differ"),
        (SeededByPixels(), "depends_on_the_last_bit"),
        (NormalizedByBatch(), "depends_on_the_batch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Target) else value,
)
def test_randomness_that_is_not_what_it_says_rings(target, alarm):
    assert alarm in alarms(target, "fgsm")


def test_an_honest_model_passes_every_question():
    assert inspect_target(NoisyTarget(), X[:8]) == {
        "repeatable": True, "draws_differ": True, "continuous": True, "independent": True,
    }  # fmt: skip
    assert inspect_target(QUIET, X[:1]) == {"repeatable": True, "continuous": True, "independent": True}
    known, rings = look_at_target(0, QUIET, _TensorImages(), 64)
    assert known["chance"] == 0.25 and rings == []


class _TensorImages:
    def __len__(self):
        return len(X)

    def batch(self, target, positions):
        return X[list(positions)], Y[list(positions)], [str(position) for position in positions]


# ---- 5: numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, np.float32("nan"), "8", [8.0, 8.0]], ids=str)
def test_numbers_that_mean_nothing_are_refused_in_python(value):
    message = "must be (a finite|at least|above|a number|>= 0)|names 8.0 twice"
    for call in (
        lambda: attack(QUIET, X, Y, "pgd", epsilon_255=value),
        lambda: evaluate(QUIET, (X, Y), "pgd", epsilon_255=value),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    if isinstance(value, list):
        return
    for setting in ("alpha_255", "alpha_ratio"):
        with pytest.raises(ValueError, match=f"{setting} must be"):
            attack(QUIET, X, Y, "pgd", **{setting: value})
    if value != "8":
        with pytest.raises(ValueError, match="sigma_255 of the smoothing noise must be above 0"):
            certify(QUIET, (X, Y), value)
        with pytest.raises(ValueError, match="sigma must be >= 0"):
            as_target(NIMPurifiedImageClassification.from_pretrained(RELEASED), sigma=value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"steps": "3"}, "steps must be a number, got '3'"),
        ({"eot_samples": 0}, "eot_samples must be at least 1"),
        ({"alpha_ratio": 0}, "alpha_ratio must be above 0, got 0"),
        ({"norm": "l3"}, "norm must be 'linf' or 'l2'"),
        ({"threat_model": "white"}, "not defined for threat model 'white'"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"attack": "transfer", "source": "m"}, "tried on another: use evaluate with both"),
        ({"images_01": X.numpy()}, "images_01 must be a float tensor .* got <class 'numpy.ndarray'>"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused_in_python(arguments, message):
    with pytest.raises(ValueError, match=message):
        attack(QUIET, **({"images_01": X, "labels": Y, "attack": "pgd"} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": [0, 0]}, "seeds names 0 twice"),
        ({"seeds": -1}, "seeds must be at least 0"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"protocol": "papr"}, "unknown protocol 'papr'"),
        ({"data": DataLoader(TensorDataset(X, Y, Y))}, "a batch needs images_01 and labels, got 3 things"),
        ({"data": DataLoader([{"images_01": X[0], "name": "a"}])}, "a batch needs images_01 and labels, got the keys"),
        ({"data": DataLoader(TensorDataset(X[:0], Y[:0]))}, "the DataLoader gives no batch"),
        ({"data": DataLoader(TensorDataset(255 * X, Y))}, r"attacks move in \[0, 1\]"),
        ({"data": (X, Y + 3)}, "classes apart, an image has label"),
        ({"data": Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "label": [-1]})}, "labels holds -1"),
        ({"data": Dataset.from_dict({"picture": [1], "label": [1]})}, "rename them to 'image' and 'label'"),
    ],
)
def test_arguments_of_an_evaluation_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(QUIET, attacks="fgsm", **({"data": (X, Y), "processor": lambda *_, **__: None} | arguments))
    with pytest.raises(ValueError, match="sigma_255 of the smoothing noise must be above 0"):
        certify(QUIET, (X, Y), 0)


# ---- 6: records


def evaluated(directory):
    return evaluate(QUIET, (X, Y), "pgd", epsilon_255=8, batch_size=5, output_dir=directory).rows


def test_a_clock_that_was_damaged_is_cut_and_the_settings_are_not(tmp_path):
    rows = evaluated(tmp_path)
    clock = tmp_path / "seconds.jsonl"
    lines = clock.read_bytes().splitlines(keepends=True)
    for damaged in (lines[0] + b"{broken\n" + b"".join(lines[2:]), b"[]\n", b"\xff\n", b'{"job": -1, "seconds": 1}\n'):
        clock.write_bytes(damaged)
        assert [row.accuracy for row in evaluated(tmp_path)] == [row.accuracy for row in rows]
        assert clock.read_bytes() == (lines[0] if damaged.startswith(lines[0]) else b"")
    for damaged in ('{"recipe": ', "[1, 2]", "null"):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(ValueError, match="run.json is broken .*choose another output_dir, or delete it"):
            evaluated(tmp_path)


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"7\n", b"[]\n", b"\n", b'{"name": "pgd"}\n', b"null\n", b"EMPTY"])
def test_a_line_that_is_no_record_is_refused_by_file_and_line(tmp_path, line):
    evaluated(tmp_path)
    file = tmp_path / "records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    if line == b"EMPTY":
        line = json.dumps(json.loads(lines[3]) | {"predictions": []}).encode() + b"\n"
    file.write_bytes(b"".join([*lines[:3], line, *lines[4:]]))
    with pytest.raises(ValueError, match="records.jsonl, line 4 is broken .*head -n 3"):
        evaluated(tmp_path)


def test_compressed_records_that_were_cut_are_refused_by_file_and_line(tmp_path):
    whole = ROOT / "results/digits/records/summary.jsonl.gz"
    assert len(read_records(whole)) == 11416
    content = whole.read_bytes()
    for number, damaged in enumerate((content[:1000], content[:5000] + b"\0" * 100 + content[5100:], b"no gzip")):
        file = tmp_path / f"{number}.jsonl.gz"
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{number}.jsonl.gz, line \d+ is broken .*: make the records again"):
            read_records(file)


def slow(oracle, images_01, epsilon):
    time.sleep(0.3)
    return images_01


def slowly(directory):
    evaluate(QUIET, (X, Y), slow, epsilon_255=8, batch_size=2, output_dir=directory)


def test_two_evaluations_at_once_and_one_that_was_killed(tmp_path):
    records = tmp_path / "killed" / "records.jsonl"
    first = multiprocessing.get_context("fork").Process(target=slowly, args=(tmp_path / "killed",))
    first.start()
    deadline = time.monotonic() + 200
    while not records.exists() or records.read_bytes().count(b"\n") < 24:  # 20 lines of the control, and attacks
        assert first.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ValueError, match=f"in use by process {first.pid} on"):
        evaluated(tmp_path / "killed")
    first.kill()
    first.join()
    assert records.read_bytes().count(b"\n") < 40
    for directory in ("killed", "whole"):
        slowly(tmp_path / directory)
    assert records.read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
    identities = [record.identity for record in read_records(records)]
    assert len(set(identities)) == len(identities) == 40


@pytest.mark.parametrize("finished", [True, False])
def test_an_edited_record_is_refused_whether_its_run_has_ended_or_not(finished, tmp_path):
    evaluated(tmp_path)
    records, summary = tmp_path / "records.jsonl", (tmp_path / "summary.json").read_bytes()
    whole = records.read_bytes()
    lines = whole.decode().splitlines()
    first = json.loads(lines[0])
    if not finished:
        (tmp_path / "summary.json").unlink()
        lines.pop()
    for key, other in (("label", (first["label"] + 1) % 10), ("loss", 7.5)):
        records.write_text("\n".join([json.dumps(first | {key: other}), *lines[1:]]) + "\n")
        if key == "label":
            with pytest.raises(
                ValueError, match=f"line 1 has label {other}, its image in the data has {first['label']}"
            ):
                evaluated(tmp_path)
        elif finished:
            with pytest.raises(ValueError, match="was changed after summary.json was made of it"):
                evaluated(tmp_path)
    records.write_text("\n".join(lines) + "\n")  # as it was, the run goes on
    evaluated(tmp_path)
    assert records.read_bytes() == whole
    assert (
        json.loads(summary)["rows"][0]["accuracy"]
        == json.loads((tmp_path / "summary.json").read_bytes())["rows"][0]["accuracy"]
    )


def test_numbers_in_yaml_are_held_to_the_same_bounds(tmp_path):
    from modeling_nim.robustness.recipes import AttackRunRecipe
    from modeling_nim.runs.recipe import load_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"output_dir": "x", "seeds": [1, 1]}))
    with pytest.raises(ValueError, match="seeds names 1 twice"):
        load_recipe(file, AttackRunRecipe)
    file.write_text(yaml.safe_dump({"output_dir": "x", "attacks": [{"attack": "pgd", "epsilon_255": [4, 4.0]}]}))
    with pytest.raises(ValueError, match="epsilon_255 names 4.0 twice"):
        load_recipe(file, AttackRunRecipe)
