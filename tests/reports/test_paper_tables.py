"""The recipes of whole data sets and the map from the paper's rows to them, read by the loaders that will run them."""

import gzip
import json
import os
import re
import shlex

import pytest
import reference

from modeling_nim.robustness.certification import CertifyRecipe
from modeling_nim.robustness.protocols import resolve
from modeling_nim.robustness.recipes import AttackRunRecipe
from modeling_nim.runs.recipe import load_recipe
from modeling_nim.training.models import make_config


paper_tables = reference.load_script("reports/paper_tables")
every_dataset = pytest.mark.parametrize(
    ("dataset", "data_path", "width"),
    [("imagenet", "ILSVRC/imagenet-1k", 768), ("cifar10", "data/cifar10", 128), ("cifar10_gpu", "data/cifar10", 192)],
)


def steps_of(dataset):
    return {s.command: s for table in paper_tables.read_tables(dataset)[0] for row in table.rows for s in row.steps}


def load_step(step):
    """The recipe that a step's command line would read."""
    overrides = [f"output_dir={step.output_dir}", *step.overrides]
    if step.script == "run_attack.py":
        schema = AttackRunRecipe
    elif step.script == "run_certify.py":
        schema = CertifyRecipe
    else:
        name = {"run_pretrain.py": "PretrainRecipe", "run_finetune.py": "FinetuneRecipe"}[step.script]
        schema = getattr(reference.load_script(step.script.removesuffix(".py")), name)
    return load_recipe(paper_tables.ROOT / step.recipe, schema, overrides)


def test_every_row_of_the_paper_is_there():
    tables, _ = paper_tables.read_tables("imagenet")
    assert [len(table.rows) for table in tables] == [10, 10, 7, 12, 3]
    numbers = [number for table in tables for row in table.rows for number in row.paper.values()]
    assert len(numbers) == 10 * 4 + (10 + 7 + 12) * 2
    assert all(0 < number < 100 for number in numbers)


@every_dataset
def test_every_recipe_is_read_by_the_script_that_runs_it(dataset, data_path, width):
    """All steps of all rows with their overrides, and through them every file of the folder."""
    used = set()
    for step in steps_of(dataset).values():
        if step.recipe is None:
            options = shlex.split(step.command)[2:]
            arguments = reference.load_script("convert_checkpoint").parse_arguments(options)
            assert arguments.output_dir == step.output_dir
            continue
        recipe = load_step(step)
        assert recipe.output_dir == step.output_dir
        assert recipe.data.path == data_path
        if step.script == "run_pretrain.py":
            assert (make_config(recipe.model).hidden_size == width) is not step.output_dir.endswith("mae_larger")
        used.add(step.recipe)
    folder = paper_tables.ROOT / "scripts" / "recipes" / dataset
    files = {f"scripts/recipes/{dataset}/{file.name}" for file in folder.glob("*.yaml")}
    assert used <= files
    if dataset == "imagenet":
        assert files - used == {"scripts/recipes/imagenet/paper.yaml"}


@every_dataset
def test_one_output_has_one_command_and_inputs_are_outputs_of_earlier_steps(dataset, data_path, width):
    outputs = {}
    for step in steps_of(dataset).values():
        assert outputs.setdefault(step.output_dir, step.command) == step.command
    for table in paper_tables.read_tables(dataset)[0]:
        for row in table.rows:
            made = set()
            for step in row.steps:
                for override in step.overrides:
                    value = override.partition("=")[2]
                    assert not value.startswith("outputs/") or value in made, (row.labels, override)
                if step.script in ("run_attack.py", "run_certify.py"):  # what the recipe names on its own as well
                    named = re.findall(rf"'(outputs/{dataset}/[^']+)'", repr(load_step(step)))
                    needed = {path for path in named if path != step.output_dir}
                    rows = [r for t in paper_tables.read_tables(dataset)[0] for r in t.rows if step in r.steps]
                    assert needed <= {earlier.output_dir for r in rows for earlier in r.steps}, row.labels
                made.add(step.output_dir)


