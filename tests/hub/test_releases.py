"""The released directories: complete, as a push would make them, and usable where this package is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from PIL import Image
from reference import load_script, released_configs
from safetensors.torch import load_file
from test_hub import SITE_PACKAGES
from transformers import AutoImageProcessor

from modeling_nim import MODELS


pytestmark = pytest.mark.timeout(600)  # one process loads all of them, on a machine that may be busy

ROOT = Path(__file__).parents[2]
CONFIGS = released_configs()
RELEASED = list(CONFIGS)


def released(architecture: str) -> list[Path]:
    return [folder for folder, config in CONFIGS.items() if config["architectures"] == [architecture]]


PURIFIED = released("NIMPurifiedImageClassification")
DENOISERS = released("NIMForPreTraining")
BARE = released("NIMForImageClassification") + released("NIMSimMIMForImageClassification")


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_a_released_directory_holds_what_a_pushed_one_holds(folder, tmp_path):
    model = MODELS[CONFIGS[folder]["architectures"][0]].from_pretrained(folder)
    model.save_pretrained(tmp_path)
    pushed = {path.name for path in tmp_path.iterdir()} | {"README.md"}
    assert pushed == {path.name for path in folder.iterdir()} - {"card.yaml", ".eval_results"}
    for path in tmp_path.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert (folder / path.name).read_text(encoding="utf-8") == text, f"run `make cards`: {path.name} has changed"
        assert (ROOT / "modeling_nim" / path.name).read_text(encoding="utf-8") == text
    saved_config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for key in ("auto_map", "custom_pipelines"):
        assert CONFIGS[folder].get(key) == saved_config.get(key)
    weights = load_file(folder / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())  # computed in float32, however they are kept
    assert all(torch.equal(weights[key].float(), value) for key, value in saved.items())


# The Python of a card as it stands, on an image of ours: the labels, or for a purifier the purified image's mean.
RUN_CARD = """
import re
import torch

def run_card(folder, image):
    [code] = re.findall(r"```python\\n(.*?)```", open(f"{folder}/README.md", encoding="utf-8").read(), re.DOTALL)
    namespace = {}
    torch.manual_seed(0)
    exec(code.replace("image.png", image), namespace)
    model = namespace["pipe"].model if "pipe" in namespace else namespace["model"]
    if "purified" in namespace:
        return type(model).__module__, namespace["purified"].double().mean().item()
    result = namespace["result"]
    return type(model).__module__, result["labels"] if isinstance(result, dict) else result
"""
# Runs with -I -S and site-packages appended by hand, so that no .pth file can make this package importable.
WITHOUT_THE_PACKAGE = f"""
import json, os, sys
sys.path += sys.argv[1].split(os.pathsep)
sys.modules["modeling_nim"] = None
{RUN_CARD}
print(json.dumps({{folder: run_card(folder, sys.argv[2]) for folder in sys.argv[3:]}}))
"""
DIGIT = str(ROOT / "space" / "examples" / "digit-4.png")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What the code of every card answers, by name, in one process that cannot import this package."""
    cache = tmp_path_factory.mktemp("modules")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", WITHOUT_THE_PACKAGE, SITE_PACKAGES, DIGIT, *RELEASED],
        env={"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {Path(folder).name: answer for folder, answer in json.loads(done.stdout.splitlines()[-1]).items()}
    assert all(module.startswith("transformers_modules.") for module, _ in found.values()), found
    return {name: answer for name, (_, answer) in found.items()}


def with_the_package(folder: Path, monkeypatch):
    """What the code of a card answers here."""
    monkeypatch.chdir(ROOT)
    namespace: dict = {}
    exec(RUN_CARD, namespace)
    module, answer = namespace["run_card"](folder, DIGIT)
    assert module.startswith("modeling_nim.")
    return answer


@pytest.mark.parametrize("folder", PURIFIED + BARE, ids=lambda folder: folder.name)
def test_a_released_classifier_answers_as_its_card_says_where_the_package_is_blocked(answers, folder, monkeypatch):
    expected, found = with_the_package(folder, monkeypatch), answers[folder.name]
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)
    if "digits" in folder.name:
        assert found[0]["label"] == "4"


