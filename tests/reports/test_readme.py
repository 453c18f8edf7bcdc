"""Runs the documents: Python as it stands, commands up to the recipe that they would follow; checks paths and names."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY, TINY_DECODER
from PIL import Image
from training_runs import REPOSITORY, load_script

import modeling_nim
from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
)
from modeling_nim.robustness.certification import CertifyRecipe
from modeling_nim.robustness.recipes import AttackRunRecipe
from modeling_nim.runs.recipe import parse_command_line


DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def blocks(document, kind):
    """The fenced texts of one kind."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == kind]


def prose(document):
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline(document):
    return re.findall(r"`([^`\n]+)`", prose(document))


def commands():
    """Every command of the documents as words, without prompts, comments and continuation lines."""
    lines = []
    for document in DOCUMENTS:
        for text in blocks(document, "bash"):
            lines += text.replace("\\\n", " ").splitlines()
        lines += [text for text in inline(document) if re.match(r"(python|make) ", text)]
    found = [shlex.split(line.partition(" | ")[0], comments=True) for line in dict.fromkeys(lines)]
    return [words for words in found if words and words[0] != "pip"]


def test_python_of_the_readme_runs_on_models_laid_out_as_the_demo_does(tmp_path, monkeypatch):
    purifier = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER))
    classifier = NIMForImageClassification(NIMClassifierConfig(**TINY, num_labels=10))
    demo = tmp_path / "outputs" / "demo"
    purifier.save_pretrained(demo / "pretrain")
    classifier.save_pretrained(demo / "finetune_denoised")
    purified = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=75)
    purified.save_pretrained(demo / "finetune_denoised" / "purified")
    (tmp_path / "space").symlink_to(REPOSITORY / "space")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for text in blocks(REPOSITORY / "README.md", "python"):
        exec(text, namespace)
    assert namespace["logits"].shape == (1, 10) and namespace["logits"].requires_grad
    assert isinstance(namespace["pipe"].model, NIMPurifiedImageClassification)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_of_the_documents_name_what_exists(words, monkeypatch):
    if words[0] == "make":
        rules = re.findall(r"^([\w -]+):(?!=)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in " ".join(rules).split()
        return
    if "--config_file" in words:
        launch = yaml.safe_load((REPOSITORY / words[words.index("--config_file") + 1]).read_text())
        assert launch["compute_environment"] == "LOCAL_MACHINE"
    scripts = [index for index, word in enumerate(words) if re.fullmatch(r"scripts/[\w/]+\.py", word)]
    position = scripts[-1]  # behind launch.py
    script, arguments = REPOSITORY / words[position], words[position + 1 :]
    source = script.read_text()
    schemas = {"run_attack": lambda: AttackRunRecipe, "run_certify": lambda: CertifyRecipe}
    schemas["run_pretrain"] = lambda: load_script("run_pretrain").PretrainRecipe
    schemas["run_finetune"] = lambda: load_script("run_finetune").FinetuneRecipe
    if script.stem in schemas:
        monkeypatch.chdir(REPOSITORY)
        assert parse_command_line("", schemas[script.stem](), arguments)
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source


@each_document
def test_paths_and_names_of_the_documents_exist(document):
    links = re.findall(r"\]\(([^)#:]+)\)", prose(document))
    assert not [link for link in links if not (document.parent / link).exists()]
    rooms = r"(scripts|tests|modeling_nim|space|model_cards|docs|results)/[\w./]*"
    paths = [text for text in inline(document) if re.fullmatch(rooms, text)]
    assert not [path for path in paths if not (REPOSITORY / path).exists()]
    for name in (text for text in inline(document) if re.fullmatch(r"(NIM\w+|noise_nim)(\.\w+)*(\(.*\))?", text)):
        place = modeling_nim
        for part in name.partition("(")[0].split("."):
            place = getattr(place, part)


def test_the_readme_is_short_and_leads_to_every_document():
    readme = DOCUMENTS[0].read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 150
    assert not [path.name for path in DOCUMENTS[2:] if f"(docs/{path.name})" not in readme]


@pytest.mark.timeout(600)
def test_the_page_on_your_own_images_runs_from_a_folder_to_certificates(tmp_path, monkeypatch):
    """Its commands one after another, on a folder of drawn images, with few steps."""
    page = REPOSITORY / "docs" / "your-images.md"
    drawn = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 3)):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(1, count + 1):
                pixels = drawn.integers(0, 256, (50 + number, 70, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03}.jpg")
    monkeypatch.chdir(tmp_path)
    for folder in ("scripts", "model_cards"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    short = {"run_pretrain": ["optimization.batch_size=8", "optimization.epochs=1", "optimization.warmup_epochs=0"]}
    short["run_finetune"] = short["run_pretrain"]
    short["run_attack"] = ["num_images=4", "num_draws=2", "attacks.0.steps=2", "attacks.1.steps=2", "micro_batch=32"]
    short["run_certify"] = ["num_images=2", "num_draws=20", "num_selection_draws=5"]
    for words in (shlex.split(line) for line in blocks(page, "bash")[0].splitlines()):
        script = Path(words[2]).stem
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:], *short[script]])
        load_script(script).main()
    namespace: dict = {}
    for text in blocks(page, "python"):
        exec(text, namespace)
    assert namespace["logits"].shape == (1, 2)
    assert namespace["defended"].purifier.config.image_size == 32 < namespace["pixel_values"].shape[-1]
    assert {answer["label"] for answer in namespace["answers"]} == {"cat", "dog"}
    assert sum(answer["score"] for answer in namespace["answers"]) == pytest.approx(1, abs=1e-5)
    rows = json.loads((tmp_path / "outputs/folder/attack/summary.json").read_text())["rows"]
    assert {row["num_images"] for row in rows} == {4}
    certified = json.loads((tmp_path / "outputs/folder/certify/certified.json").read_text())["rows"]
    assert [row["radius_l2"] for row in certified] == [0, 0.1, 0.25]
