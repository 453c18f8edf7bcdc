"""Fill the README's tables from the result files; never by hand.

    python scripts/make_readme.py            # rewrites what stands between the <!-- results:NAME --> marks
    python scripts/make_readme.py --check    # writes nothing; exit code 1 if a table differs

`results/digits/summary.json` is `outputs/demo/summary.json` of `make demo`; `attack_paper.json` and `attack_standard.json`
are the summaries of the recipes of those names, on the same images; `certified.json` is what run_certify.py writes.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_nim.cli import run_main
from modeling_nim.files import write_text


ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "results" / "digits"
MARKED = re.compile(r"(<!-- results:(?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def demo_table(summary: dict[str, Any]) -> str:
    """Accuracy of the demo's models, clean and attacked; intervals in brackets where they matter most, at 8/255."""
    sigma = next(row["sigma"] for row in summary["rows"] if row["attack"] == "square" and row["sigma"] is not None)
    rows = [row for row in summary["rows"] if row["sigma"] in (None, sigma)]
    budgets = [4, 8, 16]

    def cells(model: str, attack: str, threat_model: str, epsilons: Sequence[float]) -> str:
        found = {
            row["epsilon_255"]: row
            for row in rows
            if (row["model"], row["attack"], row["threat_model"]) == (model, attack, threat_model)
        }
        shown = [
            f"{found[epsilon]['accuracy']:.1f}" + _interval(found[epsilon], epsilon == 8)
            for epsilon in epsilons
            if epsilon in found
        ]
        return " / ".join(shown) or "–"

    lines = [
        "| Model | Clean | White-box PGD-10, 4 / 8 / 16 of 255 | Gray-box PGD-10, 4 / 8 / 16 | Square, 1,000 queries, 8/255 |",
        "|---|---|---|---|---|",
    ]
    names = {
        "original": "fine-tuned on original images, undefended",
        "purified": f"**purified, sigma {sigma:g}**",
        "purified, without purifier": "the purified model's classifier without its purifier",
    }
    for model, text in names.items():
        columns = [
            cells(model, "none", "clean", [0]),
            cells(model, "pgd", "white_box", budgets),
            cells(model, "pgd", "gray_box", budgets),
            cells(model, "square", "black_box", [8]),
        ]
        lines.append(f"| {text} | {' | '.join(columns)} |")
    square = next(row for row in rows if row["attack"] == "square")
    num_images = next(row["num_images"] for row in rows if row["attack"] == "pgd")
    num_draws = max(row["num_draws"] for row in rows)
    lines.append("")
    provenance = summary["provenance"]
    lines.append(
        f"Accuracy in percent, 95% intervals in brackets; {num_images} test images ({square['num_images']} for Square), for "
        f"purified models the mean over {num_draws} fresh noise draws. The step is epsilon / 4. Made by `make demo` on "
        f"{provenance['device']}, torch {provenance['versions']['torch']}; another number of threads moves the purified "
        "figures by a point or two. The learning rates of these recipes were chosen with the test digits in view."
    )
    return "\n".join(lines)


