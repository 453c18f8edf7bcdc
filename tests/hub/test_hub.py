"""Push to a Hub and load from it, in a process that cannot import this package."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
import transformers
import yaml
from huggingface_hub import parse_eval_result_entries
from PIL import Image
from safetensors.torch import load_file, save_file
from stub_hub import StubHub
from transformers import ViTConfig, ViTForImageClassification, pipeline

import modeling_nim
from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    NIMSimMIMClassifierConfig,
    NIMSimMIMConfig,
    NIMSimMIMForImageClassification,
    NIMSimMIMForPreTraining,
)


ROOT = Path(__file__).parents[2]
# Where the libraries of this process are; other versions of transformers and PyTorch may stand before the others.
SITE_PACKAGES = os.pathsep.join(str(Path(library.__file__).parents[1]) for library in (transformers, torch, PIL))
ENCODER = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
# What is pushed: by `push_to_hub` of its class, or by scripts/push_to_hub.py ("script-...").
NAMES = [
    "nim-mae",
    "nim-classifier",
    "nim-simmim",
    "simmim-classifier",
    "script-purified",
    "simmim-purified",
    "vit-purified",
]


def make_models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    models = {
        "nim-mae": NIMForPreTraining(NIMConfig(**ENCODER, **DECODER)),
        "nim-classifier": NIMForImageClassification(NIMClassifierConfig(**ENCODER, num_labels=5)),
        "nim-simmim": NIMSimMIMForPreTraining(NIMSimMIMConfig(**ENCODER)),
        "simmim-classifier": NIMSimMIMForImageClassification(NIMSimMIMClassifierConfig(**ENCODER, num_labels=5)),
    }
    vit = ViTForImageClassification(ViTConfig(**ENCODER | {"image_size": 24}, num_labels=5))
    for model in (models["nim-classifier"], models["simmim-classifier"], vit):
        torch.nn.init.normal_(model.classifier.weight)  # a fresh head's outputs are too small to compare
    from_parts = NIMPurifiedImageClassification.from_parts
    settings = {"classifier_image_mean": [0.5] * 3, "classifier_image_std": [0.5] * 3}
    models["script-purified"] = from_parts(models["nim-mae"], models["nim-classifier"], sigma=40)
    models["simmim-purified"] = from_parts(models["nim-simmim"], models["simmim-classifier"], sigma=40)
    models["vit-purified"] = from_parts(models["nim-mae"], vit, sigma=40, image_size=16, **settings)
    return {name: model.eval() for name, model in models.items()}


def environment(hub: StubHub, cache: Path, token: str | None) -> dict[str, str]:
    """A user's environment on a machine of their own: the stub is the Hub, the caches are empty."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and key != "PYTHONPATH"}
    own = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_MODULES_CACHE": str(cache / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    return kept | own | ({"HF_TOKEN": token} if token else {})


def run_script(hub: StubHub, cache: Path, *arguments: str, token: str | None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / "push_to_hub.py"), *arguments]
    return subprocess.run(command, env=environment(hub, cache, token), capture_output=True, text=True, timeout=120)


PUSH = """
import sys
from modeling_nim import *
import modeling_nim
for line in sys.argv[1:]:
    class_name, directory, repo_id = line.split("|")
    getattr(modeling_nim, class_name).from_pretrained(directory).push_to_hub(repo_id)
"""

