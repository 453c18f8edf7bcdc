"""Compare our attacks and certificates with those of other libraries, on the released digits.

    pip install secml-torch==1.5 foolbox==3.3.4 adversarial-robustness-toolbox==1.20.1 six

    python scripts/bench/peers.py eot          # equal budgets on the defense, scored on the same fresh draws
    python scripts/bench/peers.py optimality   # how near each comes to the best of all, on the undefended classifier
    python scripts/bench/peers.py radii [--smoothing DIR]   # locuslab/smoothing: their procedure on our votes

The first two take three minutes of one core each and write `results/digits/peers_*.json` with their records; a run
that was stopped continues in `outputs/peers_*`. Without DIR, a checkout of https://github.com/locuslab/smoothing, the
radii are compared with scipy's interval alone.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import scipy.stats

from modeling_nim import NIMPurifiedImageClassification
from modeling_nim.data import DataRecipe, load_source
from modeling_nim.image_processing import image_processor_for
from modeling_nim.robustness import as_target, evaluate
from modeling_nim.robustness.records import Certificate, Record, read_jsonl, read_records
from modeling_nim.robustness.statistics import certified_radius
from modeling_nim.robustness.targets import PurifiedTarget
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json


ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "model_cards" / "nim-digits"
RESULTS = ROOT / "results" / "digits"
EPSILONS_255 = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0]  # at 16 the undefended classifier is wrong everywhere


def eot(num_images: int, output_dir: Path) -> None:
    """What each library's attack leaves of the defense: equal steps, draws, step sizes and random starts."""
    settings = {"steps": 20, "eot_samples": 10, "epsilon_255": [8.0], "skip_misclassified": False}
    paced = settings | {"alpha_255": 2.0}
    attacks = [
        {"attack": "pgd", "name": "PGD, ours"} | paced,
        {"attack": "apgd_ce", "name": "APGD, ours"} | settings,
        {"attack": "torchattacks", "torchattacks_class": "EOTPGD", "name": "EOTPGD, torchattacks"} | paced,
        {"attack": "peer_attacks:foolbox_pgd", "name": "LinfPGD, foolbox"} | paced,
        {"attack": "peer_attacks:secml_pgd", "name": "PGD, secml-torch"} | paced,
        {"attack": "peer_attacks:secml_eot", "name": "PGD with its own EoT, secml-torch"} | paced,
        {"attack": "peer_attacks:art_apgd", "name": "AutoPGD, ART"} | settings,
    ]
    model = NIMPurifiedImageClassification.from_pretrained(MODEL)
    _evaluated(as_target(model, name="nim-digits", sigma=75), model, attacks, num_images, output_dir)


def optimality(num_images: int, output_dir: Path) -> None:
    """How near each attack comes to the best of all attacks together (`optimalities`), kept beside the rows."""
    settings = {"steps": 20, "epsilon_255": EPSILONS_255, "skip_misclassified": False}
    attacks = [
        {"attack": "pgd", "name": "PGD, ours"} | settings,
        {"attack": "apgd_ce", "name": "APGD, ours"} | settings,
        {"attack": "apgd_dlr", "name": "APGD on DLR, ours"} | settings,
        {"attack": "fgsm", "name": "FGSM, ours", "epsilon_255": EPSILONS_255},
        {"attack": "torchattacks", "torchattacks_class": "PGD", "name": "PGD, torchattacks"} | settings,
        {"attack": "torchattacks", "torchattacks_class": "APGD", "name": "APGD, torchattacks"} | settings,
        {"attack": "peer_attacks:foolbox_fmn", "name": "FMN, foolbox"} | settings,
        {"attack": "peer_attacks:secml_pgd", "name": "PGD, secml-torch"} | settings,
        {"attack": "peer_attacks:art_apgd", "name": "AutoPGD, ART"} | settings,
    ]
    model = NIMPurifiedImageClassification.from_pretrained(MODEL)
    undefended = PurifiedTarget("nim-digits, without purifier", model, without_purifier=True)
    _evaluated(undefended, model, attacks, num_images, output_dir)
    result = RESULTS / f"{output_dir.name}.json"
    found = optimalities(read_records(output_dir / "records.jsonl"))
    write_json(result, json.loads(result.read_text()) | {"optimality": found})
    for name, value in found.items():
        print(f"{value:.4f}  {name}")


def _evaluated(target, model: NIMPurifiedImageClassification, attacks, num_images: int, output_dir: Path) -> None:
    from reports.collect import main as collect

    source = load_source(DataRecipe(source="digits"), "test")
    processor = image_processor_for(model.config)
    summary = evaluate(
        target,
        source,
        attacks,
        num_images=num_images,
        num_draws=10,
        seeds=[0],
        batch_size=50,
        output_dir=str(output_dir),
        processor=processor,
        progress=True,
    )
    for row in summary.rows:
        low, high = row.ci95
        print(f"{row.accuracy:5.1f} [{low:.1f}, {high:.1f}]  {row.name}, {row.epsilon_255:g}/255")
    collect([str(output_dir), str(RESULTS / f"{output_dir.name}.json")])


