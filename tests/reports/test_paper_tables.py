"""The recipes of whole data sets and the map from the paper's rows to them, read by the loaders that will run them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import yaml

from modeling_nim.robustness.certification import CertifyRecipe
from modeling_nim.robustness.protocols import resolve
from modeling_nim.robustness.recipes import AttackRunRecipe
from modeling_nim.runs.recipe import parse_command_line
from modeling_nim.training.models import make_config
from recipes.studies import STUDIES, Column, Row, Step, Study, Table
from reports import paper_tables


ROOT = Path(__file__).parents[2]
every_study = pytest.mark.parametrize(
    ("study", "data_path", "width"),
    [("imagenet", "ILSVRC/imagenet-1k", 768), ("cifar10", "data/cifar10", 128), ("cifar10_full", "data/cifar10", 192)],
)


def rows_of(study):
    return [(table, row) for table in STUDIES[study]().tables for row in table.rows]


def steps_of(study):
    return paper_tables.in_order([row.step for _, row in rows_of(study)])


def load_step(step):
    """The recipe that a step's command line would read."""
    schemas = {"run_attack.py": AttackRunRecipe, "run_certify.py": CertifyRecipe}
    if step.script not in schemas:
        name = {"run_pretrain.py": "PretrainRecipe", "run_finetune.py": "FinetuneRecipe"}[step.script]
        schemas[step.script] = getattr(reference.load_script(step.script.removesuffix(".py")), name)
    return parse_command_line("", schemas[step.script], [*step.arguments])


def test_every_row_of_the_paper_is_there_with_its_numbers():
    """Each row's defense or sigmas, and its numbers in the paper, written down a second time."""
    tables = {table.title.partition(":")[0]: table for table in STUDIES["imagenet"]().tables}
    numbers = {title: {row.labels: tuple(row.paper.values()) for row in table.rows} for title, table in tables.items()}
    assert tables["Table 1"].columns == ("clean", "white_box", "gray_box", "black_box")
    assert numbers["Table 1"] == {
        ("SimMIM", "-"): (83.62, 6.65, 6.65, 3.03),
        ("SimMIM", "mask 0.6"): (43.05, 13.12, 37.65, 49.80),
        ("NIM-SimMIM", "-"): (81.27, 10.91, 10.91, 0.68),
        ("NIM-SimMIM", "sigma 30"): (80.60, 42.38, 65.54, 72.36),
        ("MAE", "-"): (83.05, 3.12, 3.12, 1.17),
        ("MAE", "mask 0.75"): (44.96, 29.79, 39.71, 33.59),
        ("MAE, released", "-"): (83.73, 2.13, 2.13, 1.67),
        ("MAE, released", "mask 0.75, ViT-L with GAN loss"): (65.62, 34.66, 54.22, 56.84),
        ("NIM-MAE", "-"): (81.68, 7.36, 7.36, 2.44),
        ("NIM-MAE", "sigma 30"): (81.30, 43.92, 68.99, 72.85),
        # not the paper's
        ("NIM-MAE with masks (DMAE)", "-"): (),
        ("NIM-MAE with masks (DMAE)", "sigma 30, mask 0.75"): (),
        ("NIM-MAE with masks (DMAE)", "sigma 30, no masks"): (),
    }
    assert all(tables[f"Table {number}"].columns == ("clean", "white_box") for number in (2, 3, 4))
    assert numbers["Table 2"] == {
        ("25", 30): (79.18, 43.38),
        ("75", 80): (73.79, 58.96),
        ("150", 150): (63.46, 52.56),
        ("uniform(0, 100)", 40): (77.15, 45.41),
        ("uniform(0, 150)", 40): (77.42, 45.41),
        ("uniform(0, 250)", 40): (77.44, 44.98),
        ("gamma(15, 3)", 40): (77.82, 45.88),
        ("gamma(25, 3)", 40): (78.21, 45.78),
        ("gamma(40, 2)", 40): (78.42, 44.61),
        ("gamma(2, 50)", 40): (78.15, 42.07),
    }
    assert numbers["Table 3"] == {
        ("25", 30): (80.64, 42.73),
        ("uniform(0, 150)", 30): (81.09, 43.79),
        ("gamma(15, 3)", 30): (81.12, 44.24),
        ("gamma(15, 5)", 30): (81.18, 43.69),
        ("gamma(20, 4)", 30): (81.23, 43.05),
        ("gamma(25, 3)", 30): (81.30, 43.54),
        ("gamma(40, 2)", 30): (81.08, 43.83),
    }
    assert numbers["Table 4"] == {
        ("original images", 40): (78.21, 45.78),
        ("0", 30): (80.98, 42.79),
        ("30", 30): (81.18, 43.22),
        ("uniform(0, 15)", 30): (81.10, 43.03),
        ("uniform(0, 30)", 30): (81.30, 43.54),
        ("uniform(0, 40)", 30): (81.18, 43.46),
        ("uniform(20, 40)", 30): (81.05, 43.40),
        ("uniform(0, 60)", 30): (81.08, 43.12),
        ("gamma(15, 1)", 30): (81.13, 42.25),
        ("gamma(10, 2)", 30): (81.19, 43.46),
        ("gamma(15, 2)", 30): (81.04, 43.52),
        ("gamma(5, 8)", 30): (81.02, 42.97),
    }
    # the paper's other version, whose numbers are not in its text
    assert numbers["NeurIPS protocol"] == {("NIM-MAE", sigma): () for sigma in (None, 70, 140)}
    for table in tables.values():
        for row in table.rows:
            assert set(row.paper) in (set(), set(table.columns))


