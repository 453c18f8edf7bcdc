"""One way to load a model: every entry refuses damaged, missing and other weights, and names the directory."""

import json

import pytest
import torch
from conftest import TINY, TINY_DECODER
from safetensors.torch import load_file, save_file

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
)
from modeling_nim.robustness.loading import load_targets, load_with_processor
from modeling_nim.robustness.recipes import EvaluatedModelRecipe
from modeling_nim.runs.models import CLASSIFIER, DEFENDED, PURIFIER, load_model, load_purifier
from modeling_nim.training.models import load_classifier, load_frozen_classifier


DIGITS = list("0123456789")


@pytest.fixture
def saved(tmp_path):
    """Directories of a purifier, a classifier, and both composed, with their models."""
    models = {
        "purifier": NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER, degradation="noise+mask")),
        "classifier": NIMForImageClassification(NIMClassifierConfig(**TINY, num_labels=10)),
    }
    models["composed"] = NIMPurifiedImageClassification.from_parts(*models.values(), sigma=30)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    return tmp_path, models


def test_weights_in_half_precision_are_evaluated_and_trained_in_single(saved):
    folder, models = saved
    models["composed"].half().save_pretrained(folder / "composed")
    for model in (load_model(str(folder / "composed"), DEFENDED), load_purifier(str(folder / "composed"))):
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    (target,), _ = attacked(str(folder / "composed"))
    images_01 = torch.rand(2, 3, 16, 16)
    assert target.logits(images_01, target.draw([0, 1], images_01.shape[1:])).isfinite().all()


def attacked(path):
    return load_targets([EvaluatedModelRecipe(name="model", path=path)], "cpu")


def composed_of(path):
    return load_targets(
        [EvaluatedModelRecipe(name="m", purifier=path, classifier=path.replace("purifier", "c"))], "cpu"
    )


ENTRIES = {
    "classifier": [attacked, load_frozen_classifier, lambda path: load_classifier(path, DIGITS, 0.0)],
    "purifier": [load_purifier, composed_of, lambda path: load_with_processor(path, "cpu")],
    "composed": [
        attacked,
        load_frozen_classifier,
        load_purifier,
        lambda path: load_classifier(path, DIGITS, 0.0),
        lambda path: load_model(path, DEFENDED),
    ],
}


@pytest.mark.parametrize("name, load", [(name, load) for name, entries in ENTRIES.items() for load in entries])
def test_every_entry_refuses_a_file_without_a_weight_and_a_damaged_one(saved, name, load):
    folder = saved[0] / name
    file = folder / "model.safetensors"
    weights = load_file(file)
    lost = next(key for key in sorted(weights) if key.endswith("attention.o_proj.weight") or "layer.0" in key)
    save_file({key: value for key, value in weights.items() if key != lost}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}' lacks 1 weights of a NIM\w+, e.g. '"):
        load(str(folder))
    file.write_bytes(b"\x08")
    with pytest.raises(ValueError, match=rf"{name}' are damaged"):
        load(str(folder))


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("purifier", CLASSIFIER, "'nim' model, no classifier; name a fine-tuned or purified one"),
        ("classifier", PURIFIER, "'nim_classifier' model, no purifier; name a pre-trained NIM or MIM model"),
        ("classifier", DEFENDED, "'nim_classifier' model, no purified model; name a directory of a NIMPurifiedImage"),
    ],
)
def test_a_model_of_another_kind_is_refused(saved, name, kind, message):
    with pytest.raises(ValueError, match=message):
        load_model(saved[0] / name, kind)


def test_parts_of_a_composed_model_are_its_own(saved):
    folder, models = saved
    whole = models["composed"].state_dict()
    for part, found in {
        "purifier": load_purifier(folder / "composed"),
        "classifier": load_frozen_classifier(str(folder / "composed")),
    }.items():
        assert not found.training
        for name, value in found.state_dict().items():
            assert torch.equal(value, whole[f"{part}.{name}"]), name
    purifier, processor = load_with_processor(str(folder / "composed"), "cpu")
    assert not any(weight.requires_grad for weight in purifier.parameters())
    assert (processor.size["height"], list(processor.image_mean)) == (16, list(purifier.config.image_mean))
    assert load_purifier(folder / "composed", mask_ratio=0.25).config.mask_ratio == 0.25


def test_a_file_with_more_weights_is_refused_where_they_must_be_exact(saved):
    file = saved[0] / "classifier" / "model.safetensors"
    save_file(load_file(file) | {"extra.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    load_model(saved[0] / "classifier", CLASSIFIER)  # a checkpoint of others may hold a pooler that nobody uses
    with pytest.raises(ValueError, match="holds 1 weights .* has no place for, e.g. 'extra.weight'"):
        load_classifier(str(saved[0] / "classifier"), DIGITS, 0.0)


def test_fine_tuning_starts_afresh_from_a_purifier_and_goes_on_with_a_classifier(saved):
    folder, models = saved
    started = load_classifier(str(folder / "purifier"), DIGITS, 0.0)
    encoder = models["purifier"].vit.state_dict()
    same = [name for name, value in started.vit.state_dict().items() if torch.equal(value, encoder[name])]
    assert len(same) > 10 and "embeddings.patch_embeddings.projection.weight" in same
    continued = load_classifier(str(folder / "classifier"), DIGITS, 0.1)
    for name, value in models["classifier"].state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), name
    assert continued.config.drop_path_rate == 0.1


@pytest.mark.parametrize("name", ["classifier", "composed"])
def test_another_number_of_classes_is_refused_in_words(saved, name):
    with pytest.raises(ValueError, match=f"{name}' knows 10 classes and the data have 3"):
        load_classifier(str(saved[0] / name), ["a", "b", "c"], 0.0)


def test_weights_of_another_width_are_refused(saved):
    file = saved[0] / "classifier" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 64}))
    with pytest.raises(ValueError, match="do not fit its config.json"):
        load_model(saved[0] / "classifier", CLASSIFIER)
