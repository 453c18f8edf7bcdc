"""Whole training runs: broken off, resumed, shared among processes. The curves must be the same."""

import io
import platform
import re
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from PIL import Image
from safetensors.torch import load_file
from training_runs import FINETUNE, PRETRAIN, SERVER, TINY, last_step, losses, records, run, torchrun

from modeling_nim import NIMForImageClassification, NIMForPreTraining, NIMPurifiedImageClassification
from modeling_nim.training.checkpoints import checkpoint_path, list_checkpoints
from modeling_nim.training.models import ModelRecipe, make_pretraining_model, save_model_dir
from modeling_nim.training.settings import fastest_precision


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pre-training run of 12 steps, never broken off."""
    output_dir = tmp_path_factory.mktemp("unbroken") / "pretrain"
    run("run_pretrain", PRETRAIN, output_dir)
    assert list(losses(output_dir)) == list(range(1, 13))
    return output_dir


def test_finished_run_started_again_changes_nothing(pretrained):
    before, curve = load_file(pretrained / "model.safetensors"), losses(pretrained)
    run("run_pretrain", PRETRAIN, pretrained)
    after = load_file(pretrained / "model.safetensors")
    assert losses(pretrained) == curve and all((before[key] == after[key]).all() for key in before)


@pytest.mark.parametrize("script", ["run_pretrain", "run_finetune"])
def test_another_attention_changes_the_rounding_alone(script, pretrained, tmp_path):
    recipe = recipe_of(script, pretrained)
    weights = {}
    for implementation in ("sdpa", "eager"):
        run(script, recipe, tmp_path / implementation, f"execution.attn_implementation={implementation}")
        weights[implementation] = load_file(tmp_path / implementation / "model.safetensors")
    assert losses(tmp_path / "eager") == pytest.approx(losses(tmp_path / "sdpa"), abs=1e-4)
    # it is in use: other products, other last bits
    assert any((weights["eager"][key] != weights["sdpa"][key]).any() for key in weights["sdpa"])


@pytest.mark.parametrize("script", ["run_pretrain", "run_finetune"])
def test_execution_auto_is_what_it_says(script, pretrained, tmp_path):
    recipe = recipe_of(script, pretrained)
    printed = run(script, recipe, tmp_path / "auto", "execution=auto")
    precision = fastest_precision(torch.device("cpu"))
    assert f"precision: {'bf16' if precision == 'bf16' else 'float32'}\n" in printed
    assert re.search(r"^attention: eager \(\d+ tokens\)", printed, re.MULTILINE)
    kept = yaml.safe_load((tmp_path / "auto" / "recipe.yaml").read_text())["execution"]
    assert (kept["mixed_precision"], kept["attn_implementation"]) == (precision, "auto")
    run(script, recipe, tmp_path / "named", f"execution.mixed_precision={precision}")
    assert losses(tmp_path / "auto") == losses(tmp_path / "named")


@pytest.mark.parametrize(
    "known, precision",
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"bf16": True}, "bf16"), ({"avx2": True}, "no")],
)
def test_bf16_is_chosen_where_the_cpu_multiplies_it(known, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU beside it that the run does not use
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, "architecture": "any"} | known)
    assert fastest_precision(torch.device("cpu")) == precision


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_chosen_where_the_gpu_multiplies_it(supported, monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: supported and not including_emulation
    )
    assert fastest_precision(torch.device("cuda")) == ("bf16" if supported else "no")
    assert fastest_precision(torch.device("mps")) == "no"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library decides what becomes of freed memory")
def test_a_training_keeps_the_memory_that_tensors_free():
    code = """
import resource, torch
from modeling_nim.training.settings import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4_000_000)  # 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

handed_back = pages()
keep_freed_memory()
pages()
print(handed_back, pages())
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    handed_back, kept = map(int, printed.split())
    assert kept < handed_back / 10