def distances(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """By attack and image, the least epsilon (on 0..255) at which the answer is wrong; 0 without an attack, or inf."""
    least: dict[str, dict[str, float]] = {}
    for record in records:
        if record.name == "none":
            continue
        found = least.setdefault(record.name, {})
        reached = [0.0] if record.clean_predictions[0] != record.label else []
        reached += [record.epsilon_255] if record.predictions[0] != record.label else []
        found[record.image_id] = min([found.get(record.image_id, float("inf")), *reached])
    return least


def optimalities(records: Sequence[Record]) -> dict[str, float]:
    """Each attack's optimality in AttackBench's sense (Cina et al. 2025, local optimality), in [0, 1], best first.

    An attack's curve is the accuracy that it leaves over epsilon, up to the epsilon at which all attacks together have
    fooled every image; the lower envelope is the curve of the best attack of each image. The optimality is 1 minus the
    area between the two over the area between the envelope and the accuracy without an attack: 1 for an attack that is
    never beaten, 0 for one that finds nothing.

    Raises ValueError where images are left that no attack fools: the curves would have no end.
    """
    by_attack = distances(records)
    images = list(next(iter(by_attack.values())))
    best = [min(found[image] for found in by_attack.values()) for image in images]
    end = max(best)
    if end == float("inf"):
        raise ValueError(f"{best.count(end)} of {len(best)} images withstand every attack: name larger epsilons")

    def area(least: Sequence[float]) -> float:
        return sum(min(distance, end) for distance in least) / len(least)

    whole = end * sum(distance > 0 for distance in best) / len(best)
    found = {
        name: 1 - (area([least[image] for image in images]) - area(best)) / (whole - area(best))
        for name, least in by_attack.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def radii(smoothing: Path | None) -> None:
    """Prints the largest difference between our radii and theirs, over the certificates that are kept."""
    certificates = kept_certificates()
    print(f"largest difference of {len(certificates)} L2 radii")
    print(f"{scipy_difference(certificates):.2g}  scipy.stats.binomtest")
    if smoothing is not None:
        print(f"{smoothing_difference(certificates, smoothing):.2g}  Smooth.certify of locuslab/smoothing")


def kept_certificates() -> list[Certificate]:
    """Those of every `certified.jsonl.gz` in results/ whose class was bounded."""
    files = sorted((ROOT / "results").glob("*/records/certified.jsonl.gz"))
    found = (Certificate.from_json(line) for file in files for line in read_jsonl(file))
    return [certificate for certificate in found if certificate.num_draws]


def scipy_difference(certificates: Sequence[Certificate]) -> float:
    """With the one-sided exact interval of `scipy.stats.binomtest` in place of ours."""
    differences = []
    for item in certificates:
        test = scipy.stats.binomtest(item.count, item.num_draws, alternative="greater")
        low = test.proportion_ci(confidence_level=1 - item.alpha, method="exact").low
        theirs = item.sigma_255 / 255 * scipy.stats.norm.ppf(low) if low > 0.5 else 0.0
        ours = certified_radius(item.count, item.num_draws, item.sigma_255, item.alpha)
        differences.append(max(abs(item.radius - theirs), abs(ours - theirs)))
    return float(max(differences))


def smoothing_difference(certificates: Sequence[Certificate], directory: Path) -> float:
    """With `Smooth.certify` of a checkout of locuslab/smoothing, whose votes are those that our draws gave."""
    import numpy as np
    import torch

    if not hasattr(scipy.stats, "binom_test"):  # gone from scipy; their module imports it, `certify` does not use it
        scipy.stats.binom_test = None
    sys.path.insert(0, str(directory / "code"))
    from core import Smooth

    class OnOurVotes(Smooth):
        def __init__(self, item: Certificate):
            super().__init__(torch.nn.Identity(), item.top_class + 1, item.sigma_255 / 255)
            # the first question chooses the class, the second bounds it
            self.votes = [1, item.count]

        def _sample_noise(self, x, num, batch_size):
            counts = np.zeros(self.num_classes, dtype=int)
            counts[-1] = self.votes.pop(0)
            return counts

    differences = []
    for item in certificates:
        found, radius = OnOurVotes(item).certify(None, 1, item.num_draws, item.alpha, 1)
        if (found == Smooth.ABSTAIN) != (item.prediction is None):
            raise ValueError(f"{item.image_id}: theirs answers {found}, ours {item.prediction}")
        differences.append(abs(radius - item.radius))
    return max(differences)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="what", choices=("eot", "optimality", "radii"), help="eot, optimality or radii")
    parser.add_argument("--num_images", type=int, default=100, help="how many test images; default: 100")
    parser.add_argument("--smoothing", type=Path, help="for radii: a checkout of locuslab/smoothing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    sys.path.insert(0, str(ROOT / "scripts"))  # for reports.collect
    if arguments.what == "radii":
        radii(arguments.smoothing)
    else:
        compare = {"eot": eot, "optimality": optimality}[arguments.what]
        compare(arguments.num_images, ROOT / "outputs" / f"peers_{arguments.what}")


if __name__ == "__main__":
    run_main(main)
