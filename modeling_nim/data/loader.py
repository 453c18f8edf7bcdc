"""From a source to the batches of a training step, in an order that is a function of (seed, step) alone."""

import dataclasses
import itertools
import math
import os
import signal
import tarfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ..image_processing import CHANNELS
from ..runs.bounds import Bounds, check_fields
from .base import DataRecipe, ImageSource
from .decode import BadImageError, decode_window, resize_window
from .randomness import image_seeds, uniforms
from .streams import StreamPosition, StreamSource


NUM_CROP_ATTEMPTS = 10
MAX_REPLACEMENTS = 1000

# An image as it is stored, or why it cannot be read, with its label and its id.
Candidate = tuple[bytes | np.ndarray | BadImageError, int, str]


@dataclass
class CropRecipe:
    """How a training image is cropped and flipped, on the CPU while it is decoded.

    - `crop: random_resized`: a window of `min_scale`..1 of the area, sides 3:4 to 4:3, resized to the model's size;
    - `crop: padded`: a window of the model's size at a random place of the image with `padding` black pixels around it;
    - `crop: native`: a window of the model's size at a random place of the image after its shorter side was resized to
      `shorter_side` pixels (smaller images are enlarged): textures keep their scale, as a purifier of photographs meets
      them. `shorter_side` must be at least the model's size;
    - `crop: none`: the largest centered square.
    """

    # random_resized, padded, native or none: see the docstring of CropRecipe
    crop: Literal["random_resized", "padded", "native", "none"] = "random_resized"
    min_scale: Annotated[float, Bounds(above=0, most=1)] = 0.2  # of random_resized: smallest share of the image's area
    # of native: the image is first resized to this shorter side
    shorter_side: Annotated[int, Bounds(least=1, most=65_536)] = 256
    padding: Annotated[int, Bounds(least=0)] = 4  # of padded: black pixels around the image
    flip: bool = True  # mirror half of the images, at random

    def __post_init__(self):
        check_fields(self, "crop.")


