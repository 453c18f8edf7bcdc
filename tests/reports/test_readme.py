"""The README is run: its Python as it stands, its commands up to the recipe that they would follow, its paths and names."""

import re
import shlex

import pytest
import yaml
from conftest import TINY, TINY_DECODER
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
from modeling_nim.runs.recipe import load_recipe


README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)


def commands():
    """Every command of the README as words, without prompts, comments and continuation lines."""
    lines = [line for kind, text in BLOCKS if kind == "bash" for line in text.replace("\\\n", " ").splitlines()]
    lines += [text for text in INLINE if re.match(r"(python|make|accelerate) ", text)]
    lines = [line.partition(" | ")[0] for line in lines]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words]


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
    for text in (text for kind, text in BLOCKS if kind == "python"):
        exec(text, namespace)
    assert namespace["logits"].shape == (1, 10) and namespace["logits"].requires_grad
    assert isinstance(namespace["pipe"].model, NIMPurifiedImageClassification)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_of_the_readme_name_what_exists(words):
    if words[0] == "make":
        assert f"\n{words[1]}:" in (REPOSITORY / "Makefile").read_text()
        return
    if "--config_file" in words:
        launch = yaml.safe_load((REPOSITORY / words[words.index("--config_file") + 1]).read_text())
        assert launch["compute_environment"] == "LOCAL_MACHINE"
    position = [index for index, word in enumerate(words) if re.fullmatch(r"scripts/[\w/]+\.py", word)][
        -1
    ]  # behind launch.py
    script, arguments = REPOSITORY / words[position], words[position + 1 :]
    source = script.read_text()
    schemas = {"run_attack": lambda: AttackRunRecipe, "run_certify": lambda: CertifyRecipe}
    schemas["run_pretrain"] = lambda: load_script("run_pretrain").PretrainRecipe
    schemas["run_finetune"] = lambda: load_script("run_finetune").FinetuneRecipe
    if script.stem in schemas:
        recipe, *overrides = arguments
        assert load_recipe(REPOSITORY / recipe, schemas[script.stem](), overrides)
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in source


def test_paths_and_names_of_the_readme_exist():
    paths = re.findall(r"\]\(([^)#:]+)\)", PROSE)
    paths += [text for text in INLINE if re.fullmatch(r"(scripts|tests|modeling_nim|space|model_cards)/[\w./]*", text)]
    assert len(paths) > 5
    assert not [path for path in paths if not (REPOSITORY / path).exists()]
    names = [text for text in INLINE if re.fullmatch(r"(NIM\w+|noise_nim)(\.\w+)*(\(.*\))?", text)]
    assert len(names) > 5
    for name in names:
        place = modeling_nim
        for part in name.partition("(")[0].split("."):
            place = getattr(place, part)
