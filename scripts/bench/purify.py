"""Measure what the defense costs: latency of the purified classifier over the bare one, and the ratio of FLOPs.

    python scripts/bench/purify.py [--size base --image_size 224 --batch_size 64] [--output outputs/bench/purify.json]
    python scripts/bench/purify.py --model model_cards/nim-digits --num_votes 8 --runtimes eager

Without options: ViT-B/16 at 224 in bf16, compiled, where there is a GPU; on a CPU "tiny" at 64 pixels in float32, in
PyTorch as it is (eager), with torch.compile (compiled), and exported with the noise inside, in onnxruntime (onnx). The
ratios are those of the first runtime.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from modeling_nim import (
    MODEL_SIZES,
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
)
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.export import DefendedLogits, export_defended, load_exported
from modeling_nim.runs.files import write_json
from modeling_nim.runs.machine import count_flops, machine, seconds_of
from modeling_nim.runs.models import DEFENDED, load_model


ON_GPU = torch.cuda.is_available()
SIZES = ("tiny", "small", "base", "large", "huge")
DEFAULTS = {  # on a GPU, on a CPU
    "size": ("base", "tiny"),
    "image_size": (224, 64),
    "batch_size": (64, 8),
    "runtimes": (["compiled"], ["eager", "compiled", "onnx"]),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    both = {name: f"(default: {gpu} on a GPU, {cpu} on a CPU)" for name, (gpu, cpu) in DEFAULTS.items()}
    default = "(default: %(default)s)"
    parser.add_argument("--size", choices=SIZES, help=f"of both models {both['size']}")
    parser.add_argument("--image_size", type=int, help=f"side of the images in pixels {both['image_size']}")
    parser.add_argument("--model", help="a purified model to measure, instead of --size and --image_size")
    parser.add_argument("--num_votes", type=int, default=1, help=f"noise draws for one answer {default}")
    parser.add_argument("--batch_size", type=int, help=f"images per call {both['batch_size']}")
    parser.add_argument("--rounds", type=int, default=30, help=f"calls of each model {default}")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=("eager", "compiled", "onnx"),
        help=f"what runs the models; onnx on CPUs only {both['runtimes']}",
    )
    parser.add_argument("--output", default="outputs/bench/purify.json", help=f"where the numbers go {default}")
    return parser


def make_model(arguments: argparse.Namespace) -> tuple[str, NIMPurifiedImageClassification]:
    """The model to measure, and what it is called: a directory's, or one of a size with random weights."""
    if arguments.model:
        model = load_model(arguments.model, DEFENDED)
        return f"{arguments.model}, purifier and classifier", model
    size = MODEL_SIZES[arguments.size] | {"image_size": arguments.image_size}
    purifier = NIMForPreTraining(NIMConfig(**size))
    encoder = {name: value for name, value in size.items() if not name.startswith("decoder_")}
    classifier = NIMForImageClassification(NIMClassifierConfig(**encoder, num_labels=1000))
    model = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)
    return f"NIM-MAE {arguments.size}/{size['patch_size']} purifier and classifier", model


def make_calls(
    runtime: str, model: NIMPurifiedImageClassification, pixel_values: torch.Tensor, num_votes: int
) -> dict[str, Callable[[], None]]:
    """The calls that are timed in one runtime: the bare classifier, and the defended one, which draws in every call."""
    device = pixel_values.device
    if runtime == "onnx":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_defended(DefendedLogits(model, num_votes=num_votes), path)
            exported = load_exported(path, torch.get_num_threads())
        return {"purified": lambda: exported(pixel_values)}
    bare, purified = model.classifier, model
    if runtime == "compiled":
        bare, purified = torch.compile(bare), torch.compile(purified)
    prepared = model.prepare_for_classifier(pixel_values)
    votes = (num_votes,) if num_votes > 1 else ()

    def call_bare() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=ON_GPU):
            bare(prepared)

    def call_purified() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=ON_GPU):
            epsilon = torch.randn((pixel_values.shape[0], *votes, *pixel_values.shape[1:]), device=device)
            purified(pixel_values, epsilon=epsilon, num_votes=num_votes)

    return {"bare": call_bare, "purified": call_purified}


def main() -> None:
    parser = make_parser()
    parser.set_defaults(**{name: values[0 if ON_GPU else 1] for name, values in DEFAULTS.items()})
    arguments = parser.parse_args()
    if ON_GPU and "onnx" in arguments.runtimes:
        parser.error("--runtimes onnx is measured on CPUs only: leave it out here")
    torch.manual_seed(0)
    device = torch.device("cuda" if ON_GPU else "cpu")
    name, model = make_model(arguments)
    model = model.eval().to(device)
    image_size = model.config.image_size
    pixel_values = torch.randn(arguments.batch_size, 3, image_size, image_size, device=device)

    with torch.inference_mode():
        one = pixel_values[:1]
        flops = {
            "bare": count_flops(lambda: model.classifier(model.prepare_for_classifier(one))),
            "purified": count_flops(lambda: model(one, num_votes=arguments.num_votes)),
        }
    calls = {
        (runtime, what): call
        for runtime in arguments.runtimes
        for what, call in make_calls(runtime, model, pixel_values, arguments.num_votes).items()
    }
    seconds = {key: seconds_of(call, device, 3)[:0] for key, call in calls.items()}  # warms up, and counts nothing
    for _ in range(arguments.rounds):  # in turns, so that a busy machine slows all alike
        for key, call in calls.items():
            seconds[key] += seconds_of(call, device, 1)
    by_runtime: dict[str, dict[str, float]] = {runtime: {} for runtime in arguments.runtimes}
    for (runtime, what), values in seconds.items():
        by_runtime[runtime][what] = 1000 * float(np.median(values))

    latency_ms = next((found for found in by_runtime.values() if "bare" in found), None)
    if latency_ms is None:
        raise ValueError("the bare classifier is not exported: measure onnx beside eager or compiled")
    latency_ratio, flops_ratio = latency_ms["purified"] / latency_ms["bare"], flops["purified"] / flops["bare"]
    result = {
        "model": name,
        "image_size": image_size,
        "batch_size": arguments.batch_size,
        "num_votes": arguments.num_votes,
        "precision": "bf16" if ON_GPU else "float32",
        "compiled": arguments.runtimes[0] == "compiled",
        "latency_ms": latency_ms,
        "ms_per_image": {name: value / arguments.batch_size for name, value in latency_ms.items()},
        "latency_ms_by_runtime": by_runtime,
        "latency_ratio": latency_ratio,
        "flops_per_image": flops,
        "flops_ratio": flops_ratio,
        "latency_ratio_over_flops_ratio": latency_ratio / flops_ratio,
        **machine(device),
    }
    write_json(arguments.output, result)
    print(f"purified costs {latency_ratio:.2f}x the bare latency, {flops_ratio:.2f}x its FLOPs: {arguments.output}")
    for runtime, found in by_runtime.items():
        print(f"  {runtime}: {', '.join(f'{what} {value:.1f} ms' for what, value in found.items())}")


if __name__ == "__main__":
    run_main(main)
