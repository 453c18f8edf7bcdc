"""Draws every figure that the records in a directory allow; no model and no data set is needed.

    python scripts/reports/figures.py outputs/demo
    python scripts/reports/figures.py outputs/demo outputs/certify --output_dir figures

| file | figure of the paper | from |
|---|---|---|
| panel.png | 4: clean and attacked images through the defense | pictures.json, pictures.safetensors |
| defenses.png | 4: several defenses beside one another | pictures.json, pictures.safetensors |
| degradations.png | 8: noisy and reconstructed images | pictures.json, pictures.safetensors |
| models.png | 5: clean and robust accuracy of several models | summary.json |
| sigma_curve.png | 7: accuracy against the sigma of the defense | records.jsonl |
| reconstruction.png | 6 (3 for up to four purifiers): reconstruction loss against sigma | reconstruction.jsonl |
| reconstruction_fixed.png | 3: of more, those named by one sigma, and the last | reconstruction.jsonl |
| certified.png | certified accuracy against the radius | certificates.jsonl |

Records of several directories are drawn together where they are of one kind.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
from collections.abc import Sequence
from pathlib import Path

from modeling_nim.robustness.figures import figures_of
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import written_whole


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", help="output_dir of run_attack.py or run_certify.py")
    parser.add_argument("--output_dir", help="where the pictures go; default: the first directory")
    parser.add_argument("--sigma", type=float, default=75, help="panel and defenses show the nearest to it; default 75")
    parser.add_argument("--dpi", type=int, default=140, help="dots per inch; default 140")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    output_dir = Path(arguments.output_dir or arguments.directories[0])
    for name, figure in figures_of(arguments.directories, arguments.sigma).items():
        with written_whole(output_dir / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=arguments.dpi, format="png")
        print(output_dir / f"{name}.png")


if __name__ == "__main__":
    run_main(main)
