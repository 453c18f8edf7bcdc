"""Measure what an import costs: this package beside transformers' ViTMAE classes, its base, in fresh processes.

python scripts/bench/startup.py [--rounds 9] [--output outputs/bench/startup.json]
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import os
import resource
import statistics
import subprocess
import sys

import torch

from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json
from modeling_nim.runs.machine import machine


IMPORTS = {
    "vit_mae": "from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel",
    "modeling_nim": "import modeling_nim",
}


def cpu_seconds(code: str) -> float:
    """CPU time of a fresh Python that runs `code`, user and system: other work on the machine does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes for each import (%(default)s)")
    parser.add_argument("--output", default="outputs/bench/startup.json", help="where the numbers go (%(default)s)")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for code in IMPORTS.values():
        cpu_seconds(code)  # compiles what has no bytecode yet
    for _ in range(arguments.rounds):  # in turns, so that a busy machine slows all alike
        for name, code in IMPORTS.items():
            seconds[name].append(cpu_seconds(code))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["modeling_nim"] / medians["vit_mae"]
    result = {
        "rounds": arguments.rounds,
        "seconds": medians,
        "fastest_seconds": {n: min(v) for n, v in seconds.items()},
    }
    write_json(arguments.output, result | {"ratio": ratio} | machine(torch.device("cpu")))
    print(
        f"import modeling_nim takes {medians['modeling_nim']:.2f} s of CPU time, {ratio:.2f} times transformers' "
        f"ViTMAE classes ({medians['vit_mae']:.2f} s): {arguments.output}"
    )


if __name__ == "__main__":
    run_main(main)
