"""Measure pre-training of NIM-MAE or MAE: speed, FLOPs, share of the matrix peak, memory, and an eager float32 loop.

    python scripts/bench/pretrain.py [--size base --image_size 224 --batch_size 256] [--output bench/pretrain.json]

Without options: ViT-B/16 at 224 in bf16, compiled, where there is a GPU; "tiny" at 64 pixels in float32 on a CPU.
`ours` is a full step as run_pretrain.py takes it: uint8 batch, draws, normalization, forward, backward, fused AdamW,
under Accelerate. `bare` is the model's forward and backward alone, in the same precision; `eager_float32` a plain loop
in float32 without compilation, with an unfused optimizer.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, set_seed
from torch.profiler import ProfilerActivity, profile

from modeling_nim import normalize
from modeling_nim.data.loader import to_images_01
from modeling_nim.data.randomness import generators, image_seeds
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json
from modeling_nim.runs.machine import (
    count_flops,
    machine,
    matrix_peak_flops,
    seconds_of,
    synchronize,
)
from modeling_nim.training.models import ModelRecipe, make_pretraining_model
from modeling_nim.training.optimization import OptimizationRecipe, make_optimizer, set_learning_rate
from modeling_nim.training.progress import peak_memory_gib


ARCHITECTURES = ("nim_mae", "mae", "nim_mae_masked")  # those of MAE's encoder
SIZES = ("tiny", "small", "base", "large", "huge")
DEFAULTS = {  # on a GPU, on a CPU
    "size": ("base", "tiny"),
    "image_size": (224, 64),
    "batch_size": (256, 16),
    "steps": (30, 8),
    "precision": ("bf16", "no"),
    "compile": (True, False),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = {name: f"(default: {gpu} on a GPU, {cpu} on a CPU)" for name, (gpu, cpu) in DEFAULTS.items()}
    parser.add_argument(
        "--architecture",
        choices=ARCHITECTURES,
        default="nim_mae",
        help="nim_mae_masked has noise and masks (default: %(default)s)",
    )
    parser.add_argument("--size", choices=SIZES, help=f"of the model {default['size']}")
    parser.add_argument("--image_size", type=int, help=f"side of the images in pixels {default['image_size']}")
    parser.add_argument("--batch_size", type=int, help=f"images per step {default['batch_size']}")
    parser.add_argument("--steps", type=int, help=f"steps to take of each kind {default['steps']}")
    parser.add_argument("--precision", choices=("no", "bf16"), help=f"mixed precision {default['precision']}")
    compiled = f"with torch.compile {default['compile']}"
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help=compiled)
    parser.add_argument(
        "--output", default="outputs/bench/pretrain.json", help="where the numbers go (default: %(default)s)"
    )
    return parser


class Steps:
    """The three kinds of step that are timed, all on one batch of random images."""

    def __init__(self, accelerator: Accelerator, arguments: argparse.Namespace):
        self.accelerator, self.batch_size, self.number = accelerator, arguments.batch_size, 0
        device, size = accelerator.device, arguments.image_size
        recipe = ModelRecipe(arguments.architecture, arguments.size, {"image_size": size})
        self.plain = make_pretraining_model(recipe).to(device)
        self.config = self.plain.config
        self.pixels = torch.randint(0, 256, (self.batch_size, size, size, 3), dtype=torch.uint8).to(device)
        draws = self.plain.draw(self.batch_size, torch.Generator(device).manual_seed(0))
        self.fixed = {"pixel_values": self.pixel_values()} | draws
        two = {name: value[:2] for name, value in self.fixed.items()}
        self.forward_flops = count_flops(lambda: self.plain(**two)) / 2  # per image
        self.step_flops = count_flops(lambda: self.plain(**two).loss.backward()) / 2
        self.plain.zero_grad(set_to_none=True)

        self.eager_model = copy.deepcopy(self.plain)
        trained = [p for p in self.eager_model.parameters() if p.requires_grad]
        self.eager_optimizer = torch.optim.AdamW(trained, lr=1e-6, foreach=False)
        optimization = OptimizationRecipe(batch_size=self.batch_size, base_learning_rate=1.5e-4, steps=1)
        self.model, self.optimizer = accelerator.prepare(self.plain, make_optimizer(self.plain, optimization))
        self.model.train()

    def pixel_values(self) -> torch.Tensor:
        return normalize(to_images_01(self.pixels), self.config.image_mean, self.config.image_std)

    def bare(self) -> None:
        with self.accelerator.autocast():
            loss = self.model(**self.fixed).loss
        self.accelerator.backward(loss)

    def ours(self) -> None:
        first, self.number = self.number * self.batch_size, self.number + 1
        images = self.pixel_values()
        seeds = image_seeds(0, 0, np.arange(first, first + self.batch_size), "degradation")
        draws = self.plain.draw(self.batch_size, generators(seeds, images.device))
        set_learning_rate(self.optimizer, 1e-6)
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(images, **draws).loss)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def eager(self) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        self.eager_model(self.pixel_values()).loss.backward()
        self.eager_optimizer.step()
        self.eager_optimizer.zero_grad()
        torch.set_float32_matmul_precision(before)


def median_seconds(steps: Steps, rounds: int, warmup: int) -> dict[str, float]:
    """Median seconds of each kind of step, taken in turns, so that a busy machine slows all alike."""
    device = steps.accelerator.device
    seconds_of(steps.bare, device, warmup)
    steps.optimizer.zero_grad()
    seconds_of(steps.ours, device, warmup)
    seconds_of(steps.eager, device, 1)
    bare, ours, eager = [], [], []
    for _ in range(rounds):
        bare += seconds_of(steps.bare, device, 1)
        steps.optimizer.zero_grad()
        ours += seconds_of(steps.ours, device, 1)
        eager += seconds_of(steps.eager, device, 1)
    # freed, so that the measured memory does not count it
    steps.eager_model.to("cpu")
    steps.eager_optimizer.state.clear()
    if device.type == "cuda":  # without waiting between steps, as training runs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ours = [seconds_of(lambda: [steps.ours() for _ in range(10)], device, 1)[0] / 10 for _ in range(3)]
    return {"ours": np.median(ours), "bare": np.median(bare), "eager_float32": np.median(eager)}


def profiled(step: Callable[[], None], device: torch.device) -> list[dict[str, Any]]:
    """The operations that take most of a step's time, each with its share of it."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        synchronize(device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [
        {"name": event.key[:100], "share": round(getattr(event, key) / total, 4), "calls": event.count}
        for event in events[:15]
    ]


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = make_parser()
    parser.set_defaults(**{name: values[0 if on_gpu else 1] for name, values in DEFAULTS.items()})
    arguments = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(
        mixed_precision=arguments.precision,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if arguments.compile else None,
    )
    device = accelerator.device
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    steps = Steps(accelerator, arguments)
    seconds = median_seconds(steps, arguments.steps, warmup=3 if arguments.compile else 1)
    memory_gib = peak_memory_gib()
    rates = {name: float(arguments.batch_size / value) for name, value in seconds.items()}
    peak = matrix_peak_flops(device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32)
    side = arguments.image_size
    result = {
        "model": f"{arguments.architecture} {arguments.size}/{steps.config.patch_size}, {side}x{side}",
        "batch_size": arguments.batch_size,
        "precision": arguments.precision,
        "compiled": arguments.compile,
        "images_per_s": rates,
        "ratio_to_bare_forward_backward": float(seconds["bare"] / seconds["ours"]),
        "ratio_to_eager_float32": float(seconds["eager_float32"] / seconds["ours"]),
        "flops_per_image": {
            "forward": steps.forward_flops,
            "forward_and_backward": steps.step_flops,
            "arithmetic": flops_arithmetic(steps.config),
        },
        "matrix_peak": peak,
        "share_of_matrix_peak": float(rates["ours"] * steps.step_flops / peak["flops_per_s"]),
        "peak_memory_gib": memory_gib,
        "profile": profiled(steps.ours, device),
        **machine(device),
    }
    write_json(arguments.output, result)
    print(
        f"{rates['ours']:.1f} images/s, {result['ratio_to_bare_forward_backward']:.3f} of the bare model, "
        f"{result['ratio_to_eager_float32']:.2f}x eager float32, {100 * result['share_of_matrix_peak']:.1f}% of the "
        f"matrix peak: {arguments.output}"
    )


