"""A defended classifier as one file that runs without this package: ONNX, or a program of `torch.export`.

Degrade, reconstruct and classify become one graph with a dynamic batch. The noise is drawn inside the graph, anew in
each call, or it is the second input. The file also says how its images are prepared and what its classes are called.
"""

import json
import logging
import os
import secrets
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..modeling_nim_purified import NIMPurifiedImageClassification
from ..noise_nim import parse_sigma
from .files import write_bytes


FORMATS = {"onnx": ".onnx", "torch_export": ".pt2"}
FACTS = "modeling_nim.json"  # what `describe` says, inside a file of torch.export


class DefendedLogits(nn.Module):
    r"""
    The purified model as a function of tensors alone: what is exported.

    Args:
        model: the defended classifier.
        sigma: scale of the noise on 0..255; None is the configuration's. A purifier that adds no noise takes none.
        num_votes: noise draws per answer; None is the configuration's.

    Raises:
        ValueError: sigma is a distribution, or is given although the purifier adds no noise.
    """

    def __init__(
        self,
        model: NIMPurifiedImageClassification,
        sigma: str | float | None = None,
        num_votes: int | None = None,
    ):
        super().__init__()
        self.model = model.eval()
        self.sigma_255 = None
        if model.config.purifier_config.adds_noise:
            specification = parse_sigma(model.config.sigma if sigma is None else sigma)
            if specification.kind != "fixed":
                raise ValueError(f"an exported model has one sigma, got {specification.kind}: pass a number on 0..255")
            self.sigma_255 = float(specification.a)
        elif sigma is not None:
            raise ValueError(f"the purifier hides patches instead of adding noise: leave sigma {sigma!r} out")
        self.num_votes = model.config.num_votes if num_votes is None else num_votes

    def forward(self, pixel_values: torch.Tensor, epsilon: torch.Tensor | None = None) -> torch.Tensor:
        """`(B, L)` logits of normalized images `(B, 3, H, W)` and as much noise; K votes take `(B, K, 3, H, W)`."""
        return self.model(pixel_values, sigma=self.sigma_255, epsilon=epsilon, num_votes=self.num_votes).logits

    def example(self, noise: Literal["inside", "input"], batch_size: int = 2) -> tuple[torch.Tensor, ...]:
        """Random inputs of the right shapes, from the global random state."""
        config = self.model.config
        shape = (config.purifier_config.num_channels, config.image_size, config.image_size)
        votes = () if self.num_votes == 1 else (self.num_votes,)
        draws = {"inside": (), "input": (torch.randn(batch_size, *votes, *shape),)}[noise]
        return (torch.randn(batch_size, *shape), *draws)

    def describe(self, noise: Literal["inside", "input"]) -> dict[str, Any]:
        """How images are prepared, what the classes are called, and what the defense does."""
        config = self.model.config
        return {
            "image_size": config.image_size,
            "image_mean": list(config.image_mean),
            "image_std": list(config.image_std),
            "id2label": {str(index): label for index, label in config.id2label.items()},
            "sigma_255": self.sigma_255,
            "num_votes": self.num_votes,
            "noise": noise,
        }


def export_program(
    defended: DefendedLogits, noise: Literal["inside", "input"] = "inside"
) -> torch.export.ExportedProgram:
    """Traces the model into one graph whose batch size is free.

    Raises:
        ValueError: the purifier hides patches, so that there is no epsilon to be an input.
    """
    purifier = defended.model.config.purifier_config
    if noise == "input" and (purifier.hides_patches or not purifier.adds_noise):
        raise ValueError(
            f'the purifier\'s degradation is "{purifier.degradation}", and epsilon alone belongs to "noise": use '
            'noise="inside"'
        )
    inputs = defended.example(noise)
    with torch.no_grad(), _plain_attention_where_positions_have_a_bias(defended.model):
        return torch.export.export(defended, inputs, dynamic_shapes=_dynamic_shapes(inputs))


