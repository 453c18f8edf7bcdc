"""Measure what a purifier with tiles costs before a classifier: milliseconds of an image by stride, beside the FLOPs.

    python examples/efficientnet_lite.py outputs/photos/efficientnet_lite0     # the classifier, once
    python scripts/bench/tiles.py [--strides 16 20 24 28 32] [--output outputs/bench/tiles.json]

One image at a time, at the classifier's size and without a gradient. Below the side of a tile the strides overlap.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse

import numpy as np
import torch

from modeling_nim import NIMPurifiedImageClassification
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json
from modeling_nim.runs.machine import count_flops, machine, seconds_of
from modeling_nim.runs.models import CLASSIFIER, load_model, load_purifier


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default: %(default)s)"
    parser.add_argument("--purifier", default="model_cards/nim-photos", help=f"whose images may be larger {default}")
    parser.add_argument("--classifier", default="outputs/photos/efficientnet_lite0", help=f"its directory {default}")
    parser.add_argument("--strides", type=int, nargs="+", default=[16, 20, 24, 28, 32], help=f"in pixels {default}")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, with eager attention")
    parser.add_argument("--rounds", type=int, default=10, help=f"calls of each model {default}")
    parser.add_argument("--output", default="outputs/bench/tiles.json", help=f"where the numbers go {default}")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = load_purifier(arguments.purifier), load_model(arguments.classifier, CLASSIFIER, trust_remote_code=True)
    model = NIMPurifiedImageClassification.from_parts(*parts, sigma=30).eval().to(device)
    if arguments.bf16:
        model.purifier.set_attn_implementation("eager")
    side, tile = model.config.image_size, model.purifier.config
    pixel_values = torch.randn(1, 3, side, side, device=device)

    @torch.inference_mode()
    def purify(stride: int) -> None:
        tile.tile_stride = stride
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            model.purify(pixel_values)

    @torch.inference_mode()
    def classify() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            model.classifier(model.prepare_for_classifier(pixel_values))

    calls = {"classifier": classify} | {stride: lambda stride=stride: purify(stride) for stride in arguments.strides}
    flops = {name: count_flops(call) for name, call in calls.items()}  # these calls warm up, too
    seconds: dict[str | int, list[float]] = {name: [] for name in calls}
    for _ in range(arguments.rounds):  # in turns, so that a busy machine slows all alike
        for name, call in calls.items():
            seconds[name] += seconds_of(call, device, 1)
    milliseconds = {name: 1000 * float(np.median(values)) for name, values in seconds.items()}
    rows = [
        {
            "stride": stride,
            "milliseconds": milliseconds[stride],
            "ratio": milliseconds[stride] / milliseconds["classifier"],
            "gflops": flops[stride] / 1e9,
            "flops_ratio": flops[stride] / flops["classifier"],
        }
        for stride in arguments.strides
    ]
    bare = {"milliseconds": milliseconds["classifier"], "gflops": flops["classifier"] / 1e9}
    result = {"purifier": arguments.purifier, "classifier": arguments.classifier, "image_size": side, "bare": bare}
    result |= {"precision": "bf16" if arguments.bf16 else "float32", "rows": rows, **machine(device)}
    write_json(arguments.output, result)
    print(f"{side}x{side}: the classifier takes {bare['milliseconds']:.0f} ms, {bare['gflops']:.2f} GFLOP")
    for row in rows:
        print(
            f"  stride {row['stride']}: {row['milliseconds']:.0f} ms, {row['ratio']:.1f} times the classifier; "
            f"{row['gflops']:.1f} GFLOP, {row['flops_ratio']:.1f} times"
        )


if __name__ == "__main__":
    run_main(main)
