"""Sections that both training recipes have: how the run is executed, checkpointed and logged."""

import ctypes
import os
import platform
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, TorchDynamoPlugin

from ..runs.bounds import Count, check_fields
from ..runs.files import write_text
from ..runs.recipe import dotted_keys, recipe_to_dict


@dataclass
class ExecutionRecipe:
    """The `execution` section: precision, memory and speed; options of `accelerate launch` choose the machines.

    `attn_implementation: auto` is eager for small models on a CPU, above all in bf16. Otherwise it is what null always
    is: transformers' choice, SDPA. `execution: auto` in place of a section takes both from the machine. The run says
    what it uses, and its `recipe.yaml` holds the precision that "auto" became.
    """

    SHORTHANDS = {"auto": {"mixed_precision": "auto", "attn_implementation": "auto"}}

    # bf16 computes in bfloat16, weights stay in float32; auto: bf16 where the machine multiplies it in hardware
    mixed_precision: Literal["auto", "no", "bf16"] = "no"
    compile: bool = False  # torch.compile
    gradient_checkpointing: bool = False  # compute activations again on the way back: less memory, more time
    # auto: eager for small models on a CPU, else as null: transformers' choice, SDPA
    attn_implementation: Literal["auto", "eager", "sdpa"] | None = "auto"


@dataclass
class CheckpointRecipe:
    """The `checkpoints` section: one every `every_steps` steps and at the end, the newest `keep` of them kept.

    A run does not go on from a checkpoint of another recipe, as far as the recipe decides the numbers, unless
    `on_changed_recipe` is "continue".
    """

    every_steps: Count = 1000  # how often
    keep: Count = 2  # how many stay
    # whether a run goes on from a checkpoint of another recipe
    on_changed_recipe: Literal["raise", "continue"] = "raise"

    def __post_init__(self):
        check_fields(self, "checkpoints.")


@dataclass
class LoggingRecipe:
    """The `logging` section: a record in `log.jsonl` every `every_steps` steps, and to `trackers` if any are named.

    Several processes also ask one another at this interval whether one was told to stop (SIGTERM): asking at every step
    would make the GPUs wait. The interval must be short against the time that the machine leaves between SIGTERM and
    SIGKILL (torchrun: 30 s).
    """

    every_steps: Count = 10  # how often log.jsonl gets a line
    # what gets the records besides log.jsonl
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    project: str = "modeling-nim"  # the run's project in the trackers

    def __post_init__(self):
        check_fields(self, "logging.")


def fastest_precision(device: torch.device) -> Literal["no", "bf16"]:
    """`bf16` where this GPU or CPU has instructions that multiply it."""
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        known = torch.cpu.get_capabilities()
        has_bf16 = any(known.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    return "bf16" if has_bf16 else "no"


# of glibc's malloc.h: from which size on an allocation is the kernel's own, and how much free memory goes back to it
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def keep_freed_memory() -> None:
    """Lets this process keep the memory that tensors free, where the C library is glibc.

    Else a step of training on CPUs hands its activations back to the kernel and takes them again page by page, 15,000
    pages at the size of the CIFAR-10 recipes.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, bytes_ in ((_M_MMAP_THRESHOLD, 2**25), (_M_TRIM_THRESHOLD, 2**31 - 1)):  # the largest it takes
            mallopt(parameter, bytes_)


def make_accelerator(recipe: Any) -> Accelerator:
    """The accelerator for a recipe with `execution`, `optimization`, `logging` and `output_dir`; it says the precision,
    and puts into the recipe what "auto" is here.

    Raises ValueError for trackers that are not installed (Accelerate would leave them out), and for a moving
    average of sharded weights.
    """
    installed = {tracker.value for tracker in get_available_trackers()}
    if missing := [tracker for tracker in recipe.logging.trackers if tracker not in installed]:
        raise ValueError(f"logging.trackers names {', '.join(missing)}, not installed: pip install {' '.join(missing)}")
    keep_freed_memory()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if recipe.execution.mixed_precision == "auto":
        # the device of this run, which `accelerate launch --cpu` makes the CPU where there is a GPU, too
        recipe.execution.mixed_precision = fastest_precision(PartialState().device)
    accelerator = Accelerator(
        mixed_precision=recipe.execution.mixed_precision,
        gradient_accumulation_steps=recipe.optimization.gradient_accumulation_steps,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if recipe.execution.compile else None,
        log_with=recipe.logging.trackers or None,
        project_dir=recipe.output_dir,
    )
    accelerator.print(f"precision: {'float32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision}")
    if recipe.optimization.ema_decay and accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("optimization.ema_decay averages whole weights; unset it, or launch with DDP instead of FSDP")
    return accelerator


# What these change is how a run is executed and what is seen of it, not what it computes (but for rounding).
_NEUTRAL_KEYS = (
    "output_dir",
    "checkpoints",
    "logging",
    "validation",
    "data.path",
    "data.num_images",
    "data.num_workers",
    "data.on_bad_image",
    "execution.compile",
    "execution.gradient_checkpointing",
    "execution.attn_implementation",
    "optimization.batch_size",
    "optimization.per_device_batch_size",
    "optimization.gradient_accumulation_steps",
)


def decisive_settings(recipe: Any, global_batch_size: int, num_images: int) -> dict[str, int | float | str | bool]:
    """The keys of the recipe that the numbers of the run follow from.

    The data may move and the batch may be shared otherwise; the number of images and the global batch stand for both.
    """
    settings = {
        key: value
        for key, value in _flat(recipe).items()
        if not any(key == neutral or key.startswith(f"{neutral}.") for neutral in _NEUTRAL_KEYS)
    }
    return settings | {"data.num_images": num_images, "optimization.batch_size": global_batch_size}


def save_recipe(accelerator: Accelerator, recipe: Any) -> None:
    """Write the recipe, every default filled in, to `output_dir/recipe.yaml`, and start the trackers with it."""
    if accelerator.is_main_process:
        text = yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)
        write_text(os.path.join(recipe.output_dir, "recipe.yaml"), text)
    if recipe.logging.trackers:
        accelerator.init_trackers(recipe.logging.project, config=_flat(recipe))


def _flat(recipe: Any) -> dict[str, int | float | str | bool]:
    """Nested keys joined by dots, values as the trackers take them."""
    values = dotted_keys(recipe_to_dict(recipe))
    return {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in values.items()}
