"""Silly values of every recipe are refused with the key, the value and what is allowed."""

import dataclasses
import typing

import pytest
import torch
from training_runs import load_script

from modeling_nim.checks_nim import MAX_SIDE_PIXELS
from modeling_nim.data.base import DataRecipe
from modeling_nim.noise_nim import parse_sigma
from modeling_nim.robustness.certification import CertifyRecipe
from modeling_nim.robustness.recipes import (
    AttackRecipe,
    AttackRunRecipe,
    EvaluatedModelRecipe,
    ReconstructionRecipe,
)
from modeling_nim.runs.bounds import Bounds, Pixels, parts_of
from modeling_nim.runs.recipe import build_dataclass
from modeling_nim.training.models import ModelRecipe
from modeling_nim.training.optimization import OptimizationRecipe


PretrainRecipe = load_script("run_pretrain").PretrainRecipe
FinetuneRecipe = load_script("run_finetune").FinetuneRecipe


def sections_of(schema):
    """The dataclass `schema` and every section in it."""
    yield schema
    for hint in typing.get_type_hints(schema, include_extras=True).values():
        for part in parts_of(hint):
            if dataclasses.is_dataclass(part) and not isinstance(part, Bounds):
                yield from sections_of(part)


OPTIMIZATION = {"batch_size": 8, "base_learning_rate": 0.1, "steps": 3}
RUN = {"seed": 0, "output_dir": "x", "data": DataRecipe(), "optimization": OptimizationRecipe(**OPTIMIZATION)}
# What a section needs to be made; the others have a default for everything.
NEEDED = {
    PretrainRecipe: RUN | {"model": ModelRecipe()},
    FinetuneRecipe: RUN | {"init": "x"},
    OptimizationRecipe: OPTIMIZATION,
    AttackRecipe: {"attack": "pgd"},
    EvaluatedModelRecipe: {"name": "x", "path": "x"},
    ReconstructionRecipe: {"purifiers": {"x": "x"}, "sigmas_255": [30.0]},
    AttackRunRecipe: {"output_dir": "x"},
    CertifyRecipe: {"output_dir": "x", "models": []},
}
RECIPES = (PretrainRecipe, FinetuneRecipe, AttackRunRecipe, CertifyRecipe)
SECTIONS = {schema: NEEDED.get(schema, {}) for recipe in RECIPES for schema in sections_of(recipe)}


def numbers_of(schema):
    """(field, hint) of the fields that hold numbers; sigmas are texts too, and read by `parse_sigma`."""
    for name, hint in typing.get_type_hints(schema, include_extras=True).items():
        kinds = set(parts_of(hint))
        if kinds & {int, float} and str not in kinds:
            yield name, hint


FIELDS = [
    pytest.param(schema, name, hint, id=f"{schema.__name__}.{name}")
    for schema in SECTIONS
    for name, hint in numbers_of(schema)
]


@pytest.mark.parametrize("schema, name, hint", FIELDS)
def test_every_number_of_a_recipe_has_bounds_and_keeps_to_them(schema, name, hint):
    bounds = next((part for part in parts_of(hint) if isinstance(part, Bounds)), None)
    assert bounds is not None, f"{schema.__name__}.{name} takes any number: give it Bounds"
    lowest = bounds.least if bounds.least is not None else bounds.above
    bad = [lowest - 1, float("nan"), float("inf")]
    if bounds.above is not None:
        bad.append(bounds.above)
    if (highest := bounds.most if bounds.most is not None else bounds.below) is not None:
        bad.append(highest * 2 + 1)
    is_list = "list" in str(hint)
    for value in bad:
        values = SECTIONS[schema] | {name: [value] if is_list else value}
        with pytest.raises(ValueError, match=rf"{name} must be"):
            schema(**values)
        values = {key: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for key, v in values.items()}
        with pytest.raises(ValueError, match=f"'section.{name}"):  # and from a file, with the whole key
            build_dataclass(schema, values, "section")


@pytest.mark.parametrize("schema", SECTIONS)
def test_empty_texts_are_no_values(schema):
    texts = [item.name for item in dataclasses.fields(schema) if item.type in (str, str | None)]
    for name in set(texts) - {"attack"}:  # an attack's name is looked up first
        for value in ("", "  ", "a\0b"):
            with pytest.raises(ValueError, match=f"{name} must be a text"):
                schema(**SECTIONS[schema] | {name: value})


@pytest.mark.parametrize(
    "sigma, words",
    [
        (1e9, "at most 1000"),
        ("1001", "at most 1000"),
        ("uniform(0, 1e9)", "at most 1000"),
        ("gamma(1e6, 1)", "at most 1000"),
        ("gamma(1e-3, 1e9)", "at most 1000"),
        (float("nan"), "finite"),
        ("inf", "finite"),
        ("uniform(30, 0)", "low < high"),
        ("gamma(0, 3)", "above 0"),
        ("-1", ">= 0"),
        ("thirty", "not understood"),
        (True, "not understood"),
        ([30], "not understood"),
    ],
)
def test_sigmas_that_leave_nothing_are_refused(sigma, words):
    with pytest.raises(ValueError, match=words):
        parse_sigma(sigma)


def test_sigmas_in_use_are_taken():
    for sigma in (0, 30.0, "75", "uniform(0, 140)", "gamma(25, 3)", 1000):
        assert parse_sigma(sigma).mean <= 1000
    assert torch.isfinite(torch.tensor(parse_sigma(1000).mean, dtype=torch.float16))


def test_recipes_and_configurations_take_the_same_sides():
    assert Pixels.__metadata__[0].most == MAX_SIDE_PIXELS
