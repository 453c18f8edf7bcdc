"""Models that a recipe names: loaded whole, or an error that says what is wrong; their attention and masks."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..families_nim import PURIFIERS
from ..image_processing import check_processor_fields
from ..loading_nim import naming_damaged_files
from ..modeling_nim_purified import NIMPurifiedImageClassification


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
    except Exception as error:  # transformers raises many types for a file edited by hand
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{path!r} has Python code of its own; read it, and set trust_remote_code=true to run it"
            ) from None
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"config.json of {path!r} makes no model: {kind}{str(error)[:400]}") from None


@dataclass(frozen=True)
class ModelKind:
    """What a caller of `load_model` can use.

    Args:
        name: in an error, such as "classifier".
        remedy: what to name instead of a model that is none.
        classes: the class that loads each model type.
        auto_class: for the other types, and for models with Python code of their own.
        remote_only: `auto_class` is for models with code of their own alone.
    """

    name: str
    remedy: str
    classes: Mapping[str, type[PreTrainedModel]] = field(default_factory=dict)
    auto_class: type | None = None
    remote_only: bool = False

    def class_for(self, path: str, config: PreTrainedConfig, trust_remote_code: bool) -> type:
        """The class that loads a model of this configuration; ValueError where it is of another kind."""
        if config.model_type in self.classes:
            return self.classes[config.model_type]
        if self.auto_class is not None:
            if trust_remote_code and self.auto_class.__name__ in (getattr(config, "auto_map", None) or {}):
                return self.auto_class
            if not self.remote_only and type(config) in self.auto_class._model_mapping:
                return self.auto_class
        raise ValueError(f"{path!r} is a {config.model_type!r} model, no {self.name}; name {self.remedy}")


COMPOSED_TYPE = NIMPurifiedImageClassification.config_class.model_type
CLASSIFIER = ModelKind(
    "classifier", "a fine-tuned or purified one", auto_class=AutoModelForImageClassification
)  # any of transformers
DEFENDED = ModelKind(
    "purified model", "a directory of a NIMPurifiedImageClassification", {COMPOSED_TYPE: NIMPurifiedImageClassification}
)
# transformers' own MAE cannot purify; its checkpoints load into NIMForPreTraining
PURIFIER = ModelKind(
    "purifier",
    "a pre-trained NIM or MIM model, or a purified one",
    PURIFIERS | DEFENDED.classes,
    AutoModelForPreTraining,
    remote_only=True,
)


def load_model(
    path: str | os.PathLike,
    kind: ModelKind,
    trust_remote_code: bool = False,
    fresh: Sequence[str] = (),
    exact: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """The model of a directory or of a Hub id, in evaluation mode, every weight from its file, in float32.

    Args:
        kind: `CLASSIFIER`, `PURIFIER`, `DEFENDED` or a caller's own.
        trust_remote_code: run the Python code that lies beside the weights.
        fresh: beginnings of the names that the file may lack; these weights are initialized.
        exact: refuse a file that holds weights which the model has no place for.
        settings: of `from_pretrained`, such as fields of the configuration or `dtype`.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the model is of another kind, or its file is damaged or holds other weights.
    """
    path = os.fspath(path)
    settings.setdefault("dtype", torch.float32)
    config = load_config(path, trust_remote_code)
    if trust_remote_code and getattr(config, "auto_map", None):
        warnings.warn(f"{path}: runs the Python code that lies beside the weights; read it first", stacklevel=2)
    model_class = kind.class_for(path, config, trust_remote_code)
    with naming_damaged_files(path):
        model, info = model_class.from_pretrained(
            path, output_loading_info=True, trust_remote_code=trust_remote_code, **settings
        )
    missing = sorted(key for key in map(str, info["missing_keys"]) if not key.startswith(tuple(fresh)))
    left_over = sorted(map(str, info["unexpected_keys"])) if exact else []
    if missing:
        raise ValueError(
            f"{path!r} lacks {len(missing)} weights of a {type(model).__name__}, e.g. {missing[0]!r}, which would be "
            "random: name a finished model"
        )
    if left_over:
        raise ValueError(
            f"{path!r} holds {len(left_over)} weights that a {type(model).__name__} has no place for, e.g. "
            f"{left_over[0]!r}: name a model of this package"
        )
    return model


def load_processor(path: str | os.PathLike, trust_remote_code: bool = False) -> Any:
    """The image processor that was saved with a model. Raises OSError or ValueError where there is none, or no whole
    one."""
    with naming_damaged_files(path):
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=trust_remote_code)
        check_processor_fields(processor)
    return processor


def load_purifier(
    path: str | os.PathLike, mask_ratio: float | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The purifier at `path`, or the one in the composed model there, in evaluation mode.

    `mask_ratio` is the share of patches that it hides, in place of its own. Raises what `load_model` raises.
    """
    model = load_model(path, PURIFIER, trust_remote_code)
    purifier = model.purifier if isinstance(model, NIMPurifiedImageClassification) else model
    if mask_ratio is not None:
        set_mask_ratio(purifier, mask_ratio)
    return purifier


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