@every_study
def test_every_recipe_is_read_by_the_script_that_runs_it(study, data_path, width, monkeypatch):
    """All steps of all rows with their overrides, and through them every file of the folder."""
    monkeypatch.chdir(ROOT)
    used = set()
    for step in steps_of(study):
        if step.script == "convert_checkpoint.py":
            options = shlex.split(step.command)[2:]
            arguments = reference.load_script("convert_checkpoint").make_parser().parse_args(options)
            assert arguments.output_dir == step.output_dir
            continue
        recipe = load_step(step)
        assert recipe.output_dir == step.output_dir
        assert recipe.data.path == data_path
        if step.script == "run_pretrain.py":
            assert (make_config(recipe.model).hidden_size == width) is not step.output_dir.endswith("mae_larger")
        used |= {word for word in step.arguments if word.endswith(".yaml")}
    folder = ROOT / "scripts" / "recipes" / study.removesuffix("_full")
    files = {str(file.relative_to(ROOT)) for file in folder.glob("**/*.yaml")}
    unused = {file for file in files if "/full/" not in file or study.endswith("_full")} - used
    assert used <= files
    for file in unused:  # these have no row in the paper's tables: hardening, and the longer study
        assert "/long/" in file or Path(file).name in {
            "attack_hardened.yaml",
            "finetune_hardened.yaml",
            "finetune_adversarial.yaml",
        }
        script = {kind: f"run_{kind}.py" for kind in ("pretrain", "finetune", "attack", "certify")}
        # a recipe of the longer study says in its command what it is stacked on
        command = re.findall(r"scripts/recipes/\S+\.yaml", (ROOT / file).read_text()) if "/long/" in file else [file]
        assert command[-1] == file
        stacked = tuple(command)
        recipe = load_step(Step(script[Path(file).stem.partition("_")[0]], "", stacked))
        assert recipe.data.path == data_path


@every_study
def test_one_output_has_one_command_and_inputs_are_outputs_of_earlier_steps(study, data_path, width, monkeypatch):
    monkeypatch.chdir(ROOT)
    outputs = {}
    for _, row in rows_of(study):
        made = set()
        for step in paper_tables.in_order([row.step]):
            assert outputs.setdefault(step.output_dir, step) == step
            assert {needed.output_dir for needed in step.needs} <= made
            needed = {needed.output_dir for needed in step.needs}
            if step.script in ("run_attack.py", "run_certify.py"):  # what the recipe names on its own as well
                named = re.findall(r"'(outputs/[^']+)'", repr(load_step(step)))
            else:
                named = [word.partition("=")[2] for word in step.arguments if "=outputs/" in word]
            assert {path for path in named if path != step.output_dir} == needed, step.output_dir
            made.add(step.output_dir)