def recipe_of(script, pretrained):
    return PRETRAIN if script == "run_pretrain" else FINETUNE | {"init": str(pretrained)}


def kill(script, recipe, output_dir, moment, num_processes=1):
    interruption = (*moment, signal.SIGKILL)
    run(
        script,
        recipe,
        output_dir,
        num_processes=num_processes,
        exit_code=-signal.SIGKILL,
        interruption=interruption,
    )


@pytest.mark.parametrize(
    "script, num_processes, step",  # of 12 steps with a checkpoint after each third: the first, beside one, the last
    [("run_pretrain", 1, 1), ("run_pretrain", 2, 7), ("run_finetune", 1, 12), ("run_finetune", 2, 3)],
)
def test_killed_run_goes_on_exactly(script, num_processes, step, pretrained, tmp_path):
    recipe = recipe_of(script, pretrained)
    run(script, recipe, tmp_path / "unbroken", num_processes=num_processes)
    kill(script, recipe, tmp_path / "killed", ("step", step), num_processes)
    assert last_step(tmp_path / "killed") == step - 1
    run(script, recipe, tmp_path / "killed", num_processes=num_processes)

    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    unbroken, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "killed"))
    assert all((unbroken[key] == resumed[key]).all() for key in unbroken)


def test_run_killed_while_saving_goes_on_exactly(pretrained, tmp_path):
    output_dir = tmp_path / "run"
    kill("run_pretrain", PRETRAIN, output_dir, ("save", 3))
    assert [step for step, _ in list_checkpoints(output_dir / "checkpoints")] == [3, 6]
    assert (output_dir / "checkpoints" / "step-00000009.incomplete").exists()
    run("run_pretrain", PRETRAIN, output_dir)
    assert losses(output_dir) == losses(pretrained)
    assert not list(output_dir.rglob("*incomplete*"))


def test_two_processes_and_accumulation_give_the_single_process_curve(tmp_path):
    twenty = PRETRAIN | {"optimization": PRETRAIN["optimization"] | {"steps": 20}}
    run("run_pretrain", twenty, tmp_path / "one")
    torchrun("run_pretrain", twenty, tmp_path / "two", num_processes=2)
    run("run_pretrain", twenty, tmp_path / "accumulated", "optimization.gradient_accumulation_steps=4")
    expected = losses(tmp_path / "one")
    assert len(expected) == 20
    for name in ("two", "accumulated"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-4)


def test_sigterm_saves_and_exits_well_and_a_damaged_checkpoint_is_passed_over(pretrained, tmp_path):
    output_dir = tmp_path / "run"
    printed = run("run_pretrain", PRETRAIN, output_dir, interruption=("step", 5, signal.SIGTERM))
    assert [step for step, _ in list_checkpoints(output_dir / "checkpoints")] == [3, 5] and last_step(output_dir) == 5
    assert not (output_dir / "model.safetensors").exists()
    assert "stopped at step 5 of 12" in printed

    newest = checkpoint_path(output_dir / "checkpoints", 5)
    with open(f"{newest}/optimizer.bin", "r+b") as file:
        file.seek(2000)
        file.write(b"\xff" * 64)
    printed = run("run_pretrain", PRETRAIN, output_dir)
    assert f"{newest!r} is damaged (optimizer.bin is not as it was written)" in printed
    assert losses(output_dir) == losses(pretrained)
    assert [step for step, _ in list_checkpoints(output_dir / "checkpoints")] == [9, 12]  # the newest two
    assert not list(output_dir.rglob("*incomplete*"))


def test_sigterm_to_one_process_stops_all_at_the_next_report(tmp_path):
    recipe = PRETRAIN | {"logging": {"every_steps": 4}, "checkpoints": {"every_steps": 100}}
    interruption = ("step", 5, signal.SIGTERM)
    printed = run("run_pretrain", recipe, tmp_path / "run", num_processes=2, interruption=interruption)
    assert "stopped at step 8 of 12" in printed
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [8]


