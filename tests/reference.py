"""The reference models' arithmetic, written once more and plainly, on their own state dicts.

It is checked against the golden numbers; at sizes that have none, tests compare with it.
"""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
StateDict = dict[str, torch.Tensor]


def load_script(name: str) -> ModuleType:
    """A script as a module, so that a test runs its `main` without a new process."""
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def released_configs() -> dict[Path, dict]:
    """The configuration of each released model, by its folder."""
    paths = sorted((Path(__file__).parents[1] / "model_cards").glob("*/config.json"))
    return {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def layer_norm(x: torch.Tensor, sd: StateDict, name: str) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"], eps=1e-6)


def linear(x: torch.Tensor, sd: StateDict, name: str) -> torch.Tensor:
    return F.linear(x, sd[f"{name}.weight"], sd[f"{name}.bias"])


def block(x: torch.Tensor, sd: StateDict, name: str, heads: int, table: torch.Tensor | None = None) -> torch.Tensor:
    """A pre-norm transformer block; with a table of relative positions, SimMIM's: no key bias, layer scale."""
    batch, tokens, width = x.shape
    if table is None:
        bias = sd[f"{name}.attn.qkv.bias"]
    else:
        q_bias, v_bias = sd[f"{name}.attn.q_bias"], sd[f"{name}.attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    qkv = F.linear(layer_norm(x, sd, f"{name}.norm1"), sd[f"{name}.attn.qkv.weight"], bias)
    q, k, v = qkv.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-1, -2) / (width // heads) ** 0.5  # (B, heads, T, T)
    if table is not None:
        scores = scores + relative_bias(table, int((tokens - 1) ** 0.5))
    attended = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width)
    x = x + linear(attended, sd, f"{name}.attn.proj") * sd.get(f"{name}.gamma_1", 1)
    hidden = F.gelu(linear(layer_norm(x, sd, f"{name}.norm2"), sd, f"{name}.mlp.fc1"))
    return x + linear(hidden, sd, f"{name}.mlp.fc2") * sd.get(f"{name}.gamma_2", 1)


def relative_bias(table: torch.Tensor, side: int) -> torch.Tensor:
    """Bias `(heads, 1 + N, 1 + N)` pair by pair: slow and plain."""
    bias = torch.empty(table.shape[1], 1 + side**2, 1 + side**2)
    for i in range(side**2):
        for j in range(side**2):
            down, right = i // side - j // side, i % side - j % side
            bias[:, 1 + i, 1 + j] = table[(down + side - 1) * (2 * side - 1) + right + side - 1]
    bias[:, 0, 1:] = table[-3][:, None]
    bias[:, 1:, 0] = table[-2][:, None]
    bias[:, 0, 0] = table[-1]
    return bias


def depth(sd: StateDict, name: str) -> int:
    return 1 + max(int(key.removeprefix(f"{name}.").split(".")[0]) for key in sd if key.startswith(f"{name}."))


def patch_tokens(images: torch.Tensor, sd: StateDict) -> torch.Tensor:
    weight, bias = sd["patch_embed.proj.weight"], sd["patch_embed.proj.bias"]
    return F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def mae_encode(images: torch.Tensor, sd: StateDict, heads: int, seen: torch.Tensor | None = None) -> torch.Tensor:
    """All patches, or the `seen` ones `(B, S)` of each image in this order, before the last norm; `(B, 1 + N, D)`."""
    x = patch_tokens(images, sd) + sd["pos_embed"][:, 1:]
    if seen is not None:
        x = torch.stack([patches[numbers] for patches, numbers in zip(x, seen, strict=True)])
    x = torch.cat([(sd["cls_token"] + sd["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)
    for layer in range(depth(sd, "blocks")):
        x = block(x, sd, f"blocks.{layer}", heads)
    return x


def nim_mae(noisy: torch.Tensor, clean: torch.Tensor, sd: StateDict, heads: int, decoder_heads: int) -> torch.Tensor:
    """The reconstruction with norm_pix: de-normalized with the statistics of the clean patches."""
    x = linear(layer_norm(mae_encode(noisy, sd, heads), sd, "norm"), sd, "decoder_embed")
    patches = mae_decode(x, sd, decoder_heads)
    patch = sd["patch_embed.proj.weight"].shape[-1]
    side = clean.shape[-1] // patch
    target = clean.view(-1, 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    patches = patches * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
    return to_images(patches, patch)


def mae_decode(x: torch.Tensor, sd: StateDict, heads: int) -> torch.Tensor:
    """Embedded tokens `(B, 1 + N, D)` to patches `(B, N, p * p * 3)`."""
    x = x + sd["decoder_pos_embed"]
    for layer in range(depth(sd, "decoder_blocks")):
        x = block(x, sd, f"decoder_blocks.{layer}", heads)
    return linear(layer_norm(x, sd, "decoder_norm"), sd, "decoder_pred")[:, 1:]


def to_images(patches: torch.Tensor, patch: int) -> torch.Tensor:
    side = int(patches.shape[1] ** 0.5)
    pixels = patches.view(-1, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(len(patches), 3, side * patch, side * patch)


def dmae(noisy: torch.Tensor, order: torch.Tensor, sd: StateDict, heads: int, decoder_heads: int) -> torch.Tensor:
    """The reconstruction, in raw pixels, from the quarter of the noisy patches that comes first in `order` `(B, N)`."""
    seen = order.argsort(dim=1)[:, : order.shape[1] // 4]
    latent = linear(layer_norm(mae_encode(noisy, sd, heads, seen), sd, "norm"), sd, "decoder_embed")
    x = sd["mask_token"].repeat(len(noisy), order.shape[1], 1)
    for image, numbers in enumerate(seen):
        x[image, numbers] = latent[image, 1:]
    patches = mae_decode(torch.cat([latent[:, :1], x], dim=1), sd, decoder_heads)
    return to_images(patches, sd["patch_embed.proj.weight"].shape[-1])


def mae_classify(images: torch.Tensor, sd: StateDict, heads: int) -> torch.Tensor:
    return linear(layer_norm(mae_encode(images, sd, heads)[:, 1:].mean(1), sd, "fc_norm"), sd, "head")


def simmim_encode(images: torch.Tensor, sd: StateDict, mask: torch.Tensor | None = None) -> torch.Tensor:
    x = patch_tokens(images, sd)
    if mask is not None:
        x = torch.where(mask.flatten(1)[..., None].bool(), sd["mask_token"], x)
    x = torch.cat([sd["cls_token"].expand(len(x), -1, -1), x], dim=1)
    shared = sd.get("rel_pos_bias.relative_position_bias_table")
    for layer in range(depth(sd, "blocks")):
        table = shared if shared is not None else sd[f"blocks.{layer}.attn.relative_position_bias_table"]
        x = block(x, sd, f"blocks.{layer}", table.shape[1], table)
    return x


def simmim(images: torch.Tensor, sd: StateDict, mask: torch.Tensor | None = None) -> torch.Tensor:
    encoder = {key.removeprefix("encoder."): value for key, value in sd.items() if key.startswith("encoder.")}
    x = layer_norm(simmim_encode(images, encoder, mask), encoder, "norm")[:, 1:].transpose(1, 2)
    patch = encoder["patch_embed.proj.weight"].shape[-1]
    side = images.shape[-1] // patch
    x = F.conv2d(x.unflatten(2, (side, side)), sd["decoder.0.weight"], sd["decoder.0.bias"])
    return F.pixel_shuffle(x, patch)


def simmim_classify(images: torch.Tensor, sd: StateDict) -> torch.Tensor:
    return linear(layer_norm(simmim_encode(images, sd)[:, 1:].mean(1), sd, "fc_norm"), sd, "head")


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> StateDict:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        state[name] = torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 0.1)
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    return state


def _block_shapes(name: str, width: int, simmim_heads: int | None = None) -> dict[str, tuple[int, ...]]:
    shapes = {"attn.qkv.weight": (3 * width, width)}
    if simmim_heads is None:
        shapes |= {"attn.qkv.bias": (3 * width,)}
    else:
        shapes |= dict.fromkeys(("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias"), (width,))
    for key, rows, columns in [
        ("attn.proj", width, width),
        ("mlp.fc1", 4 * width, width),
        ("mlp.fc2", width, 4 * width),
    ]:
        shapes |= {f"{key}.weight": (rows, columns), f"{key}.bias": (rows,)}
    for key in ("norm1", "norm2"):
        shapes |= {f"{key}.weight": (width,), f"{key}.bias": (width,)}
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def random_checkpoints(
    image_size: int = 48,
    patch: int = 8,
    width: int = 24,
    layers: int = 3,
    heads: int = 3,
    decoder_width: int = 16,
    decoder_layers: int = 1,
    labels: int = 7,
) -> dict[str, StateDict]:
    """State dicts in the four layouts, of sizes that differ from the golden ones in every number."""
    side = image_size // patch
    stem = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    stem |= {"patch_embed.proj.bias": (width,)}
    head = {
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "head.weight": (labels, width),
        "head.bias": (labels,),
    }
    blocks, simmim_blocks = {}, {}
    for layer in range(layers):
        blocks |= _block_shapes(f"blocks.{layer}", width)
        simmim_blocks |= _block_shapes(f"blocks.{layer}", width, heads)
    mae = stem | {"pos_embed": (1, 1 + side**2, width)} | blocks
    pretrain = mae | {
        "mask_token": (1, 1, decoder_width),
        "decoder_pos_embed": (1, 1 + side**2, decoder_width),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (decoder_width, width),
        "decoder_embed.bias": (decoder_width,),
        "decoder_norm.weight": (decoder_width,),
        "decoder_norm.bias": (decoder_width,),
        "decoder_pred.weight": (3 * patch**2, decoder_width),
        "decoder_pred.bias": (3 * patch**2,),
    }
    for layer in range(decoder_layers):
        pretrain |= _block_shapes(f"decoder_blocks.{layer}", decoder_width)
    table = ((2 * side - 1) ** 2 + 3, heads)
    encoder = stem | simmim_blocks | {"mask_token": (1, 1, width), "norm.weight": (width,), "norm.bias": (width,)}
    encoder |= {"rel_pos_bias.relative_position_bias_table": table}
    decoder = {"decoder.0.weight": (3 * patch**2, width, 1, 1), "decoder.0.bias": (3 * patch**2,)}
    tables = {f"blocks.{layer}.attn.relative_position_bias_table": table for layer in range(layers)}
    return {
        "mae_pretrain": _random(pretrain, 1),
        "mae_finetune": _random(mae | head, 2),
        "simmim_pretrain": _random({f"encoder.{key}": shape for key, shape in encoder.items()} | decoder, 3),
        "simmim_finetune": _random(stem | simmim_blocks | tables | head, 4),
    }
