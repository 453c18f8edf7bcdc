"""Models as recipes name them, their random draws, and their directories."""

import dataclasses
import os
import shutil
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedConfig, PreTrainedModel

from .. import (
    MODEL_SIZES,
    NIMConfig,
    NIMForPreTraining,
    NIMSimMIMConfig,
    NIMSimMIMForPreTraining,
    image_processor_for,
    sample_sigma,
)
from ..noise_nim import sample_epsilon


ARCHITECTURES = {
    "nim_mae": (NIMConfig, NIMForPreTraining, "noise"),
    "mae": (NIMConfig, NIMForPreTraining, "mask"),
    "nim_simmim": (NIMSimMIMConfig, NIMSimMIMForPreTraining, "noise"),
    "simmim": (NIMSimMIMConfig, NIMSimMIMForPreTraining, "mask"),
}


@dataclass
class ModelRecipe:
    """The `model` section: an architecture, one of `MODEL_SIZES` or none, and fields of its configuration over that."""

    architecture: Literal["nim_mae", "mae", "nim_simmim", "simmim"] = "nim_mae"
    size: Literal["tiny", "small", "base", "large", "huge"] | None = None
    config: dict[str, Any] = field(default_factory=dict)


def make_config(recipe: ModelRecipe) -> PreTrainedConfig:
    """The model's configuration; ValueError for a field that it does not have or a value that it refuses."""
    config_class, _, degradation = ARCHITECTURES[recipe.architecture]
    known = {entry.name for entry in dataclasses.fields(config_class)}
    for name in recipe.config:
        if name not in known or name == "degradation":
            raise ValueError(
                f"recipe key 'model.config.{name}' is not for the architecture {recipe.architecture!r}; known keys: "
                f"{', '.join(sorted(known - {'degradation'}))}"
            )
    preset = MODEL_SIZES[recipe.size] if recipe.size else {}
    return config_class(**{**preset, **recipe.config, "degradation": degradation})


def make_pretraining_model(recipe: ModelRecipe) -> PreTrainedModel:
    """A freshly initialised model for pre-training, from the global random state."""
    return ARCHITECTURES[recipe.architecture][1](make_config(recipe))


def draw_degradation(
    config: PreTrainedConfig, batch_size: int, generators: list[torch.Generator], device: torch.device
) -> dict[str, torch.Tensor]:
    """What degrades each image, as arguments of the model: sigma (section 2.4) and epsilon (Eq. 3), or the mask's order.

    Drawn here and not in the model, so that a compiled model has no random draws in its graph.
    """
    if config.degradation == "noise":
        shape = (batch_size, config.num_channels, config.image_size, config.image_size)
        return {
            "sigma": sample_sigma(config.sigma, batch_size, generators, device),
            "epsilon": sample_epsilon(shape, generators, device),
        }
    side = config.image_size // getattr(config, "mask_patch_size", config.patch_size)
    order = [torch.rand(side * side, generator=generator, device=generator.device) for generator in generators]
    return {"noise": torch.stack(order).to(device)}


def save_model_dir(
    accelerator: Accelerator, model: torch.nn.Module, output_dir: str, average: AveragedModel | None = None
) -> None:
    """Write the prepared `model`, or the moving `average` of its weights, as a model directory with its image processor.

    Every process must call it (sharded weights are gathered). The directory's files are complete or absent; files of the
    same names are replaced, others in `output_dir` stay.
    """
    state_dict = None if average else accelerator.get_state_dict(model)
    plain = average.module if average else accelerator.unwrap_model(model, keep_torch_compile=False)
    if accelerator.is_main_process:
        write_model_dir(plain, output_dir, state_dict)
    accelerator.wait_for_everyone()


def write_model_dir(model: PreTrainedModel, output_dir: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write safetensors, configuration and image processor into `output_dir` under temporary names, then rename."""
    temporary = os.path.join(output_dir, ".model.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=state_dict)
    image_processor_for(model.config).save_pretrained(temporary)
    names = sorted(os.listdir(temporary), key=lambda name: (name == "config.json", name))
    for name in names:  # the configuration last: without it the directory is no model
        os.replace(os.path.join(temporary, name), os.path.join(output_dir, name))
    os.rmdir(temporary)
