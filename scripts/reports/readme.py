"""Fill the README's tables from the result files; never by hand.

    python scripts/reports/readme.py            # rewrites what stands between the <!-- results:NAME --> marks
    python scripts/reports/readme.py --check    # writes nothing; exit code 1 if a table differs

`results/digits/summary.json` is `outputs/demo/summary.json` of `make demo`; `attack_paper.json` and `attack_standard.json`
are the summaries of the recipes of those names, on the same images; `certified.json` is what run_certify.py writes.
`results/cifar10/` is what the rules of `python scripts/reports/paper_tables.py --dataset cifar10 --makefile` make.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_text


ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "results" / "digits"
CIFAR10 = ROOT / "results" / "cifar10"
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


CIFAR10_SYSTEMS = [  # name, defence, result, which of its models
    ("MAE", "none", "mae", "undefended"),
    ("MAE", "masks 75%, fills in", "mae", "defended"),
    ("MAE", "a larger MAE does", "mae_larger", "defended"),
    ("MAE", "NIM-MAE, sigma 30, never met in fine-tuning", "unseen", "defended"),
    ("SimMIM", "none", "simmim", "undefended"),
    ("SimMIM", "masks 60%, fills in", "simmim", "defended"),
    ("NIM-SimMIM", "none", "nim_simmim", "undefended"),
    ("NIM-SimMIM", "sigma 30", "nim_simmim", "defended"),
    ("NIM-MAE, patches normalised as in the authors' code", "none", "input_statistics", "undefended"),
    ("NIM-MAE, patches normalised as in the authors' code", "sigma 30", "input_statistics", "defended"),
    ("NIM-MAE, fine-tuned on original images", "none", "nim_mae_original", "undefended"),
    ("NIM-MAE, fine-tuned on original images", "sigma 30", "nim_mae_original", "defended"),
    ("NIM-MAE", "none", "nim_mae", "undefended"),
    ("**NIM-MAE**", "**sigma 30**", "nim_mae", "defended"),
    ("**NIM-MAE**", "**sigma 50**", "nim_mae_sigma_50", "defended"),
]
CIFAR10_BUDGETS = [2, 4, 8]


def _found(summary: dict[str, Any], **wanted: Any) -> dict[str, Any]:
    """The one row of a summary that is as `wanted`."""
    rows = [row for row in summary["rows"] if all(row.get(key) == value for key, value in wanted.items())]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of the summary are {wanted}, 1 is needed")
    return rows[0]


def _pgd(summary: dict[str, Any], model: str, epsilon_255: float, threat_model: str = "white_box") -> dict[str, Any]:
    return _found(summary, model=model, name="pgd-10", threat_model=threat_model, epsilon_255=epsilon_255)


def cifar10_table(read: dict[str, Any]) -> str:
    """Table 1 on CIFAR-10 without the paper's numbers, which `reports/paper_tables.py` prints beside ours."""
    lines = [
        "| Pre-trained as | Defence | Clean | White-box PGD-10, 2 / 4 / 8 of 255 | Gray-box PGD-10 | Square |",
        "|---|---|---|---|---|---|",
    ]
    halves, used = [], []
    for system, defence, result, model in CIFAR10_SYSTEMS:
        summary = read[result]
        rows = {"clean": [_found(summary, model=model, attack="none")]}
        rows["white_box"] = [_pgd(summary, model, epsilon) for epsilon in CIFAR10_BUDGETS]
        if model == "defended":
            rows["gray_box"] = [_pgd(summary, model, epsilon, "gray_box") for epsilon in CIFAR10_BUDGETS]
        rows["square"] = [
            _found(summary, model=model, attack="square", epsilon_255=epsilon) for epsilon in CIFAR10_BUDGETS
        ]
        cells = [
            " / ".join(f"{row['accuracy']:.1f}" for row in rows[name]) if name in rows else "–"
            for name in ("clean", "white_box", "gray_box", "square")
        ]
        lines.append(f"| {system} | {defence} | {' | '.join(cells)} |")
        used += [row for found in rows.values() for row in found]
        halves += [(row["ci95"][1] - row["ci95"][0]) / 2 for row in used if row["attack"] != "square"]
    squares = [row for row in used if row["attack"] == "square"]
    training = read["time_training"]
    widest = max((row["ci95"][1] - row["ci95"][0]) / 2 for row in squares)
    draws = max(row["num_draws"] for row in used)
    lines.append("")
    lines.append(
        f"Accuracy in percent on {used[0]['num_images']} test images, 95% intervals within +-{max(halves):.1f} points; Square "
        f"with {squares[0]['settings']['queries']} queries on {squares[0]['num_images']} images, where they reach "
        f"+-{widest:.0f}. Step epsilon / 4; for defended models the mean over {draws} fresh draws. Training every model of "
        f"these tables and figures, {len(training['seconds'])} runs, took {training['total_core_minutes'] / 60:.1f} core-hours."
    )
    return "\n".join(lines)


