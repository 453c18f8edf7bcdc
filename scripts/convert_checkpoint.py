"""Turns a checkpoint of the reference implementations into a model directory.

    python scripts/convert_checkpoint.py --source nim-mae --checkpoint checkpoint.pt --output_dir models/nim-mae-base
    python scripts/convert_checkpoint.py --source mae --checkpoint mae_visualize_vit_large_ganloss.pth \
        --no_norm_pix_loss --output_dir models/mae-large-gan
    python scripts/convert_checkpoint.py --source dmae --checkpoint dmae_base.pth --no_norm_pix_loss \
        --output_dir models/dmae-base
    python scripts/convert_checkpoint.py --source simmim --checkpoint simmim_pretrain.pth --output_dir models/simmim

`--source` names the code that wrote the file: `nim-mae` (the authors' NIM), `mae`, `dmae`, or `simmim`. Whether it is a
pre-trained model or a fine-tuned classifier is told by its tensors, and so are all sizes but the number of attention
heads. Nothing in the file is executed. A tensor that is missing, unexpected or of another shape is an error, and then
nothing is written.
"""

if __name__ == "__main__":
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import math
import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_nim.configuration_nim import (
    MODEL_SIZES,
    NIMClassifierConfig,
    NIMConfig,
    NIMSimMIMClassifierConfig,
    NIMSimMIMConfig,
)
from modeling_nim.families_nim import ARCHITECTURES, SIMMIM
from modeling_nim.image_processing import image_processor_for
from modeling_nim.modeling_nim_simmim import relative_position_index
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import written_whole


# What wrote the file, and the architecture that it pre-trains.
SOURCES = {
    "nim-mae": ARCHITECTURES["nim_mae"],
    "mae": ARCHITECTURES["mae"],
    "dmae": ARCHITECTURES["nim_mae_masked"],
    "simmim": ARCHITECTURES["simmim"],
}
# The noise of pre-training where the paper of the code has one for all of its models; DMAE's is 0.25 of the range.
SIGMA_255 = {"dmae": f"{0.25 * 255:g}"}

StateDict = dict[str, torch.Tensor]
# For each tensor of the reference the tensors of ours that it holds, stacked along its first dimension.
Layout = dict[str, tuple[str, ...]]