def flops_arithmetic(config) -> dict[str, float | str]:
    """Forward FLOPs per image by hand, to check the counter: 2 per multiply-add, layers of T tokens of width D."""
    patches, pixels = (config.image_size // config.patch_size) ** 2, 3 * config.patch_size**2
    seen = patches if config.degradation == "noise" else int(patches * (1 - config.mask_ratio))

    def layers(number: int, tokens: int, width: int, mlp: int) -> float:
        projections = 4 * width**2 + 2 * width * mlp  # q, k, v, output; two of the MLP: per token
        return number * 2 * (tokens * projections + 2 * tokens**2 * width)  # scores and their use on the values

    encoder = layers(config.num_hidden_layers, seen + 1, config.hidden_size, config.intermediate_size)
    decoded = (patches + 1, config.decoder_hidden_size, config.decoder_intermediate_size)
    decoder = layers(config.decoder_num_hidden_layers, *decoded)
    patch_embedding = 2 * patches * pixels * config.hidden_size
    ends = 2 * config.decoder_hidden_size * ((seen + 1) * config.hidden_size + (patches + 1) * pixels)
    return {
        "formula": "sum over layers of 2(T(4D^2 + 2DM) + 2T^2 D), patch embedding, decoder embedding and prediction",
        "encoder": encoder,
        "decoder": decoder,
        "embeddings": patch_embedding + ends,
        "forward": encoder + decoder + patch_embedding + ends,
    }


if __name__ == "__main__":
    run_main(main)
