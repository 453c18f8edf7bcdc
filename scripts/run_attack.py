"""Attacks models and says what is left of their accuracy: records, a summary with intervals, and alarms.

    python scripts/launch.py scripts/run_attack.py scripts/recipes/digits/attack.yaml
    python scripts/launch.py scripts/run_attack.py scripts/recipes/digits/attack_standard.yaml num_images=32

Several GPUs: `scripts/launch.py --num_processes N` splits the images; on CPUs, with `--cpu` too.
A run that was stopped continues where it was when it is started again.

`output_dir` receives `run.json` (settings, hashes, versions), `records.jsonl` (one line per image, attack and seed),
`seconds.jsonl`, `summary.json`, and with the sections `pictures` and `reconstruction` what `reports/figures.py` draws
(`reconstruction.json` has the means of `reconstruction.jsonl`).
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from early_help import answer_help
    from starting import watch_signals

    answer_help(__file__)
    watch_signals()

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from modeling_nim.data import load_source
from modeling_nim.robustness.alarms import print_alarms
from modeling_nim.robustness.checks import stated_accuracy
from modeling_nim.robustness.images import SourceImages
from modeling_nim.robustness.loading import load_targets, load_with_processor, model_hash
from modeling_nim.robustness.pictures import pictured_jobs, reconstruction_records, store_pictures, store_reconstruction
from modeling_nim.robustness.protocols import default_sigmas, resolve
from modeling_nim.robustness.recipes import AttackRunRecipe
from modeling_nim.robustness.run import AttackRun
from modeling_nim.robustness.summary import table
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.processes import end_sharing
from modeling_nim.runs.recipe import parse_command_line


def main(argv: Sequence[str] | None = None) -> None:
    recipe = parse_command_line(__doc__, AttackRunRecipe, argv)
    accelerator = Accelerator()

    # the parts
    source = load_source(recipe.data, recipe.split)
    targets, processors = load_targets(recipe.models, accelerator.device, default_sigmas(recipe))
    images = SourceImages(source, processors, accelerator.device)
    plan = resolve(recipe, undefended=[target.name for target in targets if target.sigma is None])
    paths = {model.name: model.path for model in recipe.models}
    stated = [stated_accuracy(paths[target.name], target, model_hash(target.weights)) for target in targets]
    purifiers = {}
    if recipe.reconstruction is not None:
        named = recipe.reconstruction.purifiers
        purifiers = {name: load_with_processor(path, accelerator.device) for name, path in named.items()}
    run = AttackRun(targets, images, plan, recipe.micro_batch, stated)
    if recipe.pictures is not None:
        pictured_jobs(recipe.pictures, targets, run.jobs)  # before hours of attacks, not after
    if run.jobs:
        accelerator.print(run.cost(accelerator.num_processes))
    print_alarms(accelerator, run.warnings)

    # the loop
    records = run.open(recipe, recipe.batch_size, accelerator)
    progress = tqdm(
        total=sum(job.num_images for job in run.jobs), unit="image", disable=not accelerator.is_main_process
    )
    progress.update(sum(unit.num_lines for unit in records.units[: records.done]))
    for job, written in run.rounds(records):
        if job is not None:
            name = targets[job.target].name
            progress.set_postfix_str(f"{name} {job.label} {job.threat_model} {job.epsilon_255:g}/255")
        progress.update(len(written))
    progress.close()

    # what is left
    if accelerator.is_main_process:
        directory = Path(recipe.output_dir)
        if recipe.pictures is not None:
            store_pictures(directory, recipe.pictures, targets, run.jobs, images, plan.num_draws, recipe.micro_batch)
        if recipe.reconstruction is not None:
            lines = reconstruction_records(recipe.reconstruction, purifiers, source, images.order)
            hashes = {name: {"hash": model_hash(purifier)} for name, (purifier, _) in purifiers.items()}
            for row in store_reconstruction(directory, lines, records.settings | {"models": hashes}):
                psnr = f"PSNR {row['psnr_db']:.2f} dB on {row['num_images']} images"
                print(f"{row['model']} at sigma {row['sigma_255']:g}: {psnr}")
        if run.jobs:
            summary = run.summary(records, accelerator.num_processes)
            print(table(summary.rows))
            print_alarms(accelerator, summary.alarms)
    accelerator.wait_for_everyone()
    records.close()
    end_sharing(accelerator)


if __name__ == "__main__":
    run_main(main)