def test_a_changed_recipe_is_not_taken_for_the_old_one(tmp_path):
    output_dir = tmp_path / "run"
    run("run_pretrain", PRETRAIN, output_dir, interruption=("step", 5, signal.SIGTERM))
    other = ("optimization.steps=14", "model.config.sigma=30", "data.num_workers=1")
    printed = run("run_pretrain", PRETRAIN, output_dir, *other, exit_code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    changes = "model.config.sigma was not set and is 30"
    assert f"optimization.steps was 12 and is 14, {changes};" in line and "Traceback" not in printed
    # what decides no number may change; what does, when asked for
    run("run_pretrain", PRETRAIN, output_dir, "logging.every_steps=2", "optimization.gradient_accumulation_steps=2")
    assert list(losses(output_dir)) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 12]
    longer = ("optimization.steps=14", "checkpoints.on_changed_recipe=continue")
    run("run_pretrain", PRETRAIN, output_dir, *longer)
    assert last_step(output_dir) == 14


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    settings = ("optimization.base_learning_rate=1e38", "optimization.warmup_steps=4", "checkpoints.every_steps=1")
    printed = run("run_pretrain", PRETRAIN, tmp_path / "run", *settings, exit_code=2)
    (message,) = re.findall(r"error: the loss is (?:nan|inf) at step (\d+)", printed)
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")][-1] == int(message) - 1
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_two_hundred_bad_files_are_named_and_do_not_end_the_run(tmp_path):
    good = io.BytesIO()
    Image.radial_gradient("L").resize((40, 40)).save(good, "JPEG")
    cmyk = io.BytesIO()
    Image.new("CMYK", (40, 40), (9, 99, 0, 0)).save(cmyk, "JPEG")
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    kinds = {"garbage": b"\xff\xd8\xff\xe0nothing", "truncated": good.getvalue()[:400], "zero": b""}
    kinds |= {"cmyk": cmyk.getvalue(), "dot": dot.getvalue()}
    folder = tmp_path / "images" / "train" / "class0"
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"good{number:02d}.jpg").write_bytes(good.getvalue())
        for name, content in kinds.items():
            (folder / f"{name}{number:02d}.jpg").write_bytes(content)

    source = {"source": "folder", "path": str(tmp_path / "images"), "num_workers": 2}
    printed = run("run_pretrain", PRETRAIN | {"data": source}, tmp_path / "strict", exit_code=2)
    assert re.search(r"error: .*cannot read image 'class0/.*jpg'.*data.on_bad_image=skip", printed)
    assert "Traceback" not in printed
    skipping = PRETRAIN | {"data": source | {"on_bad_image": "skip"}}
    skipping["optimization"] = PRETRAIN["optimization"] | {"steps": 15}  # 15 * 16 images: each of the 240 once
    printed = run("run_pretrain", skipping, tmp_path / "run")
    messages = [record["bad_image"] for record in records(tmp_path / "run") if "bad_image" in record]
    for number in range(40):
        for name in kinds:
            named = [message for message in messages if f"{name}{number:02d}.jpg" in message]
            assert len(named) == (0 if name == "cmyk" else 1)
    assert len(messages) == 160 and "160 bad images were skipped" in printed


