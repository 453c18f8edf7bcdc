"""Measure NIM-MAE pre-training: speed, FLOPs, share of the matrix peak, memory, and against an eager float32 loop.

    python scripts/bench/pretrain.py [--size base --image_size 224 --batch_size 256] [--output bench/pretrain.json]

Without options: ViT-B/16 at 224 in bf16, compiled, where there is a GPU; "tiny" at 64 pixels in float32 on a CPU.
`ours` is a full step as run_pretrain.py takes it: uint8 batch, draws, normalization, forward, backward, fused AdamW,
under Accelerate. `bare` is the model's forward and backward alone, in the same precision; `eager_float32` a plain loop
in float32 without compilation, with an unfused optimizer.
"""

import argparse
import copy

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, set_seed
from torch.profiler import ProfilerActivity, profile

from modeling_nim import MODEL_SIZES, normalize
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


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default here: %(default)s)"
    parser.add_argument(
        "--size", choices=MODEL_SIZES, default="base" if on_gpu else "tiny", help=f"of the model {default}"
    )
    parser.add_argument(
        "--image_size", type=int, default=224 if on_gpu else 64, help=f"side of the images in pixels {default}"
    )
    parser.add_argument("--batch_size", type=int, default=256 if on_gpu else 16, help=f"images per step {default}")
    parser.add_argument("--steps", type=int, default=30 if on_gpu else 8, help=f"steps to take of each kind {default}")
    parser.add_argument(
        "--precision", choices=["no", "bf16"], default="bf16" if on_gpu else "no", help=f"mixed precision {default}"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help=f"with torch.compile {default}"
    )
    parser.add_argument("--output", default="outputs/bench/pretrain.json", help=f"where the numbers go {default}")
    arguments = parser.parse_args()
    batch_size, image_size = arguments.batch_size, arguments.image_size

    set_seed(0)
    accelerator = Accelerator(
        mixed_precision=arguments.precision,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if arguments.compile else None,
    )
    device = accelerator.device
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")
    model_recipe = ModelRecipe(size=arguments.size, config={"image_size": image_size})
    recipe = OptimizationRecipe(batch_size=batch_size, base_learning_rate=1.5e-4, steps=1)
    plain = make_pretraining_model(model_recipe).to(device)
    config = plain.config
    pixels = torch.randint(0, 256, (batch_size, image_size, image_size, 3), dtype=torch.uint8).to(device)
    pixel_values = normalize(to_images_01(pixels), config.image_mean, config.image_std)
    sigma = torch.full((batch_size,), 75.0, device=device)
    epsilon = torch.randn_like(pixel_values)

    forward_flops = count_flops(lambda: plain(pixel_values[:2], sigma=sigma[:2], epsilon=epsilon[:2])) / 2
    step_flops = count_flops(lambda: plain(pixel_values[:2], sigma=sigma[:2], epsilon=epsilon[:2]).loss.backward()) / 2
    plain.zero_grad(set_to_none=True)

    eager_model = copy.deepcopy(plain)
    eager_optimizer = torch.optim.AdamW(
        [p for p in eager_model.parameters() if p.requires_grad], lr=1e-6, foreach=False
    )
    model, optimizer = accelerator.prepare(plain, make_optimizer(plain, recipe))
    model.train()
    counter = iter(range(10**9))

    def bare_step() -> None:
        with accelerator.autocast():
            loss = model(pixel_values, sigma=sigma, epsilon=epsilon).loss
        accelerator.backward(loss)

    def eager_step() -> None:
        torch.set_float32_matmul_precision("highest")
        eager_model(normalize(to_images_01(pixels), config.image_mean, config.image_std)).loss.backward()
        eager_optimizer.step()
        eager_optimizer.zero_grad()
        torch.set_float32_matmul_precision("high" if on_gpu else "highest")

    def our_step() -> None:
        step = next(counter)
        images = normalize(to_images_01(pixels), config.image_mean, config.image_std)
        seeds = image_seeds(0, 0, np.arange(step * batch_size, (step + 1) * batch_size), "degradation")
        draws = plain.draw(batch_size, generators(seeds, device))
        set_learning_rate(optimizer, 1e-6)
        with accelerator.accumulate(model):
            accelerator.backward(model(images, **draws).loss)
            optimizer.step()
            optimizer.zero_grad()

    warmup = 3 if arguments.compile else 1
    seconds_of(bare_step, device, warmup)
    optimizer.zero_grad()
    seconds_of(our_step, device, warmup)
    seconds_of(eager_step, device, 1)
    bare, ours, eager = [], [], []
    for _ in range(arguments.steps):  # in turns, so that a busy machine slows all alike
        bare += seconds_of(bare_step, device, 1)
        optimizer.zero_grad()
        ours += seconds_of(our_step, device, 1)
        eager += seconds_of(eager_step, device, 1)
    eager_model.to("cpu"), eager_optimizer.state.clear()  # out of the way of the memory that is measured
    if on_gpu:  # without waiting between steps, as training runs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ours = [seconds_of(lambda: [our_step() for _ in range(10)], device, 1)[0] / 10 for _ in range(3)]
    memory_gib = peak_memory_gib()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        our_step()
        synchronize(device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    peak = matrix_peak_flops(device, dtype)

    seconds = {"ours": np.median(ours), "bare": np.median(bare), "eager_float32": np.median(eager)}
    rates = {name: float(batch_size / value) for name, value in seconds.items()}
    result = {
        "model": f"NIM-MAE {arguments.size}/{config.patch_size}, {image_size}x{image_size}",
        "batch_size": batch_size,
        "precision": arguments.precision,
        "compiled": arguments.compile,
        "images_per_s": rates,
        "ratio_to_bare_forward_backward": float(seconds["bare"] / seconds["ours"]),
        "ratio_to_eager_float32": float(seconds["eager_float32"] / seconds["ours"]),
        "flops_per_image": {
            "forward": forward_flops,
            "forward_and_backward": step_flops,
            "arithmetic": flops_arithmetic(config),
        },
        "matrix_peak": peak,
        "share_of_matrix_peak": float(rates["ours"] * step_flops / peak["flops_per_s"]),
        "peak_memory_gib": memory_gib,
        "profile": [
            {"name": event.key[:100], "share": round(getattr(event, key) / total, 4), "calls": event.count}
            for event in events[:15]
        ],
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
    patches = (config.image_size // config.patch_size) ** 2
    tokens, pixels = patches + 1, 3 * config.patch_size**2

    def layers(number: int, width: int, mlp: int) -> float:
        projections = 4 * width**2 + 2 * width * mlp  # q, k, v, output; two of the MLP: per token
        return number * 2 * (tokens * projections + 2 * tokens**2 * width)  # scores and their use on the values

    encoder = layers(config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    decoder = layers(config.decoder_num_hidden_layers, config.decoder_hidden_size, config.decoder_intermediate_size)
    patch_embedding = 2 * patches * pixels * config.hidden_size
    ends = 2 * tokens * config.decoder_hidden_size * (config.hidden_size + pixels)
    return {
        "formula": "sum over layers of 2(T(4D^2 + 2DM) + 2T^2 D), patch embedding, decoder embedding and prediction",
        "encoder": encoder,
        "decoder": decoder,
        "embeddings": patch_embedding + ends,
        "forward": encoder + decoder + patch_embedding + ends,
    }


if __name__ == "__main__":
    run_main(main)
