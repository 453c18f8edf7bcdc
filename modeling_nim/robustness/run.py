"""An evaluation from its parts to its summary, for `scripts/run_attack.py` and for callers in Python."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator

from ..runs.files import write_json
from .alarms import of_clean_accuracy, of_models
from .checks import inspect_target
from .cost import cost_table, measure_speed
from .draws import EVALUATE
from .evaluation import attack_images, score_batch
from .functions import function_name
from .images import SourceImages, TensorImages
from .jobs import Job, plan_jobs
from .loading import check_classes, check_losses, model_hash
from .oracle import decide, rows_per_pass, target_forward
from .protocols import Protocol
from .record_file import RecordFile, Unit, plan_units, run_settings
from .records import Record, model_key, sigma_value
from .summary import Summary, summarize
from .targets import Target


CLEAN_CHECK_IMAGES = 64  # on which the accuracy is measured before the first attack


def look_at_target(
    index: int,
    target: Target,
    images: SourceImages | TensorImages,
    micro_batch: int,
    stated: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Checks a target before the attacks: returns what is known of it, and the alarms about its clean accuracy.

    `index` is its place among the targets of `images`; `stated` is of `checks.stated_accuracy`.
    """
    images_01, labels, image_ids = images.batch(index, range(min(CLEAN_CHECK_IMAGES, len(images))))
    known: dict[str, Any] = {"hash": model_hash(target.weights)} | inspect_target(target, images_01[:16])
    rows = rows_per_pass(micro_batch, target)
    logits = decide(target_forward(target), images_01, image_ids, 0, EVALUATE, 1, rows).squeeze(1)  # (B, num_classes)
    if int(labels.max()) >= logits.shape[-1]:
        raise ValueError(
            f"{target.name} tells {logits.shape[-1]} classes apart, an image has label {int(labels.max())}: name "
            "the data that it was trained for"
        )
    known |= {"chance": 1 / logits.shape[-1]} | ({} if stated is None else {"stated": stated})
    right = (logits.argmax(dim=-1) == labels).double().tolist()
    return known, of_clean_accuracy(model_key(target.name, target.sigma), right, known)


class AttackRun:
    """Targets, images and a plan, and what is known of them; `rounds` attacks, `summary` gives the accuracy left.

    Creating one checks the models and estimates the cost; it writes nothing. `warnings` are the alarms that come before
    the first attack.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        images: SourceImages | TensorImages,
        plan: Protocol,
        micro_batch: int,
        stated: Sequence[dict[str, Any] | None] | None = None,
    ):
        check_classes(targets, images)
        check_losses(targets, plan.attacks)
        self.targets, self.images, self.plan, self.micro_batch = list(targets), images, plan, micro_batch
        self.jobs = plan_jobs(plan, self.targets, len(images))
        self.models: dict[str, dict[str, Any]] = {}
        self.speeds: dict[str, dict[str, float]] = {}
        self.warnings = []
        self._controls: dict[tuple, dict[str, list[int]]] = {}
        for index, target in enumerate(self.targets):
            key = model_key(target.name, target.sigma)
            said = None if stated is None else stated[index]
            self.models[key], rings = look_at_target(index, target, images, micro_batch, said)
            if target.name not in self.speeds:  # sigma changes nothing about the cost
                few = images.batch(index, range(min(16, len(images))))
                self.speeds[target.name] = measure_speed(target, few[0], micro_batch)
            self.warnings += rings if self.jobs else []
        self.warnings = of_models(self.models) + self.warnings

    def cost(self, num_processes: int = 1) -> str:
        """What the attacks will take on this machine, as a table."""
        return cost_table(self.jobs, self.targets, self.speeds, self.plan.num_draws, num_processes)

    def open(self, recipe: Any, batch_size: int, accelerator: Accelerator) -> RecordFile:
        """The records of the run in `recipe.output_dir`, with those of a run that was stopped."""
        # what a card states may be written after the run, and changes no record
        models = {
            name: {key: value for key, value in known.items() if key not in ("stated", "chance")}
            for name, known in self.models.items()
        }
        settings = run_settings(recipe, accelerator.device, models=models, data=self.images.fingerprint)
        units = plan_units([job.num_images for job in self.jobs], batch_size)
        records = RecordFile(recipe.output_dir, settings, units, accelerator, self._identities, self._labels)
        self._remember(records.read())
        return records

    def _identities(self, unit: Unit) -> list[tuple]:
        job = self.jobs[unit.job]
        return [(*self.group(job), job.seed, name) for name in self.images.image_ids(unit.positions)]

    def _labels(self, unit: Unit) -> list[int]:
        return self.images.labels_at(unit.positions)

    def group(self, job: Job) -> tuple:
        """`Record.group` of the job's records."""
        target = self.targets[job.target]
        return target.name, sigma_value(target.sigma), job.label, job.threat_model, job.epsilon_255

    def rounds(self, records: RecordFile) -> Iterator[tuple[Job | None, list[Record]]]:
        """Attacks, scores and writes batch by batch; yields this process's job and what all processes wrote.

        Where a last round has fewer batches than processes, the job of an idle process is None.
        """
        for unit in records.rounds():
            start = time.perf_counter()
            job, lines = None, []
            if unit is not None:
                job = self.jobs[unit.job]
                images_01, labels, image_ids = self.images.batch(job.target, unit.positions)
                shared = (self.plan.num_draws, self.micro_batch)
                attacked = attack_images(job, self.targets, images_01, labels, image_ids, *shared)
                # no-attack predictions on the evaluation draws, that attacked images are compared with
                clean = self._controls.get((*self.group(job)[:2], job.seed), {})
                lines = score_batch(job, self.targets, attacked, images_01, labels, image_ids, clean, *shared)
            written = records.append(unit, lines, time.perf_counter() - start)
            self._remember(written)
            yield job, written

    def _remember(self, records: Sequence[Record]) -> None:
        for record in records:
            if record.name == "none":
                key = (record.model, record.sigma, record.seed)
                self._controls.setdefault(key, {})[record.image_id] = record.predictions

    def summary(self, records: RecordFile, num_processes: int = 1) -> Summary:
        """The accuracy that is left, written to `summary.json` beside the records; for the main process alone."""
        attacks: dict[tuple, dict[str, Any]] = {}
        seconds: dict[tuple, float] = {}
        for job, spent in zip(self.jobs, records.seconds_per_job(len(self.jobs)), strict=True):
            group = self.group(job)
            seconds[group] = seconds.get(group, 0.0) + spent
            if job.attack is not None:
                attacks[group] = {"kind": job.kind} | job.attack.settings(job.epsilon_255)
        found = summarize(records.read_here(), attacks, self.models, seconds)
        named = [
            asdict(attack) | {"attack": function_name(attack.attack), "loss": function_name(attack.loss)}
            for attack in self.plan.attacks
        ]
        found.provenance = records.settings | {"attacks": named, "seeds": self.plan.seeds}
        found.provenance |= {"num_draws": self.plan.num_draws, "num_processes": num_processes}
        found.provenance |= {"records_sha256": records.sha256}
        write_json(records.directory / "summary.json", found.to_json())
        return found
