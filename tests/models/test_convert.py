"""Reference checkpoints of any size become model directories; what does not fit is refused by name."""

import argparse
import sys
import types

import pytest
import reference
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForPreTraining

from modeling_nim import add_noise
from modeling_nim.configuration_nim import IMAGENET_STD


convert = reference.load_script("convert_checkpoint")
HEADS = ["--num_attention_heads", "3", "--decoder_num_attention_heads", "2"]
LAYOUTS = {  # checkpoint -> source, options, container as its training script writes it
    "mae_pretrain": ("nim-mae", HEADS, "model"),
    "mae_finetune": ("mae", HEADS[:2], "classifier"),
    "dmae_pretrain": ("dmae", [*HEADS, "--no_norm_pix_loss"], "model"),
    "simmim_pretrain": ("simmim", ["--degradation", "noise"], "model"),
    "simmim_finetune": ("simmim", [], "model"),
}


@pytest.fixture(scope="module")
def checkpoints():
    return reference.random_checkpoints()


def run(tmp_path, state, source, options, container="model", legacy=False, **extra):
    file, output_dir = tmp_path / "reference.pt", tmp_path / "converted"
    torch.save({container: state, **extra}, file, _use_new_zipfile_serialization=not legacy)
    convert.main(["--source", source, "--checkpoint", str(file), "--output_dir", str(output_dir), *options])
    return output_dir


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_other_sizes_give_the_reference_numbers(tmp_path, checkpoints, name, legacy):
    """48x48 images, 3 layers of width 24, 1 decoder layer, 7 classes."""
    source, options, container = LAYOUTS[name]
    state = checkpoints[name.replace("dmae", "mae")]  # DMAE's names are MAE's
    output_dir = run(tmp_path, state, source, options, container, legacy, optimizer={"state": {}}, epoch=3)
    clean, epsilon = torch.randn(2, 3, 48, 48), torch.randn(2, 3, 48, 48)
    sigma = torch.tensor([20.0, 60.0])
    noisy = add_noise(clean, sigma, epsilon, IMAGENET_STD)
    with torch.no_grad():
        if name.endswith("finetune"):
            model = AutoModelForImageClassification.from_pretrained(output_dir)
            classify = reference.mae_classify if source == "mae" else reference.simmim_classify
            expected = classify(clean, state, *([3] if source == "mae" else []))
            found = model(clean).logits
            assert found.shape == (2, 7)
        elif source == "dmae":
            model = AutoModelForPreTraining.from_pretrained(output_dir)
            order = torch.rand(2, 36)
            expected = reference.dmae(noisy, order, state, heads=3, decoder_heads=2)
            found = model(clean, sigma=sigma, epsilon=epsilon, noise=order).reconstruction
            config = model.config
            assert (config.degradation, config.sigma, config.mask_ratio) == ("noise+mask", "63.75", 0.75)
        elif source == "nim-mae":
            model = AutoModelForPreTraining.from_pretrained(output_dir)
            expected = reference.nim_mae(noisy, clean, state, heads=3, decoder_heads=2)
            found = model(clean, sigma=sigma, epsilon=epsilon).reconstruction
        else:
            model = AutoModelForPreTraining.from_pretrained(output_dir)
            expected = reference.simmim(noisy, state)
            found = model(clean, sigma=sigma, epsilon=epsilon).reconstruction
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (model.config.image_size, model.config.patch_size, model.config.num_hidden_layers) == (48, 8, 3)
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert (list(processor.image_mean), processor.size["height"]) == (list(model.config.image_mean), 48)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("mae_pretrain", {"blocks.1.attn.qkv.bias": None}, ["missing blocks.1.attn.qkv.bias"]),
        ("mae_pretrain", {"blocks.1.extra": (2,)}, ["unexpected blocks.1.extra"]),
        ("mae_pretrain", {"decoder_pos_embed": (1, 17, 16)}, ["decoder_pos_embed", "(1, 17, 16)", "(1, 37, 16)"]),
        ("mae_finetune", {"fc_norm.weight": None, "norm.weight": (24,)}, ["missing fc_norm.weight", "unexpected norm"]),
        ("simmim_pretrain", {"encoder.blocks.2.gamma_1": (1,)}, ["encoder.blocks.2.gamma_1", "(1,)", "(24,)"]),
        ("simmim_pretrain", {"encoder.rel_pos_bias.relative_position_index": (37, 37)}, ["relative_position_index"]),
        ("simmim_finetune", {"blocks.0.attn.relative_position_bias_table": None}, ["missing", "position_bias_table"]),
        ("simmim_finetune", {"patch_embed.proj.weight": (24, 192)}, ["patch_embed.proj.weight", "(24, 192)"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, checkpoints, name, damage, words):
    source, options, container = LAYOUTS[name]
    state = dict(checkpoints[name])
    for key, shape in damage.items():
        if shape is None:
            del state[key]
        else:
            state[key] = torch.zeros(shape)
    with pytest.raises(ValueError) as error:
        run(tmp_path, state, source, options, container)
    assert all(word in str(error.value) for word in words), error.value
    assert [path.name for path in tmp_path.iterdir()] == ["reference.pt"]


def test_heads_that_no_tensor_tells_are_asked_for(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="--num_attention_heads"):
        run(tmp_path, checkpoints["mae_finetune"], "mae", [])
    with pytest.raises(ValueError, match="--decoder_num_attention_heads"):
        run(tmp_path, checkpoints["mae_pretrain"], "mae", HEADS[:2])
    with pytest.raises(ValueError, match="5 does not divide the width 24"):
        run(tmp_path, checkpoints["mae_finetune"], "mae", ["--num_attention_heads", "5"])
    with pytest.raises(ValueError, match="has 3 heads"):
        run(tmp_path, checkpoints["simmim_finetune"], "simmim", ["--num_attention_heads", "4"])


@pytest.mark.parametrize(("width", "decoder_width", "expected"), [(768, 512, (12, 16)), (1280, 512, (16, 16))])
def test_published_sizes_need_no_options(width, decoder_width, expected):
    """ViT-H's 16 heads are 80 wide, where a rule of 64 would say 20."""
    state = reference.random_checkpoints(16, 8, width, 1, 1, decoder_width, 1)["mae_pretrain"]
    args = argparse.Namespace(
        source="mae",
        num_attention_heads=None,
        decoder_num_attention_heads=None,
        no_norm_pix_loss=True,
        degradation=None,
    )
    config = convert.mae_config(state, args)
    assert (config.num_attention_heads, config.decoder_num_attention_heads) == expected
    assert (config.degradation, config.norm_pix_loss) == ("mask", False)


def test_wrong_source_names_what_is_missing(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="relative_position_bias_table"):
        run(tmp_path, checkpoints["mae_pretrain"], "simmim", [])
    with pytest.raises(ValueError, match="patch_embed.proj.weight"):
        run(tmp_path, checkpoints["simmim_pretrain"], "mae", HEADS)


def test_settings_saved_beside_the_weights_are_read_over(tmp_path, checkpoints, monkeypatch):
    """SimMIM's files carry its yacs settings, MAE's their command line."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    settings = yacs.CfgNode(MODEL=yacs.CfgNode(TYPE="vit"))
    settings.__dict__["immutable"] = True
    state = checkpoints["simmim_pretrain"]
    output_dir = run(tmp_path, state, "simmim", [], config=settings, args=argparse.Namespace(epochs=1))
    assert (output_dir / "model.safetensors").exists()


class Payload:
    """Unpickling this would make a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


def test_nothing_in_the_file_is_executed(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="cannot be read as tensors alone: it holds posix.mkdir"):
        run(tmp_path, checkpoints["mae_finetune"], "mae", HEADS[:2], payload=Payload(tmp_path / "executed"))
    assert not (tmp_path / "executed").exists()


def test_unreadable_files_and_taken_directories(tmp_path, checkpoints):
    def main(file, output_dir=tmp_path / "out"):
        convert.main(["--source", "mae", "--checkpoint", str(file), "--output_dir", str(output_dir)])

    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        main(tmp_path / "absent.pt")
    damaged = tmp_path / "damaged.pt"
    torch.save(checkpoints["mae_finetune"], damaged)
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        main(damaged)
    torch.save({"weights": {}}, damaged)
    with pytest.raises(ValueError, match='no state dict under "model" or "classifier"'):
        main(damaged)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists and is not empty"):
        main(damaged, tmp_path / "taken")
    with pytest.raises(ValueError, match="--patch_size 16"):
        options = ["--patch_size", "16", *HEADS[:2]]
        run(tmp_path, checkpoints["mae_finetune"], "mae", options)
