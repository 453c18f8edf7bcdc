"""Measure the attacks: PGD-10 against torchattacks' PGD, and batched EOT-20 against 20 passes one after the other.

    python scripts/bench/attack.py [--size tiny --image_size 32 --num_images 8] [--output outputs/bench/attack.json]

Without options: ViT-B/16 at 224 where there is a GPU; on a CPU the architecture of the digits' recipe. Both sides
attack the same purified model on the same images with as many steps, and take turns within each round. torchattacks
gets the model as its users wire it (a module from [0, 1] images to logits), and, for the record, also with frozen
weights. The 20 passes go through that module with the noise draws of the batched gradient, and the two gradients are
compared; for the record, also through the target of our attacks, which projects patches by a matrix product.

Drawing 20 noises for each image in one pass helps where the batch alone does not fill the machine. On one CPU core that
ends soon: with 8 images it is about twice as fast, with 64 about 1.2 times. So every number is printed with its
batch.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
from functools import partial
from typing import Any

import numpy as np
import torch
import torchattacks
from torch import nn

from modeling_nim import (
    MODEL_SIZES,
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
    normalize,
)
from modeling_nim.robustness.attacks import pgd
from modeling_nim.robustness.loading import project_patches_by_matrix_product
from modeling_nim.robustness.oracle import Oracle, cross_entropy_loss, target_forward
from modeling_nim.robustness.targets import PurifiedTarget
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json
from modeling_nim.runs.machine import machine, seconds_of


DIGITS = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "patch_size": 8,
}
DIGITS_DECODER = {
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 256,
}
SIZES = ("digits", "tiny", "small", "base", "large", "huge")
DEFAULTS = {"size": ("base", "digits"), "image_size": (224, 32)}  # on a GPU, on a CPU
EPSILON, ALPHA, STEPS, EOT_SAMPLES = 8 / 255, 2 / 255, 10, 20


class ImagesToLogits(nn.Module):
    """The purified model as torchattacks takes it; its noise comes from the global generator."""

    def __init__(self, model: NIMPurifiedImageClassification):
        super().__init__()
        self.model = model

    def forward(self, images_01: torch.Tensor, draw: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        config = self.model.config
        return self.model(normalize(images_01, config.image_mean, config.image_std), **(draw or {})).logits


def build(size: str, image_size: int, device: torch.device) -> NIMPurifiedImageClassification:
    torch.manual_seed(0)
    encoder, decoder = dict(DIGITS), dict(DIGITS_DECODER)
    if size != "digits":
        encoder = {key: value for key, value in MODEL_SIZES[size].items() if not key.startswith("decoder_")}
        decoder = {key: value for key, value in MODEL_SIZES[size].items() if key.startswith("decoder_")}
    purifier = NIMForPreTraining(NIMConfig(**encoder, **decoder, image_size=image_size))
    classifier = NIMForImageClassification(NIMClassifierConfig(**encoder, image_size=image_size, num_labels=10))
    nn.init.normal_(classifier.classifier.weight)  # a fresh head is almost zero, and so would the gradients be
    return NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=75).eval().to(device)


def speedup_over_peer(seconds: dict[str, list[float]], ours: str, peer: str) -> dict[str, Any]:
    ratios = np.array(seconds[peer]) / np.array(seconds[ours])  # round by round: both met the same machine
    low, high = np.percentile(ratios, [25, 75])
    return {"median": float(np.median(ratios)), "quartiles": [float(low), float(high)]}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = {name: f"default: {gpu} on a GPU, {cpu} on a CPU" for name, (gpu, cpu) in DEFAULTS.items()}
    parser.add_argument("--size", choices=SIZES, help=f"of purifier and classifier; {default['size']}")
    parser.add_argument("--image_size", type=int, help=f"pixels; {default['image_size']}")
    parser.add_argument("--num_images", type=int, default=8, help="images in the batch that is attacked; default 8")
    parser.add_argument("--micro_batch", type=int, default=256, help="largest forward pass, rows; default 256")
    parser.add_argument("--rounds", type=int, default=15, help="times that all take their turn; default 15")
    parser.add_argument(
        "--output", default="outputs/bench/attack.json", help="where the numbers go; default %(default)s"
    )
    return parser


def parse_arguments(on_gpu: bool) -> argparse.Namespace:
    parser = make_parser()
    parser.set_defaults(**{name: values[0 if on_gpu else 1] for name, values in DEFAULTS.items()})
    return parser.parse_args()


def main() -> None:
    on_gpu = torch.cuda.is_available()
    arguments = parse_arguments(on_gpu)
    device = torch.device("cuda" if on_gpu else "cpu")
    number, image_size = arguments.num_images, arguments.image_size
    images_01 = torch.rand(number, 3, image_size, image_size, device=device)
    labels = torch.arange(number, device=device) % 10
    ids = [f"image/{index}" for index in range(number)]
    wired, frozen = build(arguments.size, image_size, device), build(arguments.size, image_size, device)
    frozen.requires_grad_(False)
    # as load_targets prepares it
    model = project_patches_by_matrix_product(build(arguments.size, image_size, device))
    target = PurifiedTarget("purified", model, sigma=75)
    forward = target_forward(target)

    def ours() -> None:
        oracle = Oracle(forward, labels, ids, seed=0, micro_batch=arguments.micro_batch)
        pgd(oracle, images_01, EPSILON, ALPHA, STEPS)

    settings = {"eps": EPSILON, "alpha": ALPHA, "steps": STEPS, "random_start": True}
    theirs = torchattacks.PGD(ImagesToLogits(wired), **settings)
    theirs_frozen = torchattacks.PGD(ImagesToLogits(frozen), **settings)

    def batched() -> torch.Tensor:
        oracle = Oracle(forward, labels, ids, seed=0, eot_samples=EOT_SAMPLES, micro_batch=arguments.micro_batch)
        return oracle.gradient(images_01)[1]

    oracle = Oracle(forward, labels, ids, seed=0, eot_samples=EOT_SAMPLES)
    seeds = [oracle.seeds(image, range(EOT_SAMPLES)) for image in range(number)]

    plain = ImagesToLogits(frozen)

    def sequential(one_pass) -> torch.Tensor:
        total = torch.zeros_like(images_01)
        for draw in range(EOT_SAMPLES):
            leaf = images_01.clone().requires_grad_()
            drawn = target.draw([seeds[image][draw] for image in range(number)], images_01.shape[1:])
            total += torch.autograd.grad(cross_entropy_loss(one_pass(leaf, drawn), labels).sum(), leaf)[0]
        return total / EOT_SAMPLES

    contestants = {
        "nim_pgd10": ours,
        "torchattacks_pgd10": lambda: theirs(images_01, labels),
        "torchattacks_pgd10_frozen_weights": lambda: theirs_frozen(images_01, labels),
        "eot20_batched": batched,
        "eot20_sequential": lambda: sequential(plain),
        "eot20_sequential_same_target": lambda: sequential(target.logits),
    }
    for function in contestants.values():  # warm up
        seconds_of(function, device, 2)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, function in contestants.items():
            seconds[name] += seconds_of(function, device, 1)

    speedup = partial(speedup_over_peer, seconds)
    first, second = batched(), sequential(plain)
    result = {
        "model": {key: getattr(arguments, key) for key in ("size", "image_size", "num_images", "micro_batch")},
        "seconds_median": {name: float(np.median(values)) for name, values in seconds.items()},
        "pgd10_speedup_over_torchattacks": speedup("nim_pgd10", "torchattacks_pgd10"),
        "pgd10_speedup_over_torchattacks_frozen_weights": speedup("nim_pgd10", "torchattacks_pgd10_frozen_weights"),
        "eot20_speedup_over_sequential": speedup("eot20_batched", "eot20_sequential"),
        "eot20_speedup_over_sequential_same_target": speedup("eot20_batched", "eot20_sequential_same_target"),
        "eot20_largest_gradient_difference": float((first - second).abs().max() / second.abs().max()),
        "rounds": arguments.rounds,
        "machine": machine(device),
    }
    write_json(arguments.output, result)
    for name, value in result.items():
        if "_speedup_" in name:
            print(f"{name}: {value['median']:.2f}x, batch of {number}")
    print(f"largest relative difference of the two EOT gradients: {result['eot20_largest_gradient_difference']:.1e}")


if __name__ == "__main__":
    run_main(main)
