"""Certifies purified models: the L2 radius around each image within which no perturbation changes the majority vote.

    python scripts/launch.py scripts/run_certify.py scripts/recipes/digits/certify.yaml
    python scripts/reports/figures.py outputs/certify

Randomized smoothing (Cohen et al. 2019) with the defense's own noise. It needs a purifier whose answer depends on the
noisy image alone: `patch_statistics: input`, as in the paper's code, is refused. A run that was stopped continues where
it was.

`output_dir` receives `run.json`, `certificates.jsonl` (a line per model, sigma and image) and `certified.json`.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from early_help import answer_help
    from starting import watch_signals

    answer_help(__file__)
    watch_signals()

from collections.abc import Sequence

from accelerate import Accelerator
from tqdm import tqdm

from modeling_nim.data import load_source
from modeling_nim.robustness.alarms import print_alarms
from modeling_nim.robustness.certification import CertificationRun, CertifyRecipe
from modeling_nim.robustness.checks import stated_accuracy
from modeling_nim.robustness.images import SourceImages
from modeling_nim.robustness.loading import load_targets, model_hash
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.processes import end_sharing
from modeling_nim.runs.recipe import parse_command_line


def main(argv: Sequence[str] | None = None) -> None:
    recipe = parse_command_line(__doc__, CertifyRecipe, argv)
    accelerator = Accelerator()

    source = load_source(recipe.data, recipe.split)
    targets, processors = load_targets(recipe.models, accelerator.device)
    paths = {model.name: model.path for model in recipe.models}
    stated = [stated_accuracy(paths[target.name], target, model_hash(target.weights)) for target in targets]
    run = CertificationRun(targets, SourceImages(source, processors, accelerator.device), recipe, stated)
    here = run.num_images * run.seconds_per_image / accelerator.num_processes
    accelerator.print(f"expected: {1000 * run.seconds_per_image:.0f} s per 1,000 images, {here:.0f} s here")
    print_alarms(accelerator, run.warnings)

    certificates = run.open(accelerator)
    progress = tqdm(
        total=len(certificates.units), initial=certificates.done, unit="image", disable=not accelerator.is_main_process
    )
    for written in run.rounds(certificates):
        progress.update(len(written))
    progress.close()

    if accelerator.is_main_process:
        print("model  sigma  L2 radius  certified accuracy  95% interval  abstained  images")
        for row in run.rows(certificates):
            low, high = row["ci95"]
            print(
                f"{row['model']}  {row['sigma']:g}  {row['radius_l2']:g}  {row['certified_accuracy']:.1f}  "
                f"{low:.1f} - {high:.1f}  {row['abstained']:.1f}  {row['num_images']}"
            )
    certificates.close()
    accelerator.wait_for_everyone()
    end_sharing(accelerator)


if __name__ == "__main__":
    run_main(main)
