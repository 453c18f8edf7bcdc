"""Measure what the defence costs: latency of the purified classifier over the bare one, beside the ratio of their FLOPs.

    python scripts/bench/purify.py [--size base --image_size 224 --batch_size 64] [--output outputs/bench/purify.json]
    python scripts/bench/purify.py --model model_cards/nim-digits --num_votes 8

Without options: ViT-B/16 at 224 in bf16 where there is a GPU, "tiny" at 64 pixels in float32 on a CPU.
"""

import argparse

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
from modeling_nim.runs.files import write_json
from modeling_nim.runs.machine import count_flops, machine, seconds_of


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "(default here: %(default)s)"
    parser.add_argument(
        "--size", choices=MODEL_SIZES, default="base" if on_gpu else "tiny", help=f"of both models {default}"
    )
    parser.add_argument(
        "--image_size", type=int, default=224 if on_gpu else 64, help=f"side of the images in pixels {default}"
    )
    parser.add_argument("--model", help="a purified model to measure, instead of --size and --image_size")
    parser.add_argument("--num_votes", type=int, default=1, help=f"noise draws for one answer {default}")
    parser.add_argument("--batch_size", type=int, default=64 if on_gpu else 8, help=f"images per call {default}")
    parser.add_argument("--rounds", type=int, default=30, help=f"calls of each model {default}")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help=f"with torch.compile {default}"
    )
    parser.add_argument("--output", default="outputs/bench/purify.json", help=f"where the numbers go {default}")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if on_gpu else "cpu")
    if arguments.model:
        purified = NIMPurifiedImageClassification.from_pretrained(arguments.model)
        name = f"{arguments.model}, purifier and classifier"
    else:
        size = MODEL_SIZES[arguments.size] | {"image_size": arguments.image_size}
        purifier = NIMForPreTraining(NIMConfig(**size))
        encoder = {name: value for name, value in size.items() if not name.startswith("decoder_")}
        classifier = NIMForImageClassification(NIMClassifierConfig(**encoder, num_labels=1000))
        purified = NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30)
        name = f"NIM-MAE {arguments.size}/{size['patch_size']} purifier and classifier"
    purified = purified.eval().to(device)
    classifier, image_size = purified.classifier, purified.config.purifier_config.image_size
    pixel_values = torch.randn(arguments.batch_size, 3, image_size, image_size, device=device)
    votes = (arguments.num_votes,) if arguments.num_votes > 1 else ()
    epsilon_shape = (arguments.batch_size, *votes, *pixel_values.shape[1:])
    epsilon = torch.randn(epsilon_shape, device=device)

    with torch.inference_mode():
        flops = {
            "bare": count_flops(lambda: classifier(pixel_values[:1])),
            "purified": count_flops(
                lambda: purified(pixel_values[:1], epsilon=epsilon[:1], num_votes=arguments.num_votes)
            ),
        }
    bare_call, purified_call = classifier, purified
    if arguments.compile:
        bare_call, purified_call = torch.compile(classifier), torch.compile(purified)

    def bare() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            bare_call(pixel_values)

    def defended() -> None:  # the noise is drawn in every call, as it is in use
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            epsilon = torch.randn(epsilon_shape, device=device)
            purified_call(pixel_values, epsilon=epsilon, num_votes=arguments.num_votes)

    seconds: dict[str, list[float]] = {"bare": [], "purified": []}
    seconds_of(bare, device, 3), seconds_of(defended, device, 3)
    for _ in range(arguments.rounds):  # in turns, so that a busy machine slows both alike
        seconds["bare"] += seconds_of(bare, device, 1)
        seconds["purified"] += seconds_of(defended, device, 1)
    latency_ms = {name: 1000 * float(np.median(values)) for name, values in seconds.items()}
    latency_ratio, flops_ratio = latency_ms["purified"] / latency_ms["bare"], flops["purified"] / flops["bare"]
    result = {
        "model": name,
        "image_size": image_size,
        "batch_size": arguments.batch_size,
        "num_votes": arguments.num_votes,
        "precision": "bf16" if on_gpu else "float32",
        "compiled": arguments.compile,
        "latency_ms": latency_ms,
        "ms_per_image": {name: value / arguments.batch_size for name, value in latency_ms.items()},
        "latency_ratio": latency_ratio,
        "flops_per_image": flops,
        "flops_ratio": flops_ratio,
        "latency_ratio_over_flops_ratio": latency_ratio / flops_ratio,
        **machine(device),
    }
    write_json(arguments.output, result)
    print(f"purified costs {latency_ratio:.2f}x the bare latency, {flops_ratio:.2f}x its FLOPs: {arguments.output}")


if __name__ == "__main__":
    run_main(main)
