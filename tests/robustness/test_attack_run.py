"""run_attack.py, run_certify.py and figures.py as users run them, on tiny models."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
import yaml
from conftest import TINY, TINY_DECODER
from matplotlib.figure import Figure

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
)
from modeling_nim.image_processing import image_processor_for
from modeling_nim.robustness import figures
from modeling_nim.robustness.certification import CertifyRecipe
from modeling_nim.robustness.figures import defenses, panel
from modeling_nim.robustness.loading import check_losses
from modeling_nim.robustness.pictures import load_pictures
from modeling_nim.robustness.protocols import resolve
from modeling_nim.robustness.recipes import AttackRecipe, AttackRunRecipe
from modeling_nim.robustness.records import Record, read_records
from modeling_nim.robustness.targets import ClassifierTarget
from modeling_nim.runs.recipe import load_recipe


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A purified model with "input" and one with "noisy" patch statistics, a classifier, a purifier; untrained."""
    parent = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    size = TINY | {"image_size": 16}
    classifier = NIMForImageClassification(NIMClassifierConfig(**size, num_labels=10))
    torch.nn.init.normal_(classifier.classifier.weight)
    parts = {"classifier": classifier}
    for statistics in ("input", "noisy"):
        parts[statistics] = NIMForPreTraining(NIMConfig(**size, **TINY_DECODER, patch_statistics=statistics))
        composed = NIMPurifiedImageClassification.from_parts(parts[statistics], classifier, sigma=60)
        parts[f"purified_{statistics}"] = composed
    for name, model in parts.items():
        model.save_pretrained(parent / name)
        image_processor_for(model.config).save_pretrained(parent / name)
    return parent


@pytest.fixture
def recipe(models):
    return {
        "models": [
            {"name": "original", "path": str(models / "classifier")},
            {"name": "purified", "path": str(models / "purified_input"), "sigma": [0, 60]},
        ],
        "attacks": [
            {"attack": "pgd", "threat_models": ["white_box", "gray_box"], "epsilon_255": [8], "steps": 2},
            {"attack": "square", "epsilon_255": [8], "queries": 6, "num_images": 4},
            {"attack": "torchattacks", "torchattacks_class": "FGSM", "epsilon_255": [8], "sigmas": [60]},
        ],
        "num_images": 10,
        "num_draws": 3,
        "seeds": [0, 1],
        "batch_size": 4,
        "micro_batch": 5,
        "pictures": {"num_images": 2, "attack": "pgd-2", "epsilon_255": 8},
        "reconstruction": {"purifiers": {"tiny": str(models / "input")}, "sigmas_255": [0, 60], "num_images": 2},
    }


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def run_attack(path, content, output_dir, *overrides):
    reference.load_script("run_attack").main([write(path, content), f"output_dir={output_dir}", *overrides])
    return json.loads((output_dir / "summary.json").read_text())


