"""Models that a recipe names: the configuration, or an error that says what is wrong; their attention and masks."""

import os
from collections.abc import Sequence
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel


# On a CPU, one core, forward and backward: SDPA in bf16 takes 60 times as long as plain products at 17 tokens, 4 times
# at 65, 1.6 times at 577, beyond which the memory for all pairs counts; in float32 2.3 times at 17 and the same at 65.
MAX_EAGER_TOKENS = {"bf16": 640, "no": 40}


def load_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of a model directory or of a Hub id such as "org/name"; FileNotFoundError where there is none.

    `trust_remote_code` runs the configuration's own Python code, where there is some.
    """
    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "config.json")):
            raise FileNotFoundError(f"{path!r} holds no model (no config.json); is its training finished?")
        return _read_config(path, trust_remote_code)
    if path.count("/") != 1 or path.startswith((".", "/", "~", "outputs/")) or os.path.isdir(path.split("/")[0]):
        raise FileNotFoundError(f"there is no model directory {path!r}; scripts/run_pretrain.py makes one")
    try:
        return _read_config(path, trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(f"there is no model directory {path!r}, and the Hub gave none: {error}") from None


def _read_config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, StrictDataclassError):  # these name the file or the field
        raise
    except Exception as error:  # a file edited by hand makes transformers trip over whatever comes first
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{path!r} has Python code of its own; read it, and set trust_remote_code=true to run it"
            ) from None
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"config.json of {path!r} makes no model: {kind}{str(error)[:400]}") from None


def set_attention(
    parts: Sequence[PreTrainedModel],
    implementation: Literal["auto", "eager", "sdpa"] | None,
    mixed_precision: str,
    device: torch.device,
) -> str:
    """Set the attention of the parts and return it in words: "auto" is what is fastest for their size on this device.

    Where "auto" has nothing better, and with None, it is what transformers chose when the part was built. Parts without
    patches are left alone.
    """
    said = []
    for part in parts:
        if not hasattr(part.config, "patch_size"):
            continue
        chosen, num_tokens = implementation, (part.config.image_size // part.config.patch_size) ** 2 + 1
        if implementation == "auto":
            chosen = None
            if device.type == "cpu" and num_tokens <= MAX_EAGER_TOKENS[mixed_precision]:
                chosen = "eager"
        if chosen:
            part.set_attn_implementation(chosen)
        said.append(f"{part.config._attn_implementation} ({num_tokens} tokens)")
    return ", ".join(said)


def set_mask_ratio(purifier: PreTrainedModel, mask_ratio: float) -> None:
    """Makes a purifier hide another share of the patches than in its training; 0 shows it the whole noisy image."""
    config = purifier.config
    if "mask" not in config.degradation:
        raise ValueError(
            f"mask_ratio {mask_ratio} is for a purifier that was trained to fill masks, and this one's degradation is "
            f'"{config.degradation}": leave it out'
        )
    if mask_ratio == 0 and not config.adds_noise:
        raise ValueError("mask_ratio 0 leaves this purifier nothing to do: it fills masks and takes away no noise")
    config.mask_ratio = mask_ratio
    for name, weight in purifier.named_parameters():
        if name.endswith("mask_token"):  # without masks it is outside the graph
            weight.requires_grad_(config.hides_patches)
