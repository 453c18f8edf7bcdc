"""What users bring to a recipe: code beside weights, classifiers that say little, own functions, larger images."""

import json
import shutil

import pytest
import reference
import torch
import yaml
from conftest import TINY, TINY_DECODER
from remote_classifier import write_remote_classifier
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers import pipeline as make_pipeline

from modeling_nim import NIMConfig, NIMForPreTraining, NIMPurifiedImageClassification, image_processor_for
from modeling_nim.data import DataRecipe, load_source
from modeling_nim.robustness import as_target, attack, evaluate
from modeling_nim.robustness.loading import load_targets, model_hash
from modeling_nim.robustness.recipes import EvaluatedModelRecipe
from modeling_nim.robustness.records import read_records


FGSM = [{"attack": "fgsm", "epsilon_255": [8.0]}]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Directories of a purifier for 16x16 images, of one with tiles, and of a ViT without a mean and a std."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    for name, settings in (("purifier", {}), ("tiles", {"tile_stride": 12})):
        purifier = NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, **settings))
        purifier.save_pretrained(folder / name)
        image_processor_for(purifier.config).save_pretrained(folder / name)
    size = {key: value for key, value in TINY.items() if key != "image_size"}
    vit = ViTForImageClassification(ViTConfig(image_size=24, num_labels=10, **size))
    torch.nn.init.normal_(vit.classifier.weight)
    vit.save_pretrained(folder / "vit")
    return folder


def run_attack(tmp_path, name, **content):
    recipe = {"num_images": 6, "num_draws": 2, "batch_size": 3, "attacks": FGSM} | content
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    reference.load_script("run_attack").main([str(tmp_path / f"{name}.yaml"), f"output_dir={tmp_path / name}"])
    return json.loads((tmp_path / name / "summary.json").read_text()), read_records(tmp_path / name / "records.jsonl")


def test_code_beside_the_weights_runs_when_it_is_trusted_and_is_warned_of(tmp_path):
    path = write_remote_classifier(tmp_path / "remote", num_labels=10)
    processor = ViTImageProcessor(size={"height": 48, "width": 48}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(path)
    model = {"name": "remote", "path": path}
    with pytest.raises(ValueError, match="has Python code of its own; read it, and set trust_remote_code=true"):
        run_attack(tmp_path, "refused", models=[model])
    assert not (tmp_path / "refused").exists()
    with pytest.warns(UserWarning, match="runs the Python code that lies beside the weights; read it first"):
        _, script = run_attack(tmp_path, "trusted", models=[model | {"trust_remote_code": True}])
    loaded = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=True)
    source = load_source(DataRecipe(source="digits"), "test")
    arguments = {"num_images": 6, "num_draws": 2, "batch_size": 3, "output_dir": tmp_path / "called"}
    evaluate({"remote": loaded}, source, FGSM, **arguments)
    called = read_records(tmp_path / "called/records.jsonl")
    assert [record.predictions for record in called] == [record.predictions for record in script]
    classify = make_pipeline("image-classification", model=path, trust_remote_code=True)
    by_id = {source.image_id(index): index for index in range(len(source))}
    control = [record for record in called if record.name == "none"]
    answers = classify([source[by_id[record.image_id]][0] for record in control], top_k=1)
    assert [answer[0]["label"] for answer in answers] == [f"LABEL_{record.predictions[0]}" for record in control]


def test_what_a_classifiers_files_do_not_say_is_said_by_the_recipe(parts, tmp_path):
    model = {"name": "x", "purifier": str(parts / "purifier"), "classifier": str(parts / "vit"), "sigma": 20}
    with pytest.warns(UserWarning, match="does not say how its images are normalized"):
        run_attack(tmp_path, "silent", models=[model])
    keys = {"classifier_image_mean": [0.1] * 3, "classifier_image_std": [0.2] * 3}
    summary, records = run_attack(tmp_path, "said", models=[model | keys])
    assert summary["rows"][0]["num_images"] == 6
    [target], _ = load_targets([EvaluatedModelRecipe(**(model | keys))], "cpu")
    config = target.model.config
    assert (config.classifier_image_mean, config.classifier_image_std) == ([0.1] * 3, [0.2] * 3)
    _, others = run_attack(tmp_path, "other", models=[model | keys | {"classifier_image_std": [0.4] * 3}])
    assert [record.loss for record in others] != [record.loss for record in records]
    [sized], _ = load_targets([EvaluatedModelRecipe(**(model | keys), classifier_image_size=24)], "cpu")
    assert sized.model.config.classifier_image_size == 24
    with pytest.raises(ValueError, match="classifier_image_mean is for 'purifier' and 'classifier' paths"):
        EvaluatedModelRecipe("x", path="p", **keys)
    with pytest.raises(ValueError, match="go together, three numbers each"):
        EvaluatedModelRecipe("x", purifier="p", classifier="c", classifier_image_mean=[0.5] * 3)
    with pytest.raises(ValueError, match="classifier_image_std must be above 0, got 0"):
        EvaluatedModelRecipe("x", purifier="p", classifier="c", **(keys | {"classifier_image_std": [0.0] * 3}))