def load_reference(path: str) -> StateDict:
    """The tensors of a reference checkpoint, float32; torch's zip and legacy formats alike.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or holds objects that would have to be executed to be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {path!r}")
    # SimMIM saves its yacs settings beside the weights and MAE its parsed arguments: read as plain dictionaries.
    settings = [(OrderedDict, "yacs.config.CfgNode"), (argparse.Namespace, "argparse.Namespace")]
    try:
        with torch.serialization.safe_globals(settings):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on arbitrary bytes the unpickler raises many types
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}; save its state dict by itself" if found else "it is damaged or no checkpoint"
        raise ValueError(f"{path!r} cannot be read as tensors alone: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path!r} holds a {type(checkpoint).__name__}, not a dictionary of tensors")
    for name in ("model", "classifier"):
        if isinstance(checkpoint.get(name), dict):
            checkpoint = checkpoint[name]
            break
    tensors = all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in checkpoint.items())
    if not checkpoint or not tensors:
        found = sorted(map(str, checkpoint))[:8]
        raise ValueError(f'{path!r} has no state dict under "model" or "classifier"; it has {found}')
    return {key: t.float() if t.is_floating_point() else t for key, t in checkpoint.items()}


def _affine(reference: str, ours: str) -> Layout:
    return {f"{reference}.{kind}": (f"{ours}.{kind}",) for kind in ("weight", "bias")}


def _mae_blocks(reference: str, ours: str, depth: int) -> Layout:
    layout: Layout = {}
    for layer in range(depth):
        theirs, mine = f"{reference}.{layer}", f"{ours}.{layer}"
        for kind in ("weight", "bias"):
            layout[f"{theirs}.attn.qkv.{kind}"] = tuple(f"{mine}.attention.{part}_proj.{kind}" for part in "qkv")
        layout |= _block_rest(theirs, mine)
    return layout


def _block_rest(theirs: str, mine: str) -> Layout:
    return (
        _affine(f"{theirs}.norm1", f"{mine}.layernorm_before")
        | _affine(f"{theirs}.attn.proj", f"{mine}.attention.o_proj")
        | _affine(f"{theirs}.norm2", f"{mine}.layernorm_after")
        | _affine(f"{theirs}.mlp.fc1", f"{mine}.mlp.fc1")
        | _affine(f"{theirs}.mlp.fc2", f"{mine}.mlp.fc2")
    )


def mae_layout(config: NIMConfig | NIMClassifierConfig) -> Layout:
    """Names of MAE's reference code, and of NIM's which is built on it, to ours."""
    layout = {"cls_token": ("vit.embeddings.cls_token",), "pos_embed": ("vit.embeddings.position_embeddings",)}
    layout |= _affine("patch_embed.proj", "vit.embeddings.patch_embeddings.projection")
    layout |= _mae_blocks("blocks", "vit.layers", config.num_hidden_layers)
    if isinstance(config, NIMClassifierConfig):
        return layout | _affine("fc_norm", "fc_norm") | _affine("head", "classifier")
    layout |= {"mask_token": ("decoder.mask_token",), "decoder_pos_embed": ("decoder.decoder_pos_embed",)}
    layout |= _affine("norm", "vit.layernorm")
    layout |= _affine("decoder_embed", "decoder.decoder_embed")
    layout |= _mae_blocks("decoder_blocks", "decoder.decoder_layers", config.decoder_num_hidden_layers)
    return layout | _affine("decoder_norm", "decoder.decoder_norm") | _affine("decoder_pred", "decoder.decoder_pred")


def simmim_layout(config: NIMSimMIMConfig | NIMSimMIMClassifierConfig) -> Layout:
    """Names of SimMIM's reference code to ours; its pre-trained models carry the prefix `encoder.`."""
    shared = isinstance(config, NIMSimMIMConfig)
    table = "relative_position_bias_table"
    layout = {"cls_token": ("beit.embeddings.cls_token",)}
    layout |= _affine("patch_embed.proj", "beit.embeddings.patch_embeddings.projection")
    for layer in range(config.num_hidden_layers):
        theirs, mine = f"blocks.{layer}", f"beit.layers.{layer}"
        for number in (1, 2):
            layout[f"{theirs}.gamma_{number}"] = (f"{mine}.lambda_{number}",)
        layout[f"{theirs}.attn.qkv.weight"] = tuple(f"{mine}.attention.{part}_proj.weight" for part in "qkv")
        for part in "qv":  # the keys have no bias
            layout[f"{theirs}.attn.{part}_bias"] = (f"{mine}.attention.{part}_proj.bias",)
        if not shared:
            layout[f"{theirs}.attn.{table}"] = (f"{mine}.relative_position_bias.{table}",)
        layout |= _block_rest(theirs, mine)
    if not shared:
        return layout | _affine("fc_norm", "fc_norm") | _affine("head", "classifier")
    layout |= {"mask_token": ("beit.embeddings.mask_token",)}
    layout |= {f"rel_pos_bias.{table}": (f"beit.shared_position_bias.{table}",)} | _affine("norm", "beit.layernorm")
    return {f"encoder.{key}": names for key, names in layout.items()} | _affine("decoder.0", "decoder")


def _shape(tensors: StateDict, key: str, dimensions: int) -> torch.Size:
    """Shape of a tensor that a size is read from."""
    if key not in tensors:
        raise ValueError(f"the checkpoint does not fit --source: missing {key}; it has {_some(tensors)}")
    if tensors[key].ndim != dimensions:
        raise ValueError(f"{key} has shape {tuple(tensors[key].shape)}, expected {dimensions} dimensions")
    return tensors[key].shape


