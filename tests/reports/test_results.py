"""Results equal what their records give; the records are committed beside them."""

import gzip
import hashlib
import json
from collections import defaultdict

import pytest
import reference

from modeling_nim.robustness.certification import certified_comparisons, certified_rows
from modeling_nim.robustness.records import Certificate, Record, Row
from modeling_nim.robustness.statistics import accuracy_interval
from modeling_nim.robustness.summary import compare_models
from reports import collect, paper_tables


RESULTS = reference.GOLDEN.parents[2] / "results" / "cifar10"
FILES = sorted(file for file in RESULTS.glob("*.json") if not file.name.startswith("time_"))
RECORDED = sorted(
    path.parents[1] / path.name.replace(".jsonl.gz", ".json") for path in RESULTS.parent.glob("*/records/*.jsonl.gz")
)


def read(file):
    content = gzip.decompress((file.parent / "records" / f"{file.stem}.jsonl.gz").read_bytes())
    return json.loads(file.read_text()), content


def test_every_result_on_cifar10_has_its_records():
    assert set(FILES) <= set(RECORDED)


def test_every_result_on_digits_has_its_records():
    assert set(RESULTS.parent.glob("digits/*.json")) <= set(RECORDED)


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_result_is_made_of_the_records_beside_it(file):
    result, content = read(file)
    assert hashlib.sha256(content).hexdigest() == result["provenance"]["records_sha256"]
    records = [json.loads(line) for line in content.splitlines()]
    if file.stem.startswith("training"):
        found = {row["run"]: row for row in result["rows"]}
        assert list(dict.fromkeys(record["run"] for record in records)) == list(found)
        for run, row in found.items():
            log = [record for record in records if record["run"] == run and "images_per_s" in record]
            steps = [0] + [record["step"] for record in log]  # a line every 10 steps, at a stop, at the end
            assert set(range(0, steps[-1], 10)) <= set(steps) and steps == sorted(set(steps))
            assert row["steps"] == steps[-1]
            images = [(b - a) * line["batch_size"] for a, b, line in zip(steps, steps[1:], log, strict=False)]
            seconds = sum(count / line["images_per_s"] for count, line in zip(images, log, strict=True))
            assert row["seconds"] == pytest.approx(seconds, abs=0.051)
            validated = [r["validation_accuracy"] for r in records if r["run"] == run and "validation_accuracy" in r]
            assert row.get("validation_accuracy", []) == validated
        return
    if file.stem.startswith("certified"):
        certificates = [Certificate.from_json(record) for record in records]
        radii = sorted({row["radius_l2"] for row in result["rows"]})
        assert certified_rows(certificates, radii) == result["rows"]
        assert certified_comparisons(certificates, radii) == result["comparisons"]
        return
    if "psnr_db" in records[0]:
        values = defaultdict(list)
        for record in records:
            values[record["model"], record["sigma_255"]].append(record["psnr_db"])
        found = {(row["model"], row["sigma_255"]): (row["psnr_db"], row["num_images"]) for row in result["rows"]}
        assert found == {key: (pytest.approx(sum(v) / len(v), abs=1e-3), len(v)) for key, v in values.items()}
        return
    attacked = [Record.from_json(record) for record in records]
    assert compare_models(attacked) == result["comparisons"]
    right = defaultdict(list)
    for record in attacked:
        predictions = record.predictions
        right[record.group].append(sum(prediction == record.label for prediction in predictions) / len(predictions))
    assert len(right) == len(result["rows"])
    for row in map(Row.from_json, result["rows"]):
        values = right[row.group]
        assert row.num_images == len(values)
        assert row.accuracy == pytest.approx(100 * sum(values) / len(values), abs=1e-3)
        assert row.ci95 == pytest.approx(accuracy_interval(values), abs=1e-3)


def test_the_tables_beside_the_results_are_up_to_date(tmp_path):
    paper_tables.main(["--dataset", "cifar10", "--output", str(tmp_path / "tables.md")])
    text = (tmp_path / "tables.md").read_text()
    assert text == (RESULTS / "tables.md").read_text(), "run `make cards`"
    assert "missing" not in text


def test_all_results_are_of_test_images_and_no_two_of_other_weights_under_one_name():
    hashes = {}
    for file in FILES:
        provenance = json.loads(file.read_text())["provenance"]
        assert "test:10000:" in provenance["data"]
        for recipe in provenance["recipe"]["models"]:
            for name, model in provenance["models"].items():
                if name.partition(" @ ")[0] == recipe["name"]:
                    paths = (recipe["path"], recipe["purifier"], recipe["classifier"])
                    value = model["hash"] if isinstance(model, dict) else model
                    assert hashes.setdefault(paths, value) == value


def test_the_logs_of_trainings_become_a_result_with_its_records(tmp_path):
    for name, rates in (("first", [320.0, 640.0]), ("second", [64.0])):
        run = tmp_path / name
        run.mkdir()
        (run / "recipe.yaml").write_text("optimization: {batch_size: 32}")
        lines = [{"step": 20 * (number + 1), "images_per_s": rate} for number, rate in enumerate(rates)]
        lines.insert(1, {"step": 20, "validation_accuracy": 50.0})
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = tmp_path / "results" / "training.json"
    collect.main([str(tmp_path / "first"), str(tmp_path / "second"), str(result)])
    rows, content = (
        json.loads(result.read_text()),
        gzip.decompress((result.parent / "records/training.jsonl.gz").read_bytes()),
    )
    assert rows["rows"] == [  # 640 images at 320 a second, then 640 at 640
        {"run": str(tmp_path / "first"), "steps": 40, "seconds": 3.0, "validation_accuracy": [50.0]},
        {"run": str(tmp_path / "second"), "steps": 20, "seconds": 10.0, "validation_accuracy": [50.0]},
    ]
    assert hashlib.sha256(content).hexdigest() == rows["provenance"]["records_sha256"]
    with pytest.raises(ValueError, match="2 runs make one result where they are trainings"):
        collect.main([str(tmp_path / "first"), str(tmp_path), str(result)])
