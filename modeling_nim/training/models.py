"""Models as recipes name them, their random draws, and their directories."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedConfig, PreTrainedModel

from .. import MODEL_SIZES, NIMPurifiedImageClassification
from ..families_nim import ARCHITECTURES, BEGINNINGS, CLASSIFIERS
from ..image_processing import CHANNELS
from ..runs.files import INCOMPLETE, naming_path, remove, sync
from ..runs.models import CLASSIFIER, COMPOSED_TYPE, DEFENDED, ModelKind, load_config, load_model


BEGINNING = ModelKind(
    "model that fine-tuning starts from",
    f"one of {', '.join(BEGINNINGS)} (scripts/convert_checkpoint.py makes them from published MAE and SimMIM weights)",
    BEGINNINGS,
)


@dataclass
class ModelRecipe:
    """The `model` section: an architecture, one of `MODEL_SIZES` or none, and fields of its configuration over that."""

    # noise (nim_*), masks, or both (nim_mae_masked), on the encoder of MAE or of SimMIM
    architecture: Literal[tuple(ARCHITECTURES)] = "nim_mae"
    size: Literal["tiny", "small", "base", "large", "huge"] | None = None  # a preset of MODEL_SIZES
    config: dict[str, Any] = field(default_factory=dict)  # fields of NIMConfig or NIMSimMIMConfig, over the preset


def make_config(recipe: ModelRecipe) -> PreTrainedConfig:
    """The model's configuration; ValueError for a field that it does not have or a value that it refuses."""
    architecture = ARCHITECTURES[recipe.architecture]
    config_class = architecture.family.pretraining.config_class
    # what every configuration of transformers has (labels, dtype, outputs, ...) is not for a recipe
    not_for_recipes = {entry.name for entry in dataclasses.fields(PreTrainedConfig)} | {"degradation"}
    known = {entry.name for entry in dataclasses.fields(config_class)} - not_for_recipes
    for name in recipe.config:
        if name not in known:
            raise ValueError(
                f"recipe key 'model.config.{name}' is not for the architecture {recipe.architecture!r}; known keys: "
                f"{', '.join(sorted(known))}"
            )
    preset = MODEL_SIZES[recipe.size] if recipe.size else {}
    return config_class(**{**preset, **recipe.config, "degradation": architecture.degradation})


def make_pretraining_model(recipe: ModelRecipe) -> PreTrainedModel:
    """A freshly initialized model for pre-training, from the global random state."""
    config = make_config(recipe)
    require_channels(config)
    return ARCHITECTURES[recipe.architecture].family.pretraining(config)


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Keep the layers' inputs alone and compute the rest again on the way back: less memory, the same numbers."""
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.23; before, it had the name below
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()


def load_classifier(path: str, class_names: list[str] | None, drop_path_rate: float) -> PreTrainedModel:
    """The classifier that starts from the model at `path`.

    From a pre-trained model: encoder loaded, `fc_norm` and head fresh. From a classifier, or the one in a composed
    model: all of it. Raises FileNotFoundError when there is no model, ValueError when it is not one of ours or its
    weights or classes do not fit.
    """
    if not class_names:
        raise ValueError("the labels of this stream have no names; fine-tune without data.streaming, which counts them")
    if len(class_names) == 1:
        raise ValueError(f"all images are of one class, {class_names[0]!r}: there is nothing to tell apart")
    config = load_config(path)
    if config.model_type == COMPOSED_TYPE:
        return _composed_classifier(path, config, len(class_names), drop_path_rate)
    if config.model_type in CLASSIFIERS:
        _require_classes(path, config, len(class_names))
    model = load_model(
        path,
        BEGINNING,
        fresh=() if config.model_type in CLASSIFIERS else ("fc_norm.", "classifier."),
        exact=True,
        id2label=dict(enumerate(class_names)),
        label2id={name: label for label, name in enumerate(class_names)},
        drop_path_rate=drop_path_rate,
    )
    require_channels(model.config)
    return model


def _composed_classifier(
    path: str, config: PreTrainedConfig, num_classes: int, drop_path_rate: float
) -> PreTrainedModel:
    """The classifier of the composed model at `path`, with another drop path."""
    if config.classifier_config.model_type not in BEGINNINGS:
        raise ValueError(
            f"the classifier of {path!r} is a {config.classifier_config.model_type!r} model, which is not fine-tuned "
            f"here; name a composed model with one of {', '.join(BEGINNINGS)}"
        )
    _require_classes(path, config, num_classes)
    config.classifier_config.drop_path_rate = drop_path_rate
    return load_model(path, DEFENDED, config=config).classifier


def _require_classes(path: str, config: PreTrainedConfig, num_classes: int) -> None:
    if config.num_labels != num_classes:
        raise ValueError(
            f"{path!r} knows {config.num_labels} classes and the data have {num_classes}: use the data it was made for"
        )


def load_frozen_classifier(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Any image classifier of transformers, or the one in a composed model: in evaluation mode, its weights frozen.

    `trust_remote_code` runs the Python code that lies beside the weights. Raises what `load_model` raises.
    """
    model = load_model(path, CLASSIFIER, trust_remote_code)
    if isinstance(model, NIMPurifiedImageClassification):
        model = model.classifier
    return model.requires_grad_(False).eval()


def require_channels(config: PreTrainedConfig) -> None:
    """ValueError for a model of images that no data source gives."""
    if config.num_channels != len(CHANNELS):
        raise ValueError(
            f"the model takes {config.num_channels} channels and all images are {CHANNELS}: use num_channels "
            f"{len(CHANNELS)}"
        )


def save_model_dir(
    accelerator: Accelerator, model: torch.nn.Module, output_dir: str, average: AveragedModel | None = None
) -> None:
    """Write the prepared `model`, or the moving `average` of its weights, as a directory with its image processor.

    Every process must call it (sharded weights are gathered). The directory's files are complete or absent; files of
    the same names are replaced, others in `output_dir` stay.
    """
    state_dict = None
    if not average:
        # a compiled model says `_orig_mod.` before its names
        state_dict = {key.replace("_orig_mod.", ""): value for key, value in accelerator.get_state_dict(model).items()}
    plain = average.module if average else accelerator.unwrap_model(model, keep_torch_compile=False)
    if accelerator.is_main_process:
        write_model_dir(plain, output_dir, state_dict)
    accelerator.wait_for_everyone()


def write_model_dir(model: PreTrainedModel, output_dir: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write safetensors, configuration and image processor into `output_dir` under temporary names, then rename."""
    temporary = os.path.join(output_dir, f".model{INCOMPLETE}")
    remove(temporary)
    try:
        with naming_path(output_dir):
            model.save_pretrained(temporary, state_dict=state_dict)
            sync(temporary)
            names = sorted(os.listdir(temporary), key=lambda name: (name == "config.json", name))
            for name in names:  # the configuration last: without it the directory is no model
                os.replace(os.path.join(temporary, name), os.path.join(output_dir, name))
    finally:
        remove(temporary)