def cifar10_findings(read: dict[str, Any]) -> str:
    """What else was asked of the same models, a line for each question."""

    def clean(result: str, model: str) -> float:
        return _found(read[result], model=model, attack="none")["accuracy"]

    def both(result: str, model: str) -> str:
        return f"{clean(result, model):.1f} and {_pgd(read[result], model, 4)['accuracy']:.1f}"

    standard = read["standard"]
    strong = _found(standard, model="defended", name="pgd-100 eot20 r2", threat_model="white_box")
    known = _found(standard, model="defended", threat_model="white_box_known_draw")
    bare = _found(standard, model="undefended", name="pgd-100 eot20 r2", threat_model="white_box")
    large = _found(standard, model="defended", epsilon_255=128)
    [worst] = [entry for entry in standard["worst_case"] if entry["model"] == "defended"]
    eot = _found(read["eot"], model="defended", name="pgd-20 eot20")
    eot_input = _found(read["eot"], model="statistics of the input", name="pgd-20 eot20")
    lines = [
        f"- **Stronger attacks**, 4/255, sigma 30: PGD-20 with EOT-20 leaves {eot['accuracy']:.1f}{_interval(eot, True)} "
        f"where PGD-10 leaves {_pgd(read['eot'], 'defended', 4)['accuracy']:.1f} ({eot['num_images']} images; with statistics "
        f"of the input {eot_input['accuracy']:.1f} and {_pgd(read['eot'], eot_input['model'], 4)['accuracy']:.1f}). The "
        f"standard protocol, {strong['num_images']} images: PGD-100 with EOT-20 and 2 restarts {strong['accuracy']:.1f}"
        f"{_interval(strong, True)} (undefended {bare['accuracy']:.1f}), the best of all attacks for each image "
        f"{worst['accuracy_majority']:.1f}, an attacker who knows the draw {known['accuracy']:.1f}, 128/255 "
        f"{large['accuracy']:.1f}; without an attack {clean('standard', 'defended'):.1f}."
    ]
    certified = {(row["sigma"], row["radius_l2"]): row for row in read["certified"]["rows"]}
    shown = [
        f"sigma {sigma:g}: " + " / ".join(f"{certified[sigma, radius]['certified_accuracy']:.0f}" for radius in radii)
        for sigma, radii in ((30, (0, 0.1, 0.25)), (75, (0, 0.25, 0.5)))
    ]
    lines.append(
        f"- **Certified** (statistics of the noisy image), {read['certified']['rows'][0]['num_images']} images: {shown[0]} at "
        f"L2 radius 0 / 0.1 / 0.25; {shown[1]} at 0 / 0.25 / 0.5."
    )
    lines.append(
        f"- **Patch statistics**, sigma 30, clean and white-box at 4/255: raw pixels {both('nim_mae', 'defended')}; normalised "
        f"patches with statistics of the input (the authors' code) {both('input_statistics', 'defended')}; of the noisy image "
        f"{both('noisy_statistics', 'defended')}."
    )
    lines.append(
        f"- **Votes** 1, 8, 32, attacked through all of them, {_pgd(read['votes'], '1 vote', 4)['num_images']} images, clean "
        f"and white-box at 4/255: {'; '.join(both('votes', name) for name in ('1 vote', '8 votes', '32 votes'))}."
    )
    time = {votes: read[f"time_votes_{votes}"] for votes in (1, 8, 32)}
    bare_ms = time[1]["ms_per_image"]["bare"]
    lines.append(
        f"- **Time per image** against the bare classifier ({bare_ms:.1f} ms on one core): "
        + ", ".join(
            f"{result['latency_ratio']:.1f}x with {votes} vote{'s'[: votes > 1]}" for votes, result in time.items()
        )
        + "."
    )
    return "\n".join(lines)


def _interval(row: dict[str, Any], shown: bool) -> str:
    return f" [{row['ci95'][0]:.1f}, {row['ci95'][1]:.1f}]" if shown else ""


def _budget(row: dict[str, Any]) -> str:
    return "" if row["attack"] == "none" else f", {row['epsilon_255']:g}/255"


def filled(readme: str) -> str:
    """The README with every marked table made anew."""
    read, cifar10 = (
        {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
        for folder in (DIGITS, CIFAR10)
    )
    tables = {
        "cifar10": lambda: cifar10_table(cifar10),
        "cifar10_findings": lambda: cifar10_findings(cifar10),
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