@contextmanager
def _plain_attention_where_positions_have_a_bias(model: NIMPurifiedImageClassification) -> Iterator[None]:
    """Eager attention in BEiT and SimMIM: ONNX takes SDPA with their relative positions apart into other strides than
    those that were traced, and fails."""
    biases = ("use_relative_position_bias", "use_shared_relative_position_bias")
    parts = [part for part in (model.purifier, model.classifier) if any(getattr(part.config, b, False) for b in biases)]
    before = [part.config._attn_implementation for part in parts]
    for part in parts:
        part.set_attn_implementation("eager")
    try:
        yield
    finally:
        for part, implementation in zip(parts, before, strict=True):
            part.set_attn_implementation(implementation)


def _dynamic_shapes(inputs: tuple[torch.Tensor, ...]) -> tuple[dict[int, torch.export.Dim], ...]:
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in inputs)


def export_defended(
    defended: DefendedLogits,
    path: str | os.PathLike,
    format: Literal["onnx", "torch_export"] = "onnx",
    noise: Literal["inside", "input"] = "inside",
) -> None:
    """Writes the file. Inputs are `pixel_values` and, with `noise="input"`, `epsilon`; the output is `logits`."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Torch warns of its own internals: of a class that it will rename, and of one name for the two batch axes.
        warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)`|# The axis name")
        program, facts = export_program(defended, noise), defended.describe(noise)
        written = Path(folder) / f"model{FORMATS[format]}"
        if format == "torch_export":
            torch.export.save(program, written, extra_files={FACTS: json.dumps(facts)})
        else:
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists what torchvision would have added
            shapes = _dynamic_shapes(defended.example(noise))  # once more, or the axis loses its name
            onnx_program = torch.onnx.export(
                program, output_names=["logits"], dynamic_shapes=shapes, dynamo=True, verbose=False
            )
            for key, value in facts.items():
                onnx_program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
            onnx_program.save(written)
        write_bytes(path, written.read_bytes())


def load_exported(
    path: str | os.PathLike, num_threads: int = 1, seed: int | None = None
) -> Callable[..., torch.Tensor]:
    """The file as a function of tensors, `(pixel_values[, epsilon]) -> logits`; the format is told by its ending.

    Args:
        num_threads: of onnxruntime; torch has its own setting.
        seed: of the noise that onnxruntime draws, 0 or more; None takes one from the system's secure source. Programs
            of torch draw from the global random state.

    Raises:
        ValueError: the ending is neither `.onnx` nor `.pt2`.
    """
    if Path(path).suffix == FORMATS["torch_export"]:
        return torch.export.load(path).module()
    if Path(path).suffix != FORMATS["onnx"]:
        raise ValueError(f"{os.fspath(path)!r} ends in neither .onnx nor .pt2: name the file by its format")
    import onnxruntime

    # Without this all sessions of a process and its forks draw the same noise: onnxruntime has one seed, the clock's.
    onnxruntime.set_seed(secrets.randbits(62) if seed is None else seed)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        return torch.from_numpy(logits)

    return run


def verify_export(
    defended: DefendedLogits, path: str | os.PathLike, noise: Literal["inside", "input"], tolerance: float = 1e-5
) -> float:
    """Compares the file with the model on random images, for batches of one and of three.

    Returns:
        With `noise="input"` the largest difference from the model's logits, of their size where that is above 1; with
        `noise="inside"` the largest difference between two calls on the same images.

    Raises:
        ValueError: the file differs from the model by more than `tolerance`, draws the same noise twice, or answers
            with NaN.
    """
    exported, largest = load_exported(path), 0.0
    for batch_size in (1, 3):
        inputs = defended.example(noise, batch_size)
        with torch.no_grad():
            logits = exported(*inputs)
            expected = defended(*inputs) if noise == "input" else exported(*inputs)
        if not logits.isfinite().all():
            raise ValueError(f"{os.fspath(path)!r} answers with NaN or infinity: mend the model's weights first")
        scale = expected.abs().max().clamp(min=1)
        largest = max(largest, float((logits - expected).abs().max() / scale))
    if noise == "input" and not largest <= tolerance:
        raise ValueError(
            f"{os.fspath(path)!r} differs from the model by {largest:.1e}, above {tolerance:g}: do not use it"
        )
    if noise == "inside" and largest == 0 and defended.sigma_255 != 0:
        raise ValueError(f"{os.fspath(path)!r} draws the same noise in each call: do not use it")
    return largest
