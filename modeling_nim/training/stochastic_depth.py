"""Stochastic depth whose draws follow from the image, as all draws do: the same in one process or eight."""

import numpy as np
import torch
from torch import nn
from transformers.models.beit.modeling_beit import BeitDropPath

from ..data.randomness import image_seeds, uniforms
from ..modeling_nim import DropPath


NUM_BRANCHES = 2  # of a layer: attention and MLP, in this order, pass the same module


class ImageDropPath(nn.Module):
    """Drops a residual branch of the images whose number of `uniforms` (NUM_BRANCHES, B) is below `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.branch = 0
        self.uniforms: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return hidden_states
        kept = self.uniforms[self.branch] >= self.rate  # (B,)
        self.branch = (self.branch + 1) % NUM_BRANCHES
        if len(hidden_states) % len(kept):
            raise ValueError(f"{len(hidden_states)} images pass a drop path that was drawn for {len(kept)}")
        # several versions of the same images may pass at once, one batch after the other
        kept = kept.repeat(len(hidden_states) // len(kept)).view(-1, *[1] * (hidden_states.ndim - 1))
        return hidden_states * kept.to(hidden_states.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class DropPaths:
    """The drop paths of a model, which is changed: call `draw` before each batch in training mode."""

    def __init__(self, model: nn.Module):
        self.modules: list[ImageDropPath] = []
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if isinstance(child, (DropPath, BeitDropPath)):
                    rate = child.rate if isinstance(child, DropPath) else child.drop_prob
                    replacement = ImageDropPath(rate)
                    setattr(parent, name, replacement)
                    self.modules.append(replacement)

    def draw(self, seed: int, epochs: np.ndarray, indices: np.ndarray, device: torch.device) -> None:
        """For the images `indices` (B,) in `epochs` (B,), a function of them and `seed` alone."""
        if not self.modules:
            return
        numbers = uniforms(image_seeds(seed, epochs, indices, "drop_path"), NUM_BRANCHES * len(self.modules))
        numbers = torch.from_numpy(numbers.T.astype(np.float32)).to(device)  # (NUM_BRANCHES * modules, B)
        for module, chunk in zip(self.modules, numbers.split(NUM_BRANCHES), strict=True):
            module.uniforms, module.branch = chunk, 0