# Runs with -I -S and site-packages appended by hand, so that no .pth file can make this package importable.
LOAD = """
import os
import sys
site_packages, folder, names = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
sys.path += site_packages.split(os.pathsep)
try:
    import modeling_nim
except ImportError:
    pass
else:
    raise SystemExit("this test needs a process that cannot import modeling_nim")
import json
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, pipeline

inputs = load_file(f"{folder}/inputs.safetensors")
outputs, answers = {}, {}
for name in names:
    repo_id = f"org/{name}"
    pre_training = name in ("nim-mae", "nim-simmim")
    auto_class = AutoModelForPreTraining if pre_training else AutoModelForImageClassification
    model, report = auto_class.from_pretrained(repo_id, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    extra = {"epsilon": inputs["epsilon"]} if pre_training or "purified" in name else {}
    with torch.no_grad():
        output = model.eval()(inputs["pixel_values"], **extra, **({"sigma": 30} if pre_training else {}))
    outputs[name] = output.logits
    if pre_training:
        outputs[f"{name}.reconstruction"] = output.reconstruction
        encoder = AutoModel.from_pretrained(repo_id, trust_remote_code=True).eval()
        with torch.no_grad():
            outputs[f"{name}.features"] = encoder(inputs["pixel_values"]).last_hidden_state
        features = pipeline("image-feature-extraction", repo_id, trust_remote_code=True)(f"{folder}/image.png")
        answers[name] = [len(features), len(features[0]), len(features[0][0])]
        outputs[f"{name}.purified"] = model.purify(inputs["pixel_values"], sigma=30, epsilon=inputs["epsilon"]).detach()
        continue
    pipe = pipeline("image-classification", repo_id, trust_remote_code=True)
    if "purified" in name:
        result = pipe(f"{folder}/image.png", sigma=30, num_votes=3, seed=0, return_purified=True)
        result["purified"].save(f"{folder}/{name}.png")
        answers[name] = result["labels"]
    else:
        answers[name] = pipe(f"{folder}/image.png")
save_file({name: value.contiguous() for name, value in outputs.items()}, f"{folder}/outputs.safetensors")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """A hub that holds every model, the models, and what a process without this package made of them."""
    folder = tmp_path_factory.mktemp("hub")
    models = make_models()
    for name, model in models.items():
        model.save_pretrained(folder / name)
    torch.manual_seed(1)
    pixel_values, epsilon = torch.randn(2, 2, 3, 16, 16)
    save_file({"pixel_values": pixel_values, "epsilon": epsilon}, folder / "inputs.safetensors")
    levels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(levels).save(folder / "image.png")
    with StubHub() as hub:
        by_class = [
            f"{type(models[name]).__name__}|{folder / name}|org/{name}"
            for name in NAMES
            if not name.startswith("script")
        ]
        pusher = environment(hub, folder / "pusher", hub.token)
        subprocess.run(
            [sys.executable, "-c", PUSH, *by_class], env=pusher, check=True, capture_output=True, timeout=120
        )
        script = run_script(
            hub, folder / "pusher", str(folder / "script-purified"), "org/script-purified", token=hub.token
        )
        assert script.returncode == 0, script.stderr
        loaded = subprocess.run(
            [sys.executable, "-I", "-S", "-c", LOAD, SITE_PACKAGES, str(folder), ",".join(NAMES)],
            env=environment(hub, folder / "loader", None),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert loaded.returncode == 0, loaded.stderr[-3000:]
        yield {
            "hub": hub,
            "folder": folder,
            "models": models,
            "outputs": load_file(folder / "outputs.safetensors"),
            "answers": json.loads(loaded.stdout.splitlines()[-1]),
            "script": script,
            "stderr": loaded.stderr,
        }


@pytest.mark.parametrize("name", NAMES)
def test_outputs_without_the_package_are_the_same(pushed, name):
    inputs = load_file(pushed["folder"] / "inputs.safetensors")
    model = pushed["models"][name]
    is_purified, is_pre_training = "purified" in name, name in ("nim-mae", "nim-simmim")
    extra = {"epsilon": inputs["epsilon"]} if is_purified or is_pre_training else {}
    with torch.no_grad():
        output = model(inputs["pixel_values"], **extra, **({"sigma": 30} if is_pre_training else {}))
    expected = {name: output.logits}
    if is_pre_training:
        expected[f"{name}.reconstruction"] = output.reconstruction
        with torch.no_grad():
            encoder = model.vit if name == "nim-mae" else model.beit
            expected[f"{name}.features"] = encoder(inputs["pixel_values"]).last_hidden_state
        assert pushed["answers"][name] == [1, 17, 32]  # one image, CLS and 16 patches, width 32
        expected[f"{name}.purified"] = model.purify(inputs["pixel_values"], sigma=30, epsilon=inputs["epsilon"])
    for key, value in expected.items():
        torch.testing.assert_close(pushed["outputs"][key], value.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("nim-mae", "nim-simmim")])
def test_the_pipeline_without_the_package_gives_the_same_answer(pushed, name):
    pipe = pipeline("image-classification", str(pushed["folder"] / name))
    image = str(pushed["folder"] / "image.png")
    if "purified" in name:
        result = pipe(image, sigma=30, num_votes=3, seed=0, return_purified=True)
        expected = result["labels"]
        with Image.open(pushed["folder"] / f"{name}.png") as purified:
            assert purified.size == (20, 30)
            assert np.array_equal(purified, result["purified"])
    else:
        expected = pipe(image)
    found = pushed["answers"][name]
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_repository_holds_weights_configuration_processor_code_and_card(pushed, name):
    files = pushed["hub"].repositories[f"org/{name}"].files
    assert {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"} <= set(files)
    config = json.loads(files["config.json"])
    for reference in config["auto_map"].values():
        assert f"{reference.split('.')[0]}.py" in files
    if "purified" in name:
        assert config["custom_pipelines"]["image-classification"]["impl"].startswith("pipeline_nim.")
        assert "pipeline_nim.py" in files
    assert str(pushed["folder"]) not in json.dumps(config)  # no path of the machine that made it
    for path, content in files.items():
        if path.endswith(".py"):
            assert b"\nimport modeling_nim" not in content and b"\nfrom modeling_nim" not in content, path


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_the_parameters_and_no_more(pushed, name):
    content = pushed["hub"].repositories[f"org/{name}"].files["model.safetensors"]
    (header_size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_size])
    header.pop("__metadata__")
    shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
    parameters = {key: tuple(value.shape) for key, value in pushed["models"][name].named_parameters()}
    assert shapes == parameters
    num_values = sum(value.numel() for value in pushed["models"][name].parameters())
    assert len(content) == 8 + header_size + 4 * num_values


def test_the_script_says_what_it_published_and_the_card_is_ours(pushed):
    assert "files published at" in pushed["script"].stdout
    card = pushed["hub"].repositories["org/script-purified"].files["README.md"].decode()
    assert 'pipeline("image-classification", "org/script-purified", trust_remote_code=True)' in card
    assert "No attack on this model is recorded here" in card


def test_loading_without_the_package_reports_no_error(pushed):
    assert "ERROR" not in pushed["stderr"] and "not supported" not in pushed["stderr"]


# ---- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def push(monkeypatch, tmp_path, pushed):
    """Calls scripts/push_to_hub.py in this process, as the given user, with the stub for the Hub."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # loopback only
    import push_to_hub

    def call(*arguments, token=pushed["hub"].token):
        from huggingface_hub import HfApi

        api = HfApi(endpoint=pushed["hub"].url, token=token or False)
        monkeypatch.setattr(push_to_hub, "HfApi", lambda: api)
        monkeypatch.setattr(sys, "argv", ["push_to_hub.py", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as exit_info:
            modeling_nim.runs.errors.run_main(push_to_hub.main)
        return exit_info.value.code

    return call


@pytest.fixture
def impatient(monkeypatch):
    """Removes the waits of the client, which tries a cut upload six times and waits longer each time."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def test_a_cut_upload_leaves_nothing_and_can_be_repeated(push, pushed, capsys, impatient):
    hub, directory = pushed["hub"], pushed["folder"] / "nim-mae"
    hub.cut_commits_after_bytes = [20_000] * 6
    assert push(directory, "org/cut") == 2
    assert "nothing was published. Run the command again" in capsys.readouterr().err
    assert set(hub.repositories["org/cut"].files) == {".gitattributes"}
    assert not push(directory, "org/cut", "--update")
    assert "model.safetensors" in hub.repositories["org/cut"].files


def test_a_cut_update_leaves_the_old_version(push, pushed, impatient):
    hub, folder = pushed["hub"], pushed["folder"]
    assert not push(folder / "nim-mae", "org/updated")
    before = hub.repositories["org/updated"].sha
    hub.cut_commits_after_bytes = [20_000] * 6
    assert push(folder / "script-purified", "org/updated", "--update") == 2
    assert hub.repositories["org/updated"].sha == before


def test_a_taken_name_gets_our_words_and_strangers_the_hub_s(push, pushed, capsys):
    directory = pushed["folder"] / "nim-mae"
    before = dict(pushed["hub"].repositories["org/nim-mae"].files)
    assert push(directory, "org/nim-mae") == 2
    error = capsys.readouterr().err
    assert "org/nim-mae exists" in error and "pass --update" in error and "409" not in error
    assert pushed["hub"].repositories["org/nim-mae"].files == before
    assert push(directory, "org/new", token=None) == 2
    assert "401" in capsys.readouterr().err
    assert push(directory, "elsewhere/new") == 2
    assert "403" in capsys.readouterr().err
    assert push(directory, "no good/name") == 2
    assert "Repo id must" in capsys.readouterr().err
    assert not {"org/new", "elsewhere/new"} & set(pushed["hub"].repositories)


def test_a_summary_of_several_models_asks_for_a_name_and_its_results_go_up(push, pushed, tmp_path, capsys):
    row = {"attack": "pgd", "name": "pgd-10", "threat_model": "white_box", "epsilon_255": 8.0, "sigma": 40.0}
    row |= {"accuracy": 61.25, "ci95": [50.0, 70.0], "num_images": 80, "num_draws": 1, "control_accuracy": 90.0}
    rows = [row | {"model": "one"}, row | {"model": "two", "accuracy": 33.0, "settings": {"steps": 10}}]
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"rows": rows, "alarms": [], "provenance": {}}))
    directory = pushed["folder"] / "script-purified"
    assert push(directory, "org/measured", "--summary", summary) == 2
    assert "['one', 'two']: say with --model" in capsys.readouterr().err
    assert "org/measured" not in pushed["hub"].repositories
    assert not push(directory, "org/measured", "--summary", summary, "--model", "two")
    files = pushed["hub"].repositories["org/measured"].files
    [entry] = parse_eval_result_entries(yaml.safe_load(files[".eval_results/accuracy.yaml"]))
    assert (entry.value, entry.task_id) == (33.0, "white_box_accuracy_pgd_10_steps_eps_8_255_80_images")


def test_directories_that_cannot_be_published_are_named(push, pushed, tmp_path, capsys):
    assert push(tmp_path, "org/new") == 2
    assert "holds no config.json" in capsys.readouterr().err
    ViTForImageClassification(ViTConfig(**ENCODER)).save_pretrained(tmp_path / "vit")
    assert push(tmp_path / "vit", "org/new") == 2
    assert "no model of this package" in capsys.readouterr().err
    wrong = tmp_path / "wrong"
    pushed["models"]["nim-mae"].save_pretrained(wrong)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"decoder_num_hidden_layers": 2}))
    assert push(wrong, "org/new") == 2
    assert "lacks 16 weights of a NIMForPreTraining" in capsys.readouterr().err
    assert "org/new" not in pushed["hub"].repositories
