"""Export a defended classifier as one file that runs without this package, and compare it with the model.

    python scripts/export.py model_cards/nim-cifar10 outputs/export/nim-cifar10.onnx
    python scripts/export.py model_cards/nim-cifar10 outputs/export/nim-cifar10.pt2 --format torch_export --noise input

`--noise inside` draws the noise inside the graph, anew in each call: what is served. `--noise input` makes epsilon the
second input, (batch, 3, H, W), or (batch, votes, 3, H, W) with several votes: what is attacked and tested. The batch
size is free in both. How to serve the file: docs/serving.md.
"""

if __name__ == "__main__":
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
from pathlib import Path

from modeling_nim.runs.errors import run_main
from modeling_nim.runs.export import FORMATS, DefendedLogits, export_defended, verify_export
from modeling_nim.runs.models import DEFENDED, load_model


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a directory of a NIMPurifiedImageClassification")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument(
        "--format", choices=("onnx", "torch_export"), default="onnx", help="of the file, .onnx or .pt2 (%(default)s)"
    )
    parser.add_argument(
        "--noise", choices=("inside", "input"), default="inside", help="who draws the noise (%(default)s)"
    )
    parser.add_argument("--sigma", help="scale of the noise on 0..255 (the model's)")
    parser.add_argument("--num_votes", type=int, help="noise draws per answer (the model's)")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    if arguments.output.suffix != FORMATS[arguments.format]:
        raise ValueError(f"{arguments.output} is to be {arguments.format}: name it {FORMATS[arguments.format]!r}")
    if not (arguments.directory / "config.json").is_file():
        raise FileNotFoundError(f"{arguments.directory} holds no config.json: pass a directory of a purified model")
    model = load_model(arguments.directory, DEFENDED)
    defended = DefendedLogits(model, arguments.sigma, arguments.num_votes)
    export_defended(defended, arguments.output, arguments.format, arguments.noise)
    try:
        difference = verify_export(defended, arguments.output, arguments.noise)
    except ValueError:
        arguments.output.unlink()  # a file that differs must not be served
        raise
    found = {"input": "largest difference from the model", "inside": "two calls on the same images differ by"}
    noise = [] if defended.sigma_255 is None else [f"sigma {defended.sigma_255:g}"]
    masks = ["masks"] if model.config.purifier_config.hides_patches else []
    defense = " and ".join(noise + masks)
    print(
        f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB, {defense}, "
        f"{defended.num_votes} vote(s); {found[arguments.noise]} {difference:.1e}"
    )


if __name__ == "__main__":
    run_main(main)
