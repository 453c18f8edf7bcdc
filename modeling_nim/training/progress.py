"""Reports of a run: the progress line and `log.jsonl`; and the signals that stop it."""

import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..runs.files import append_text, write_jsonl
from ..runs.processes import end_sharing


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


def resume_log(path: str, step: int) -> list[dict[str, Any]]:
    """Cut the log back to the records up to `step`, so that it holds the history of the loaded weights alone.

    Returns the records that are left.
    """
    kept: list[dict[str, Any]] = []
    if not os.path.exists(path):
        return kept
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that a killed run was writing
                continue
            if record["step"] <= step:
                kept.append(record)
    write_jsonl(path, kept)
    return kept


class Reporter:
    """Losses, throughput and time spent waiting for data since the last report; where the reports go.

    Losses stay on the device until `report`, so that the loop never waits for one.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str, step: int, num_steps: int):
        self.accelerator = accelerator
        self.log_path = os.path.join(output_dir, "log.jsonl")
        self.seen_bad_images: set[str] = set()
        if accelerator.is_main_process:
            os.makedirs(output_dir, exist_ok=True)
            records = resume_log(self.log_path, step)
            self.seen_bad_images |= {record["bad_image"] for record in records if "bad_image" in record}
        # a terminal shows a moving line; a log file gets a line now and then
        self.bar = tqdm(
            total=num_steps,
            initial=step,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 20,
            disable=not accelerator.is_main_process,
        )
        self.bad_images: list[str] = []
        self.step_started: float | None = None
        self.step_ended = 0.0
        self._start_window()

    def _start_window(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.num_images = 0
        self.waiting_s = self.training_s = 0.0

    def timed(self, batches: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches, with the time that `next` takes counted as waiting for data and bad images noted."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            self.step_started = self.step_started or before
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waiting_s += time.perf_counter() - before
            self.bad_images += batch["bad_images"]
            yield batch

    def add_step(self, micro_losses: list[torch.Tensor], num_images: int) -> None:
        """Count one optimizer step: the losses of its micro-batches in this process, its images in all processes."""
        self.losses.append(torch.stack([loss.float() for loss in micro_losses]).mean())
        self.num_images += num_images
        self.step_ended = time.perf_counter()
        self.training_s += self.step_ended - self.step_started
        self.step_started = None  # what comes before the next batch (validation, a checkpoint) is no training time
        self.bar.update()

    def report(self, step: int, learning_rate: float) -> None:
        """Write the mean loss of the steps since the last report, rates and memory to bar, log and trackers.

        Every process must call it. Raises `NonFiniteLossError` naming the first step whose loss is not finite.
        """
        losses = self.accelerator.reduce(torch.stack(self.losses), reduction="mean").tolist()
        for number, loss in enumerate(losses, start=step - len(losses) + 1):
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"the loss is {loss} at step {number}; the last checkpoint is kept: go on from it with a lower "
                    f"learning rate or optimization.max_grad_norm, and checkpoints.on_changed_recipe=continue"
                )
        # the losses have arrived: on a GPU the steps end here, not where they were queued
        elapsed_s = self.training_s + time.perf_counter() - self.step_ended
        self.write(
            {
                "step": step,
                "loss": sum(losses) / len(losses),
                "lr": learning_rate,
                "images_per_s": self.num_images / elapsed_s,
                "data_wait": self.waiting_s / elapsed_s,
                "memory_gib": peak_memory_gib(),
            }
        )
        self.bar.set_postfix(
            loss=f"{sum(losses) / len(losses):.4f}", images_per_s=f"{self.num_images / elapsed_s:.0f}", refresh=False
        )
        self.name_bad_images(step, self.bad_images)
        self.bad_images = []
        self._start_window()

    def name_bad_images(self, step: int, messages: list[str]) -> None:
        """Write and count the images that were skipped, each of them once in a run. Every process must call it."""
        for message in gather_object(messages):
            if message not in self.seen_bad_images:
                self.seen_bad_images.add(message)
                self.write({"step": step, "bad_image": message, "num_bad_images": len(self.seen_bad_images)})

    def write(self, record: dict[str, Any]) -> None:
        """Add a record with a `step` to the log, its numbers to the trackers too."""
        if self.accelerator.is_main_process:
            append_text(self.log_path, json.dumps(record) + "\n")
        numbers = {key: value for key, value in record.items() if key != "step" and not isinstance(value, str)}
        self.accelerator.log(numbers, step=record["step"])

    def close(self) -> None:
        """End bar, trackers and, with several processes, their group: nothing may be shared afterwards."""
        self.bar.close()
        if self.seen_bad_images and self.accelerator.is_main_process:
            print(f"{len(self.seen_bad_images)} bad images were skipped; {self.log_path} names each one")
        end_sharing(self.accelerator)


def peak_memory_gib() -> float:
    """Peak memory of this process: on the GPU where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


class StopSignal:
    """SIGTERM and SIGINT (Ctrl-C) as requests: the run finishes its step, saves and ends well."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)
        accelerator.wait_for_everyone()  # no process begins a step before all handle signals

    def _receive(self, number: int, _) -> None:
        self.received = self.received or number

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, as in every shell; else 0."""
        return 130 if self.received == signal.SIGINT else 0

    def requested(self, step: int, every: int) -> bool:
        """Whether any process was told to stop; several processes ask one another every `every` steps."""
        if self.accelerator.num_processes == 1:
            return self.received is not None
        if step % every:
            return False
        if self.received is not None:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()