def test_bad_images_of_validation_are_named_and_counted_once(pretrained, tmp_path):
    for number, split in enumerate(["train"] * 17 + ["test"] * 5):
        folder = tmp_path / "images" / split / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.radial_gradient("L").resize((40, 40)).save(folder / f"{number}.png")
    (tmp_path / "images" / "test" / "class0" / "torn.png").write_bytes(b"\x89PNG torn")
    (tmp_path / "images" / "test" / "class1" / "empty.png").write_bytes(b"")
    recipe = FINETUNE | {"init": str(pretrained), "validation": {"split": "test", "every_epochs": 1}}
    recipe["data"] = {"source": "folder", "path": str(tmp_path / "images"), "num_workers": 1}
    recipe["optimization"] = FINETUNE["optimization"] | {"steps": 4}

    printed = run("run_finetune", recipe, tmp_path / "run", exit_code=2)
    assert re.search(r"error: cannot read image 'class0/torn.png'.*data.on_bad_image=skip", printed)
    assert "Traceback" not in printed
    for _ in range(2):  # what was named before a run is resumed is not named again
        skipping = ("data.on_bad_image=skip", "checkpoints.every_steps=1")
        printed = run("run_finetune", recipe, tmp_path / "run", *skipping)
        found = records(tmp_path / "run")
        names = [re.search(r"class\d/\w+.png", record["bad_image"])[0] for record in found if "bad_image" in record]
        assert sorted(names) == ["class0/torn.png", "class1/empty.png"]
        assert len([record for record in found if "validation_accuracy" in record]) == 4
        assert "2 bad images were skipped" in printed


def test_finetuning_validates_keeps_the_best_and_composes_the_purified_model(pretrained, tmp_path):
    recipe = FINETUNE | {"init": str(pretrained), "validation": {"split": "validation", "every_epochs": 0.05}}
    recipe["data"] = {"source": "digits", "validation_fraction": 0.1}
    run("run_finetune", recipe, tmp_path / "run", "logging.trackers=[tensorboard]")
    accuracies = [
        record["validation_accuracy"] for record in records(tmp_path / "run") if "validation_accuracy" in record
    ]
    assert len(accuracies) == 3 and all(0 <= accuracy <= 100 for accuracy in accuracies)
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))

    classifier = NIMForImageClassification.from_pretrained(tmp_path / "run").eval()
    purified = NIMPurifiedImageClassification.from_pretrained(tmp_path / "run" / "purified").eval()
    assert purified.config.id2label[7] == "7" and purified.config.sigma == 30
    weights, purifier = purified.state_dict(), NIMForPreTraining.from_pretrained(pretrained).state_dict()
    assert all(torch.equal(weights[f"purifier.{key}"], purifier[key]) for key in purifier)  # frozen
    assert all(torch.equal(weights[f"classifier.{key}"], value) for key, value in classifier.state_dict().items())
    best = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert best.keys() == classifier.state_dict().keys()


def _save_compiled(output_dir):
    accelerator = Accelerator(dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    model = make_pretraining_model(ModelRecipe(config=TINY))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    compiled = accelerator.prepare(model)
    assert any("_orig_mod" in name for name in compiled.state_dict())
    save_model_dir(accelerator, compiled, str(output_dir))
    saved = NIMForPreTraining.from_pretrained(output_dir).state_dict()
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)


def test_compiled_model_is_saved_under_its_own_names(tmp_path):
    process = SERVER.Process(target=_save_compiled, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["init=outputs/no/such/model"], "no model directory 'outputs/no/such/model'"),
        (["sigma=-3"], "sigma must be >= 0"),
        (["logging.trackers=[wandb]"], "logging.trackers names wandb, not installed: pip install wandb"),
        (["validation.every_epochs=0"], "'validation.every_epochs' must be above 0 and at most 1000000, got 0.0"),
        (["data.source=folder", "data.path=nowhere"], "no folder 'nowhere/train'"),
        (["optimizaton.steps=3"], "unknown recipe key 'optimizaton' (did you mean 'optimization'?)"),
        (["optimization.batch_size=4000"], "one step takes 4000 images and the training split has 1437"),
        (["optimization.gradient_accumulation_steps=3"], "does not divide into 1 processes x 3 accumulation steps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(overrides, message, pretrained, tmp_path):
    printed = run("run_finetune", FINETUNE | {"init": str(pretrained)}, tmp_path / "run", *overrides, exit_code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in printed
    assert not (tmp_path / "run").exists()
