"""Fine-tune a pre-trained encoder as a classifier, on images as they are or as the defense hands them on (Eq. 10).

    python scripts/launch.py scripts/run_finetune.py scripts/recipes/digits/finetune_denoised.yaml [key=value ...]

With `images: noisy` each image gets noise of its own sigma and nothing takes it away: for a smoothed classifier (Cohen
et al. 2019), which is certified without a purifier. With `images: denoised` the purifier takes the noise away and
clamps before the classifier sees the image. With an `adversary` the images are attacked first, through all of that, and
the purifier may learn too. As run_pretrain.py it runs on one machine or many and goes on where it was broken off. In
`output_dir`:

    config.json, model.safetensors, preprocessor_config.json   the classifier, at the end, unless it is frozen
    purified/                                                  purifier and classifier composed (Eq. 9), if one is named
    purifier/                                                  the purifier alone, if it was trained
    best/                                                      what is trained, at its best in validation, if asked for
    checkpoints/, log.jsonl, recipe.yaml                       as in pre-training
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from early_help import answer_help
    from starting import watch_signals

    answer_help(__file__)
    watch_signals()

import os
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_nim import NIMPurifiedImageClassification, image_processor_for, parse_sigma
from modeling_nim.data import BadImageError, DataRecipe, load_source
from modeling_nim.data.augment import AugmentationRecipe
from modeling_nim.data.evaluation import BAD_IMAGE_LABEL, EvaluationImages, evaluation_loader
from modeling_nim.data.loader import CropRecipe, TrainingImages, training_loader
from modeling_nim.noise_nim import MAX_SIGMA_255
from modeling_nim.runs.bounds import Bounds, Pixels, Seed, check_fields
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.locks import lock_output_dir
from modeling_nim.runs.models import load_purifier, set_attention
from modeling_nim.runs.recipe import parse_command_line
from modeling_nim.training.adversary import AdversaryRecipe, epsilon_255_at
from modeling_nim.training.checkpoints import load_newest_checkpoint, save_checkpoint
from modeling_nim.training.consistency import ConsistencyRecipe
from modeling_nim.training.finetuning import FeatureLossRecipe, Finetuning
from modeling_nim.training.models import (
    enable_activation_checkpointing,
    load_classifier,
    load_frozen_classifier,
    save_model_dir,
    write_model_dir,
)
from modeling_nim.training.optimization import (
    BatchSize,
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
class ValidationRecipe:
    """The split whose accuracy is measured every `every_epochs`, with images as in training, at `defense_sigma`."""

    # which images; validation is the part that data.validation_fraction holds out
    split: Literal["none", "validation", "test"] = "none"
    every_epochs: Annotated[float, Bounds(above=0, most=1_000_000)] = 1.0  # how often
    batch_size: BatchSize = 64  # images per process and step

    def __post_init__(self):
        check_fields(self, "validation.")


@dataclass
class FinetuneRecipe:
    seed: Seed  # of everything that is random in the run
    output_dir: str  # where model, checkpoints and log go; a run there is continued
    data: DataRecipe
    optimization: OptimizationRecipe
    init: str  # a pre-trained model, a classifier or a composed model: a directory or a Hub id
    trust_remote_code: bool = False  # of a frozen classifier: runs the Python code beside its weights
    # what the classifier learns from: images as they are, with noise, or as the defense hands them on (Eq. 10)
    images: Literal["original", "noisy", "denoised"] = "original"
    sigma: str | float = "uniform(0, 30)"  # of the noise in training; the paper's
    purifier: str | None = None  # None: `init` itself, where images are denoised
    # share of patches that a purifier trained with masks hides, here and in the composed model; null: its own
    mask_ratio: Annotated[float, Bounds(least=0, below=1)] | None = None
    # of the composed model and of validation
    defense_sigma: Annotated[float, Bounds(least=0, most=MAX_SIGMA_255)] = 30.0
    # of the training images; larger than the purifier's, they are purified in tiles
    image_size: Pixels | None = None
    # share of residual branches left out at the last layer; earlier layers get less
    drop_path_rate: Annotated[float, Bounds(least=0, below=1)] = 0.0
    # share of the target that is spread over all classes
    label_smoothing: Annotated[float, Bounds(least=0, below=1)] = 0.0
    crop: CropRecipe = field(default_factory=CropRecipe)
    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)
    adversary: AdversaryRecipe = field(default_factory=AdversaryRecipe)
    consistency: ConsistencyRecipe = field(default_factory=ConsistencyRecipe)
    feature_loss: FeatureLossRecipe = field(default_factory=FeatureLossRecipe)
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)
    execution: ExecutionRecipe = field(default_factory=ExecutionRecipe)
    checkpoints: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    logging: LoggingRecipe = field(default_factory=LoggingRecipe)

    def __post_init__(self):
        check_fields(self)
        parse_sigma(self.sigma), parse_sigma(self.defense_sigma)
        if self.images == "denoised" and self.purifier is None:
            self.purifier = self.init
        if self.mask_ratio is not None and self.purifier is None:
            raise ValueError(
                f"mask_ratio {self.mask_ratio:g} is for a purifier that hides patches: name one, or leave it out"
            )
        if self.images != "denoised" and self.adversary.trains != "classifier":
            raise ValueError(
                f"adversary.trains {self.adversary.trains} needs the purifier in the way of the images: "
                "set images=denoised"
            )
        if self.images == "original" and self.consistency.num_draws > 1:
            raise ValueError(
                f"consistency.num_draws {self.consistency.num_draws} are draws of the noise: set images=denoised or "
                "images=noisy"
            )
        if self.image_size is not None and (self.images != "denoised" or self.adversary.trains != "purifier"):
            raise ValueError(
                f"image_size {self.image_size} is for a purifier that learns on images larger than its own, before a "
                "frozen classifier: set images=denoised adversary.trains=purifier, or leave it out"
            )
        if self.feature_loss.weight and self.adversary.trains != "purifier":
            raise ValueError(
                f"feature_loss.weight {self.feature_loss.weight} is for a purifier before a frozen classifier: set "
                "adversary.trains=purifier"
            )
        if self.feature_loss.weight and self.execution.compile:
            raise ValueError(
                "feature_loss looks into the classifier, which compiled code does not allow: unset execution.compile"
            )


def main() -> int:
    recipe = parse_command_line(__doc__, FinetuneRecipe)

    # The parts
    accelerator = make_accelerator(recipe)
    with accelerator.main_process_first():  # it lists or copies the data, the others find that done
        source = load_source(recipe.data, "train")
    set_seed(recipe.seed)
    model, purified_model = make_models(accelerator, recipe, source.class_names)
    plan = make_plan(recipe.optimization, accelerator.num_processes, len(source), accelerator.is_main_process)
    drop_paths = DropPaths(model)
    average = make_average(model, recipe.optimization.ema_decay) if recipe.optimization.ema_decay else None
    model, optimizer = accelerator.prepare(model, make_optimizer(model, recipe.optimization))
    set_seed(recipe.seed, device_specific=True)  # for dropout, if a model has any
    finetuning = Finetuning(accelerator, recipe, model, purified_model)
    size = recipe.image_size or finetuning.config.image_size
    images = TrainingImages(source, recipe.crop, size, recipe.seed, recipe.data.on_bad_image)

    # Where to begin: everything that is random about an image depends on (seed, epoch, image), not on what was before
    lock_output_dir(accelerator, recipe.output_dir)
    checkpoints = os.path.join(recipe.output_dir, "checkpoints")
    settings = decisive_settings(recipe, plan.global_batch_size, len(source))
    found = load_newest_checkpoint(accelerator, checkpoints, settings, recipe.checkpoints.on_changed_recipe, average)
    step, state = found or (0, {"best_accuracy": -1.0})
    batch_sizes = (plan.global_batch_size, plan.per_device_batch_size)
    loader = training_loader(accelerator, images, recipe.data, *batch_sizes, step, plan.num_steps, state)
    validation_loader = make_validation_loader(accelerator, recipe, finetuning.config)
    validation_steps = max(1, round(recipe.validation.every_epochs * plan.steps_per_epoch))
    reporter = Reporter(accelerator, recipe.output_dir, step, plan.num_steps)
    save_recipe(accelerator, recipe)
    reporter.name_bad_images(step, source.bad_images)
    stop = StopSignal(accelerator)

    # The loop
    finetuning.train()
    micro_losses = []
    for batch in reporter.timed(loader):
        which = (batch["epochs"], batch["indices"])
        drop_paths.draw(recipe.seed, *which, accelerator.device)
        images_01, targets = finetuning.augmented(batch)  # (B, 3, H, W), (B, num_labels)
        clean = finetuning.clean(images_01, targets)
        images_01 = finetuning.attack(clean, which, epsilon_255_at(step, recipe.adversary, plan))
        learning_rate = learning_rate_at(step, recipe.optimization, plan)
        set_learning_rate(optimizer, learning_rate)
        with accelerator.accumulate(model):
            loss = finetuning.loss(images_01, clean, which)  # Eq. 10
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
        if validation_loader and (step % validation_steps == 0 or step == plan.num_steps):
            state = keep_best(finetuning, average, validation_loader, reporter, step, state)
        if saving:
            both = state | loader.state()
            save_checkpoint(accelerator, checkpoints, step, settings, both, recipe.checkpoints.keep, average)
        if stopping or step == plan.num_steps:
            break

    reporter.bar.close()
    if step < plan.num_steps:
        accelerator.print(f"stopped at step {step} of {plan.num_steps}; the same command goes on from there")
    else:
        save_models(finetuning, purified_model, average)
    reporter.close()
    return stop.exit_code if step < plan.num_steps else 0


def make_models(
    accelerator: Accelerator, recipe: FinetuneRecipe, class_names: list[str] | None
) -> tuple[PreTrainedModel, NIMPurifiedImageClassification | None]:
    """What is trained, and the composed model if a purifier is named; they share their parts.

    Trained is the classifier, or the composed model where the purifier learns too (a frozen classifier included).
    """
    trains, execution = recipe.adversary.trains, recipe.execution
    if accelerator.distributed_type == DistributedType.FSDP and (
        trains != "classifier" or recipe.adversary.attack != "none"
    ):
        raise ValueError("the adversary section asks whole models: launch with DDP instead of FSDP")
    if trains == "purifier":
        classifier = load_frozen_classifier(recipe.init, recipe.trust_remote_code)
    else:
        classifier = load_classifier(recipe.init, class_names, recipe.drop_path_rate)
    purified_model, parts = None, [classifier]
    if recipe.purifier:
        purifier = load_purifier(recipe.purifier, recipe.mask_ratio).to(accelerator.device)
        if trains == "classifier":
            purifier.requires_grad_(False)
        if execution.compile and trains == "classifier":
            purifier.reconstruct = torch.compile(purifier.reconstruct)
        size = recipe.image_size
        purified_model = NIMPurifiedImageClassification.from_parts(
            purifier, classifier, recipe.defense_sigma, image_size=size, classifier_image_size=size
        )
        parts.append(purifier)
    # once composed: composing sets the attention of its parts
    settings = (execution.attn_implementation, execution.mixed_precision, accelerator.device)
    accelerator.print(f"attention: {set_attention(parts, *settings)}")
    for part in parts:
        if execution.gradient_checkpointing and any(weight.requires_grad for weight in part.parameters()):
            enable_activation_checkpointing(part)
    return (classifier if trains == "classifier" else purified_model), purified_model


def make_validation_loader(
    accelerator: Accelerator, recipe: FinetuneRecipe, config: PreTrainedConfig
) -> DataLoader | None:
    """The images of `validation.split` as the model with this configuration takes them; None without a split."""
    if recipe.validation.split == "none":
        return None
    held_out = EvaluationImages(load_source(recipe.data, recipe.validation.split), image_processor_for(config))
    return accelerator.prepare(evaluation_loader(held_out, recipe.validation.batch_size, recipe.data.num_workers))


def save_models(
    finetuning: Finetuning, purified_model: NIMPurifiedImageClassification | None, average: AveragedModel | None
) -> None:
    """Write what was trained into the output directory, alone and composed; every process must call it."""
    accelerator, recipe = finetuning.accelerator, finetuning.recipe
    if not finetuning.trains_purifier:
        save_model_dir(accelerator, finetuning.model, recipe.output_dir, average)
    composes = purified_model and not recipe.trust_remote_code  # a classifier with code of its own stays where it is
    if purified_model and accelerator.is_main_process:
        purifier, classifier = purified_model.purifier, purified_model.classifier
        if finetuning.trains_purifier:
            trained = (
                average.module if average else accelerator.unwrap_model(finetuning.model, keep_torch_compile=False)
            )
            purifier, classifier = trained.purifier, trained.classifier
            write_model_dir(purifier, os.path.join(recipe.output_dir, "purifier"))
            if recipe.adversary.trains == "both":
                write_model_dir(classifier, recipe.output_dir)
        else:
            classifier = type(classifier).from_pretrained(recipe.output_dir)
        if composes:
            composed = NIMPurifiedImageClassification.from_parts(purifier.cpu(), classifier.cpu(), recipe.defense_sigma)
            write_model_dir(composed, os.path.join(recipe.output_dir, "purified"))
    accelerator.print(
        f"what was trained is in {recipe.output_dir}{', composed in purified/ under it' * bool(composes)}"
    )


def keep_best(
    finetuning: Finetuning,
    average: AveragedModel | None,
    loader: DataLoader,
    reporter: Reporter,
    step: int,
    state: dict[str, Any],
) -> dict[str, Any]:
    """Measure and report the accuracy, and write the model to `best/` when it is the highest; the state after it."""
    model, output_dir = finetuning.model, finetuning.recipe.output_dir
    accuracy, bad_images = validate(finetuning, average.module if average else model, loader)
    reporter.name_bad_images(step, bad_images)
    reporter.write({"step": step, "validation_accuracy": accuracy})
    if accuracy <= state["best_accuracy"]:
        return state
    save_model_dir(finetuning.accelerator, model, os.path.join(output_dir, "best"), average)
    return {"best_accuracy": accuracy}


@torch.inference_mode()
def validate(finetuning: Finetuning, model: torch.nn.Module, loader: DataLoader) -> tuple[float, list[str]]:
    """Accuracy of `model` in percent, with the same noise for an image every time, and the messages of the bad images
    of this process.

    What is trained goes back to training mode. Raises `BadImageError` where bad images are not to be skipped.
    """
    accelerator, recipe = finetuning.accelerator, finetuning.recipe
    model.eval()
    num_right = num_images = 0
    bad_images = []
    for batch in loader:
        bad_images += [message for message in batch["bad_images"] if message]
        if bad_images and recipe.data.on_bad_image == "raise":
            raise BadImageError(f"{bad_images[0]}; data.on_bad_image=skip leaves such images out")
        logits = finetuning.predict(model, batch["images_01"], batch["indices"].cpu().numpy())
        predictions, labels = accelerator.gather_for_metrics((logits.argmax(dim=-1), batch["labels"]))
        num_right += int((predictions == labels).sum())
        num_images += int((labels != BAD_IMAGE_LABEL).sum())
    finetuning.train()
    if num_images == 0:
        raise ValueError(f"none of the images of split {recipe.validation.split!r} can be read; check data.path")
    return 100 * num_right / num_images, bad_images


if __name__ == "__main__":
    run_main(main)