def test_records_summary_and_figures(recipe, tmp_path, capsys):
    summary = run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "per 1,000 images" in printed.split("threat model")[0]  # the cost comes before the table
    records = [json.loads(line) for line in (tmp_path / "out/records.jsonl").read_text().splitlines()]
    # per seed: original: control, pgd, square; each sigma: control, two pgd, square; torchattacks at sigma 60 alone,
    # and on the original
    assert len(records) == 2 * ((10 + 10 + 4 + 10) + (10 + 10 + 10 + 4) + (10 + 10 + 10 + 4 + 10))
    rows = {(r["model"], r["sigma"], r["name"], r["threat_model"]): r for r in summary["rows"]}
    assert len(rows) == len(summary["rows"]) == 4 + 4 + 5
    row = rows["purified", 60.0, "pgd-2", "white_box"]
    mine = [
        r
        for r in records
        if (r["model"], r["sigma"], r["name"], r["threat_model"]) == ("purified", 60.0, "pgd-2", "white_box")
    ]
    share = [sum(p == r["label"] for p in r["predictions"]) / 3 for r in mine]
    assert row["accuracy"] == pytest.approx(100 * sum(share) / 20, abs=1e-3)
    assert (row["num_images"], row["num_draws"], row["seeds"], row["epsilon_255"], row["attack"]) == (
        10,
        3,
        [0, 1],
        8,
        "pgd",
    )
    assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] and row["seconds"] > 0
    assert row["accuracy_worst_draw"] <= row["accuracy_majority"]
    assert row["settings"]["alpha_255"] == 2 and row["settings"]["implementation"] == "nim"
    assert rows["original", None, "none", "clean"]["epsilon_255"] == 0
    assert rows["purified", 60.0, "fgsm torchattacks", "white_box"]["settings"]["implementation"] == "torchattacks"
    assert ("original", None, "pgd-2", "gray_box") not in rows  # it has no defense
    control = {
        (r["model"], r["sigma"], r["seed"], r["image_id"]): r["predictions"] for r in records if r["attack"] == "none"
    }
    for record in records:
        assert (
            record["clean_predictions"] == control[record["model"], record["sigma"], record["seed"], record["image_id"]]
        )
    provenance = summary["provenance"]
    assert provenance["data"].startswith("digits:test:360") and len(provenance["models"]["original"]["hash"]) == 64
    assert provenance["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert provenance["device"] == "cpu" and provenance["seeds"] == [0, 1]
    assert provenance["records_sha256"] == hashlib.sha256((tmp_path / "out/records.jsonl").read_bytes()).hexdigest()

    reference.load_script("reports/figures").main([str(tmp_path / "out")])
    for name in ("panel", "degradations", "models", "sigma_curve", "reconstruction"):
        assert (tmp_path / f"out/{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_is_kept_with_its_records(recipe, tmp_path):
    recipe |= {
        "attacks": recipe["attacks"][:1],
        "num_images": 3,
        "seeds": [0],
        "pictures": None,
        "reconstruction": None,
    }
    summary = run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "out")
    collect = reference.load_script("reports/collect").main
    collect([str(tmp_path / "out"), str(tmp_path / "results/small.json")])
    assert json.loads((tmp_path / "results/small.json").read_text()) == summary
    kept = gzip.decompress((tmp_path / "results/records/small.jsonl.gz").read_bytes())
    assert hashlib.sha256(kept).hexdigest() == summary["provenance"]["records_sha256"]
    with open(tmp_path / "out/records.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="has not the SHA-256"):
        collect([str(tmp_path / "out"), str(tmp_path / "results/small.json")])


def test_figure_3_is_drawn_from_the_purifiers_of_fixed_sigma(tmp_path, monkeypatch):
    names = ["25", "75", "150", "uniform(0, 150)", "gamma(25, 3)"]
    lines = [
        {"model": name, "sigma_255": s, "loss": 0.1 + s, "image_id": i} for name in names for s in (0, 9) for i in "ab"
    ]
    (tmp_path / "reconstruction.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    script = reference.load_script("reports/figures")
    drawn = []
    monkeypatch.setattr(figures, "reconstruction_loss", lambda r: drawn.append(r) or Figure())
    script.main([str(tmp_path)])
    assert [list(dict.fromkeys(r["model"] for r in records)) for records in drawn] == [names, [*names[:3], names[4]]]
    assert (tmp_path / "reconstruction_fixed.png").exists()


def test_figures_that_the_records_do_not_allow_are_left_out(tmp_path):
    with pytest.raises(ValueError, match="no records to draw; models: accuracy of models needs records"):
        figures.figures_of([tmp_path])
    losses = [{"model": "25", "sigma_255": 9, "loss": 0.1, "image_id": "a"}]
    for name, lines in (("first", losses), ("second", [losses[0] | {"model": "75"}])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reconstruction.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = figures.figures_of([tmp_path / "first", tmp_path / "second"])
    assert list(drawn) == ["reconstruction"]
    assert [line.get_label() for line in drawn["reconstruction"].axes[0].get_lines()] == ["25", "75"]


def test_several_defenses_are_shown_beside_one_another(recipe, models, tmp_path):
    masked = NIMForPreTraining(NIMConfig(**TINY | {"image_size": 16}, **TINY_DECODER, degradation="mask"))
    masked.save_pretrained(tmp_path / "masked")
    image_processor_for(masked.config).save_pretrained(tmp_path / "masked")
    recipe["models"].append(
        {"name": "MAE", "purifier": str(tmp_path / "masked"), "classifier": str(models / "classifier")}
    )
    recipe |= {"attacks": recipe["attacks"][:1], "num_images": 3, "seeds": [0], "reconstruction": None}
    run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "out")
    content, pixels = load_pictures(tmp_path / "out")
    for sigma, shown in ((70, "sigma 60"), (10, "sigma 0")):
        figure = defenses(content["entries"], pixels, content["class_names"], sigma)
        top = [axes.get_title() for axes in figure.axes[:7]]
        assert top == [
            "clean image",
            f"purified\nattacked, {shown}",
            "purified\nclean, reconstructed",
            "purified\nattacked, reconstructed",
            "MAE\nattacked, masked",
            "MAE\nclean, reconstructed",
            "MAE\nattacked, reconstructed",
        ]
        assert len(figure.axes) == 2 * 7
    # an answer stands under what the classifier saw, and is that of the records of the pictures
    entry = next(e for e in content["entries"] if (e["model"], e["kind"]) == ("MAE", "clean"))
    caption = f"{content['class_names'][entry['prediction']]} ({100 * entry['confidence']:.0f}%)"
    assert figure.axes[5].get_xlabel() == caption and not figure.axes[4].get_xlabel()
    # the panel: undefended and defended, and a second defense of the same sigma beside them
    second = [e | {"model": "hardened"} for e in content["entries"] if (e["model"], e["sigma"]) == ("purified", "60")]
    for entries, names in ((content["entries"], ["purified"]), (content["entries"] + second, ["purified", "hardened"])):
        figure = panel(entries, pixels, content["class_names"], sigma=70)
        top = ["clean image\noriginal", "attacked image\noriginal"]
        for name in names:
            top += [f"clean, purified\n{name}", f"attacked, degraded\n{name}, sigma 60", f"attacked, purified\n{name}"]
        assert [axes.get_title() for axes in figure.axes[: len(top)]] == top
        assert len(figure.axes) == 2 * len(top) and figure.axes[len(top) - 1].get_xlabel()
    reference.load_script("reports/figures").main([str(tmp_path / "out"), "--sigma", "0"])
    assert (tmp_path / "out/defenses.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_continues_to_the_identical_file(recipe, tmp_path):
    recipe |= {"seeds": [0], "pictures": None, "reconstruction": None}
    path = tmp_path / "recipe.yaml"
    summary = run_attack(path, recipe, tmp_path / "whole")
    whole = (tmp_path / "whole/records.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for number, kept in enumerate((b"".join(lines[:10]) + lines[10][:37], b"".join(lines[:23]), b"".join(lines[:-1]))):
        directory = tmp_path / f"killed{number}"
        directory.mkdir()
        (directory / "run.json").write_bytes((tmp_path / "whole/run.json").read_bytes())
        (directory / "records.jsonl").write_bytes(kept)
        resumed = run_attack(path, recipe, directory)
        assert (directory / "records.jsonl").read_bytes() == whole
        assert without_seconds(resumed) == without_seconds(summary)
    # and other settings are not mixed into the same file
    with pytest.raises(ValueError, match="made with another recipe"):
        run_attack(path, recipe, tmp_path / "whole", "num_draws=2")
    assert (tmp_path / "whole/records.jsonl").read_bytes() == whole


@pytest.mark.parametrize("fault", ["missing", "doubled", "swapped", "broken", "of another image", "surplus"])
def test_records_that_are_not_those_of_the_run_are_refused_by_file_and_line(recipe, tmp_path, fault):
    """By identity and not by count: a line less and another one more would come to the same number."""
    recipe |= {"seeds": [0], "pictures": None, "reconstruction": None}
    path, file = tmp_path / "recipe.yaml", tmp_path / "out/records.jsonl"
    summary = run_attack(path, recipe, tmp_path / "out")
    lines = file.read_bytes().splitlines(keepends=True)
    changed, where = {
        "missing": (lines[:5] + lines[6:], 6),
        "doubled": (lines[:6] + lines[5:], 7),
        "swapped": (lines[:5] + [lines[6], lines[5]] + lines[7:], 6),
        "broken": (lines[:5] + [lines[5][:20] + lines[6]] + lines[6:], 6),
        "of another image": (lines[:5] + [lines[5].replace(b"digits/", b"digits/9")] + lines[6:], 6),
        "surplus": (lines + lines[-1:], len(lines) + 1),
    }[fault]
    file.write_bytes(b"".join(changed))
    with pytest.raises(ValueError, match=rf"out/records.jsonl, line {where} .*head -n {where - 1}"):
        run_attack(path, recipe, tmp_path / "out")
    # and the remedy that it names is one
    file.write_bytes(b"".join(changed[: where - 1]))
    assert without_seconds(run_attack(path, recipe, tmp_path / "out")) == without_seconds(summary)
    assert file.read_bytes() == b"".join(lines)


def test_records_of_earlier_versions_are_read(tmp_path):
    old = {
        "model": "m", "sigma": "75", "attack": "pgd-10 a8", "threat_model": "white_box", "epsilon_255": 8.0, "seed": 0,
        "image_id": "a", "label": 1, "clean_predictions": [1], "predictions": [0], "linf_255": 8.0, "l2_255": 90.0,
        "pixel_min": 0.0, "pixel_max": 1.0, "loss": 2.5, "queries": 10, "zero_gradients": 0, "skipped": False,
    }  # fmt: skip
    (tmp_path / "records.jsonl").write_text(
        json.dumps(old) + "\n" + json.dumps(old | {"attack": "none", "sigma": "mask"})
    )
    first, second = read_records(tmp_path / "records.jsonl")
    assert (first.attack, first.name, first.sigma, second.attack, second.sigma) == (
        "pgd",
        "pgd-10 a8",
        75.0,
        "none",
        "mask",
    )
    assert Record.from_json(first.to_json()) == first and first.to_json().keys() - old.keys() == {"name"}
    (tmp_path / "records.jsonl").write_text('{"model": \n')
    with pytest.raises(ValueError, match="records.jsonl, line 1 is broken"):
        read_records(tmp_path / "records.jsonl")


def without_seconds(summary):
    summary = json.loads(json.dumps(summary))
    for row in summary["rows"]:
        row.pop("seconds")
    summary["provenance"].pop("num_processes")
    return summary


def test_two_processes_give_the_single_processs_file(recipe, tmp_path):
    recipe |= {"seeds": [0], "pictures": None, "reconstruction": None}
    single = run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "single")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(ROOT / "scripts/run_attack.py"), str(tmp_path / "recipe.yaml"), f"output_dir={tmp_path / 'double'}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    double = json.loads((tmp_path / "double/summary.json").read_text())
    assert double["provenance"]["num_processes"] == 2
    assert (tmp_path / "double/records.jsonl").read_bytes() == (tmp_path / "single/records.jsonl").read_bytes()
    assert without_seconds(double) == without_seconds(single)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attcks": []}, "unknown recipe key 'attcks'"),
        ({"models": [{"name": "a", "path": "outputs/nothing/here"}]}, "there is no model directory"),
        ({"models": [{"name": "a", "path": "CLASSIFIER", "sigma": 30}]}, "has no purifier"),
        ({"models": [{"name": "a", "path": "PURIFIED", "sigma": -1}]}, "sigma must be >= 0"),
        ({"models": [{"name": "a", "purifier": "PURIFIED"}]}, "either 'path', or both"),
        ({"models": [{"name": "a", "purifier": "CLASSIFIER", "classifier": "CLASSIFIER"}]}, "model, no purifier"),
        ({"attacks": [{"attack": "square", "threat_models": ["white_box"]}]}, "not defined for threat model"),
        ({"attacks": [{"attack": "transfer", "source": "nobody"}]}, "names model 'nobody'"),
        ({"attacks": [{"attack": "torchattacks", "torchattacks_class": "PDG"}]}, "torchattacks has no class"),
        ({"attacks": []}, "neither a protocol nor attacks"),
        ({"attacks": [{"attack": "pgd", "steps": 0}]}, "'attacks.0.steps' must be at least 1"),
        ({"attacks": [{"attack": "pgdd"}]}, "unknown attack 'pgdd' .did you mean 'pgd'"),
        ({"attacks": [{"attack": "transfer"}]}, "'transfer' needs 'source'"),
        ({"attacks": [{"attack": "pgd", "loss": "cee"}]}, "unknown loss 'cee'; known: ce, dlr, margin"),
        ({"attacks": [{"attack": "pgd", "alpha_ratio": 0.0}]}, "'attacks.0.alpha_ratio' must be above 0, got 0.0"),
        ({"attacks": [{"attack": "pgd", "epsilon_255": [float("nan")]}]}, "finite number"),
        ({"attacks": [{"attack": "pgd", "epsilon_255": [float("inf")]}]}, "finite number"),
        ({"attacks": [{"attack": "nowhere.to:be_found"}]}, "No module named 'nowhere'"),
        ({"attacks": [{"attack": "math:fsumm"}]}, "module 'math' has no function 'fsumm'"),
        ({"epsilon_255": [float("nan")], "protocol": "smoke"}, "finite number"),
        ({"attacks": [{"attack": "apgd_ce", "steps": 1}]}, "steps must be at least 2"),
    ],
)
def test_bad_recipes_are_refused_before_anything_is_written(recipe, models, tmp_path, change, message):
    recipe |= {"pictures": None, "reconstruction": None} | change
    paths = {"CLASSIFIER": str(models / "classifier"), "PURIFIED": str(models / "purified_input")}
    for model in recipe["models"]:
        model |= {key: paths.get(value, value) for key, value in model.items() if isinstance(value, str)}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_recipe_of_the_repository_can_be_read():
    """Of the digits and the protocols; tests/reports reads those of the paper's data sets with their overrides."""
    schemas = {
        "pretrain": reference.load_script("run_pretrain").PretrainRecipe,
        "finetune": reference.load_script("run_finetune").FinetuneRecipe,
        "attack": AttackRunRecipe,
        "certify": CertifyRecipe,
    }
    recipes = dict.fromkeys(ROOT.glob("scripts/recipes/protocols/*.yaml"), AttackRunRecipe)
    recipes |= {path: schemas[path.stem.partition("_")[0]] for path in ROOT.glob("scripts/recipes/digits/*.yaml")}
    assert set(recipes.values()) == set(schemas.values())
    for path, schema in recipes.items():
        recipe = load_recipe(path, schema)
        assert schema is not AttackRunRecipe or resolve(recipe).attacks
        assert path.parent.name == "protocols" or recipe.data.source == "digits"


def test_a_model_for_fewer_classes_than_the_data_have_is_refused(recipe, classifier, tmp_path):
    classifier.save_pretrained(tmp_path / "five")
    image_processor_for(classifier.config).save_pretrained(tmp_path / "five")
    recipe["models"] = [{"name": "five", "path": str(tmp_path / "five")}]
    with pytest.raises(ValueError, match="tells 5 classes apart, the data have 10"):
        run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "out")


def test_a_model_that_calls_classes_by_other_numbers_than_the_data_is_refused(recipe, classifier, tmp_path):
    names = "zero 1 2 3 4 5 6 7 9 8".split()
    config = type(classifier.config)(**classifier.config.to_dict() | {"id2label": dict(enumerate(names))})
    type(classifier)(config).save_pretrained(tmp_path / "moved")
    recipe["models"] = [{"name": "moved", "path": str(tmp_path / "moved")}]
    with pytest.raises(ValueError, match="class 8 of the data is '8', which moved calls class 9"):
        run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dlr_loss_is_refused_to_two_classes_before_the_run(classifier):
    target = ClassifierTarget("two", classifier, [0.5] * 3, [0.5] * 3)
    classifier.config.num_labels = 2
    check_losses([target], [AttackRecipe("pgd"), AttackRecipe("apgd_ce")])
    for recipe in (AttackRecipe("apgd_dlr"), AttackRecipe("autoattack_rand"), AttackRecipe("pgd", loss="dlr")):
        with pytest.raises(ValueError, match="needs 3 classes for its DLR loss, two has 2"):
            check_losses([target], [recipe])


def test_attacks_of_torchattacks_run_beside_ours(recipe, tmp_path):
    settings = {"epsilon_255": [8], "models": ["original", "purified"], "sigmas": [60]}
    theirs = {"attack": "torchattacks", **settings}
    recipe |= {
        "attacks": [
            {**theirs, "torchattacks_class": "PGD", "threat_models": ["white_box", "gray_box"], "steps": 3},
            {**theirs, "torchattacks_class": "Square", "threat_models": ["black_box"], "queries": 10},
            {**settings, "attack": "pgd", "threat_models": ["white_box", "gray_box"], "steps": 3},
        ],
        "seeds": [0],
        "pictures": None,
        "reconstruction": None,
    }
    summary = run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "out")
    rows = {(row["model"], row["attack"], row["name"], row["threat_model"]): row for row in summary["rows"]}
    for model in ("original", "purified"):
        square = rows[model, "square", "square torchattacks", "black_box"]
        assert square["settings"]["arguments"] == {"eps": 8 / 255, "n_queries": 10}
        pgd = rows[model, "pgd", "pgd torchattacks", "white_box"]
        assert pgd["settings"]["arguments"] == {"eps": 8 / 255, "alpha": 2 / 255, "steps": 3}
        ours = rows[model, "pgd", "pgd-3", "white_box"]
        assert pgd["mean_loss"] == pytest.approx(ours["mean_loss"], rel=0.1)
        assert ours["mean_loss"] > ours_clean_loss(summary, model)
    assert ("purified", "pgd", "pgd torchattacks", "gray_box") in rows