@every_dataset
def test_the_attack_of_each_row_makes_the_numbers_of_its_columns(dataset, data_path, width):
    tables, columns = paper_tables.read_tables(dataset)
    for table in (table for table in tables if table.columns):
        for row in table.rows:
            recipe = load_step(row.steps[-1])
            plan = resolve(recipe)
            model = next(model for model in recipe.models if model.name == row.model)
            sigmas = plan.sigmas if model.sigma is None and plan.sigmas else model.sigmas()
            assert row.sigma in (None, "mask") or row.sigma in sigmas
            for name in table.columns:
                column = columns[name]
                if column["attack"] == "none":
                    continue
                assert any(
                    attack.kind == column["attack"]
                    and column["threat_model"] in attack.threat_models
                    and column["epsilon_255"] in attack.epsilon_255
                    and column.get("name", attack.label) == attack.label
                    for attack in plan.attacks
                ), (row.labels, name)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the recipes' root with one result in it."""
    monkeypatch.setattr(paper_tables, "ROOT", tmp_path)
    (tmp_path / "scripts").mkdir()
    real = reference.GOLDEN.parents[2] / "scripts" / "recipes"
    (tmp_path / "scripts" / "recipes").symlink_to(real)

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
        "7.25 [6.8, 7.7]",  # without a defence gray-box is white-box
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
    assert lines[-2:] == ["python scripts/reports/paper_tables.py --dataset imagenet --collect", "```"]
    assert len(lines) == len([line for line in lines if not line.startswith("accelerate")]) + len(
        {line for line in lines if line.startswith("accelerate")}
    )


def test_steps_that_are_done_are_left_out(results, capsys):
    done = results / "outputs/imagenet/pretrain/nim_mae-gamma_25_3"
    done.mkdir(parents=True)
    (done / "config.json").write_text("{}")
    paper_tables.main([])
    assert f"output_dir={done.relative_to(results)} " not in capsys.readouterr().out


def test_another_data_set_stands_beside_the_papers_numbers_under_its_own_titles(capsys):
    paper_tables.main(["--dataset", "cifar10"])
    lines = capsys.readouterr().out.splitlines()
    assert "| system | defence | Clean paper | Clean ours | WB paper | WB 4/255 ours |" in lines[3]
    assert not any("MAE, released" in line or "gamma(40, 2)" in line or "NeurIPS" in line for line in lines)
    # rows of its own stand in the paper's table, and tables of its own behind them
    larger = next(line for line in lines if line.startswith("| MAE | mask 0.75, larger MAE | 65.62 |"))
    assert lines.index(larger) < next(number for number, line in enumerate(lines) if line.startswith("### Table 2"))
    assert any(line.startswith("### Votes") for line in lines)
    assert "| NIM-MAE, classifier of original images | sigma 30 | – |" in "\n".join(lines)


def test_a_full_size_differs_from_its_base_in_recipes_and_budget_alone():
    small, _ = paper_tables.read_tables("cifar10")
    full, _ = paper_tables.read_tables("cifar10_gpu")
    assert [[row.labels for row in table.rows] for table in small] == [
        [row.labels for row in table.rows] for table in full
    ]
    epochs = {
        dataset: {
            (step.script, override)
            for step in steps_of(dataset).values()
            for override in step.overrides
            if "epochs" in override
        }
        for dataset in ("cifar10", "cifar10_gpu")
    }
    assert epochs["cifar10_gpu"] == {
        ("run_pretrain.py", "optimization.epochs=200"),
        ("run_finetune.py", "optimization.epochs=100"),
    }
    assert len(epochs["cifar10"]) == 4  # the ablations are shorter