@every_study
def test_the_attack_of_each_row_makes_the_numbers_of_its_columns(study, data_path, width, monkeypatch):
    monkeypatch.chdir(ROOT)
    columns = STUDIES[study]().columns
    for table, row in rows_of(study):
        if not table.columns:
            continue
        recipe = load_step(row.step)
        plan = resolve(recipe)
        model = next(model for model in recipe.models if model.name == row.model)
        sigmas = plan.sigmas if model.sigma is None and plan.sigmas else model.sigmas()
        assert row.sigma in (None, "mask") or row.sigma in sigmas
        for column in (columns[name] for name in table.columns):
            if column.attack == "none":
                continue
            assert any(
                attack.kind == column.attack
                and column.threat_model in attack.threat_models
                and column.epsilon_255 in attack.epsilon_255
                and (column.name or attack.label) == attack.label
                for attack in plan.attacks
            ), (row.labels, column.title)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A root with one result in it."""
    monkeypatch.setattr(paper_tables, "ROOT", tmp_path)

    def row(sigma, model, attack, threat_model, epsilon_255, accuracy, name=None):
        return {
            "model": model,
            "sigma": sigma,
            "attack": attack,
            "name": name or attack,
            "threat_model": threat_model,
            "epsilon_255": epsilon_255,
            "accuracy": accuracy,
            "ci95": [accuracy - 0.4, accuracy + 0.4],
            "num_images": 50000,
        }

    rows = [
        row(None, "undefended", "none", "clean", 0, 81.5),
        row(None, "undefended", "pgd", "white_box", 2, 7.25, "pgd-10 a2"),
        row(None, "undefended", "pgd", "white_box", 2, 6.5, "pgd-10"),
        row(None, "undefended", "square", "black_box", 16, 2.5),
        row(30.0, "defended", "none", "clean", 0, 81.25),
        row(30.0, "defended", "pgd", "white_box", 2, 43.75, "pgd-10 a2"),
    ]
    folder = tmp_path / "results" / "imagenet"
    folder.mkdir(parents=True)
    (folder / "nim_mae.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def test_ours_stand_beside_the_papers(results, capsys):
    paper_tables.main([])
    lines = capsys.readouterr().out.splitlines()
    undefended, defended = [line for line in lines if line.startswith("| NIM-MAE |")][:2]
    assert [cell.strip() for cell in undefended.split("|")[1:-1]] == [
        "NIM-MAE",
        "-",
        "81.68",
        "81.50 [81.1, 81.9]",
        "7.36",
        "7.25 [6.8, 7.7]",
        "7.36",
        "7.25 [6.8, 7.7]",  # without a defense gray-box is white-box
        "2.44",
        "2.50 [2.1, 2.9]",
    ]
    assert defended.count("missing") == 2  # gray-box and Square were not run
    assert "Ours, 95% intervals in brackets: results/imagenet/nim_mae.json, 50,000 images." in lines
    # the complete row asks for nothing, the incomplete one for its steps, in order
    start = lines.index("# Table 1: NIM-MAE, sigma 30")
    assert [line.split()[2] for line in lines[start + 1 : start + 4]] == [
        "scripts/run_pretrain.py",
        "scripts/run_finetune.py",
        "scripts/run_attack.py",
    ]
    kept = "outputs/imagenet/attack/nim_mae results/imagenet/nim_mae.json"
    assert lines[start + 4] == f"python scripts/reports/collect.py {kept}"
    commands = [line for line in lines if line.startswith("python")]
    assert len(commands) == len(set(commands)) and lines[-1] == "```"


def test_steps_that_are_done_are_left_out(results, capsys):
    done = results / "outputs/imagenet/pretrain/nim_mae-gamma_25_3"
    done.mkdir(parents=True)
    (done / "config.json").write_text("{}")
    paper_tables.main([])
    assert f"output_dir={done.relative_to(results)} " not in capsys.readouterr().out


def test_another_data_set_stands_beside_the_papers_numbers_under_its_own_titles(capsys):
    paper_tables.main(["--dataset", "cifar10"])
    lines = capsys.readouterr().out.splitlines()
    assert any("| system | defense | Clean paper | Clean ours | WB paper | WB 4/255 ours |" in line for line in lines)
    assert not any("MAE, released" in line or "gamma(40, 2)" in line or "NeurIPS" in line for line in lines)
    # rows of its own stand in the paper's table, and tables of its own behind them
    larger = next(line for line in lines if line.startswith("| MAE | mask 0.75, larger MAE | 65.62 |"))
    assert lines.index(larger) < next(number for number, line in enumerate(lines) if line.startswith("### Table 2"))
    assert any(line.startswith("### Votes") for line in lines)
    assert "| NIM-MAE, classifier of original images | sigma 30 | – |" in "\n".join(lines)


def test_a_full_size_differs_from_its_base_in_recipes_and_budget_alone(monkeypatch):
    monkeypatch.chdir(ROOT)
    small, full = rows_of("cifar10"), rows_of("cifar10_full")
    masked = [row.model for _, row in full if row.result == "nim_mae_masked"]
    assert masked == ["undefended", "defended", "without masks"]
    assert [(t.title, r.labels, r.result) for t, r in small] == [(t.title, r.labels, r.result) for t, r in full]
    epochs = {(s.script, load_step(s).optimization.epochs) for s in steps_of("cifar10_full") if "train" in s.output_dir}
    epochs |= {(s.script, load_step(s).optimization.epochs) for s in steps_of("cifar10_full") if "tune" in s.output_dir}
    assert epochs == {("run_pretrain.py", 200), ("run_finetune.py", 100)}
    assert all("outputs/cifar10/" not in word for step in steps_of("cifar10_full") for word in step.arguments)


@pytest.fixture
def tiny_world(tmp_path, monkeypatch):
    """A study of three rows that share a step, whose scripts write what the real ones write."""

    def step(script, name, *needs):
        inputs = tuple(f"init={needed.output_dir}" for needed in needs)
        makes = "summary.json" if script == "run_attack.py" else "config.json"
        return Step(script, f"outputs/{name}", (f"output_dir=outputs/{name}", *inputs), needs, makes)

    pretrained = step("run_pretrain.py", "pretrain")
    chain = step("run_pretrain.py", "more", step("run_pretrain.py", "finetune", step("run_pretrain.py", "other")))
    rows = {name: step("run_attack.py", name, pretrained) for name in ("a", "b")}
    rows["c"] = step("run_attack.py", "c", pretrained, chain)
    tables = [
        Table("T", ("system",), ("clean",), [Row((n.upper(),), rows[n], n, "m", None) for n in ("a", "b")]),
        Table("N", ("system",), (), [Row(("C",), rows["c"], "c", "m", None)]),
    ]
    study = Study("tiny", {"clean": Column("Clean", "none")}, tables)
    monkeypatch.setitem(STUDIES, "tiny", lambda: study)
    monkeypatch.setattr(paper_tables, "ROOT", tmp_path)
    script = """
