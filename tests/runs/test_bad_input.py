"""What users get wrong: every script answers with one line that names the value, a failing exit code, and no output."""

import io
import json
import shutil
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import TINY as TINY_ENCODER
from conftest import TINY_DECODER
from PIL import Image
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
    gray = {"num_channels": 1, "image_mean": [0.5], "image_std": [0.5]}
    ten = NIMForImageClassification(NIMClassifierConfig(**TINY_ENCODER, num_labels=10))
    purifier.save_pretrained(root / "purifier")
    NIMForPreTraining(NIMConfig(**TINY_ENCODER, **TINY_DECODER, **gray)).save_pretrained(root / "gray")
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
        (root / "one_class" / split / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(root / "one_class" / split / "cat" / "0.png")
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
    recipes["certify"] = {key: recipes["attack"][key] for key in ("models", "data")} | {"num_images": 2}
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
ONE_CLASS = "data={source: folder, path: INPUTS/one_class}"
PARTS = "models=[{name: parts, purifier: INPUTS/gray, classifier: INPUTS/classifier}]"
NO_PURIFIER = "models=[{name: parts, purifier: INPUTS/classifier, classifier: INPUTS/classifier}]"
HALF_NORMALIZED = f"{PARTS[:-2]}, classifier_image_mean: [0.5]}}]"
HUGE = f"{PARTS[:-2]}, classifier_image_size: 1000000}}]"
PEER = "attacks=[{{attack: torchattacks, torchattacks_class: PGD, arguments: {{steps: {}}}}}]"
RECONSTRUCTION = "reconstruction={{purifiers: {}, sigmas_255: [{}]}}"
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
        ("run_finetune INPUTS/finetune.yaml init=INPUTS/gray", ["1 channels"]),
        ("run_finetune INPUTS/finetune.yaml purifier=INPUTS/gray", ["gives 1 channels", "takes 3"]),
        ("run_finetune INPUTS/finetune.yaml purifier=INPUTS/classifier", ["'nim_classifier' model, no purifier"]),
        ("run_finetune INPUTS/finetune.yaml defense_sigma=-3", ["'defense_sigma' must be at least 0", "-3"]),
        ("run_finetune INPUTS/finetune.yaml drop_path_rate=2", ["drop_path_rate", "at least 0 and below 1", "got 2"]),
        (f"run_finetune INPUTS/finetune.yaml {FOLDER}", ["no images under"]),
        (f"run_finetune INPUTS/finetune.yaml {ONE_CLASS}", ["all images are of one class, 'cat'"]),
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
        ("run_attack INPUTS/attack.yaml num_draws=0", ["'num_draws' must be at least 1"]),
        (f"run_attack INPUTS/attack.yaml {FOLDER}", ["no images under", "no_images/test"]),
        ("run_pretrain INPUTS/pretrain.yaml seed=-1", ["'seed' must be at least 0", "-1"]),
        ("run_pretrain INPUTS/pretrain.yaml seed=99999999999999999999", ["'seed'", "64 bits"]),
        ("run_pretrain INPUTS/pretrain.yaml seed=4294967296", ["'seed'", "32 bits"]),
        ("run_pretrain INPUTS/pretrain.yaml seed=1.5", ["'seed' must be int", "1.5"]),
        (
            "run_pretrain INPUTS/pretrain.yaml optimization.weight_decay=-1",
            ["'optimization.weight_decay'", "at least 0"],
        ),
        (
            "run_pretrain INPUTS/pretrain.yaml optimization.warmup_steps=-1",
            ["'optimization.warmup_steps'", "at least 0"],
        ),
        ("run_pretrain INPUTS/pretrain.yaml optimization.warmup_steps=12", ["warm-up takes 12 of 12 steps", "lower"]),
        ("run_pretrain INPUTS/pretrain.yaml optimization.base_learning_rate=.nan", ["base_learning_rate", "nan"]),
        ("run_pretrain INPUTS/pretrain.yaml optimization.base_learning_rate=.inf", ["base_learning_rate", "inf"]),
        ("run_pretrain INPUTS/pretrain.yaml optimization.betas=[0.9,1.0]", ["'optimization.betas'", "below 1", "1.0"]),
        ("run_pretrain INPUTS/pretrain.yaml data.shuffle_buffer=0", ["'data.shuffle_buffer'", "at least 1"]),
        ("run_pretrain INPUTS/pretrain.yaml crop.min_scale=0", ["'crop.min_scale'", "above 0"]),
        ("run_pretrain INPUTS/pretrain.yaml output_dir=", ["output_dir"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.sigma=1e9", ["sigma", "at most 1000"]),
        ("run_finetune INPUTS/finetune.yaml sigma=1e9", ["sigma", "at most 1000"]),
        ("run_finetune INPUTS/finetune.yaml defense_sigma=1e9", ["'defense_sigma'", "at most 1000"]),
        ("run_finetune INPUTS/finetune.yaml augmentation.mixup_alpha=-1", ["'augmentation.mixup_alpha'", "at least 0"]),
        ("run_finetune INPUTS/finetune.yaml adversary.alpha_ratio=0", ["'adversary.alpha_ratio'", "above 0"]),
        ("run_attack INPUTS/attack.yaml models.0.num_votes=2.5", ["'models.0.num_votes' must be int", "2.5"]),
        ("run_attack INPUTS/attack.yaml models.0.num_votes=1000000000", ["'models.0.num_votes'", "at most 100000"]),
        ("run_attack INPUTS/attack.yaml models.0.num_votes=0", ["'models.0.num_votes'", "at least 1"]),
        ("run_attack INPUTS/attack.yaml models.0.sigma=1e9", ["sigma", "at most 1000"]),
        ("run_attack INPUTS/attack.yaml attacks.0.epsilon_255=[.nan]", ["epsilon_255", "nan"]),
        ("run_attack INPUTS/attack.yaml attacks.0.epsilon_255=[-1]", ["'attacks.0.epsilon_255'", "at least 0"]),
        ("run_attack INPUTS/attack.yaml seeds=[-1]", ["'seeds'", "at least 0"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.num_hidden_layers=0", ["num_hidden_layers", "at least 1"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.decoder_num_hidden_layers=-1", ["decoder_num_hidden_layers"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.intermediate_size=-4", ["intermediate_size", "at least 1"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.decoder_intermediate_size=0", ["decoder_intermediate_size"]),
        (
            "run_pretrain INPUTS/pretrain.yaml model.config.layer_norm_eps=.nan",
            ["layer_norm_eps must be above 0", "nan"],
        ),
        ("run_pretrain INPUTS/pretrain.yaml model.config.initializer_range=.nan", ["initializer_range", "nan"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.hidden_dropout_prob=2", ["hidden_dropout_prob", "0..1", "2"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.image_mean=[.nan,0.0,0.0]", ["image_mean [nan", "one number"]),
        (
            "run_pretrain INPUTS/pretrain.yaml model.config.intermediate_size=100000000000",
            ["memory is not enough for 12800", "lower"],
        ),
        (
            "run_pretrain INPUTS/pretrain.yaml model.config.image_size=1000000",
            ["image_size must be at most 16384 pixels, got 1000000"],
        ),
        (
            "run_pretrain INPUTS/pretrain.yaml model.config.num_hidden_layers=1000000000",
            ["num_hidden_layers must be at least 1 and at most 1000, got 1000000000"],
        ),
        ("run_pretrain INPUTS/pretrain.yaml model.config.id2label=3", ["'model.config.id2label' is not for"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.dtype=float8", ["'model.config.dtype' is not for"]),
        ("run_pretrain INPUTS/pretrain.yaml model.config.return_dict=false", ["'model.config.return_dict' is not for"]),
        ("run_finetune INPUTS/finetune.yaml adversary.steps=1000000000000", ["'adversary.steps'", "at most 1000"]),
        (
            "run_finetune INPUTS/finetune.yaml adversary.alpha_ratio=1e300 adversary.attack=fgsm",
            ["'adversary.alpha_ratio'", "at most 100"],
        ),
        ("run_finetune INPUTS/finetune.yaml consistency.num_draws=1000000000", ["'consistency.num_draws'", "1024"]),
        ("run_finetune INPUTS/finetune.yaml feature_loss.weight=1e300", ["'feature_loss.weight'", "at most 1000000"]),
        ("run_finetune INPUTS/finetune.yaml image_size=9999999", ["'image_size'", "at most 16384"]),
        ("run_attack INPUTS/attack.yaml models.0.sigma=[]", ["model 'defended': sigma is an empty list"]),
        ("run_attack INPUTS/attack.yaml models.0.sigma=[30,30]", ["sigma names 30.0 twice"]),
        (f"run_attack INPUTS/attack.yaml {HALF_NORMALIZED}", ["classifier_image_mean [0.5]", "three numbers each"]),
        (f"run_attack INPUTS/attack.yaml {HUGE}", ["classifier_image_size' must be", "at most 16384"]),
        ("run_attack INPUTS/attack.yaml attacks.0.models=[]", ["attack 'fgsm': models is an empty list"]),
        ("run_attack INPUTS/attack.yaml attacks.0.sigmas=[]", ["attack 'fgsm': sigmas is an empty list"]),
        ("run_attack INPUTS/attack.yaml attacks.0.seeds=[]", ["attack 'fgsm': seeds is an empty list"]),
        ("run_attack INPUTS/attack.yaml attacks.0.seeds=[3,3]", ["attack 'fgsm': seeds names 3 twice"]),
        ("run_attack INPUTS/attack.yaml attacks.0.epsilon_255=[8,8]", ["epsilon_255 names 8.0 twice"]),
        ("run_attack INPUTS/attack.yaml seeds=[0,0]", ["seeds names 0 twice"]),
        (
            "run_attack INPUTS/attack.yaml epsilon_255=[2]",
            ["epsilon_255 [2.0]", "a protocol's budgets", "none is named"],
        ),
        ("run_attack INPUTS/attack.yaml num_draws=10000000000", ["'num_draws'", "at most 100000"]),
        (
            "run_attack INPUTS/attack.yaml attacks=[{attack: os:system}]",
            ["(oracle, images_01, epsilon)", "takes command"],
        ),
        (
            "run_attack INPUTS/attack.yaml attacks=[{attack: pgd, alpha_255: 1, alpha_ratio: 0.5}]",
            ["alpha_255 1 and alpha_ratio 0.5 both set the step"],
        ),
        (f"run_attack INPUTS/attack.yaml {PEER.format('abc')}", ["torchattacks.PGD: steps must be a number", "'abc'"]),
        (f"run_attack INPUTS/attack.yaml {PEER.format(-1)}", ["steps must be a number from 1 up, got -1"]),
        (f"run_attack INPUTS/attack.yaml {RECONSTRUCTION.format('{}', 30)}", ["purifiers is an empty list"]),
        (
            f"run_attack INPUTS/attack.yaml {RECONSTRUCTION.format('{a: INPUTS/purifier}', '')}",
            ["sigmas_255 is an empty list"],
        ),
        (f"run_attack INPUTS/attack.yaml {RECONSTRUCTION.format('{a: INPUTS/none}', 30)}", ["no model directory"]),
        ("run_certify INPUTS/certify.yaml radii=[]", ["radii is an empty list"]),
        ("run_certify INPUTS/certify.yaml radii=[0.5,0.5]", ["radii names 0.5 twice"]),
        ("run_certify INPUTS/certify.yaml models=[]", ["models is an empty list"]),
        ("run_certify INPUTS/certify.yaml", ['patch_statistics="input"', "no certificate would be valid"]),
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
    check_one_line(command, words, inputs, monkeypatch, capsys)


CONFIGS = {
    "broken": "{",
    "empty": "",
    "list": "[]",
    "number": "3",
    "no_type": "{}",
    "unknown_type": '{"model_type": "nothing"}',
    "number_type": '{"model_type": 5}',
    "text_width": ("hidden_size", "wide"),
    "list_width": ("hidden_size", [32]),
    "other_width": ("hidden_size", 64),
    "null_patch": ("patch_size", None),
    "zero_heads": ("num_attention_heads", 0),
    "number_mean": ("image_mean", 3),
    "negative_std": ("image_std", [-1.0, 1.0, 1.0]),
    "more_layers": ("num_hidden_layers", "many"),
    "list_labels": ("id2label", [1, 2]),
    "no_activation": ("hidden_act", 3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_edited_by_hand_is_one_line(name, inputs, in_the_repository, monkeypatch, capsys):
    folder = inputs / f"edited_{name}"
    shutil.copytree(inputs / "classifier", folder)
    change = CONFIGS[name]
    if isinstance(change, str):
        (folder / "config.json").write_text(change)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict([change])))
    command = f"run_finetune INPUTS/finetune.yaml init={folder}"
    by_path = isinstance(change, str) or name in ("other_width", "list_labels")
    check_one_line(command, [f"edited_{name}" if by_path else change[0]], inputs, monkeypatch, capsys)
    shutil.rmtree(folder)


def edit_json(name, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))

    return edit


def leave_a_pickle_alone(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


PROCESSOR = "preprocessor_config.json"
DAMAGES = {
    "pickle": leave_a_pickle_alone,
    "text": lambda folder: (folder / "config.json").write_text('"nim"'),
    "null": lambda folder: (folder / "config.json").write_text("null"),
    "deep": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "dtype": edit_json("config.json", dtype="float7"),
    "huge": edit_json("config.json", classifier_config={"model_type": "nim_classifier", "image_size": 2**31}),
    "processor_list": lambda folder: (folder / PROCESSOR).write_text("[]"),
    "processor_number": lambda folder: (folder / PROCESSOR).write_text("5"),
    "processor_type": edit_json(PROCESSOR, image_processor_type=5),
    "processor_size": edit_json(PROCESSOR, size="x"),
}


@pytest.mark.parametrize("script", ["run_attack INPUTS/attack.yaml models.0.path=", "push_to_hub "])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_composed_model_whose_files_are_damaged_is_one_line(
    name, script, inputs, in_the_repository, monkeypatch, capsys
):
    folder = inputs / f"damaged_{name}"
    shutil.copytree(inputs / "purified", folder)
    DAMAGES[name](folder)
    repository = " org/name" if script.startswith("push") else ""
    check_one_line(f"{script}{folder}{repository}", [f"damaged_{name}"], inputs, monkeypatch, capsys)
    shutil.rmtree(folder)


def odd_checkpoints():
    yield "empty.pt", b""
    yield from (
        (f"text{number}.pt", text) for number, text in enumerate((b"hello", b"import torch", b"cos\nsystem\n."))
    )
    yield from ((f"bytes{number}.pt", bytes([number] * 40)) for number in (0, 40, 80, 128, 200, 255))
    yield "zip.pt", b"PK\x03\x04" + bytes(60)
    for name, value in {"list": [1], "numbers": {1: torch.ones(2)}, "mixed": {"a": 1, 2: 3}, "nothing": {}}.items():
        buffer = io.BytesIO()
        torch.save(value, buffer)
        yield f"{name}.pt", buffer.getvalue()


@pytest.mark.parametrize("name, content", [pytest.param(*case, id=case[0]) for case in odd_checkpoints()])
def test_what_is_no_checkpoint_is_one_line(name, content, inputs, in_the_repository, monkeypatch, capsys):
    (inputs / name).write_bytes(content)
    check_one_line(f"{CONVERT} INPUTS/{name}", [name], inputs, monkeypatch, capsys)


def check_one_line(command, words, inputs, monkeypatch, capsys):
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
