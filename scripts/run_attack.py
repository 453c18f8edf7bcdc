"""Attacks models and says what is left of their accuracy: records, a summary with intervals, and alarms.

    python scripts/launch.py scripts/run_attack.py scripts/recipes/digits/attack.yaml
    python scripts/launch.py scripts/run_attack.py scripts/recipes/digits/attack_standard.yaml num_images=32

Several GPUs: `scripts/launch.py --num_processes N` splits the images; on CPUs, with `--cpu` too.
A run that was stopped continues where it was when it is started again.

`output_dir` receives `run.json` (settings, hashes, versions), `records.jsonl` (one line per image, attack and seed),
`seconds.jsonl`, `summary.json`, and with the sections `pictures` and `reconstruction` what `reports/figures.py` draws.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from early_help import answer_help
    from starting import watch_signals

    answer_help(__file__)
    watch_signals()

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from modeling_nim.data import evaluation_batch, load_source
from modeling_nim.robustness.cost import cost_table, measure_speed
from modeling_nim.robustness.draws import evaluation_order
from modeling_nim.robustness.evaluation import attack_images, score_batch
from modeling_nim.robustness.jobs import plan_jobs
from modeling_nim.robustness.loading import check_classes, check_losses, load_purifier, load_targets, model_hash
from modeling_nim.robustness.pictures import pictured_jobs, reconstruction_records, store_pictures
from modeling_nim.robustness.protocols import resolve
from modeling_nim.robustness.recipes import AttackRunRecipe
from modeling_nim.robustness.records import RecordFile, plan_units, read_jsonl, run_settings
from modeling_nim.robustness.summary import model_key, summarise, table
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json, write_jsonl
from modeling_nim.runs.recipe import parse_command_line


def main(argv: Sequence[str] | None = None) -> None:
    recipe = parse_command_line(__doc__, AttackRunRecipe, argv)
    accelerator = Accelerator()
    device = accelerator.device

    source = load_source(recipe.data, recipe.split)
    targets, processors = load_targets(recipe.models, device, default_sigmas=resolve(recipe).sigmas)
    check_classes(targets, source)
    undefended = [target.name for target in targets if target.sigma is None]
    plan = resolve(recipe, undefended)
    check_losses(targets, plan.attacks)
    jobs = plan_jobs(plan, targets, len(source))
    if recipe.pictures is not None:
        pictured_jobs(recipe.pictures, targets, jobs)  # before hours of attacks, not after
    order = evaluation_order([source.image_id(index) for index in range(len(source))])

    def load_batch(target: int, positions: range) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        indices = [order[position] for position in positions]
        images_01 = evaluation_batch(source, indices, processors[target]).to(device)  # (B, 3, H, W)
        labels = torch.tensor([source.stored(index)[1] for index in indices], device=device)
        return images_01, labels, [source.image_id(index) for index in indices]

    models, speeds = {}, {}
    for index, target in enumerate(targets):
        images_01 = load_batch(index, range(min(16, len(source))))[0]
        models[model_key(target.name, target.sigma)] = {
            "hash": model_hash(target.model),
            "repeatable": target.repeats_itself(images_01),
        }
        if target.name not in speeds:  # sigma changes nothing about the cost
            speeds[target.name] = measure_speed(target, images_01, recipe.micro_batch)
    if jobs:
        accelerator.print(cost_table(jobs, targets, speeds, plan.num_draws, accelerator.num_processes))

    settings = run_settings(recipe, device, models=models, data=source.fingerprint)
    units = plan_units([job.num_images for job in jobs], recipe.batch_size)
    records = RecordFile(recipe.output_dir, settings, units, accelerator)
    # no-attack predictions on the evaluation draws, by (target, seed), that attacked images are compared with
    controls: dict[tuple[int, int], dict[str, list[int]]] = {}
    position_of = {(target.name, target.sigma): index for index, target in enumerate(targets)}

    def remember_controls(lines: list[dict]) -> None:
        for line in lines:
            if line["attack"] == "none":
                key = (position_of[line["model"], line["sigma"]], line["seed"])
                controls.setdefault(key, {})[line["image_id"]] = line["predictions"]

    remember_controls(records.read())
    progress = tqdm(total=sum(unit.num_lines for unit in units), unit="image", disable=not accelerator.is_main_process)
    progress.update(sum(unit.num_lines for unit in units[: records.done]))
    for unit in records.rounds():
        start = time.perf_counter()
        lines = []
        if unit is not None:
            job = jobs[unit.job]
            images_01, labels, image_ids = load_batch(job.target, range(unit.start, unit.stop))
            attacked = attack_images(job, targets, images_01, labels, image_ids, plan.num_draws, recipe.micro_batch)
            clean = controls.get((job.target, job.seed), {})
            lines = score_batch(
                job, targets, attacked, images_01, labels, image_ids, clean, plan.num_draws, recipe.micro_batch
            )
            progress.set_postfix_str(
                f"{targets[job.target].name} {job.label} {job.threat_model} {job.epsilon_255:g}/255"
            )
        written = records.append(unit, lines, time.perf_counter() - start)
        remember_controls(written)
        progress.update(len(written))
    progress.close()

    if accelerator.is_main_process:
        output_dir = Path(recipe.output_dir)
        attacks, seconds = {}, {}
        for job, spent in zip(jobs, records.seconds_per_job(len(jobs)), strict=True):
            target = targets[job.target]
            group = (target.name, target.sigma, job.label, job.threat_model, job.epsilon_255)
            seconds[group] = seconds.get(group, 0.0) + spent
            if job.attack is not None:
                attacks[group] = {"kind": job.attack.kind} | job.attack.settings(job.epsilon_255)
        if recipe.pictures is not None:
            store_pictures(
                output_dir,
                recipe.pictures,
                targets,
                jobs,
                load_batch,
                plan.num_draws,
                recipe.micro_batch,
                source.class_names,
            )
        if recipe.reconstruction is not None:
            purifiers = {name: load_purifier(path, device) for name, path in recipe.reconstruction.purifiers.items()}
            write_jsonl(
                output_dir / "reconstruction.jsonl",
                reconstruction_records(recipe.reconstruction, purifiers, source, order),
            )
        if jobs:
            summary = summarise(read_jsonl(records.path), attacks, models, seconds)
            provenance = settings | {"attacks": [asdict(attack) for attack in plan.attacks], "seeds": plan.seeds}
            provenance |= {"num_draws": plan.num_draws, "num_processes": accelerator.num_processes}
            provenance |= {"records_sha256": records.sha256}
            write_json(output_dir / "summary.json", summary | {"provenance": provenance})
            print(table(summary["rows"]))
            for alarm in summary["alarms"]:
                print(f"ALARM {alarm['alarm']} [{alarm['where']}]: {alarm['message']}")
    records.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