def standard_table(paper: dict[str, Any], standard: dict[str, Any]) -> str:
    """The purified model under the paper's protocol and under today's, on the same images."""
    lines = [
        "| Protocol | Attack | Threat model | Mean over draws | Majority vote | Worst draw |",
        "|---|---|---|---|---|---|",
    ]
    for name, summary in (("paper", paper), ("standard", standard)):
        num_images = max(row["num_images"] for row in summary["rows"])
        for row in summary["rows"]:
            if row["model"] != "purified" or row["num_images"] < num_images:
                continue  # sweeps run on a part of the images
            accuracy = f"{row['accuracy']:.1f}{_interval(row, True)}"
            lines.append(
                f"| {name} | {row['name']}{_budget(row)} | {row['threat_model'].replace('_', ' ')} | {accuracy} "
                f"| {row['accuracy_majority']:.1f} | {row['accuracy_worst_draw']:.1f} |"
            )

    def accuracy(summary: dict[str, Any], attack: str, threat_model: str) -> dict[str, Any]:
        rows = [row for row in summary["rows"] if row["model"] == "purified" and row["threat_model"] == threat_model]
        return next(row for row in rows if row["name"] == attack)

    before = accuracy(paper, "pgd-10", "white_box")
    after = accuracy(standard, "pgd-100 eot20 r2", "white_box")
    known = accuracy(standard, "pgd-100", "white_box_known_draw")
    [worst] = [entry for entry in standard["worst_case"] if entry["model"] == "purified"]
    large = next(row for row in standard["rows"] if row["model"] == "purified" and row["epsilon_255"] == 128)
    undefended = next(
        row for row in standard["rows"] if row["model"] == "original" and row["name"] == "pgd-100 eot20 r2"
    )
    sweep = [
        row
        for row in standard["rows"]
        if row["model"] == "purified" and row["epsilon_255"] == 8 and row["num_images"] < after["num_images"]
    ]
    swept = [row["accuracy"] for row in sweep]
    lines.append("")
    lines.append(
        f"On the same {after['num_images']} images, white-box accuracy falls from {before['accuracy']:.1f} under the paper's "
        f"PGD-10 to {after['accuracy']:.1f} under PGD-100 with 20 draws a step and 2 restarts, to "
        f"{worst['accuracy_majority']:.1f} (majority vote) when each image meets the best of the attacks that do not know the "
        f"draw, to {known['accuracy']:.1f} when the attacker knows the draw, and to {after['accuracy_worst_draw']:.1f} when "
        "every one of the scoring draws must be right. In the sweep over steps and draws "
        f"({sweep[0]['num_images']} images) the figures stay between {min(swept):.1f} and {max(swept):.1f}: a stronger setting "
        f"gains little; at {large['epsilon_255']:g}/255 accuracy is {large['accuracy']:.1f}, as it must be where nothing hides "
        f"the gradients. Undefended, {undefended['accuracy']:.1f} is left."
    )
    return "\n".join(lines)


def certified_table(certified: dict[str, Any], attacked: dict[str, Any], demo: dict[str, Any]) -> str:
    """Certified accuracy against the L2 radius, a row for each sigma; the same model under attack, beside the demo's."""
    rows = certified["rows"]
    radii = sorted({row["radius_l2"] for row in rows})
    lines = [f"| sigma | {' | '.join(f'{radius:g}' for radius in radii)} |", "|---" * (len(radii) + 1) + "|"]
    for sigma in sorted({row["sigma"] for row in rows}):
        found = {row["radius_l2"]: row for row in rows if row["sigma"] == sigma}
        accuracies = [f"{found[radius]['certified_accuracy']:.0f}" for radius in radii]
        lines.append(f"| {sigma:g} | {' | '.join(accuracies)} |")
    lines.append("")
    lines.append(
        f"Certified accuracy in percent at an L2 radius ([0, 1] pixels) on {rows[0]['num_images']} test digits. A radius that "
        "1,000 draws cannot reach counts as zero."
    )

    def white_box(summary: dict[str, Any], model: str) -> str:
        rows = [row for row in summary["rows"] if (row["model"], row["sigma"], row["name"]) == (model, 75, "pgd-10")]
        row = next(row for row in rows if row["threat_model"] == "white_box" and row["epsilon_255"] == 8)
        return f"{row['accuracy']:.1f}{_interval(row, True)}"

    lines.append("")
    lines.append(
        "Under white-box PGD-10 at 8/255, sigma 75, all test digits, this purifier leaves "
        f"{white_box(attacked, 'noisy patch statistics')}, the paper's with statistics of the input "
        f"{white_box(demo, 'purified')}."
    )
    return "\n".join(lines)


def _interval(row: dict[str, Any], shown: bool) -> str:
    return f" [{row['ci95'][0]:.1f}, {row['ci95'][1]:.1f}]" if shown else ""


def _budget(row: dict[str, Any]) -> str:
    return "" if row["attack"] == "none" else f", {row['epsilon_255']:g}/255"


def filled(readme: str) -> str:
    """The README with every marked table made anew."""
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in DIGITS.glob("*.json")}
    tables = {
        "demo": lambda: demo_table(read["summary"]),
        "certified": lambda: certified_table(read["certified"], read["attack_noisy_statistics"], read["summary"]),
        "standard": lambda: standard_table(read["attack_paper"], read["attack_standard"]),
    }
    return MARKED.sub(lambda match: f"{match[1]}{tables[match['name']]()}\n{match[3]}", readme)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only; exit code 1 if the README differs")
    arguments = parser.parse_args(argv)
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if arguments.check:
        return int(new != old)
    write_text(path, new)
    return 0


if __name__ == "__main__":
    run_main(main)
