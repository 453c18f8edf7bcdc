"""What users get wrong: every script answers with one line that names the value, a failing exit code, and no output."""

import sys

import pytest
import yaml
from accelerate.state import AcceleratorState
from conftest import TINY as TINY_ENCODER
from conftest import TINY_DECODER
from training_runs import FINETUNE, PRETRAIN, REPOSITORY, load_script

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
)
from modeling_nim.runs.errors import run_main


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of good and bad inputs."""
    root = tmp_path_factory.mktemp("inputs")
    purifier = NIMForPreTraining(NIMConfig(**TINY_ENCODER, **TINY_DECODER))
    grey = {"num_channels": 1, "image_mean": [0.5], "image_std": [0.5]}
    ten = NIMForImageClassification(NIMClassifierConfig(**TINY_ENCODER, num_labels=10))
    purifier.save_pretrained(root / "purifier")
    NIMForPreTraining(NIMConfig(**TINY_ENCODER, **TINY_DECODER, **grey)).save_pretrained(root / "grey")
    ten.save_pretrained(root / "classifier")
    for num_labels in (5, 12):
        config = NIMClassifierConfig(**TINY_ENCODER, num_labels=num_labels)
        NIMForImageClassification(config).save_pretrained(root / f"classes{num_labels}")
    NIMPurifiedImageClassification.from_parts(purifier, ten).save_pretrained(root / "purified")
    ten.save_pretrained(root / "damaged")
    (root / "damaged" / "model.safetensors").write_bytes(b"\x08")
    (root / "no_model").mkdir()
    for split in ("train", "test"):
        (root / "no_images" / split / "class").mkdir(parents=True)
    (root / "list.yaml").write_text("- seed\n")
    (root / "text.pt").write_text("weights")
    recipes = {
        "pretrain": PRETRAIN,
        "finetune": FINETUNE | {"init": str(root / "purifier")},
        "attack": {
            "models": [{"name": "defended", "path": str(root / "purified")}],
            "attacks": [{"attack": "fgsm", "epsilon_255": [8]}],
            "data": {"source": "digits"},
        },
    }
    for name, recipe in recipes.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe | {"output_dir": str(root / "out")}))
    return root


@pytest.fixture
def in_the_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend("scripts")
    yield
    AcceleratorState._reset_state(True)


FOLDER = "data={source: folder, path: INPUTS/no_images}"
PARTS = "models=[{name: parts, purifier: INPUTS/grey, classifier: INPUTS/classifier}]"
NO_PURIFIER = "models=[{name: parts, purifier: INPUTS/classifier, classifier: INPUTS/classifier}]"
CONVERT = "convert_checkpoint --source nim-mae --output_dir INPUTS/out --checkpoint"


@pytest.mark.parametrize(
    "command, words",
    [
        ("run_pretrain nowhere.yaml", ["no recipe 'nowhere.yaml'", "scripts/recipes/"]),
        ("run_pretrain INPUTS/list.yaml", ["list.yaml' must be a mapping", "got list"]),
        ("run_pretrain INPUTS/text.pt", ["text.pt' must be a mapping", "got str"]),
        ("run_pretrain INPUTS/pretrain.yaml modle.size=tiny", ["'modle'", "did you mean 'model'"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.hidden=3", ["'model.config.hidden'", "hidden_size"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.hidden_size=abc", ["'hidden_size' expected int", "'abc'"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.hidden_size=30", ["multiple of 4, got 30"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.num_attention_heads=3", ["32", "num_attention_heads 3"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.hidden_act=nope", ["'nope'", "gelu"]),
        (
            "run_pretrain INPUTS/pretrain.yaml model.config.image_size=33",
            ["image_size 33 and patch_size 8", "multiple"],
        ),
        ("run_pretrain INPUTS/pretrain.yaml model.config.image_size=abc", ["'image_size'", "'abc'"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.patch_size=0", ["patch_size 0"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.sigma=-3", ["sigma must be >= 0", "-3", '"30"']),
        ("run_pretrain INPUTS/pretrain.yaml model.config.image_std=[0.0,1.0,1.0]", ["image_std [0.0", "above 0"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.num_channels=1", ["1 channels", "use num_channels 3"]),
        ("run_pretrain INPUTS/pretrain.yaml model.architecture=mae model.config.mask_ratio=1.5", ["mask_ratio", "1.5"]),
        ("run_pretrain INPUTS/pretrain.yaml optimization.base_learning_rate=-1", ["base_learning_rate", "above 0"]),
        (f"run_pretrain INPUTS/pretrain.yaml {FOLDER}", ["no images under", "no_images/train", "one folder per class"]),
        ("run_finetune INPUTS/finetune.yaml init=outputs/none", ["no model directory 'outputs/none'", "run_pretrain"]),
        ("run_finetune INPUTS/finetune.yaml init=some/model", ["no model directory 'some/model'", "Hub"]),
        ("run_finetune INPUTS/finetune.yaml init=INPUTS/no_model", ["no_model' holds no model"]),
        ("run_finetune INPUTS/finetune.yaml init=INPUTS/damaged", ["damaged' are damaged", "again"]),
        ("run_finetune INPUTS/finetune.yaml init=INPUTS/grey", ["1 channels"]),
        ("run_finetune INPUTS/finetune.yaml purifier=INPUTS/grey", ["gives 1 channels", "takes 3"]),
        ("run_finetune INPUTS/finetune.yaml purifier=INPUTS/classifier", ["'nim_classifier'", "cannot purify"]),
        ("run_finetune INPUTS/finetune.yaml defense_sigma=-3", ["'defense_sigma' must be at least 0", "-3"]),
        ("run_finetune INPUTS/finetune.yaml drop_path_rate=2", ["drop_path_rate", "at least 0 and below 1", "got 2"]),
        (f"run_finetune INPUTS/finetune.yaml {FOLDER}", ["no images under"]),
        ("run_attack INPUTS/attack.yaml models.0.path=outputs/none", ["no model directory 'outputs/none'"]),
        ("run_attack INPUTS/attack.yaml models.0.path=INPUTS/damaged", ["damaged' are damaged"]),
        ("run_attack INPUTS/attack.yaml models.0.path=INPUTS/purifier", ["'nim' model, no classifier", "fine-tuned"]),
        ("run_attack INPUTS/attack.yaml models.0.path=INPUTS/classes5", ["5 classes", "data have 10"]),
        ("run_attack INPUTS/attack.yaml models.0.path=INPUTS/classes12", ["12 classes", "data have 10"]),
        ("run_attack INPUTS/attack.yaml models.0.sigma=-3", ["sigma must be >= 0", "-3"]),
        ("run_attack INPUTS/attack.yaml models.0.sgma=3", ["'models.0.sgma'", "did you mean 'sigma'"]),
        (f"run_attack INPUTS/attack.yaml {PARTS}", ["gives 1 channels", "takes 3"]),
        (f"run_attack INPUTS/attack.yaml {NO_PURIFIER}", ["'nim_classifier' model, no purifier"]),
        ("run_attack INPUTS/attack.yaml attacks.0.sigmas=[12]", ["sigma 12", "['30']"]),
        ("run_attack INPUTS/attack.yaml pictures={attack: none}", ["'none'", "['fgsm', 'none']"]),
        ("run_attack INPUTS/attack.yaml num_draws=0", ["num_draws must be at least 1"]),
        (f"run_attack INPUTS/attack.yaml {FOLDER}", ["no images under", "no_images/test"]),
        (f"{CONVERT} none.pt", ["no checkpoint at 'none.pt'"]),
        (f"{CONVERT} INPUTS/text.pt", ["text.pt' cannot be read"]),
        (f"{CONVERT} tests/fixtures/golden/simmim_pretrain.pth", ["does not fit --source", "patch_embed.proj.weight"]),
        ("push_to_hub INPUTS/none org/name", ["none holds no config.json"]),
        ("push_to_hub INPUTS/damaged org/name", ["damaged' are damaged"]),
        ("push_to_hub INPUTS/classifier org/name --summary INPUTS/text.pt", ["text.pt is no summary.json"]),
        ("push_to_hub INPUTS/classifier org/na/me", ["'org/na/me'"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    command, words, inputs, in_the_repository, monkeypatch, capsys
):
    script, *arguments = command.replace("INPUTS", str(inputs)).split(" ")
    if "{" in command:  # one override whose value has spaces
        first = next(index for index, argument in enumerate(arguments) if "{" in argument)
        arguments = [*arguments[:first], " ".join(arguments[first:])]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    before = sorted(inputs.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        run_main(load_script(script).main)
    assert exit_info.value.code == 2
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.split("\n") if "error" in line.lower()]
    assert line.startswith("error: ") and "Traceback" not in printed
    assert all(word in line for word in words), line
    assert sorted(inputs.rglob("*")) == before
