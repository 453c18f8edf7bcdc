"""What figures need beyond numbers, stored beside the records so that drawing needs no model."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ..data import ImageSource, evaluation_batch
from ..image_processing import BICUBIC
from ..noise_nim import denormalize, normalize
from ..runs.files import write_json, write_jsonl, written_whole
from .draws import PICTURE, RECONSTRUCTION, stream_seed
from .evaluation import attack_images
from .images import SourceImages
from .jobs import Job, is_among
from .recipes import PicturesRecipe, ReconstructionRecipe
from .targets import PurifiedTarget, Target


def pictured_jobs(recipe: PicturesRecipe, targets: Sequence[Target], jobs: Sequence[Job]) -> dict[int, Job]:
    """For each target that is to be shown, the attack that it is shown under; ValueError when there is none at all."""
    chosen: dict[int, Job] = {}
    for job in jobs:
        target = targets[job.target]
        if recipe.models is not None and target.name not in recipe.models:
            continue
        if recipe.sigmas is not None and target.sigma is not None and not is_among(target.sigma, recipe.sigmas):
            continue
        if (job.label, job.epsilon_255, job.threat_model) == (recipe.attack, recipe.epsilon_255, "white_box"):
            chosen.setdefault(job.target, job)
    if not chosen:
        raise ValueError(
            f"pictures: no model meets the white-box attack {recipe.attack!r} at epsilon {recipe.epsilon_255:g}/255; "
            f"the run has {sorted({job.label for job in jobs})}"
        )
    return chosen


def store_pictures(
    directory: str | os.PathLike,
    recipe: PicturesRecipe,
    targets: Sequence[Target],
    jobs: Sequence[Job],
    images: SourceImages,
    num_draws: int,
    micro_batch: int,
) -> None:
    """Attacks the first images once more and stores every stage: `pictures.json` lists them, `pictures.safetensors` has
    the pixels, float32 in [0, 1] units (degraded images lie outside of it).

    Predictions and confidences belong to the very draw that is shown.
    """
    entries: list[dict[str, Any]] = []
    pixels: dict[str, torch.Tensor] = {}
    for index, job in pictured_jobs(recipe, targets, jobs).items():
        target = targets[index]
        images_01, labels, image_ids = images.batch(index, range(min(recipe.num_images, job.num_images)))
        attacked = attack_images(job, targets, images_01, labels, image_ids, num_draws, micro_batch)
        for kind, batch in (("clean", images_01), ("attacked", attacked.adversarial_01)):
            seeds = [stream_seed(job.seed, image_id, PICTURE) for image_id in image_ids]
            stages = {"input": batch}
            if isinstance(target, PurifiedTarget) and not target.without_purifier:
                stages["degraded"], stages["purified"], logits = target.stages(batch, seeds)
            else:
                with torch.no_grad():
                    logits = target.logits(batch, target.draw(seeds, batch.shape[1:]))
            confidence, prediction = logits.softmax(dim=-1).max(dim=-1)
            for row, image_id in enumerate(image_ids):
                entry = {
                    "model": target.name,
                    "sigma": target.sigma,
                    "image_id": image_id,
                    "label": int(labels[row]),
                    "kind": kind,
                    "attack": None if kind == "clean" else job.label,
                    "epsilon_255": 0.0 if kind == "clean" else job.epsilon_255,
                    "prediction": int(prediction[row]),
                    "confidence": float(confidence[row]),
                    "stages": {},
                }
                for stage, stage_images in stages.items():
                    key = f"{len(entries):05d}/{stage}"
                    pixels[key] = stage_images[row].detach().float().cpu().contiguous()
                    entry["stages"][stage] = key
                entries.append(entry)
    directory = Path(directory)
    with written_whole(directory / "pictures.safetensors") as temporary:
        save_file(pixels, temporary)
    write_json(directory / "pictures.json", {"class_names": images.class_names, "entries": entries})


def load_pictures(directory: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`{"class_names", "entries"}` and the pixels, as `store_pictures` wrote them."""
    directory = Path(directory)
    if not (directory / "pictures.json").exists():
        raise FileNotFoundError(f"{str(directory)!r} has no pictures.json: run the attack with a 'pictures' section")
    return json.loads((directory / "pictures.json").read_text()), load_file(directory / "pictures.safetensors")


@torch.no_grad()
def reconstruction_records(
    recipe: ReconstructionRecipe, purifiers: dict[str, tuple[nn.Module, Any]], source: ImageSource, order: Sequence[int]
) -> list[dict[str, Any]]:
    """How each purifier undoes the noise of each sigma, one record per purifier, sigma and image.

    `psnr_db` is the peak signal-to-noise ratio of the purified image. `loss` is the loss of pre-training (Figures 3 and
    6), None for images that are larger than the purifier. An image meets the same epsilon at every sigma.
    """
    records = []
    for name, (purifier, processor) in purifiers.items():
        config = purifier.config
        if not config.adds_noise:
            raise ValueError(f"reconstruction: {name!r} hides patches instead of adding noise; leave it out")
        if recipe.image_size is not None:
            processor = center_square_processor(recipe.image_size)
        device = next(purifier.parameters()).device
        for sigma in recipe.sigmas_255:
            for index in order[: recipe.num_images]:
                image_id = source.image_id(index)
                seed = stream_seed(0, image_id, RECONSTRUCTION)
                images_01 = evaluation_batch(source, [index], processor).to(device)  # (1, 3, H, W)
                pixel_values = normalize(images_01, config.image_mean, config.image_std)
                draw = purifier.draw(1, [torch.Generator(device).manual_seed(seed)], sigma, images_01.shape[-2:])
                purified = denormalize(purifier.purify(pixel_values, **draw), config.image_mean, config.image_std)
                psnr_db = -10 * float((purified - images_01).square().mean().log10())
                own_size = tuple(images_01.shape[-2:]) == (config.image_size, config.image_size)
                loss = float(purifier(pixel_values, **draw).loss) if own_size else None
                record = {"model": name, "sigma_255": sigma, "image_id": image_id, "loss": loss, "psnr_db": psnr_db}
                records.append(record)
    return records


def reconstruction_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per purifier and sigma the mean PSNR in dB over the images, and their number."""
    values: dict[tuple[str, float], list[float]] = {}
    for record in records:
        values.setdefault((record["model"], record["sigma_255"]), []).append(record["psnr_db"])
    return [
        {"model": model, "sigma_255": sigma, "psnr_db": round(sum(found) / len(found), 3), "num_images": len(found)}
        for (model, sigma), found in values.items()
    ]


def store_reconstruction(
    directory: str | os.PathLike, records: Sequence[dict[str, Any]], provenance: dict[str, Any]
) -> list[dict[str, Any]]:
    """Writes `reconstruction.jsonl`, the records, and `reconstruction.json`, their means; returns the means."""
    directory = Path(directory)
    write_jsonl(directory / "reconstruction.jsonl", records)
    written = (directory / "reconstruction.jsonl").read_bytes()
    provenance = provenance | {"records_sha256": hashlib.sha256(written).hexdigest()}
    rows = reconstruction_rows(records)
    write_json(directory / "reconstruction.json", {"rows": rows, "provenance": provenance})
    return rows


def center_square_processor(side: int) -> ViTImageProcessorPil:
    """Resizes the shorter side to `side` pixels and cuts out the middle square."""
    crop_size = {"height": side, "width": side}
    return ViTImageProcessorPil(
        do_convert_rgb=True, size={"shortest_edge": side}, resample=BICUBIC, do_center_crop=True, crop_size=crop_size
    )