def _some(keys: Any, limit: int = 20) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _depth(tensors: StateDict, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    layers = [int(match[1]) for match in map(pattern.match, tensors) if match]
    if not layers:
        raise ValueError(f"the checkpoint does not fit --source: no tensor begins with {prefix}.0.")
    return max(layers) + 1


def _square_side(number: int, key: str) -> int:
    side = math.isqrt(number)
    if side * side != number:
        raise ValueError(f"{key} speaks of {number} positions: only square images can be converted")
    return side


def _heads(given: int | None, width: int, option: str, known: dict[int, int], head_width: int) -> int:
    """The number of attention heads, which no tensor tells: given, a known size's, or by MAE's head width."""
    heads = (
        given
        if given is not None
        else known.get(width) or (width // head_width if width % head_width == 0 and width >= 128 else None)
    )
    if heads is None:
        raise ValueError(f"the number of attention heads for width {width} is not in the tensors: pass {option}")
    if heads < 1 or width % heads:
        raise ValueError(f"{option} {heads} does not divide the width {width}")
    return heads


def mae_config(tensors: StateDict, args: argparse.Namespace) -> NIMConfig | NIMClassifierConfig:
    """Configuration of an MAE, NIM-MAE or DMAE checkpoint, with sizes from its tensors."""
    width, channels, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4)
    known = {size["hidden_size"]: size["num_attention_heads"] for size in MODEL_SIZES.values()}
    encoder = {
        "image_size": patch * _square_side(_shape(tensors, "pos_embed", 3)[1] - 1, "pos_embed"),
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": _depth(tensors, "blocks"),
        "num_attention_heads": _heads(args.num_attention_heads, width, "--num_attention_heads", known, 64),
        "intermediate_size": _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0],
    }
    if not any(key.startswith("decoder") for key in tensors):
        return NIMClassifierConfig(**encoder, num_labels=_shape(tensors, "head.weight", 2)[0])
    width = _shape(tensors, "decoder_embed.weight", 2)[0]
    known = {size["decoder_hidden_size"]: size["decoder_num_attention_heads"] for size in MODEL_SIZES.values()}
    own = {"sigma": SIGMA_255[args.source]} if args.source in SIGMA_255 else {}
    return NIMConfig(
        **encoder,
        **own,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=_depth(tensors, "decoder_blocks"),
        decoder_num_attention_heads=_heads(
            args.decoder_num_attention_heads, width, "--decoder_num_attention_heads", known, 32
        ),
        decoder_intermediate_size=_shape(tensors, "decoder_blocks.0.mlp.fc1.weight", 2)[0],
        degradation=args.degradation or SOURCES[args.source].degradation,
        norm_pix_loss=not args.no_norm_pix_loss,
    )


def simmim_config(tensors: StateDict, args: argparse.Namespace) -> NIMSimMIMConfig | NIMSimMIMClassifierConfig:
    """Configuration of a SimMIM checkpoint, with sizes and the number of heads from its tensors."""
    pretrained = any(key.startswith("encoder.") for key in tensors)
    prefix = "encoder." if pretrained else ""
    table = prefix + ("rel_pos_bias" if pretrained else "blocks.0.attn") + ".relative_position_bias_table"
    rows, heads = _shape(tensors, table, 2)
    if args.num_attention_heads not in (None, heads):
        raise ValueError(f"--num_attention_heads {args.num_attention_heads}: {table} has {heads} heads")
    width, channels, patch, _ = _shape(tensors, f"{prefix}patch_embed.proj.weight", 4)
    grid = (_square_side(rows - 3, table) + 1) // 2
    sizes = {
        "image_size": patch * grid,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": _depth(tensors, f"{prefix}blocks"),
        "num_attention_heads": heads,
        "intermediate_size": _shape(tensors, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0],
    }
    if not pretrained:
        return NIMSimMIMClassifierConfig(**sizes, num_labels=_shape(tensors, "head.weight", 2)[0])
    # SimMIM hides squares of 2 x 2 patches (32 pixels at patch 16) where the image can be cut into them.
    mask_patch_size = 2 * patch if grid % 2 == 0 and grid > 2 else patch
    degradation = args.degradation or SOURCES[args.source].degradation
    return NIMSimMIMConfig(**sizes, degradation=degradation, mask_patch_size=mask_patch_size)