@pytest.mark.parametrize("folder", DENOISERS, ids=lambda folder: folder.name)
def test_a_released_purifier_denoises_as_its_card_says_where_the_package_is_blocked(answers, folder, monkeypatch):
    assert answers[folder.name] == pytest.approx(with_the_package(folder, monkeypatch), abs=1e-5)
    model = MODELS[CONFIGS[folder]["architectures"][0]].from_pretrained(folder)
    clean = AutoImageProcessor.from_pretrained(folder)(Image.open(DIGIT), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        purified = model.purify(clean, sigma=30, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(model.config.image_std).view(1, -1, 1, 1)
    residual_255 = 255 * ((purified - clean) * scale).square().mean().sqrt()
    assert residual_255 < 30  # less than the noise that it was given


def test_every_released_directory_is_tested_and_named_where_releases_are_described():
    assert len(PURIFIED) + len(DENOISERS) + len(BARE) == len(RELEASED)
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    assert not [folder.name for folder in RELEASED if f"`{folder.name}`" not in page]


def test_the_purifier_of_the_digits_is_the_one_inside_the_defended_model():
    alone = load_file(ROOT / "model_cards" / "nim-mae-digits" / "model.safetensors")
    composed = load_file(ROOT / "model_cards" / "nim-digits" / "model.safetensors")
    inside = {key.removeprefix("purifier."): value for key, value in composed.items() if key.startswith("purifier.")}
    assert alone.keys() == inside.keys()
    assert all(torch.equal(value, inside[key]) for key, value in alone.items())


def clean(rows: list[dict]) -> list[int]:
    """The image counts of the rows without an attack: several protocols measure the same one."""
    return [row["num_images"] for row in rows if row["attack"] == "none"]


@pytest.mark.parametrize("folder", PURIFIED + BARE, ids=lambda folder: folder.name)
def test_results_for_the_hub_are_the_records(folder):
    """Parsed back by the Hub's client, each entry is one row of the summaries that the card names."""
    text = (folder / ".eval_results" / "accuracy.yaml").read_text(encoding="utf-8")
    entries = parse_eval_result_entries(yaml.safe_load(text))
    card = yaml.safe_load((folder / "card.yaml").read_text(encoding="utf-8"))
    rows = [row for path in card["summaries"] for row in json.loads((ROOT / path).read_text())["rows"]]
    own = [row for row in rows if row["model"] == card["model"] and card.get("sigma", row["sigma"]) == row["sigma"]]
    own = [
        row for index, row in enumerate(own) if row["attack"] != "none" or row["num_images"] not in clean(own[:index])
    ]
    assert [entry.value for entry in entries] == [round(row["accuracy"], 2) for row in own] != []
    assert len({entry.task_id for entry in entries}) == len(entries)
    assert {entry.dataset_id for entry in entries} == {card["data"].get("id") or card["data"]["name"]}
    for entry, row in zip(entries, own, strict=True):
        assert f'"epsilon_255": {row["epsilon_255"]}' in entry.notes and f"{row['num_images']} images" in entry.notes


def test_every_released_file_is_as_made_and_a_changed_one_is_found(monkeypatch, capsys, tmp_path):
    releases = load_script("releases")
    monkeypatch.setattr(sys, "argv", ["releases.py", "--check"])
    assert releases.main() == 0, capsys.readouterr().out
    folder = tmp_path / "model_cards" / "nim-mae-digits"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((ROOT / "model_cards/nim-mae-digits/config.json").read_bytes())
    (folder / "old.py").write_text("no file of this model")
    monkeypatch.setattr(releases, "ROOT", tmp_path)
    assert releases.main() == 1
    assert "nim-mae-digits/old.py is not as made" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["releases.py"])
    assert releases.main() == 0
    assert not (folder / "old.py").exists() and (folder / "noise_nim.py").is_file()


def test_the_releases_stay_small():
    """Every clone of the repository downloads them."""
    assert sum(path.stat().st_size for path in (ROOT / "model_cards").rglob("*") if path.is_file()) <= 60e6
