"""Measure the training loader against the plain Pillow pipeline, on the same photos, on one core.

    python scripts/bench/loader.py [--path FOLDER_OF_PARQUET --split validation] [--output outputs/bench/loader.json]

Without a path the photos are the two that come with scikit-learn, at ImageNet's usual 500 pixels. `plain` opens,
converts to RGB, crops, resizes (bicubic), makes a float tensor and normalizes. `ours` is what a loader worker does,
from the stored bytes to the flipped uint8 batch; `ours_normalized` adds on the same core what a training step does on
the device.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from early_help import answer_help

    answer_help(__file__)  # before the imports below, which take seconds

import argparse
import io
import time

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from modeling_nim import normalize
from modeling_nim.configuration_nim import IMAGENET_MEAN, IMAGENET_STD
from modeling_nim.data import DataRecipe, ImageSource, load_source
from modeling_nim.data.loader import NUM_CROP_ATTEMPTS, CropRecipe, TrainingImages, random_window, to_images_01
from modeling_nim.data.randomness import image_seeds, uniforms
from modeling_nim.runs.errors import run_main
from modeling_nim.runs.files import write_json
from modeling_nim.runs.machine import machine


def plain_pipeline(source, indices, numbers, crop: CropRecipe, size: int) -> torch.Tensor:
    """The pipeline that most training scripts have, with the windows that ours draws."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    images = []
    for index, row in zip(indices, numbers, strict=True):
        image = Image.open(io.BytesIO(source.stored(index)[0])).convert("RGB")
        top, left, height, width = random_window(image.height, image.width, row, (crop.min_scale, 1.0))
        image = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        images.append((tensor - mean) / std)
    return torch.stack(images)  # (B, 3, H, W)


class SamplePhotos(ImageSource):
    """scikit-learn's two sample photos, again and again, re-encoded at 500 pixels and quality 90."""

    class_names = ["photo"]

    def __init__(self, num_images: int = 250):
        self.num_images = num_images
        self.photos = []
        for pixels in load_sample_images().images:
            buffer = io.BytesIO()
            Image.fromarray(pixels).resize((500, 334), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            self.photos.append(buffer.getvalue())
        self.fingerprint = f"scikit-learn's sample photos, repeated: {num_images}"

    def __len__(self):
        return self.num_images

    def stored(self, index):
        return self.photos[index % len(self.photos)], 0

    def image_id(self, index):
        return f"photo {index}"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", help="a folder of parquet shards SPLIT-*.parquet with JPEG photos")
    parser.add_argument("--split", default="validation", help="which split of --path (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the images that come out (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=50, help="images fetched at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="passes over all photos (default: %(default)s)")
    parser.add_argument(
        "--output", default="outputs/bench/loader.json", help="where the numbers go (default: %(default)s)"
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()

    torch.set_num_threads(1)
    if arguments.path:
        source = load_source(DataRecipe(source="parquet", path=arguments.path, test_split=arguments.split), "test")
    else:
        source = SamplePhotos()
    crop = CropRecipe()
    images = TrainingImages(source, crop, arguments.size, seed=0)
    batches = np.array_split(np.arange(len(source)), max(1, len(source) // arguments.batch_size))

    def plain(epoch: int) -> None:
        for batch in batches:
            numbers = uniforms(image_seeds(0, epoch, batch, "crop"), 2 * NUM_CROP_ATTEMPTS + 3)[:, :-1]
            plain_pipeline(source, batch, numbers, crop, arguments.size)

    def ours(epoch: int) -> None:
        for batch in batches:
            images.__getitems__([(epoch, index) for index in batch])

    def ours_normalized(epoch: int) -> None:
        for batch in batches:
            pixels = images.__getitems__([(epoch, index) for index in batch])["pixels"]
            normalize(to_images_01(pixels), IMAGENET_MEAN, IMAGENET_STD)

    seconds: dict[str, list[float]] = {"plain": [], "ours": [], "ours_normalized": []}
    for epoch in range(arguments.rounds + 1):
        for pipeline in (plain, ours, ours_normalized):  # in turns, so that a busy machine slows them alike
            before = time.process_time()  # of this core alone
            pipeline(epoch)
            if epoch:  # round 0 warms up
                seconds[pipeline.__name__].append(time.process_time() - before)
    rates = {name: len(source) / float(np.median(values)) for name, values in seconds.items()}
    result = {
        "images_per_s_per_core": rates,
        "ratio_to_plain": {name: rates[name] / rates["plain"] for name in ("ours", "ours_normalized")},
        "num_images": len(source),
        "data": source.fingerprint,
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        **machine(torch.device("cpu")),
    }
    write_json(arguments.output, result)
    print(f"plain {rates['plain']:.0f}, ours {rates['ours']:.0f} images/s on one core: {arguments.output}")


if __name__ == "__main__":
    run_main(main)