import json, os, pathlib, sys
output_dir = pathlib.Path(next(word for word in sys.argv if word.startswith("output_dir=")).partition("=")[2])
for word in sys.argv:
    if word.startswith("init="):
        made = pathlib.Path(word.partition("=")[2])
        assert (made / "config.json").exists()
with open("ran", "a") as file:
    file.write(f"{output_dir.name}\\n")
if output_dir.name == os.environ.get("FAILS"):
    sys.exit(1)
output_dir.mkdir(parents=True)
row = {"model": "m", "sigma": None, "attack": "none", "accuracy": 50.0, "ci95": [40.0, 60.0], "num_images": 9}
(output_dir / "config.json").write_text("{}")
(output_dir / "summary.json").write_text(json.dumps({"rows": [row]}))
"""
    collect = """
import pathlib, sys
run, result = map(pathlib.Path, sys.argv[1:])
result.parent.mkdir(parents=True, exist_ok=True)
result.write_bytes((run / "summary.json").read_bytes())
"""
    (tmp_path / "scripts" / "reports").mkdir(parents=True)
    (tmp_path / "scripts" / "reports" / "collect.py").write_text(collect)
    for name in ("run_pretrain.py", "run_attack.py"):
        (tmp_path / "scripts" / name).write_text(script)
    # what launch.py would launch runs alone
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = scripts/launch.py ] && shift\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_make(capsys, *options):
    paper_tables.main(["--dataset", "tiny", "--makefile", *options])
    rules = capsys.readouterr().out
    return subprocess.run(["make", "-j2", "-k", "-f", "-"], input=rules, text=True, capture_output=True)


def test_make_runs_what_is_missing_each_step_once_and_inputs_first(tiny_world, capsys):
    assert run_make(capsys).returncode == 0
    ran = (tiny_world / "ran").read_text().split()
    assert sorted(ran) == ["a", "b", "c", "finetune", "more", "other", "pretrain"]
    place = {name: number for number, name in enumerate(ran)}
    assert place["pretrain"] < min(place["a"], place["b"], place["c"])
    assert place["other"] < place["finetune"] < place["more"] < place["c"]
    assert sorted(file.name for file in (tiny_world / "results/tiny").iterdir()) == ["a.json", "b.json", "c.json"]
    paper_tables.main(["--dataset", "tiny"])
    shown = capsys.readouterr().out
    assert "| A | 50.00 [40.0, 60.0] |" in shown and "Commands for what is missing" not in shown
    # results that are there already stand beside those that are collected again
    assert run_make(capsys, "--results", "outputs/again").returncode == 0
    assert (tiny_world / "ran").read_text().split() == ran
    for name in ("a.json", "b.json", "c.json"):
        again = (tiny_world / "outputs/again" / name).read_bytes()
        assert again == (tiny_world / "results/tiny" / name).read_bytes()


def test_make_names_what_failed_and_goes_on_from_there(tiny_world, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "finetune")
    failed = run_make(capsys)
    assert failed.returncode == 2
    assert "outputs/finetune/config.json" in failed.stderr
    assert sorted((tiny_world / "ran").read_text().split()) == ["a", "b", "finetune", "other", "pretrain"]
    monkeypatch.delenv("FAILS")
    assert run_make(capsys).returncode == 0
    assert (tiny_world / "ran").read_text().split()[5:] == ["finetune", "more", "c"]


def test_an_unknown_study_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no tables for --dataset 'mnist'.*imagenet"):
        paper_tables.main(["--dataset", "mnist"])


@pytest.mark.parametrize(("study", "rows"), [("imagenet", 2), ("cifar10", 3), ("cifar10_full", 3)])
def test_published_rows_are_marked_as_theirs_with_protocol_and_source(study, rows, capsys):
    paper_tables.main(["--dataset", study])
    section = capsys.readouterr().out.partition("### Published by others: under attack")[2].partition("###")[0]
    lines = [line for line in section.splitlines() if line.startswith("| MIMIR")]
    assert "Attacked theirs" in section and len(lines) == rows
    assert all("/255 |" in line and "arXiv 2312.04960" in line for line in lines)


def test_certificates_of_others_stand_by_radius(tmp_path, monkeypatch):
    published = {
        "attacked": [],
        "certified": [
            {"study": "s", "system": "A", "protocol": "p", "radii": {0.25: 60.5}, "source": "q"},
            {"study": "s", "system": "B", "protocol": "p", "radii": {0.0: 70, 0.25: 50}, "source": "q"},
            {"study": "t", "system": "C", "protocol": "p", "radii": {1.0: 10}, "source": "q"},
        ],
    }
    monkeypatch.setattr(paper_tables, "PUBLISHED", tmp_path / "published.yaml")
    paper_tables.PUBLISHED.write_text(yaml.safe_dump(published))
    lines = paper_tables.report(Study("s", {}, []), tmp_path).splitlines()
    assert "| system | protocol | L2 0 theirs | L2 0.25 theirs | source |" in lines
    assert "| A | p | – | 60.5 | q |" in lines and "| B | p | 70.0 | 50.0 | q |" in lines
    assert paper_tables.report(Study("u", {}, []), tmp_path) == "\n"


HARDENED = [f"scripts/recipes/{folder}/finetune_hardened.yaml" for folder in ("cifar10", "imagenet")]


@pytest.mark.parametrize("file", HARDENED)
def test_every_variant_of_hardening_is_one_line_of_overrides(file, monkeypatch):
    """The paragraphs "# NAME:" with their "#   key=value ..." above a recipe, read by the script that runs them."""
    monkeypatch.chdir(ROOT)
    schema = reference.load_script("run_finetune").FinetuneRecipe
    comment = (ROOT / file).read_text().partition("seed:")[0]
    variants = dict(re.findall(r"^# ([^:\n]+):\n((?:#   (?:\S+=\S+ ?)+\n)+)", comment, flags=re.MULTILINE))
    found = {
        name: parse_command_line("", schema, [file, *lines.replace("#", "").split()])
        for name, lines in variants.items()
    }
    assert {
        name: (r.images, r.adversary.attack, r.adversary.trains, r.consistency.num_draws) for name, r in found.items()
    } == {
        "The classifier alone": ("denoised", "fgsm", "classifier", 1),
        "The purifier alone": ("denoised", "fgsm", "purifier", 1),
        "The control, as long without an attack": ("denoised", "none", "both", 1),
        "Adversarial training without a purifier": ("original", "fgsm", "classifier", 1),
        "Draws that agree, for certificates": ("denoised", "none", "classifier", 2),
        "Noisy images that nobody denoises, for certificates without a purifier": ("noisy", "none", "classifier", 2),
    }
    assert len({recipe.output_dir for recipe in found.values()}) == len(found)