def test_an_image_larger_than_the_purifier_is_attacked_in_tiles(parts):
    purifier = NIMForPreTraining.from_pretrained(parts / "tiles")
    vit = ViTForImageClassification.from_pretrained(parts / "vit")
    settings = {"classifier_image_mean": [0.5] * 3, "classifier_image_std": [0.5] * 3}
    with pytest.warns(UserWarning, match="in overlapping tiles"):
        model = NIMPurifiedImageClassification.from_parts(purifier, vit, sigma=20, **settings)
    x = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    target = as_target(model)
    y = target.logits(x, target.draw([1, 2, 3], x.shape[1:])).argmax(1)
    arguments = {"epsilon_255": 8, "steps": 3, "eot_samples": 2, "skip_misclassified": False}
    found = attack(target, x, y, "pgd", **arguments)
    moved = (found.images_01 - x).abs()
    assert found.queries == [6, 6, 6] and found.zero_gradients == [0, 0, 0]
    assert 7.9 < 255 * moved.max() <= 8 + 1e-3
    assert all(float(moved[..., part, :].max()) > 7 / 255 for part in (slice(0, 8), slice(16, 24)))  # every tile
    one_by_one = [
        attack(target, x[i : i + 1], y[i : i + 1], "pgd", image_ids=[f"{i:08d}"], **arguments) for i in range(3)
    ]
    torch.testing.assert_close(torch.cat([one.images_01 for one in one_by_one]), found.images_01)


def test_functions_of_ones_own_are_named_in_a_recipe(parts, tmp_path):
    """An attack, a loss and a purifier at once, and each of them does something."""
    path = str(shutil.copytree(parts / "vit", tmp_path / "vit"))
    processor = ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(path)
    behind = {"name": "ours", "purifier": "robustness_targets:pixel_noise", "classifier": path}
    attacks = [
        {"attack": "robustness_targets:corner_attack", "steps": 2, "arguments": {"share": 0.5}, "epsilon_255": [8.0]},
        {"attack": "pgd", "steps": 3, "loss": "robustness_targets:climbing_loss", "epsilon_255": [8.0]},
    ]
    summary, records = run_attack(tmp_path, "own", models=[behind, {"name": "bare", "path": path}], attacks=attacks)
    rows = {(row["model"], row["name"]): row for row in summary["rows"]}
    assert rows["ours", "corner_attack-2"]["settings"]["implementation"] == "robustness_targets:corner_attack"
    assert rows["ours", "pgd-3 climbing_loss"]["settings"]["loss"] == "robustness_targets:climbing_loss"
    assert rows["ours", "none"]["sigma"] == "external" and rows["bare", "none"]["sigma"] is None
    assert rows["ours", "none"]["num_draws"] == 2 and rows["bare", "none"]["num_draws"] == 1
    corner = [record for record in records if record.attack == "corner_attack"]
    assert {round(record.linf_255, 3) for record in corner} == {4.0} and {record.queries for record in corner} == {2}
    hashes = {name: known["hash"] for name, known in summary["provenance"]["models"].items()}
    assert hashes["bare"] and len(set(hashes.values())) == 2  # both are of weights, under their own names
    [target, bare], _ = load_targets([EvaluatedModelRecipe(**behind), EvaluatedModelRecipe("bare", path=path)], "cpu")
    x = torch.rand(2, 3, 24, 24)
    expected = torch.cat([bare.logits(_noisy(x[i : i + 1], seed), {}) for i, seed in enumerate((7, 8))])
    torch.testing.assert_close(target.logits(x, target.draw([7, 8], x.shape[1:])), expected)
    before = model_hash(target.weights)
    with torch.no_grad():
        target.classifier.model.classifier.bias += 1
    assert model_hash(target.weights) != before
    for change, message in (
        ({"purifier": "robustness_targets:nothing"}, "purifier .* has no function 'nothing'"),
        ({"purifier": "nowhere.at:all"}, "purifier 'nowhere.at:all': No module named 'nowhere'"),
        ({"sigma": 30}, "has no purifier of ours: leave sigma, num_votes and without_purifier out"),
    ):
        with pytest.raises(ValueError, match=message):
            load_targets([EvaluatedModelRecipe(**(behind | change))], "cpu")


def _noisy(images_01, seed):
    noise = torch.randn(images_01.shape, generator=torch.Generator().manual_seed(seed))
    return (images_01 + 0.1 * noise).clamp(0, 1)


def test_progress_is_shown_when_it_is_asked_for(tmp_path, capsys):
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 4

    def model(images_01):
        return images_01.flatten(1)[:, :4]

    evaluate(model, (x, y), "fgsm", epsilon_255=1, batch_size=2, output_dir=tmp_path)
    assert capsys.readouterr().err == ""
    whole = (tmp_path / "records.jsonl").read_bytes()
    (tmp_path / "records.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:7]))  # stopped in the middle
    evaluate(model, (x, y), "fgsm", epsilon_255=1, batch_size=2, output_dir=tmp_path, progress=True)
    assert "12/12" in capsys.readouterr().err  # and what was there already counts
    assert (tmp_path / "records.jsonl").read_bytes() == whole
