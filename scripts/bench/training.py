"""Measure how much of a CPU's matrix peak the three stages of training reach: pre-training, fine-tuning, hardening.

    python scripts/bench/training.py [--threads 1 2] [--compile] [--output outputs/bench/training.json]

The models are those of `scripts/recipes/cifar10/long` (width 128, 4 + 2 layers, patches of 4), 128 images a step:
forward and backward of NIM-MAE, of its classifier, and of one FGSM step through noise, purifier and classifier
followed by the training step of both. Each in float32 and bf16 with eager attention and SDPA; the peak is measured in
the same precision and number of threads. `--compile` adds eager attention under torch.compile, whose compilation takes
minutes.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
from collections.abc import Callable
from itertools import product

import torch
from torch import nn

from modeling_nim import NIMConfig, NIMForImageClassification, NIMForPreTraining, NIMPurifiedImageClassification
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json
from modeling_nim.runs.machine import count_flops, machine, matrix_peak_flops, seconds_of
from modeling_nim.training.settings import keep_freed_memory


BATCH_SIZE = 128
WIDTHS = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "patch_embedding": "convolutional"}
SIZES = {"image_size": 32, "patch_size": 4, "num_hidden_layers": 4, **WIDTHS}
DECODER = {f"decoder_{key}": value for key, value in WIDTHS.items() if key != "patch_embedding"}


def stages(attention: str) -> dict[str, tuple[nn.Module, Callable[[nn.Module, torch.Tensor, torch.Tensor], None]]]:
    """The model of each stage, and what a step does with a model, pixel values `(B, 3, 32, 32)` and labels `(B,)`."""
    config = NIMConfig(
        **SIZES, **DECODER, decoder_num_hidden_layers=2, norm_pix_loss=False, attn_implementation=attention
    )
    denoiser = NIMForPreTraining(config)
    classifier = NIMForImageClassification(NIMForImageClassification.config_class(**SIZES, num_labels=10))
    purified = NIMPurifiedImageClassification.from_parts(denoiser, classifier, sigma=30)
    purified.set_attn_implementation(attention)  # composing sets the attention of its parts

    def harden(model: nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
        # FlopCounterMode fails on an input that itself requires a gradient, so the input is a sum that does
        attacked = pixel_values + torch.zeros_like(pixel_values, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(attacked, labels=labels).loss, attacked)
        model((attacked + gradient.sign() * 8 / 255).detach(), labels=labels).loss.backward()

    return {
        "pre-training": (denoiser, lambda model, pixel_values, labels: model(pixel_values).loss.backward()),
        "fine-tuning": (
            classifier,
            lambda model, pixel_values, labels: model(pixel_values, labels=labels).loss.backward(),
        ),
        "hardening": (purified, harden),
    }


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1, 2],
        help="numbers of CPU threads to measure with (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of each kind, whose median counts (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="measure torch.compile as well")
    parser.add_argument(
        "--output", default="outputs/bench/training.json", help="where the numbers go (default: %(default)s)"
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    device = torch.device("cpu")
    keep_freed_memory()  # as in a run
    torch.manual_seed(0)
    pixel_values, labels = torch.randn(BATCH_SIZE, 3, 32, 32), torch.randint(0, 10, (BATCH_SIZE,))
    flops = {
        name: count_flops(lambda model=model, step=step: step(model, pixel_values[:2], labels[:2])) / 2
        for name, (model, step) in stages("eager").items()
    }
    kinds = [("eager", False), ("sdpa", False)] + [("eager", True)] * arguments.compile
    rows = []
    for threads, dtype in product(arguments.threads, (torch.float32, torch.bfloat16)):
        torch.set_num_threads(threads)
        peak = matrix_peak_flops(device, dtype)
        for attention, compiled in kinds:
            torch.compiler.reset()  # else the code, compiled for a few models, runs uncompiled for those after them
            for name, (model, step) in stages(attention).items():
                used = torch.compile(model) if compiled else model

                def run(used: nn.Module = used, step: Callable = step, dtype: torch.dtype = dtype) -> None:
                    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                        step(used, pixel_values, labels)

                seconds_of(run, device, 1)
                images_per_s = BATCH_SIZE / sorted(seconds_of(run, device, arguments.steps))[arguments.steps // 2]
                rows.append(
                    {
                        "stage": name,
                        "threads": threads,
                        "precision": peak["dtype"],
                        "attention": attention,
                        "compiled": compiled,
                        "images_per_s": images_per_s,
                        "gflop_per_image": flops[name] / 1e9,
                        "matrix_peak_gflops": peak["flops_per_s"] / 1e9,
                        "share_of_matrix_peak": images_per_s * flops[name] / peak["flops_per_s"],
                    }
                )
                row = rows[-1]
                print(
                    f"{name}, {threads} thread(s), {row['precision']}, {attention}{', compiled' if compiled else ''}: "
                    f"{images_per_s:.0f} images/s, {100 * row['share_of_matrix_peak']:.0f}% of the matrix peak",
                    flush=True,
                )
    write_json(arguments.output, {"batch_size": BATCH_SIZE, "rows": rows, **machine(device)})


if __name__ == "__main__":
    run_main(main)
