"""Pre-train a model to undo a degradation: noise (NIM, Eq. 3-4 of the paper) or masks (MAE and SimMIM, Eq. 1-2).

    python scripts/launch.py scripts/run_pretrain.py scripts/recipes/digits/pretrain_nim_mae.yaml [key=value ...]

The same line on one GPU, on many (`--config_file scripts/launch/gpu_8_ddp.yaml`) or on CPU. Given again after the run
was broken off, it goes on from the newest checkpoint and arrives at the same numbers. SIGTERM saves and exits 0, SIGINT
(Ctrl-C) 130: after the current step, with several processes at the next multiple of `logging.every_steps`. In
`output_dir`:

    config.json, model.safetensors, preprocessor_config.json   the model, at the end
    checkpoints/step-00001000/                                 what the run resumes from
    log.jsonl                                                  one record every `logging.every_steps` steps
    recipe.yaml                                                the recipe with every default filled in
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from early_help import answer_help
    from starting import watch_signals

    answer_help(__file__)
    watch_signals()

import os
from dataclasses import dataclass, field

from accelerate.utils import set_seed

from modeling_nim import normalize
from modeling_nim.data import DataRecipe, load_source
from modeling_nim.data.loader import CropRecipe, TrainingImages, to_images_01, training_loader
from modeling_nim.data.randomness import generators, image_seeds
from modeling_nim.runs.bounds import Seed, check_fields
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.locks import lock_output_dir
from modeling_nim.runs.models import set_attention
from modeling_nim.runs.recipe import parse_command_line
from modeling_nim.training.checkpoints import load_newest_checkpoint, save_checkpoint
from modeling_nim.training.models import (
    ModelRecipe,
    enable_activation_checkpointing,
    make_pretraining_model,
    save_model_dir,
)
from modeling_nim.training.optimization import (
    OptimizationRecipe,
    learning_rate_at,
    make_average,
    make_optimizer,
    make_plan,
    set_learning_rate,
)
from modeling_nim.training.progress import Reporter, StopSignal
from modeling_nim.training.settings import (
    CheckpointRecipe,
    ExecutionRecipe,
    LoggingRecipe,
    decisive_settings,
    make_accelerator,
    save_recipe,
)
from modeling_nim.training.stochastic_depth import DropPaths


@dataclass
class PretrainRecipe:
    seed: Seed  # of everything that is random in the run
    output_dir: str  # where model, checkpoints and log go; a run there is continued
    data: DataRecipe
    model: ModelRecipe
    optimization: OptimizationRecipe
    crop: CropRecipe = field(default_factory=CropRecipe)
    execution: ExecutionRecipe = field(default_factory=ExecutionRecipe)
    checkpoints: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    logging: LoggingRecipe = field(default_factory=LoggingRecipe)

    def __post_init__(self):
        check_fields(self)


def main() -> int:
    recipe = parse_command_line(__doc__, PretrainRecipe)

    # The parts
    accelerator = make_accelerator(recipe)
    set_seed(recipe.seed)
    model = make_pretraining_model(recipe.model)
    config, draw = model.config, model.draw  # outside of the prepared model: a compiled graph holds no random draws
    execution = (recipe.execution.attn_implementation, recipe.execution.mixed_precision, accelerator.device)
    accelerator.print(f"attention: {set_attention([model], *execution)}")
    if recipe.execution.gradient_checkpointing:
        enable_activation_checkpointing(model)
    with accelerator.main_process_first():  # it lists or copies the data, the others find that done
        source = load_source(recipe.data, "train")
    images = TrainingImages(source, recipe.crop, config.image_size, recipe.seed, recipe.data.on_bad_image)
    plan = make_plan(recipe.optimization, accelerator.num_processes, len(source), accelerator.is_main_process)
    drop_paths = DropPaths(model)
    average = make_average(model, recipe.optimization.ema_decay) if recipe.optimization.ema_decay else None
    model, optimizer = accelerator.prepare(model, make_optimizer(model, recipe.optimization))
    set_seed(recipe.seed, device_specific=True)  # for dropout, if a model has any

    # Where to begin: everything that is random about an image depends on (seed, epoch, image), not on what was before
    lock_output_dir(accelerator, recipe.output_dir)
    checkpoints = os.path.join(recipe.output_dir, "checkpoints")
    settings = decisive_settings(recipe, plan.global_batch_size, len(source))
    found = load_newest_checkpoint(accelerator, checkpoints, settings, recipe.checkpoints.on_changed_recipe, average)
    step, state = found or (0, {})
    batch_sizes = (plan.global_batch_size, plan.per_device_batch_size)
    loader = training_loader(accelerator, images, recipe.data, *batch_sizes, step, plan.num_steps, state)
    reporter = Reporter(accelerator, recipe.output_dir, step, plan.num_steps)
    save_recipe(accelerator, recipe)
    reporter.name_bad_images(step, source.bad_images)
    stop = StopSignal(accelerator)

    # The loop
    model.train()
    micro_losses = []
    for batch in reporter.timed(loader):
        which = (batch["epochs"], batch["indices"])
        drop_paths.draw(recipe.seed, *which, accelerator.device)
        pixel_values = normalize(to_images_01(batch["pixels"]), config.image_mean, config.image_std)  # (B, 3, H, W)
        seeds = image_seeds(recipe.seed, *which, "degradation")  # (B,)
        draws = draw(len(seeds), generators(seeds, accelerator.device))
        learning_rate = learning_rate_at(step, recipe.optimization, plan)
        set_learning_rate(optimizer, learning_rate)
        with accelerator.accumulate(model):
            loss = model(pixel_values, **draws).loss  # Eq. 4, or Eq. 2 with masks
            accelerator.backward(loss)
            if accelerator.sync_gradients and recipe.optimization.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), recipe.optimization.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        micro_losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue

        step += 1
        if average:
            average.update_parameters(accelerator.unwrap_model(model, keep_torch_compile=False))
        reporter.add_step(micro_losses, plan.global_batch_size)
        micro_losses = []
        stopping = stop.requested(step, every=recipe.logging.every_steps)
        saving = stopping or step % recipe.checkpoints.every_steps == 0 or step == plan.num_steps
        if saving or step % recipe.logging.every_steps == 0:
            reporter.report(step, learning_rate)  # raises before a NaN can reach a checkpoint
        if saving:
            save_checkpoint(accelerator, checkpoints, step, settings, loader.state(), recipe.checkpoints.keep, average)
        if stopping or step == plan.num_steps:
            break

    reporter.bar.close()
    if step < plan.num_steps:
        accelerator.print(f"stopped at step {step} of {plan.num_steps}; the same command goes on from there")
    else:
        save_model_dir(accelerator, model, recipe.output_dir, average)
        accelerator.print(f"the model is in {recipe.output_dir}")
    reporter.close()
    return stop.exit_code if step < plan.num_steps else 0


if __name__ == "__main__":
    run_main(main)
