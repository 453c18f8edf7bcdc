"""Records on disk: one JSON line per image, attack and seed, written as they come and continued after a kill.

A run is a fixed list of units (one batch of one job), each with a known number of lines. Processes take the units of a
round side by side, the main process writes them in order. So the file is the same whether one process made it or
several, in one go or in many.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..runs.files import append_text, write_bytes, write_json
from ..runs.locks import lock_directory, unlock_directory
from ..runs.processes import on_main_process
from .functions import function_name
from .records import Certificate, Record, read_jsonl


@dataclass(frozen=True)
class Unit:
    """One batch of one job."""

    job: int
    start: int  # images start .. stop of the evaluation order
    stop: int

    @property
    def positions(self) -> range:
        """The places of its images in the evaluation order."""
        return range(self.start, self.stop)

    @property
    def num_lines(self) -> int:
        """One per image."""
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

    `settings` is everything the records depend on. A directory that was made with other settings is refused, and so is
    one that another run is writing to; `close` releases it.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        settings: dict[str, Any],
        units: list[Unit],
        accelerator: Accelerator,
        identities: Callable[[Unit], list[tuple]],
        labels: Callable[[Unit], list[int]],
        record_type: type[Record] | type[Certificate] = Record,
        name: str = "records",
    ):
        self.directory = Path(directory)
        self.path, self.clock_path = self.directory / f"{name}.jsonl", self.directory / "seconds.jsonl"
        self.units, self.accelerator = units, accelerator
        self.identities, self.labels, self.record_type = identities, labels, record_type
        self.settings = json.loads(json.dumps(settings))
        self.done = on_main_process(accelerator, self._open)

    def _open(self) -> int:
        """Number of complete units; what an interrupted write left behind is cut off."""
        lock_directory(self.directory)
        run_file = self.directory / "run.json"
        settings = self.settings
        if run_file.exists():
            stored = self._stored_settings(run_file)
            different = sorted(key for key in settings | stored if settings.get(key) != stored.get(key))
            if different:
                raise ValueError(
                    f"{self.directory} holds records made with another {', '.join(different)}: choose another "
                    "output_dir, or delete it to start again"
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
        done, kept = self._complete(lines)
        if done == len(self.units):
            self._check_hash()
        write_bytes(self.path, b"".join(lines[:kept]))
        if self.clock_path.exists():
            write_bytes(
                self.clock_path, b"".join(_readable(self.clock_path.read_bytes().splitlines(keepends=True)[:done]))
            )
        return done

    def _check_hash(self) -> None:
        """ValueError where a summary in the directory was made of other lines than there are."""
        for summary in (self.directory / name for name in ("summary.json", "certified.json")):
            try:
                stated = json.loads(summary.read_bytes())["provenance"]["records_sha256"]
            except (OSError, ValueError, TypeError, KeyError):
                continue  # none, or one that is written anew
            if stated != self.sha256:
                raise ValueError(
                    f"{self.path} was changed after {summary.name} was made of it (its SHA-256 is no longer "
                    f"{stated}): put the old file back; or choose another output_dir, or delete it to start again"
                )

    def _stored_settings(self, run_file: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(run_file.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{run_file} is broken ({error}), so nobody knows what the records beside it were made with: choose "
                "another output_dir, or delete it to start again"
            ) from None

    def _complete(self, lines: Sequence[bytes]) -> tuple[int, int]:
        """How many units and how many lines are complete; ValueError names the first line that does not fit."""
        kept = 0
        for done, unit in enumerate(self.units):
            identities = self.identities(unit)
            expected = zip(lines[kept:], identities, self.labels(unit), strict=False)
            for number, (line, identity, label) in enumerate(expected, start=kept + 1):
                self._check_line(number, line, identity, label)
            if kept + len(identities) > len(lines):
                return done, kept
            kept += len(identities)
        if kept < len(lines):
            raise ValueError(self._refusal(kept + 1, "is one too many: every image has its record already"))
        return len(self.units), kept

    def _check_line(self, number: int, line: bytes, identity: tuple, label: int) -> None:
        try:
            record = self.record_type.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(self._refusal(number, f"is broken ({error})")) from None
        if record.identity != identity:
            raise ValueError(
                self._refusal(
                    number, f"is the record of {record.identity}, where that of {identity} belongs: missing, or doubled"
                )
            )
        if record.label != label:
            raise ValueError(self._refusal(number, f"has label {record.label}, its image in the data has {label}"))

    def _refusal(self, number: int, what: str) -> str:
        return (
            f"{self.path}, line {number} {what}. Keep what comes before it (head -n {number - 1}) and start again, the "
            "rest is made anew; or choose another output_dir"
        )

    def rounds(self) -> Iterator[Unit | None]:
        """This process's unit of every round that is left; None where a last round has fewer units than processes."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for start in range(self.done, len(self.units), world):
            yield self.units[start + rank] if start + rank < len(self.units) else None

    def append(self, unit: Unit | None, records: Sequence[Record | Certificate], seconds: float) -> list:
        """Writes what all processes bring from this round, in order; returns all of it, in every process."""
        if unit is not None and [record.identity for record in records] != self.identities(unit):
            raise ValueError(f"{self.path}: the records of {unit} are not those of its images")
        gathered = [(unit, list(records), seconds)]
        if self.accelerator.num_processes > 1:
            gathered = gather_object(gathered)
        gathered = [piece for piece in gathered if piece[0] is not None]
        if self.accelerator.is_main_process:
            lines = "".join(json.dumps(record.to_json()) + "\n" for _, members, _ in gathered for record in members)
            clock = "".join(
                json.dumps({"job": piece[0].job, "seconds": round(piece[2], 3)}) + "\n" for piece in gathered
            )
            for path, text in ((self.path, lines), (self.clock_path, clock)):
                append_text(path, text)
        return [record for _, members, _ in gathered for record in members]

    def read(self) -> list:
        """The records so far, in every process."""
        return on_main_process(self.accelerator, self.read_here)

    def read_here(self) -> list:
        """The records so far, for one process alone."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        self._complete(lines)  # raises where another program has changed the file
        return [self.record_type.from_json(json.loads(line)) for line in lines]

    def close(self) -> None:
        """Releases the directory for other runs, as the end of the process does."""
        if self.accelerator.is_main_process:
            unlock_directory(self.directory)

    @property
    def sha256(self) -> str:
        """Hash of the records' bytes, which a summary keeps to name the lines that it was made of."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def seconds_per_job(self, num_jobs: int) -> list[float]:
        """Process-seconds that each job took."""
        seconds = [0.0] * num_jobs
        for line in read_jsonl(self.clock_path) if self.clock_path.exists() else []:
            seconds[line["job"]] += line["seconds"]
        return seconds


def _readable(clock: Sequence[bytes]) -> Iterator[bytes]:
    """The lines of a clock up to the first damaged one: missing seconds must not stop a run."""
    for line in clock:
        try:
            entry = json.loads(line)
            readable = entry["job"] >= 0 and entry["seconds"] >= 0 and line.endswith(b"\n")
        except (ValueError, TypeError, KeyError):
            readable = False
        if not readable:
            return
        yield line


def run_settings(recipe: Any, device: torch.device, **parts: Any) -> dict[str, Any]:
    """Everything that records depend on: the recipe without its output directory, `parts`, the device, the versions."""
    settings = json.loads(json.dumps(dataclasses.asdict(recipe), default=function_name))
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
