"""Certifies purified models: the L2 radius around each image within which no perturbation changes the majority vote.

    python scripts/launch.py scripts/run_certify.py scripts/recipes/digits/certify.yaml
    python scripts/reports/figures.py outputs/certify

Randomized smoothing (Cohen et al. 2019) with the defence's own noise. It needs a purifier whose answer depends on the noisy
image alone: `patch_statistics: input`, as in the paper's code, is refused. A run that was stopped continues where it was.

`output_dir` receives `run.json`, `certificates.jsonl` (one line per model, sigma and image) and `certified.json` (the table).
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from early_help import answer_help
    from starting import watch_signals

    answer_help(__file__)
    watch_signals()

import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from modeling_nim.data import evaluation_batch, load_source
from modeling_nim.robustness.certification import CertifyRecipe, certified_rows, certify_image, check_certifiable
from modeling_nim.robustness.cost import measure_speed
from modeling_nim.robustness.draws import evaluation_order
from modeling_nim.robustness.loading import check_classes, load_targets, model_hash
from modeling_nim.robustness.records import RecordFile, plan_units, read_jsonl, run_settings
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json
from modeling_nim.runs.recipe import parse_command_line


def main(argv: Sequence[str] | None = None) -> None:
    recipe = parse_command_line(__doc__, CertifyRecipe, argv)
    accelerator = Accelerator()

    source = load_source(recipe.data, recipe.split)
    targets, processors = load_targets(recipe.models, accelerator.device)
    check_classes(targets, source)
    order = evaluation_order([source.image_id(index) for index in range(len(source))])[: recipe.num_images]
    sigmas, models, expected = [], {}, 0.0
    for target, processor in zip(targets, processors, strict=True):
        images_01 = evaluation_batch(source, order[:4], processor).to(accelerator.device)
        sigmas.append(check_certifiable(target, images_01))
        models[f"{target.name} @ sigma {target.sigma}"] = model_hash(target.model)
        draws = recipe.num_selection_draws + recipe.num_draws
        expected += draws * measure_speed(target, images_01, recipe.micro_batch)["full_forward"]
    accelerator.print(
        f"expected: {1000 * expected:.0f} s per 1,000 images, {len(order) * expected / accelerator.num_processes:.0f} s here"
    )

    settings = run_settings(recipe, accelerator.device, models=models, data=source.fingerprint)
    settings["recipe"].pop("radii")  # the table's alone: another one can be made of the same certificates
    units = plan_units([len(order)] * len(targets), batch_size=1)
    records = RecordFile(recipe.output_dir, settings, units, accelerator, name="certificates")
    progress = tqdm(total=len(units), initial=records.done, unit="image", disable=not accelerator.is_main_process)
    for unit in records.rounds():
        start, lines = time.perf_counter(), []
        if unit is not None:
            index = order[unit.start]
            image_01 = evaluation_batch(source, [index], processors[unit.job])[0].to(accelerator.device)  # (3, H, W)
            label, image_id = source.stored(index)[1], source.image_id(index)
            lines = [certify_image(targets[unit.job], sigmas[unit.job], image_01, label, image_id, recipe)]
        progress.update(len(records.append(unit, lines, time.perf_counter() - start)))
    progress.close()

    if accelerator.is_main_process:
        rows = certified_rows(read_jsonl(records.path), recipe.radii)
        provenance = settings | {"records_sha256": records.sha256}
        write_json(Path(recipe.output_dir) / "certified.json", {"rows": rows, "provenance": provenance})
        print("model  sigma  L2 radius  certified accuracy  95% interval  abstained  images")
        for row in rows:
            low, high = row["ci95"]
            print(
                f"{row['model']}  {row['sigma']:g}  {row['radius_l2']:g}  {row['certified_accuracy']:.1f}  "
                f"{low:.1f} - {high:.1f}  {row['abstained']:.1f}  {row['num_images']}"
            )
    records.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
