"""Records on disk: one JSON line per image, attack and seed, written as they come and continued after a kill.

A run is a fixed list of units (one batch of one job), each with a known number of lines. Processes take the units of a
round side by side, the main process writes them in order. So the file is the same whether one process made it or several,
in one go or in many.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..runs.files import append_text, write_bytes, write_json
from ..runs.locks import lock_directory, unlock_directory
from ..runs.processes import on_main_process


@dataclass(frozen=True)
class Unit:
    """One batch of one job."""

    job: int
    start: int  # images start .. stop of the evaluation order
    stop: int

    @property
    def num_lines(self) -> int:
        return self.stop - self.start


def plan_units(images_per_job: Sequence[int], batch_size: int) -> list[Unit]:
    """The units of all jobs; a batch holds the same images whatever else happens."""
    return [
        Unit(job, start, min(start + batch_size, images))
        for job, images in enumerate(images_per_job)
        for start in range(0, images, batch_size)
    ]


class RecordFile:
    """`DIR/records.jsonl` (or another `name`), its clock `DIR/seconds.jsonl`, and `DIR/run.json`, the settings.

    `settings` is everything the records depend on. A directory that was made with other settings is refused, and so is one
    that another run is writing to; `close` gives it up.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        settings: dict[str, Any],
        units: list[Unit],
        accelerator: Accelerator,
        name: str = "records",
    ):
        self.directory = Path(directory)
        self.path, self.clock_path = self.directory / f"{name}.jsonl", self.directory / "seconds.jsonl"
        self.units, self.accelerator = units, accelerator
        self.done = on_main_process(accelerator, lambda: self._open(settings))

    def _open(self, settings: dict[str, Any]) -> int:
        """Number of complete units; what an interrupted write left behind is cut off."""
        lock_directory(self.directory)
        run_file = self.directory / "run.json"
        settings = json.loads(json.dumps(settings))
        if run_file.exists():
            stored = json.loads(run_file.read_text())
            different = sorted(key for key in settings | stored if settings.get(key) != stored.get(key))
            if different:
                raise ValueError(
                    f"{self.directory} holds records made with another {', '.join(different)}: choose another output_dir, "
                    "or delete it to start again"
                )
        elif self.path.exists():
            raise ValueError(f"{self.path} exists without a run.json: choose another output_dir, or delete it")
        else:
            write_json(run_file, settings)
        if not self.path.exists():
            return 0
        lines = self.path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        done, kept = 0, 0
        while done < len(self.units) and kept + self.units[done].num_lines <= len(lines):
            kept += self.units[done].num_lines
            done += 1
        write_bytes(self.path, b"".join(lines[:kept]))
        if self.clock_path.exists():
            clock = self.clock_path.read_bytes().splitlines(keepends=True)
            write_bytes(self.clock_path, b"".join(line for line in clock[:done] if line.endswith(b"\n")))
        return done

    def rounds(self) -> Iterator[Unit | None]:
        """This process's unit of every round that is left; None where a last round has fewer units than processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for start in range(self.done, len(self.units), world):
            yield self.units[start + rank] if start + rank < len(self.units) else None

    def append(self, unit: Unit | None, records: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
        """Writes what all processes bring from this round, in order; returns all of it, in every process."""
        if unit is not None and len(records) != unit.num_lines:
            raise ValueError(f"{len(records)} records for a unit of {unit.num_lines} images")
        gathered = [(unit, records, seconds)]
        if self.accelerator.num_processes > 1:
            gathered = gather_object(gathered)
        gathered = [piece for piece in gathered if piece[0] is not None]
        if self.accelerator.is_main_process:
            lines = "".join(json.dumps(record) + "\n" for _, unit_records, _ in gathered for record in unit_records)
            clock = "".join(
                json.dumps({"job": piece[0].job, "seconds": round(piece[2], 3)}) + "\n" for piece in gathered
            )
            for path, text in ((self.path, lines), (self.clock_path, clock)):
                append_text(path, text)
        return [record for _, unit_records, _ in gathered for record in unit_records]

    def read(self) -> list[dict[str, Any]]:
        """The records so far, in every process."""
        return on_main_process(self.accelerator, lambda: read_jsonl(self.path) if self.path.exists() else [])

    def close(self) -> None:
        """Another run may write to the directory. The end of the process does the same."""
        if self.accelerator.is_main_process:
            unlock_directory(self.directory)

    @property
    def sha256(self) -> str:
        """Of the records' bytes: what ties a summary to the lines that it was made of."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def seconds_per_job(self, num_jobs: int) -> list[float]:
        """Process-seconds that each job took."""
        seconds = [0.0] * num_jobs
        for line in read_jsonl(self.clock_path) if self.clock_path.exists() else []:
            seconds[line["job"]] += line["seconds"]
        return seconds


def run_settings(recipe: Any, device: torch.device, **parts: Any) -> dict[str, Any]:
    """Everything that records depend on: the recipe without its output directory, `parts`, the device, the versions."""
    settings = dataclasses.asdict(recipe)
    settings.pop("output_dir")
    packages = ("torch", "transformers", "accelerate", "numpy", "torchattacks", "Pillow")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"recipe": settings, **parts, "device": name, "versions": versions}


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file; FileNotFoundError names the file and the remedy."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"there are no records {str(path)!r}; make them with scripts/run_attack.py or run_certify.py"
        )
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
