"""Keeps a run: its summary as RESULT.json, and the records that it was made of as records/RESULT.jsonl.gz beside it.

    python scripts/reports/collect.py outputs/attack results/digits/attack.json

Takes the output_dir of run_attack.py or run_certify.py; refuses records that are not those that the summary names.
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

from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_bytes


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output_dir of run_attack.py or run_certify.py")
    parser.add_argument("result", help="where the summary goes, e.g. results/digits/attack.json")
    return parser


def store(summary: bytes, records: bytes, result: Path) -> Path:
    """Writes a summary as `result` and its records, compressed, into `records/` beside it; returns where those are."""
    write_bytes(result, summary)
    kept = result.parent / "records" / f"{result.stem}.jsonl.gz"
    write_bytes(kept, gzip.compress(records, mtime=0))  # no time in the header: equal records give an equal file
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    run, result = Path(arguments.run), Path(arguments.result)
    names = (("summary.json", "records.jsonl"), ("certified.json", "certificates.jsonl"))
    found = next(((run / summary, run / records) for summary, records in names if (run / summary).exists()), None)
    if found is None:
        raise FileNotFoundError(f"{str(run)!r} holds neither summary.json nor certified.json: is the run finished?")
    summary, records = (file.read_bytes() for file in found)
    stated = json.loads(summary)["provenance"].get("records_sha256")
    if hashlib.sha256(records).hexdigest() != stated:
        raise ValueError(f"{found[1]} has not the SHA-256 {stated} that {found[0]} names: run the evaluation again")
    print(f"{result} and {store(summary, records, result)}")


if __name__ == "__main__":
    run_main(main)