def ours_clean_loss(summary, model):
    return next(row["mean_loss"] for row in summary["rows"] if (row["model"], row["attack"]) == (model, "none"))


def test_any_purifier_before_any_classifier(recipe, models, tmp_path):
    recipe["models"] = [
        {"name": "x", "purifier": str(models / "noisy"), "classifier": str(models / "classifier"), "sigma": 20}
    ]
    recipe |= {"attacks": recipe["attacks"][:1], "seeds": [0], "pictures": None, "reconstruction": None}
    summary = run_attack(tmp_path / "recipe.yaml", recipe, tmp_path / "out")
    assert [row["sigma"] for row in summary["rows"]] == [20.0] * 3


def test_certification_refuses_statistics_of_the_input_and_resumes(models, tmp_path, capsys):
    main = reference.load_script("run_certify").main
    content = {
        "models": [{"name": "noisy", "path": str(models / "purified_noisy"), "sigma": [40, 80]}],
        "num_images": 4,
        "num_selection_draws": 10,
        "num_draws": 40,
        "micro_batch": 16,
    }
    path = write(tmp_path / "recipe.yaml", content)
    main([path, f"output_dir={tmp_path / 'whole'}"])
    whole = (tmp_path / "whole/certificates.jsonl").read_bytes()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/run.json").write_bytes((tmp_path / "whole/run.json").read_bytes())
    (tmp_path / "killed/certificates.jsonl").write_bytes(whole[: len(whole) // 2])
    main([path, f"output_dir={tmp_path / 'killed'}"])
    assert (tmp_path / "killed/certificates.jsonl").read_bytes() == whole
    main([path, f"output_dir={tmp_path / 'small'}", "micro_batch=3"])  # memory does not change the counts
    assert (tmp_path / "small/certificates.jsonl").read_bytes() == whole
    main([path, f"output_dir={tmp_path / 'whole'}", "radii=[0, 0.2]"])  # another table of the same certificates
    assert len(json.loads((tmp_path / "whole/certified.json").read_text())["rows"]) == 2 * 2
    main([path, f"output_dir={tmp_path / 'whole'}"])
    assert (tmp_path / "whole/certificates.jsonl").read_bytes() == whole
    rows = json.loads((tmp_path / "whole/certified.json").read_text())["rows"]
    assert len(rows) == 2 * 6 and all(row["num_images"] == 4 for row in rows)
    reference.load_script("reports/figures").main([str(tmp_path / "whole")])
    assert (tmp_path / "whole/certified.png").exists()

    content["models"] = [{"name": "as in the paper", "path": str(models / "purified_input"), "sigma": 40}]
    with pytest.raises(ValueError, match='patch_statistics="input".*no function of the noisy image'):
        main([write(tmp_path / "recipe.yaml", content), f"output_dir={tmp_path / 'refused'}"])
    content["models"] = [{"name": "undefended", "path": str(models / "classifier")}]
    with pytest.raises(ValueError, match="no noise to certify with"):
        main([write(tmp_path / "recipe.yaml", content), f"output_dir={tmp_path / 'refused'}"])
    assert not (tmp_path / "refused").exists()


def test_the_cost_of_votes_is_measured_on_a_released_model(tmp_path, monkeypatch):
    flops = {}
    for votes in (1, 4):
        arguments = ["--model", str(ROOT / "model_cards" / "nim-digits"), "--num_votes", str(votes), "--rounds", "1"]
        arguments += ["--runtimes", "eager", "onnx"]
        monkeypatch.setattr(sys, "argv", ["purify.py", *arguments, "--output", str(tmp_path / "time.json")])
        reference.load_script("bench/purify").main()
        result = json.loads((tmp_path / "time.json").read_text())
        assert (result["image_size"], result["num_votes"]) == (32, votes)
        assert result["ms_per_image"]["purified"] == result["latency_ms"]["purified"] / result["batch_size"] > 0
        assert result["latency_ms_by_runtime"]["eager"] == result["latency_ms"]
        assert result["latency_ms_by_runtime"]["onnx"]["purified"] > 0
        flops[votes] = result["flops_per_image"]
    assert flops[4]["bare"] == flops[1]["bare"]
    assert flops[4]["purified"] == 4 * flops[1]["purified"]
