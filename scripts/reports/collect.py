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

from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_bytes


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output_dir of run_attack.py or run_certify.py, or those of trainings")
    parser.add_argument("result", help="where the summary goes, e.g. results/digits/attack.json")
    return parser


def store(summary: bytes, records: bytes, result: Path) -> Path:
    """Writes a summary as `result` and its records, compressed, into `records/` beside it; returns where those are."""
    write_bytes(result, summary)
    kept = result.parent / "records" / f"{result.stem}.jsonl.gz"
    write_bytes(kept, gzip.compress(records, mtime=0))  # no time in the header: equal records give an equal file
    return kept


def training_records(run: Path) -> list[dict[str, Any]]:
    """The log of a training, validations included, each line with its directory and the images of a step."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    known = {"run": run.as_posix(), "batch_size": recipe["optimization"]["batch_size"]}
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [known | line for line in lines if "images_per_s" in line or "validation_accuracy" in line]


def training_row(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one training took: its steps, and their seconds without start, checkpoints and validation.

    Where there was validation, its accuracies in percent, in the order of the log.
    """
    step, seconds, accuracies = 0, 0.0, []
    for record in records:
        if "validation_accuracy" in record:
            accuracies.append(record["validation_accuracy"])
        else:  # it tells the rate since the one before
            seconds += (record["step"] - step) * record["batch_size"] / record["images_per_s"]
            step = record["step"]
    row = {"run": records[0]["run"], "steps": step, "seconds": round(seconds, 1)}
    return row | ({"validation_accuracy": accuracies} if accuracies else {})


def trainings(runs: Sequence[Path]) -> tuple[bytes, bytes]:
    """Summary and records of trainings, as files hold them."""
    logs = [training_records(run) for run in runs]
    records = "".join(json.dumps(record) + "\n" for log in logs for record in log).encode()
    provenance = {"records_sha256": hashlib.sha256(records).hexdigest()}
    summary = {"rows": [training_row(log) for log in logs], "provenance": provenance}
    return (json.dumps(summary, indent=2) + "\n").encode(), records


def evaluation(run: Path) -> tuple[bytes, bytes]:
    """Summary and records of run_attack.py or run_certify.py, as files hold them."""
    names = [("summary.json", "records.jsonl"), ("certified.json", "certificates.jsonl")]
    names += [("reconstruction.json", "reconstruction.jsonl")]
    found = next(((run / summary, run / records) for summary, records in names if (run / summary).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{str(run)!r} holds no {', '.join(summary for summary, _ in names)} or log.jsonl: is the run finished?"
        )
    summary, records = (file.read_bytes() for file in found)
    stated = json.loads(summary)["provenance"].get("records_sha256")
    if hashlib.sha256(records).hexdigest() != stated:
        raise ValueError(f"{found[1]} has not the SHA-256 {stated} that {found[0]} names: run the evaluation again")
    return summary, records


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    runs, result = [Path(run) for run in arguments.runs], Path(arguments.result)
    are_trainings = all((run / "log.jsonl").exists() for run in runs)
    if len(runs) > 1 and not are_trainings:
        raise ValueError(f"{len(runs)} runs make one result where they are trainings: give one directory of the others")
    summary, records = trainings(runs) if are_trainings else evaluation(runs[0])
    print(f"{result} and {store(summary, records, result)}")


if __name__ == "__main__":
    run_main(main)
