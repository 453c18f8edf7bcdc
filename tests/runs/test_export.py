"""Defended classifiers as single files: the same answers as the model, or fresh noise in each call."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import load_script, released_configs
from transformers import ViTConfig, ViTForImageClassification

from modeling_nim import (
    NIMConfig,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    NIMSimMIMConfig,
    NIMSimMIMForImageClassification,
    NIMSimMIMForPreTraining,
)
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.export import FACTS, DefendedLogits, export_defended, load_exported, verify_export


pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
PURIFIED = {folder.name: config for folder, config in released_configs().items() if "purifier_config" in config}
DEGRADATIONS = {name: config["purifier_config"]["degradation"] for name, config in PURIFIED.items()}
MASKED = [name for name, degradation in DEGRADATIONS.items() if degradation != "noise"]


@pytest.fixture
def export(monkeypatch, capsys):
    """Calls scripts/export.py in this process and returns its exit code and what it says."""
    script = load_script("export")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as exit_info:
            run_main(script.main)
        printed = capsys.readouterr()
        return exit_info.value.code or 0, printed.out + printed.err

    return call


@pytest.mark.parametrize(
    ("name", "format", "ending"),
    [(name, "onnx", ".onnx") for name in PURIFIED if name not in MASKED] + [("nim-cifar10", "torch_export", ".pt2")],
)
def test_released_models_answer_as_in_pytorch_when_epsilon_is_given(export, tmp_path, name, format, ending):
    model = NIMPurifiedImageClassification.from_pretrained(ROOT / "model_cards" / name).eval()
    path = tmp_path / f"model{ending}"
    code, said = export(ROOT / "model_cards" / name, path, "--format", format, "--noise", "input")
    assert code == 0, said
    assert float(re.search(r"largest difference from the model ([\d.e+-]+)", said)[1]) <= 1e-5
    exported = load_exported(path)
    for batch_size in (1, 4):
        pixel_values, epsilon = torch.randn(2, batch_size, 3, 32, 32)
        with torch.no_grad():
            expected = model(pixel_values, epsilon=epsilon).logits
            torch.testing.assert_close(exported(pixel_values, epsilon), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", MASKED)
def test_a_released_model_that_hides_patches_draws_its_masks_inside(export, tmp_path, name):
    directory, path = ROOT / "model_cards" / name, tmp_path / "model.onnx"
    code, said = export(directory, path, "--noise", "input")
    assert code == 2 and f'the purifier\'s degradation is "{DEGRADATIONS[name]}"' in said and not path.exists()
    if DEGRADATIONS[name] == "mask":
        code, said = export(directory, path, "--sigma", 30)
        assert code == 2 and "hides patches instead of adding noise: leave sigma '30' out" in said
    code, said = export(directory, path)
    defense = {"mask": "masks", "noise+mask": "sigma 30 and masks"}[DEGRADATIONS[name]]
    assert code == 0 and f" MB, {defense}, 1 vote(s); " in said
    exported, image = load_exported(path), torch.rand(1, 3, 32, 32) * 2
    assert (exported(image) - exported(image)).abs().max() > 1e-3
    model = NIMPurifiedImageClassification.from_pretrained(directory).eval()
    images = image.expand(400, -1, -1, -1).contiguous()
    with torch.no_grad():
        own, its = model(images).logits, exported(images)
    assert ((own.mean(0) - its.mean(0)).abs() < 5 * own.std(0) * (2 / 400) ** 0.5).all()


def test_relative_positions_of_simmim_answer_as_in_pytorch(tmp_path):
    sizes = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    widths = {"hidden_size": 32, "intermediate_size": 64}
    purifier = NIMSimMIMForPreTraining(NIMSimMIMConfig(**sizes, **widths, mask_patch_size=8))
    classifier = NIMSimMIMForImageClassification(NIMSimMIMForImageClassification.config_class(**sizes, **widths))
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)
    biases = [parameter for name, parameter in model.named_parameters() if "relative_position_bias" in name]
    assert biases  # of the purifier and of the classifier
    for bias in biases:
        torch.nn.init.normal_(bias)
    defended = DefendedLogits(model)
    export_defended(defended, tmp_path / "model.onnx", noise="input")
    assert verify_export(defended, tmp_path / "model.onnx", "input") <= 1e-5
    assert {part.config._attn_implementation for part in (model.purifier, model.classifier)} == {"sdpa"}


@pytest.mark.parametrize("ending", [".onnx", ".pt2"])
def test_noise_inside_is_fresh_in_each_call_and_has_the_model_s_distribution(export, tmp_path, ending):
    directory, path = ROOT / "model_cards" / "nim-digits", tmp_path / f"model{ending}"
    format = {".onnx": "onnx", ".pt2": "torch_export"}[ending]
    code, said = export(directory, path, "--format", format, "--sigma", 60)
    assert code == 0 and "sigma 60" in said
    exported = load_exported(path)
    image = torch.rand(1, 3, 32, 32) * 2
    first, second = exported(image), exported(image)
    assert (first - second).abs().max() > 1e-3
    # Two sample means of 400 draws each; their difference has a standard deviation of sqrt(2 / 400) of the draws'.
    model = NIMPurifiedImageClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        own = torch.cat([model(image.expand(200, -1, -1, -1), sigma=60).logits for _ in range(2)])
        its = torch.cat([exported(image.expand(200, -1, -1, -1).contiguous()) for _ in range(2)])
    difference, scale = (own.mean(0) - its.mean(0)).abs(), own.std(0)
    assert (difference / scale).max() < 5 * (2 / 400) ** 0.5
    assert (its.std(0) / scale - 1).abs().max() < 0.25


def test_sessions_of_one_process_do_not_share_their_noise_unless_they_share_a_seed(tmp_path, purifier, classifier):
    path = tmp_path / "model.onnx"
    export_defended(DefendedLogits(NIMPurifiedImageClassification.from_parts(purifier, classifier)), path)
    image = torch.rand(1, 3, 16, 16)
    first, second = load_exported(path)(image), load_exported(path)(image)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(load_exported(path, seed=3)(image), load_exported(path, seed=3)(image))


def test_votes_are_an_axis_of_epsilon_and_facts_travel_with_the_file(tmp_path, purifier, classifier):
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=40).eval()
    defended = DefendedLogits(model, num_votes=3)
    facts = {"image_size": 16, "sigma_255": 40.0, "num_votes": 3, "noise": "input", "image_std": model.config.image_std}
    for name, format in (("votes.onnx", "onnx"), ("votes.pt2", "torch_export")):
        export_defended(defended, tmp_path / name, format, "input")
        pixel_values, epsilon = torch.randn(5, 3, 16, 16), torch.randn(5, 3, 3, 16, 16)
        with torch.no_grad():
            expected = model(pixel_values, epsilon=epsilon).logits
            found = load_exported(tmp_path / name)(pixel_values, epsilon)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    session = onnxruntime.InferenceSession(tmp_path / "votes.onnx", providers=["CPUExecutionProvider"])
    assert [entry.shape for entry in session.get_inputs()] == [["batch", 3, 16, 16], ["batch", 3, 3, 16, 16]]
    written = session.get_modelmeta().custom_metadata_map
    assert {key: written[key] if key == "noise" else json.loads(written[key]) for key in facts} == facts
    assert json.loads(written["id2label"])["4"] == "LABEL_4"
    extra = {FACTS: ""}
    torch.export.load(tmp_path / "votes.pt2", extra_files=extra)
    assert facts.items() <= json.loads(extra[FACTS]).items()


def test_a_purifier_in_tiles_is_exported_too(tmp_path, purifier):
    torch.manual_seed(0)
    sizes = {"image_size": 40, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=64, num_labels=5)).eval()
    torch.nn.init.normal_(vit.classifier.weight)
    settings = {"classifier_image_mean": [0.5] * 3, "classifier_image_std": [0.5] * 3}
    with pytest.warns(UserWarning, match="in overlapping tiles"):
        model = NIMPurifiedImageClassification.from_parts(purifier, vit, **settings).eval()
    for name, format in (("tiles.onnx", "onnx"), ("tiles.pt2", "torch_export")):
        export_defended(DefendedLogits(model), tmp_path / name, format, "input")
        pixel_values, epsilon = torch.randn(2, 3, 3, 40, 40)
        with torch.no_grad():
            expected = model(pixel_values, epsilon=epsilon).logits
            found = load_exported(tmp_path / name)(pixel_values, epsilon)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_file_that_is_another_model_s_is_found_out(tmp_path, purifier, classifier):
    defended = DefendedLogits(NIMPurifiedImageClassification.from_parts(purifier, classifier))
    path = tmp_path / "model.pt2"
    export_defended(defended, path, "torch_export", "input")
    assert verify_export(defended, path, "input") <= 1e-5
    with torch.no_grad():
        classifier.classifier.bias += 1e-3
    with pytest.raises(ValueError, match="differs from the model by"):
        verify_export(defended, path, "input")


@pytest.mark.parametrize("noise", ["input", "inside"])
def test_a_model_that_answers_with_nan_is_found_out(noise, tmp_path, purifier, classifier):
    with torch.no_grad():
        classifier.classifier.bias += float("nan")
    defended = DefendedLogits(NIMPurifiedImageClassification.from_parts(purifier, classifier))
    export_defended(defended, tmp_path / "model.pt2", "torch_export", noise)
    with pytest.raises(ValueError, match="answers with NaN or infinity"):
        verify_export(defended, tmp_path / "model.pt2", noise)


def test_what_cannot_be_exported_is_named(export, tmp_path, classifier):
    digits = ROOT / "model_cards" / "nim-digits"
    assert export(tmp_path / "absent", tmp_path / "x.onnx") == (
        2,
        f"error: {tmp_path}/absent holds no config.json: pass a directory of a purified model\n",
    )
    assert "name it '.pt2'" in export(digits, tmp_path / "x.onnx", "--format", "torch_export")[1]
    assert "one sigma, got uniform" in export(digits, tmp_path / "x.onnx", "--sigma", "uniform(0, 30)")[1]
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    masked = NIMForPreTraining(NIMConfig(**sizes, **decoder, degradation="mask"))
    NIMPurifiedImageClassification.from_parts(masked, classifier).save_pretrained(tmp_path / "masked")
    code, said = export(tmp_path / "masked", tmp_path / "x.onnx", "--noise", "input")
    assert code == 2 and 'degradation is "mask"' in said
    assert not (tmp_path / "x.onnx").exists()


def test_the_serving_page_s_own_code_runs(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    [commands] = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    output = "outputs/export/nim-digits.onnx"
    [line] = [line for line in commands.splitlines() if line.startswith("python scripts/export.py")]
    arguments = [sys.executable, *line.replace(output, str(tmp_path / "served.onnx")).split()[1:]]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    served = subprocess.run(
        [sys.executable, "-c", code.replace(output, str(tmp_path / "served.onnx"))],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert served.stdout == "4\n"