@pytest.fixture
def tiny_world(tmp_path, monkeypatch):
    """A data set of two rows that share a step, whose scripts write what the real ones write."""
    monkeypatch.setattr(paper_tables, "ROOT", tmp_path)
    folder = tmp_path / "scripts" / "recipes" / "tiny"
    folder.mkdir(parents=True)
    (folder / "paper.yaml").write_text("""
columns: {clean: {title: Clean, attack: none}}
steps:
  pretrain: {script: run_pretrain.py, recipe: p.yaml, output_dir: "outputs/pretrain", overrides: {}}
  other: {script: run_pretrain.py, recipe: p.yaml, output_dir: "outputs/other", overrides: {}}
  finetune: {script: run_pretrain.py, recipe: p.yaml, output_dir: "outputs/finetune", overrides: {init: outputs/other}}
  more: {script: run_pretrain.py, recipe: p.yaml, output_dir: "outputs/more", overrides: {init: outputs/finetune}}
  attack: {script: run_attack.py, recipe: a.yaml, output_dir: "outputs/{result}", overrides: {init: outputs/pretrain}}
tables:
  - title: T
    columns: [clean]
    label: [system]
    defaults: {steps: [pretrain, attack], model: m, sigma: null, paper: {}}
    rows: [{system: A, result: a}, {system: B, result: b}]
  - title: N
    columns: []
    label: [system]
    defaults: {model: m, sigma: null, paper: {}}
    rows: [{system: C, result: c, steps: [other, finetune, more, pretrain, attack]}]
""")
    script = """
import json, os, pathlib, sys
output_dir = pathlib.Path(next(word for word in sys.argv if word.startswith("output_dir=")).partition("=")[2])
for word in sys.argv:
    if word.startswith("init="):
        assert (pathlib.Path(word.partition("=")[2]) / "config.json").exists()
with open("ran", "a") as file:
    file.write(f"{output_dir} {os.environ['OMP_NUM_THREADS']}\\n")
if output_dir.name == os.environ.get("FAILS"):
    sys.exit(1)
output_dir.mkdir(parents=True)
row = {"model": "m", "sigma": None, "attack": "none", "accuracy": 50.0, "ci95": [40.0, 60.0], "num_images": 9}
(output_dir / "config.json").write_text("{}")
(output_dir / "summary.json").write_text(json.dumps({"rows": [row]}))
(output_dir / "records.jsonl").write_text("{}\\n")
"""
    for name in ("run_pretrain.py", "run_attack.py"):
        (tmp_path / "scripts" / name).write_text(script)
    return tmp_path


def test_run_makes_what_is_missing_each_step_once(tiny_world, capsys):
    paper_tables.main(["--dataset", "tiny", "--run", "--jobs", "2"])
    ran = (tiny_world / "ran").read_text().splitlines()
    threads = max(1, os.cpu_count() // 2)
    place = {line.split()[0].removeprefix("outputs/"): number for number, line in enumerate(ran)}
    assert place["pretrain"] < min(place["a"], place["b"], place["c"])
    assert place["other"] < place["finetune"] < place["more"] < place["c"]
    # a chain of its own in a later row holds nothing up, even where a shared step stands behind it
    names = ["a", "b", "c", "finetune", "more", "other", "pretrain"]
    assert sorted(ran) == [f"outputs/{name} {threads}" for name in names]
    assert "| A | 50.00 [40.0, 60.0] |" in capsys.readouterr().out
    assert gzip.decompress((tiny_world / "results/tiny/records/a.jsonl.gz").read_bytes()) == b"{}\n"
    paper_tables.main(["--dataset", "tiny", "--run"])
    assert (tiny_world / "ran").read_text().splitlines() == ran
    # results that are there already stand beside those that are made again
    paper_tables.main(["--dataset", "tiny", "--run", "--results", "outputs/again"])
    assert (tiny_world / "outputs/again/b.json").read_bytes() == (tiny_world / "results/tiny/b.json").read_bytes()


def test_run_names_the_command_that_failed_and_goes_on_from_there(tiny_world, monkeypatch):
    monkeypatch.setenv("FAILS", "b")
    with pytest.raises(
        ChildProcessError, match=r"failed: accelerate launch scripts/run_attack\.py .*output_dir=outputs/b"
    ):
        paper_tables.main(["--dataset", "tiny", "--run"])
    assert sorted(file.name for file in (tiny_world / "results/tiny").glob("*.json")) == ["a.json", "c.json"]
    monkeypatch.delenv("FAILS")
    paper_tables.main(["--dataset", "tiny", "--run"])
    ran = [line.split()[0] for line in (tiny_world / "ran").read_text().splitlines()]
    trained = ["outputs/pretrain", "outputs/other", "outputs/finetune", "outputs/more"]
    assert ran == [*trained, "outputs/a", "outputs/b", "outputs/c", "outputs/b"]
    with pytest.raises(SystemExit):
        paper_tables.main(["--dataset", "tiny", "--run", "--jobs", "0"])


def test_an_unknown_data_set_is_refused_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match=r"no tables for --dataset 'mnist'.*imagenet"):
        paper_tables.main(["--dataset", "mnist"])
