"""Keeps a run: its summary as RESULT.json, and the records that it was made of as records/RESULT.jsonl.gz beside it.

    python scripts/reports/collect.py outputs/attack results/digits/attack.json
    python scripts/reports/collect.py outputs/demo/pretrain outputs/demo/finetune_* results/digits/training.json

Takes the output_dir of run_attack.py or run_certify.py; refuses records that are not those that the summary names.
Of the output_dirs of trainings, one or several, it keeps the logs, and as their summary what each training took.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from modeling_nim.robustness.records import read_jsonl
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_bytes
from reports.tables import read_result


# Of each kind of evaluation its summary, and the records that it was made of.
RECORDS = {
    "summary.json": "records.jsonl",
    "certified.json": "certificates.jsonl",
    "reconstruction.json": "reconstruction.jsonl",
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output_dir of run_attack.py or run_certify.py, or those of trainings")
    parser.add_argument("result", help="where the summary goes, e.g. results/digits/attack.json")
    return parser


def training(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one training took: steps, their seconds without start, checkpoints and validation; and the log behind it.

    Where there was validation, its accuracies in percent, in the order of the log.
    """
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    known = {"run": run.as_posix(), "batch_size": recipe["optimization"]["batch_size"]}
    row, records = {"run": known["run"], "steps": 0, "seconds": 0.0}, []
    for line in read_jsonl(run / "log.jsonl"):
        if "validation_accuracy" in line:
            row.setdefault("validation_accuracy", []).append(line["validation_accuracy"])
        elif "images_per_s" in line:  # the rate since the last such line
            row["seconds"] += (line["step"] - row["steps"]) * known["batch_size"] / line["images_per_s"]
            row["steps"] = line["step"]
        else:
            continue
        records.append(known | line)
    return row | {"seconds": round(row["seconds"], 1)}, records


def trainings(runs: Sequence[Path]) -> tuple[bytes, bytes]:
    """Summary and records of trainings, as files hold them."""
    rows, logs = zip(*map(training, runs), strict=True)
    records = "".join(json.dumps(record) + "\n" for log in logs for record in log).encode()
    summary = {"rows": list(rows), "provenance": {"records_sha256": hashlib.sha256(records).hexdigest()}}
    return (json.dumps(summary, indent=2) + "\n").encode(), records


def evaluation(run: Path) -> tuple[bytes, bytes]:
    """Summary and records of run_attack.py or run_certify.py, as files hold them."""
    summary = next((run / name for name in RECORDS if (run / name).exists()), None)
    if summary is None:
        raise FileNotFoundError(f"{str(run)!r} holds no {', '.join(RECORDS)} or log.jsonl: is the run finished?")
    records = run / RECORDS[summary.name]
    stated = read_result(summary)["provenance"].get("records_sha256")
    if hashlib.sha256(records.read_bytes()).hexdigest() != stated:
        raise ValueError(f"{records} has not the SHA-256 {stated} that {summary} names: run the evaluation again")
    return summary.read_bytes(), records.read_bytes()


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    runs, result = [Path(run) for run in arguments.runs], Path(arguments.result)
    are_trainings = all((run / "log.jsonl").exists() for run in runs)
    if len(runs) > 1 and not are_trainings:
        raise ValueError(f"{len(runs)} runs make one result where they are trainings: give one directory of the others")
    summary, records = trainings(runs) if are_trainings else evaluation(runs[0])
    kept = result.parent / "records" / f"{result.stem}.jsonl.gz"
    write_bytes(kept, gzip.compress(records, mtime=0))  # no time in the header: equal records give an equal file
    write_bytes(result, summary)
    print(f"{result} and {kept}")


if __name__ == "__main__":
    run_main(main)
