"""Recipes are strict: a wrong key or value stops the run before it starts."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from modeling_nim.runs.recipe import load_recipe, parse_command_line, recipe_to_dict


@dataclass
class Part:
    name: str
    sigma: float | str = 30.0


@dataclass
class Section:
    SHORTHANDS = {"quick": {"steps": 2, "compile": True}}

    learning_rate: float = 1e-3
    steps: int = 10
    mode: Literal["a", "b"] = "a"
    compile: bool = False


@dataclass
class Recipe:
    seed: int
    section: Section = field(default_factory=Section)
    parts: list[Part] = field(default_factory=list)
    path: str | None = None
    model: dict[str, Any] = field(default_factory=dict)


def load(tmp_path, text, *overrides):
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml", Recipe, overrides)


def test_values_defaults_and_overrides(tmp_path):
    recipe = load(
        tmp_path,
        'seed: 1\nsection: {learning_rate: 1e-4}\nparts: [{name: x}, {name: y, sigma: "uniform(0, 30)"}]\n'
        "model: {depth: 2}\n",
        "section.steps=20",
        "parts.0.sigma=75",
        "path=out",
    )
    assert recipe_to_dict(recipe) == {
        "seed": 1,
        "section": {"learning_rate": 1e-4, "steps": 20, "mode": "a", "compile": False},
        "parts": [{"name": "x", "sigma": 75.0}, {"name": "y", "sigma": "uniform(0, 30)"}],
        "path": "out",
        "model": {"depth": 2},
    }


def test_a_word_stands_for_a_section(tmp_path):
    assert load(tmp_path, "seed: 0\nsection: quick").section == Section(steps=2, compile=True)
    assert load(tmp_path, "seed: 0\nsection: {steps: 5}", "section=quick").section.steps == 2


def test_a_key_can_be_set_beside_the_word_for_its_section(tmp_path):
    expected = Section(steps=2, compile=True, mode="b")
    assert load(tmp_path, "seed: 0\nsection: quick", "section.mode=b").section == expected
    assert load(tmp_path, "seed: 0", "section=quick", "section.mode=b").section == expected
    assert load(tmp_path, "seed: 0", "section.mode=b", "section=quick").section == Section(steps=2, compile=True)
    (tmp_path / "word.yaml").write_text("seed: 0\nsection: quick\n")
    (tmp_path / "key.yaml").write_text("section: {mode: b}\n")
    assert load_recipe([tmp_path / "word.yaml", tmp_path / "key.yaml"], Recipe).section == expected
    assert Section.SHORTHANDS == {"quick": {"steps": 2, "compile": True}}


def test_override_creates_a_section_left_out(tmp_path):
    assert load(tmp_path, "seed: 0", "section.mode=b").section.mode == "b"


# eight lines that stand for nine to the power of eight values
ALIASES_OF_ALIASES = "seed:\n- &a0 [x]\n" + "".join(
    f"- &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 9)
)


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("section: {}", (), "'seed' is missing"),
        ("seed: 1\nsede: 2", (), r"unknown recipe key 'sede' \(did you mean 'seed'\?\); known keys: seed, section"),
        ("seed: 1\nsection: {step: 3}", (), r"'section.step' \(did you mean 'steps'\?\)"),
        ("seed: 1\nparts: [{name: x, sigm: 3}]", (), "'parts.0.sigm'"),
        ("seed: 1\nsection: {steps: 1, steps: 2}", (), "line 2: key 'steps' stands twice"),
        ("seed: 1\nsection: {learning_rate: .nan}", (), "'section.learning_rate' must be a finite number, got nan"),
        ("seed: 1\nsection: {learning_rate: .inf}", (), "'section.learning_rate' must be a finite number, got inf"),
        ("seed: 18446744073709551616", (), "'seed' must fit in 64 bits"),
        ("model: " + "{a: " * 5000 + "1" + "}" * 5000, (), "nested too deeply"),
        ("seed: one", (), "'seed' must be int, got 'one'"),
        ("seed: true", (), "'seed' must be int, got True"),
        ("seed: 1\nsection: {compile: 1}", (), "'section.compile' must be bool, got 1"),
        ("seed: 1\nsection: {mode: c}", (), r"'section.mode' must be one of \['a', 'b'\], got 'c'"),
        ("seed: 1\nsection: 3", (), "'section' must be 'quick' or a section with keys .*, got 3"),
        ("seed: 1\nsection: slow", (), "'section' must be 'quick' or a section"),
        ("seed: 1\nparts: [x]", (), "'parts.0' must be a section"),
        ("seed: 1\nparts: [{sigma: 1}]", (), "'parts.0.name' is missing"),
        ("- 1", (), "must be a mapping"),
        ("seed: [1", (), "not valid YAML"),
        ("seed: 2026-13-45", (), "not valid YAML: month must be in"),
        ("seed: !!timestamp abc", (), "not valid YAML"),
        ("seed: !!bool abc", (), "not valid YAML"),
        ("seed: !!int abc", (), "not valid YAML"),
        ("seed: " + "9" * 5000, (), "not valid YAML"),
        ("seed: &a [*a]", (), "an alias refers to what it stands in"),
        (ALIASES_OF_ALIASES, (), "holds more than 100000 values"),
        ("seed: 3", ("seed=&a [*a]",), "override 'seed=&a.*an alias refers to what it stands in"),
        ("seed: 3", ("model={size: a, size: b}",), "override .*'size' stands twice"),
        ("seed: 1", ("seed",), "not of the form"),
        ("seed: 1", ("seed.x=1",), "'seed' is not a section"),
        ("seed: 1\nparts: [{name: x}]", ("parts.1.name=y",), "'1' is not an index of a list of 1"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text, *overrides)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_recipe(tmp_path / "nowhere.yaml", Recipe)


def test_later_files_win_key_by_key_and_replace_lists(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 1\nsection: {steps: 5, mode: b}\nparts: [{name: x}, {name: y}]\n")
    (tmp_path / "full.yaml").write_text("section: {steps: 50}\nparts: [{name: z, sigma: 1}]\n")
    arguments = [str(tmp_path / "base.yaml"), "seed=2", str(tmp_path / "full.yaml"), "section.learning_rate=0.5"]
    recipe = parse_command_line("What it does.", Recipe, arguments)
    assert recipe_to_dict(recipe) == {
        "seed": 2,
        "section": {"learning_rate": 0.5, "steps": 50, "mode": "b", "compile": False},
        "parts": [{"name": "z", "sigma": 1.0}],
        "path": None,
        "model": {},
    }


def test_help_of_a_recipe_ends_with_its_keys(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_command_line("What it does.", Recipe, ["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert text.index("What it does.") < text.index("  seed: int (required)")
    assert "  section.mode: a | b (default a)" in text
    assert "  parts.N.sigma: float | str (default 30.0)" in text


def test_a_command_line_without_a_recipe_says_so():
    with pytest.raises(ValueError, match="name a recipe before 'seed=1'"):
        parse_command_line("What it does.", Recipe, ["seed=1"])
