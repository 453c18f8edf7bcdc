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
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from modeling_nim.robustness import figures
from modeling_nim.robustness.pictures import load_pictures
from modeling_nim.robustness.records import Certificate, read_jsonl, read_records
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import written_whole


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", help="output_dir of run_attack.py or run_certify.py")
    parser.add_argument("--output_dir", help="where the pictures go; default: the first directory")
    parser.add_argument(
        "--sigma",
        type=float,
        default=75,
        help="which sigma of a defense panel and defenses show: the nearest; default 75",
    )
    parser.add_argument("--dpi", type=int, default=140, help="dots per inch; default 140")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    directories = [Path(directory) for directory in arguments.directories]
    output_dir = Path(arguments.output_dir or directories[0])
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(
                f"there is no directory {str(directory)!r}; make records with scripts/run_attack.py"
            )

    drawn: dict[str, Figure] = {}
    rows = []
    for directory in directories:
        if (directory / "summary.json").exists():
            rows += json.loads((directory / "summary.json").read_text())["rows"]
    if any(row["name"] != "none" for row in rows):
        drawn["models"] = figures.accuracy_of_models(rows)
        swept = {(row["model"], row["sigma"]) for row in rows if isinstance(row["sigma"], (int, float))}
        if len(swept) > len({model for model, _ in swept}):
            files = [directory / "records.jsonl" for directory in directories]
            lines = [record for file in files if file.exists() for record in read_records(file)]
            drawn["sigma_curve"] = figures.accuracy_against_sigma(lines)
    for directory in directories:
        if (directory / "pictures.json").exists() and "panel" not in drawn:
            content, pixels = load_pictures(directory)
            shown = (content["entries"], pixels, content["class_names"], arguments.sigma)
            drawn["panel"] = figures.panel(*shown)
            defended = {entry["model"] for entry in content["entries"] if "purified" in entry["stages"]}
            if len(defended) > 1:
                drawn["defenses"] = figures.defenses(*shown)
            if defended:
                drawn["degradations"] = figures.degradations(content["entries"], pixels)
    for name, file, draw in (
        ("reconstruction", "reconstruction.jsonl", figures.reconstruction_loss),
        ("certified", "certificates.jsonl", figures.certified_accuracy),
    ):
        records = [
            line for directory in directories if (directory / file).exists() for line in read_jsonl(directory / file)
        ]
        if name == "certified":
            records = [Certificate.from_json(line) for line in records]
        if records:
            drawn[name] = draw(records)
        models = list(dict.fromkeys(record["model"] for record in records)) if name == "reconstruction" else []
        fixed = [model for model in models if model.isdecimal()]
        if len(models) > 4 and 0 < len(fixed) < 4:
            shown = [*fixed, models[-1]]
            drawn["reconstruction_fixed"] = draw([record for record in records if record["model"] in shown])
    if not drawn:
        raise FileNotFoundError(
            f"{', '.join(arguments.directories)}: no records to draw; run scripts/run_attack.py first"
        )

    for name, figure in drawn.items():
        with written_whole(output_dir / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=arguments.dpi, format="png")
        print(output_dir / f"{name}.png")


if __name__ == "__main__":
    run_main(main)