def random_window(
    height: int,
    width: int,
    numbers: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a window with a share of the area in `scale` and a width : height in `ratio`.

    `numbers` are 2 * NUM_CROP_ATTEMPTS + 2 uniforms: attempts at (area, ratio), then the place. When no attempt fits,
    the largest centered window with an allowed ratio.
    """
    areas = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[0:-2:2])
    ratios = np.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * numbers[1:-2:2])
    window_widths = np.rint(np.sqrt(areas * ratios)).astype(int)
    window_heights = np.rint(np.sqrt(areas / ratios)).astype(int)
    fits = (0 < window_widths) & (window_widths <= width) & (0 < window_heights) & (window_heights <= height)
    if fits.any():
        first = int(fits.argmax())
        window_height, window_width = int(window_heights[first]), int(window_widths[first])
        top = int(numbers[-2] * (height - window_height + 1))
        left = int(numbers[-1] * (width - window_width + 1))
        return top, left, window_height, window_width
    window_height = max(1, min(height, round(width / ratio[0])))
    window_width = max(1, min(width, round(height * ratio[1])))
    return (height - window_height) // 2, (width - window_width) // 2, window_height, window_width


def native_window(
    height: int, width: int, numbers: np.ndarray, image_size: int, shorter_side: int
) -> tuple[int, int, int, int]:
    """Top, left, height and width of the pixels that become a window of `image_size` pixels once the shorter side of
    the image has `shorter_side` pixels.

    It is counted in the image's own pixels, so that only the window is resized. `numbers` end in two
    uniforms: its place.
    """
    side = max(1, round(image_size * min(height, width) / shorter_side))
    return int(numbers[-2] * (height - side + 1)), int(numbers[-1] * (width - side + 1)), side, side


def center_window(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest centered square: top, left, height, width."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


class TrainingImages(Dataset):
    """Decoded, cropped, flipped uint8 images; its keys are `(epoch, index)`, and a batch of keys is fetched at once.

    A batch is a dict: `pixels` (B, H, W, 3) uint8 and `labels` (B,) are tensors; `epochs` and `indices` (B,) are arrays
    that stay on the host, where they seed whatever is random about the image later on; `bad_images` are the messages of
    the images that were skipped. A skipped image is replaced by the next good one: every step has its full batch. Where
    bad images are not to be skipped, the `BadImageError` comes in place of the batch (`Batches` raises it).
    """

    def __init__(
        self,
        source: ImageSource | StreamSource,
        crop: CropRecipe,
        image_size: int,
        seed: int,
        on_bad_image: str = "raise",
    ):
        if crop.crop == "native" and crop.shorter_side < image_size:
            raise ValueError(
                f"crop.shorter_side {crop.shorter_side} is less than the model's image size {image_size}: no window "
                f"fits; set crop.shorter_side to {image_size} or more"
            )
        if crop.crop == "padded" and crop.padding >= image_size:
            raise ValueError(
                f"crop.padding {crop.padding} may leave nothing of an image of {image_size} pixels; set it below that"
            )
        self.source, self.crop, self.image_size, self.seed = source, crop, image_size, seed
        self.on_bad_image = on_bad_image

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any] | BadImageError:
        epochs, indices = (np.asarray(column, dtype=np.int64) for column in zip(*keys, strict=True))
        try:
            return self.batch(epochs, indices, (self._good_images(int(index)) for index in indices))
        except BadImageError as error:
            return error

    def _good_images(self, index: int) -> Iterator[Candidate]:
        """The image at `index` and, in case it is bad, those after it."""
        for attempt in range(min(len(self.source), MAX_REPLACEMENTS)):
            where = (index + attempt) % len(self.source)
            try:
                stored, label = self.source.stored(where)
            except BadImageError as error:
                stored, label = error, -1
            yield stored, label, self.source.image_id(where)

    def batch(
        self,
        epochs: np.ndarray,
        indices: np.ndarray,
        candidates: Iterable[Iterator[Candidate]],
    ) -> dict[str, Any]:
        """Decode, cut and turn one image for each key: the first good one of its candidates `(stored, label, id)`."""
        numbers = uniforms(image_seeds(self.seed, epochs, indices, "crop"), 2 * NUM_CROP_ATTEMPTS + 3)
        pixels = np.empty((len(indices), self.image_size, self.image_size, len(CHANNELS)), np.uint8)
        labels, bad_images = [], []
        for position, images in enumerate(candidates):
            image, label = self._first_good(images, numbers[position, :-1], bad_images)
            flipped = self.crop.flip and numbers[position, -1] < 0.5
            pixels[position] = cv2.flip(image, 1) if flipped else image
            labels.append(label)
        if self.crop.crop == "padded":
            pixels = self._shift(pixels, numbers)
        return {
            "pixels": torch.from_numpy(pixels),
            "labels": torch.tensor(labels),
            "epochs": epochs,
            "indices": indices,
            "bad_images": bad_images,
        }

    def _first_good(
        self, images: Iterator[Candidate], numbers: np.ndarray, bad_images: list[str]
    ) -> tuple[np.ndarray, int]:
        """Pixels and label of the first image that can be read; the messages of those before it go to `bad_images`."""

        def window(height: int, width: int) -> tuple[int, int, int, int]:
            if self.crop.crop == "random_resized":
                return random_window(height, width, numbers, (self.crop.min_scale, 1.0))
            if self.crop.crop == "native":
                return native_window(height, width, numbers, self.image_size, self.crop.shorter_side)
            return center_window(height, width)

        for stored, label, image_id in images:
            try:
                if isinstance(stored, BadImageError):
                    raise stored
                if isinstance(stored, np.ndarray):
                    return resize_window(stored, window, self.image_size), label
                return decode_window(stored, image_id, window, self.image_size), label
            except BadImageError as error:
                if self.on_bad_image == "raise":
                    raise BadImageError(f"{error}; data.on_bad_image=skip leaves such images out") from None
                bad_images.append(str(error))
        raise ValueError(f"too many bad images in a row, the last: {bad_images[-1]}")

    def _shift(self, pixels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Adds a black border to each image and crops it at a random place of its own."""
        padding, size = self.crop.padding, self.image_size
        padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        offsets = (numbers[:, :2] * (2 * padding + 1)).astype(int)  # (B, 2)
        rows = offsets[:, 0, None] + np.arange(size)  # (B, H)
        columns = offsets[:, 1, None] + np.arange(size)
        return padded[np.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]


class StepSampler(Sampler):
    """Keys `(epoch, index)` of the steps `start_step`..`num_steps`, `batch_size` of them per step (the global batch).

    Every epoch is a permutation made from (seed, epoch), its incomplete last batch left out. The order at a step
    depends on nothing that happened before it, so a run resumes by starting here, and any number of processes shares
    it.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, start_step: int, num_steps: int):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start_step, self.num_steps = start_step, num_steps
        self.steps_per_epoch = num_images // batch_size

    def __len__(self):
        return (self.num_steps - self.start_step) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order_epoch = None
        for step in range(self.start_step, self.num_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
                order_epoch = epoch
            for index in order[position * self.batch_size : (position + 1) * self.batch_size]:
                yield epoch, int(index)


class StreamedImages(IterableDataset):
    """Batches as `TrainingImages` makes them, from a stream, without end.

    Each has its reader's number and its position after the batch, `reader` and `position`. A process has one reader for
    each loader worker, and they take turns; `positions` are those of an interrupted run.
    """

    def __init__(
        self, images: TrainingImages, batch_size: int, rank: int, num_processes: int, positions: list[StreamPosition]
    ):
        self.images, self.batch_size = images, batch_size
        self.rank, self.num_processes, self.positions = rank, num_processes, positions

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError | None]:
        worker = get_worker_info()
        reader = worker.id if worker else 0
        lanes, lane = self.num_processes * len(self.positions), self.rank + self.num_processes * reader
        position = dataclasses.replace(self.positions[reader])
        if position.batches > min(other.batches for other in self.positions):
            yield None  # this reader had its turn in the interrupted run, and leaves one out
        stream = self.images.source.epochs(self.images.seed, self.rank, self.num_processes, position)
        while True:
            # images of a stream have no index: the place in the stream seeds an image's draws
            indices = (position.batches * self.batch_size + np.arange(self.batch_size)) * lanes + lane
            candidates = (itertools.islice(stream, MAX_REPLACEMENTS) for _ in indices)
            try:
                batch = self.images.batch(np.full(self.batch_size, self.images.seed), indices, candidates)
            except (ValueError, OSError, tarfile.TarError) as error:
                yield ValueError(str(error))  # `Batches` raises it
                return
            position.batches += 1
            yield batch | {"reader": reader, "position": dataclasses.replace(position)}


class Batches:
    """The micro-batches of this process; `state` is what a resumed run needs besides the step.

    An error of a loader's worker is raised here: raised in the worker it would print a long traceback.
    """

    def __init__(self, loader: Iterable[Any], positions: list[StreamPosition]):
        self.loader, self.positions = loader, positions

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            if isinstance(batch, Exception):
                raise batch
            if batch is None:
                continue
            if "reader" in batch:
                self.positions[batch.pop("reader")] = batch.pop("position")
            yield batch

    def state(self) -> dict[str, Any]:
        """The positions of all processes' readers after the batches so far, JSON-able. Every process must call it."""
        if not self.positions:
            return {}
        return {"stream": gather_object([[dataclasses.asdict(position) for position in self.positions]])}


def training_loader(
    accelerator: Accelerator,
    images: TrainingImages,
    recipe: DataRecipe,
    batch_size: int,
    micro_batch_size: int,
    start_step: int,
    num_steps: int,
    state: dict[str, Any],
) -> Batches:
    """The micro-batches of this process for the steps `start_step`..`num_steps` (a stream goes on without end).

    `batch_size` images make a step of all processes, `micro_batch_size` a batch of the loader. `state` is that of the
    interrupted run's loader, or {}. Raises ValueError where a stream was shared among another number of readers.
    """
    if start_step >= num_steps:  # a finished run, started again
        return Batches([], [])
    settings = {
        "num_workers": recipe.num_workers,
        "pin_memory": torch.cuda.is_available(),
        "prefetch_factor": 4 if recipe.num_workers else None,
        "generator": torch.Generator(),  # the workers' seeds must not move the global random state
        "worker_init_fn": ignore_stop_signals,
    }
    if isinstance(images.source, StreamSource):
        rank, num_processes = accelerator.process_index, accelerator.num_processes
        settings["num_workers"] = images.source.num_readers(recipe.num_workers, num_processes)
        all_positions = _stream_positions(state, num_processes, max(1, settings["num_workers"]))
        stream = StreamedImages(images, micro_batch_size, rank, num_processes, all_positions[rank])
        loader = DataLoaderShard(stream, device=accelerator.device, batch_size=None, **settings)
        return Batches(loader, list(all_positions[rank]))
    sampler = StepSampler(len(images), batch_size, images.seed, start_step, num_steps)
    batches = BatchSampler(sampler, micro_batch_size, drop_last=True)
    loader = DataLoader(images, batch_sampler=batches, collate_fn=_as_fetched, **settings)
    return Batches(accelerator.prepare(loader), [])


def _stream_positions(state: dict[str, Any], num_processes: int, num_readers: int) -> list[list[StreamPosition]]:
    """Where each reader of each process begins."""
    if "stream" not in state:
        return [[StreamPosition() for _ in range(num_readers)] for _ in range(num_processes)]
    found = [[StreamPosition(**position) for position in positions] for positions in state["stream"]]
    if (len(found), len(found[0])) != (num_processes, num_readers):
        raise ValueError(
            f"the checkpoint's stream was shared by {len(found)} processes with {len(found[0])} readers each, now by "
            f"{num_processes} with {num_readers}: it cannot go on where it was; use the same numbers (data.num_workers)"
        )
    return found


def ignore_stop_signals(_: int) -> None:
    """Makes a loader's worker ignore signals that go to all processes: the run needs its workers until it has saved.

    A worker ends when the run tells it to, or when the run was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(run: int) -> None:
    """Ends this process at a SIGTERM from the process `run`, and at no other's."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)


def _as_fetched(batch):
    return batch  # `__getitems__` has made the batch already


def to_images_01(pixels: torch.Tensor) -> torch.Tensor:
    """`(B, H, W, 3)` uint8 to `(B, 3, H, W)` float32 in [0, 1], on whatever device the pixels are."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)
