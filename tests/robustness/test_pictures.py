"""What a purifier gives back, measured image by image."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_DECODER
from transformers import set_seed

from modeling_nim import NIMConfig, NIMForPreTraining, image_processor_for, normalize
from modeling_nim.data import DataRecipe, load_source
from modeling_nim.noise_nim import denormalize
from modeling_nim.robustness.draws import RECONSTRUCTION, stream_seed
from modeling_nim.robustness.pictures import reconstruction_records, store_reconstruction
from modeling_nim.robustness.recipes import ReconstructionRecipe


@pytest.fixture
def purifier() -> NIMForPreTraining:
    set_seed(0)
    config = NIMConfig(**TINY, **TINY_DECODER, norm_pix_loss=False, patch_statistics="noisy", tile_stride=12)
    return NIMForPreTraining(config).eval().requires_grad_(False)


def records_of(purifier: NIMForPreTraining, image_size: int) -> list[dict]:
    recipe = ReconstructionRecipe({"tiny": "unused"}, [0, 30], num_images=2, image_size=image_size)
    source = load_source(DataRecipe(source="digits"), "test")
    return reconstruction_records(recipe, {"tiny": (purifier, image_processor_for(purifier.config))}, source, [3, 5, 7])


def test_psnr_of_whole_images_is_that_of_the_purified_ones(purifier):
    records = records_of(purifier, image_size=32)  # four tiles and more
    source = load_source(DataRecipe(source="digits"), "test")
    names = [(sigma, source.image_id(index)) for sigma in (0, 30) for index in (3, 5)]
    assert [(record["sigma_255"], record["image_id"]) for record in records] == names
    assert all(record["loss"] is None for record in records)
    mean, std = purifier.config.image_mean, purifier.config.image_std
    image_01 = torch.from_numpy(np.asarray(source[5][0], np.float32) / 255).permute(2, 0, 1)[None]
    generator = torch.Generator().manual_seed(stream_seed(0, source.image_id(5), RECONSTRUCTION))
    purified = denormalize(purifier.purify(normalize(image_01, mean, std), sigma=30, generator=generator), mean, std)
    expected = 10 * torch.log10(1 / (purified - image_01).square().mean())
    assert records[3]["psnr_db"] == pytest.approx(float(expected), abs=1e-4)


def test_images_of_the_purifiers_size_have_its_loss_too(purifier):
    record = records_of(purifier, image_size=16)[2]
    source = load_source(DataRecipe(source="digits"), "test")
    pixels = np.asarray(source[3][0].resize((16, 16), resample=3), np.float32) / 255
    pixel_values = normalize(
        torch.from_numpy(pixels).permute(2, 0, 1)[None], purifier.config.image_mean, purifier.config.image_std
    )
    generator = torch.Generator().manual_seed(stream_seed(0, source.image_id(3), RECONSTRUCTION))
    assert record["loss"] == pytest.approx(float(purifier(pixel_values, sigma=30, generator=generator).loss), rel=1e-4)


def test_what_is_stored_names_its_records_and_their_means(tmp_path):
    def record(sigma, image_id, psnr_db):
        return {"model": "tiny", "sigma_255": sigma, "image_id": image_id, "loss": None, "psnr_db": psnr_db}

    records = [record(0, "a", 40.0), record(0, "b", 41.0), record(30, "a", 28.5)]
    rows = store_reconstruction(tmp_path, records, {"data": "two images"})
    stored = json.loads((tmp_path / "reconstruction.json").read_text())
    content = (tmp_path / "reconstruction.jsonl").read_bytes()
    assert [json.loads(line) for line in content.splitlines()] == records
    assert stored == {
        "rows": [
            {"model": "tiny", "sigma_255": 0, "psnr_db": 40.5, "num_images": 2},
            {"model": "tiny", "sigma_255": 30, "psnr_db": 28.5, "num_images": 1},
        ],
        "provenance": {"data": "two images", "records_sha256": hashlib.sha256(content).hexdigest()},
    }
    assert rows == stored["rows"]
