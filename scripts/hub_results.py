"""Results in the two formats of the Hub: the metadata of a card, and `.eval_results/accuracy.yaml` beside it."""

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from modeling_nim.robustness.recipes import SETTINGS, attack_text
from reports.tables import Row, number


def in_metadata(row: Row, name: str, dataset_id: str | None, split: str) -> EvalResult:
    """A row of a summary, as the metadata of a card has it; `name`, `dataset_id` and `split` are the data's."""
    metric_type, metric = "accuracy", "clean accuracy"
    if row["attack"] != "none":
        threat_model = row["threat_model"].replace("_", " ")
        metric_type = "robust_accuracy"
        metric = f"{threat_model} accuracy, {attack_text(row)}, eps {number(row['epsilon_255'])}/255"
    return EvalResult(
        task_type="image-classification",
        task_name="Image classification",
        dataset_type=dataset_id or name,
        dataset_name=name,
        dataset_split=split,
        metric_type=metric_type,
        metric_name=metric,
        metric_value=round(row["accuracy"], 2),
        # The client merges all results on one data set: the arguments of the metric tell the attacks apart.
        metric_args=metric_arguments(row),
    )


def metric_arguments(row: Row) -> dict[str, Any]:
    """The attack, the defense's randomness and the interval, without which the value has no meaning."""
    arguments = {key: row[key] for key in ("attack", "threat_model", "epsilon_255")}
    if row["sigma"] is not None:
        arguments["sigma_255"] = row["sigma"]
    arguments |= {key: value for key, value in row.get("settings", {}).items() if key in SETTINGS}
    if "num_draws" in row:
        arguments["num_draws"] = row["num_draws"]
    return arguments | {"ci95": [round(bound, 2) for bound in row["ci95"]], "num_images": row["num_images"]}


def results_yaml(results: Sequence[EvalResult]) -> str:
    """The text of `.eval_results/accuracy.yaml`; empty where there are no results."""
    entries = [_entry(result) for result in results]
    # The same images without an attack are a row of every protocol.
    entries = [entry for index, entry in enumerate(entries) if entry not in entries[:index]]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, width=120) if entries else ""


def _entry(result: EvalResult) -> EvalResultEntry:
    metric = f"{result.metric_name}, {result.metric_args['num_images']} images"
    return EvalResultEntry(
        dataset_id=result.dataset_type,  # the Hub shows those whose data set it has
        task_id=re.sub(r"[^a-z0-9]+", "_", metric.lower()).strip("_"),
        value=result.metric_value,
        notes=f"{metric}, split {result.dataset_split}; {json.dumps(result.metric_args)}",
    )