def convert(tensors: StateDict, layout: Layout, model: PreTrainedModel) -> PreTrainedModel:
    """Puts the tensors of a reference checkpoint into a model of ours.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; all of them are listed.
    """
    own = model.state_dict()
    expected = {}
    for key, names in layout.items():
        first = own[names[0]].shape
        expected[key] = (len(names) * first[0], *first[1:])
        if key == "decoder.0.weight":  # SimMIM's decoder, a 1x1 convolution on both sides
            expected[key] = tuple(first)
    index_keys = {key for key in tensors if key.endswith("relative_position_index")}  # a buffer, checked and not loaded
    problems = []
    if missing := [key for key in layout if key not in tensors]:
        problems.append(f"missing {', '.join(missing)}")
    if unexpected := [key for key in tensors if key not in layout and key not in index_keys]:
        problems.append(f"unexpected {', '.join(unexpected)}")
    for key, shape in expected.items():
        if key in tensors and tuple(tensors[key].shape) != shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)} instead of {shape}")
    for key in sorted(index_keys):
        grid = model.config.image_size // model.config.patch_size
        if not torch.equal(tensors[key], relative_position_index((grid, grid))):
            problems.append(f"{key} orders the relative positions in another way")
    if problems:
        raise ValueError(f"the checkpoint is not a {type(model).__name__}: {'; '.join(problems)}")
    converted = {}
    for key, names in layout.items():
        for name, part in zip(names, tensors[key].chunk(len(names)), strict=True):
            converted[name] = part
    model.load_state_dict(converted)
    return model


def save_directory(model: PreTrainedModel, output_dir: str) -> None:
    """Config, image processor and safetensors, complete or not at all."""
    with written_whole(output_dir) as temporary:
        model.save_pretrained(temporary, save_original_format=False)
        image_processor_for(model.config).save_pretrained(temporary)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", required=True, choices=("nim-mae", "mae", "dmae", "simmim"), help="what wrote the file"
    )
    parser.add_argument("--checkpoint", required=True, help="the reference's .pt or .pth file")
    parser.add_argument("--output_dir", required=True, help="the model directory to make")
    parser.add_argument(
        "--num_attention_heads", type=int, help="of the encoder; default: as the published sizes, or width / 64"
    )
    parser.add_argument("--decoder_num_attention_heads", type=int, help="default: width / 32, as the published models")
    parser.add_argument(
        "--degradation",
        choices=("mask", "noise", "noise+mask"),
        help="what a pre-trained model undoes; default: noise for nim-mae, noise+mask for dmae, otherwise mask "
        "(give noise for NIM-SimMIM)",
    )
    parser.add_argument("--patch_size", type=int, help="checked against the tensors; default: theirs")
    parser.add_argument(
        "--no_norm_pix_loss",
        action="store_true",
        help="the model predicts pixels as they are (MAE's models for visualization), not normalized patches",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if os.path.exists(args.output_dir) and (not os.path.isdir(args.output_dir) or os.listdir(args.output_dir)):
        raise ValueError(f"--output_dir {args.output_dir!r} exists and is not empty: choose another or remove it")

    tensors = load_reference(args.checkpoint)
    family = SOURCES[args.source].family
    config: PreTrainedConfig
    if family is SIMMIM:
        config = simmim_config(tensors, args)
        layout = simmim_layout(config)
    else:
        config = mae_config(tensors, args)
        layout = mae_layout(config)
    if args.patch_size not in (None, config.patch_size):
        raise ValueError(f"--patch_size {args.patch_size}: the patch projection is for patches of {config.patch_size}")
    is_classifier = isinstance(config, family.classifier.config_class)
    model = convert(tensors, layout, (family.classifier if is_classifier else family.pretraining)(config))
    save_directory(model, args.output_dir)
    print(
        f"{args.output_dir}: {type(model).__name__}, {model.num_parameters():,} parameters, images "
        f"{config.image_size}, patches {config.patch_size}, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size} with {config.num_attention_heads} heads"
    )


if __name__ == "__main__":
    run_main(main)
