"""One way to load a model: every entry refuses damaged, missing and other weights, and names the directory."""

import json

import pytest
import torch
from conftest import TINY, TINY_DECODER
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, pipeline

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


def written(name, content):
    """Damage: a file of other content, bytes as they are, or some fields of its JSON changed (None: taken out)."""

    def damage(folder):
        new = content
        if isinstance(content, dict):
            fields = json.loads((folder / name).read_text()) | content
            new = json.dumps({key: value for key, value in fields.items() if value is not None}).encode()
        (folder / name).write_bytes(new)

    return damage


def without_half_of_the_weights(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:20_000])


def with_one_weight_of_another_shape(folder):
    weights = load_file(folder / WEIGHTS)
    name = next(key for key in sorted(weights) if key.endswith("layernorm_before.weight"))
    save_file(weights | {name: torch.ones(7)}, folder / WEIGHTS, metadata={"format": "pt"})


def with_a_damaged_index(folder):
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def with_a_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
DAMAGED = [
    (written(WEIGHTS, b""), r"the weights in '.*composed' are damaged \(.*\); make or download them again"),
    (written(WEIGHTS, b"garbage" * 9), r"the weights in '.*composed' are damaged"),
    (written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"), r"the weights in '.*composed' are damaged"),
    (without_half_of_the_weights, r"the weights in '.*composed' are damaged"),
    (with_one_weight_of_another_shape, r"the weights in '.*composed' do not fit its config.json"),
    (with_a_damaged_index, r"the files in '.*composed' make no model \(TypeError"),
    (with_a_pickle, r"the files in '.*composed' make no model \(UnpicklingError"),
    (written(CONFIG, {"purifier_config": None}), "has no purifier_config: write it again with save_pretrained"),
    (written(CONFIG, {"classifier_config": None}), "has no classifier_config: write it again"),
    (
        written(CONFIG, {"classifier_config": [1]}),
        r"config.json of '.*composed': .*'classifier_config' with value \[1\]",
    ),
    (written(CONFIG, {"classifier_config": {"model_type": [1]}}), r"'.*composed' make no model \(TypeError"),
    (written(CONFIG, {"classifier_config": {"id2label": 5}}), r"'.*composed' make no model \(AttributeError"),
    (written(CONFIG, {"purifier_config": {"model_type": "nim_classifier"}}), "which cannot purify; give that of"),
    (written(CONFIG, {"num_votes": 2.5}), r"config.json of '.*composed': .*'num_votes' expected int, got float"),
    (written(CONFIG, {"dtype": "float7"}), r"'.*composed' make no model \(AttributeError: .*float7"),
    (written(CONFIG, {"num_labels": "x"}), r"'.*composed' make no model \(TypeError"),
    (written(CONFIG, {"image_size": 10**6}), "image_size must be at least 1 and at most 16384 pixels, got 1000000"),
    (written(CONFIG, {"classifier_image_size": 10**6}), "classifier_image_size must be .* got 1000000"),
    (written(PROCESSOR, b""), r"preprocessor_config.json' is no JSON"),
    (written(PROCESSOR, b"[]"), r"preprocessor_config.json' must be a mapping .*, got \[\]"),
    (written(PROCESSOR, b"\xff\xfe"), r"preprocessor_config.json' is no JSON .*delete it"),
    (
        written(PROCESSOR, {"image_processor_type": 5}),
        r"preprocessor_config.json' must be a mapping with a text image_processor_type",
    ),
]


@pytest.mark.parametrize("damage, words", DAMAGED)
def test_damaged_files_are_named_by_transformers_own_entries(saved, damage, words):
    folder = saved[0] / "composed"
    damage(folder)
    for load in (
        NIMPurifiedImageClassification.from_pretrained,
        AutoModelForImageClassification.from_pretrained,
        lambda path: pipeline("image-classification", model=path),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            load(str(folder))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"[]", r"config.json of '.*' must hold a mapping of fields, got list; download it again"),
        (b'"nim"', "must hold a mapping of fields, got str"),
        (b"null", r"make no model \(TypeError"),
        (b"3", r"make no model \(TypeError"),
        (b"[" * 100_000, r"make no model \(RecursionError"),
        (b"{}", "has no config.json, or one without fields; name the directory of a model"),
        (None, "has no config.json"),
    ],
)
@pytest.mark.parametrize("name", ["purifier", "classifier", "composed"])
def test_a_configuration_that_is_none_is_named_by_every_class(saved, name, content, words):
    folder, models = saved
    (folder / name / CONFIG).unlink()
    if content is not None:
        (folder / name / CONFIG).write_bytes(content)
    for owner in (type(models[name]), type(models[name]).config_class):
        with pytest.raises((ValueError, OSError), match=words):
            owner.from_pretrained(folder / name)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"size": {"height": 10**6, "width": 10**6}}, "size must be whole numbers of pixels from 1 to 16384, got"),
        ({"size": {"shortest_edge": 10**6}}, "size must be whole numbers .* 1000000"),
        ({"size": {"height": 16.5, "width": 16.5}}, r"size must be whole numbers .* 16\.5"),
        ({"size": {"height": -5, "width": 5}}, "size must be whole numbers .* -5"),
        ({"do_center_crop": True, "crop_size": {"height": 10**6, "width": 10**6}}, "crop_size must be .* 1000000"),
        ({"image_std": [0, 0, 0]}, r"image_std must be finite numbers above 0, got .0, 0, 0"),
        ({"image_mean": [float("nan")] * 3}, "image_mean must be finite numbers, got .nan"),
        ({"rescale_factor": "x"}, "rescale_factor must be finite numbers above 0, got 'x'"),
    ],
)
def test_an_image_processor_that_makes_no_pixel_values_is_refused(saved, fields, words):
    folder = str(saved[0] / "composed")
    written(PROCESSOR, fields)(saved[0] / "composed")
    for load in (
        lambda: pipeline("image-classification", model=folder)(Image.new("RGB", (32, 32))),
        lambda: attacked(folder),
    ):
        with pytest.raises(ValueError, match=words):
            load()
