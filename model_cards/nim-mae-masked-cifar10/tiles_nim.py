"""Images larger than a model, as overlapping tiles of its size, and back."""

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class TileGrid:
    """Square tiles over an image with a reflected border, which gives edge pixels neighbors on all sides.

    Args:
        height, width: of the image, in pixels, each at least `size`.
        size: side of a tile.
        stride: distance from a tile to the next; below `size` the tiles overlap.
        border: width of the reflected border. The right and lower one are widened until the tiles end with them.
        window: weight of a tile's pixels where tiles overlap: `"hann"` falls to the edge, `"uniform"` is constant.
    """

    height: int
    width: int
    size: int
    stride: int
    border: int
    window: str = "hann"

    def __post_init__(self):
        if min(self.height, self.width) < self.size:
            raise ValueError(
                f"the images are {self.height}x{self.width}, smaller than a tile of {self.size}x{self.size}: resize "
                f"them to at least {self.size} pixels on each side"
            )

    @property
    def rows(self) -> int:
        """Number of tiles from top to bottom."""
        return math.ceil((self.height + 2 * self.border - self.size) / self.stride) + 1

    @property
    def columns(self) -> int:
        """Number of tiles from left to right."""
        return math.ceil((self.width + 2 * self.border - self.size) / self.stride) + 1

    def cut(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, C, H, W)` to tiles `(B * T, C, size, size)`, row by row."""
        right = self.columns * self.stride - self.stride + self.size - self.width - self.border
        below = self.rows * self.stride - self.stride + self.size - self.height - self.border
        images = nn.functional.pad(images, (self.border, right, self.border, below), mode="reflect")
        tiles = images.unfold(2, self.size, self.stride).unfold(
            3, self.size, self.stride
        )  # (B, C, rows, columns, S, S)
        return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)

    def blend(self, tiles: torch.Tensor) -> torch.Tensor:
        """Tiles `(B * T, C, size, size)` to images `(B, C, H, W)`: weighted means where they overlap, no border."""
        weights = self._weights(tiles)  # (S, S)
        weighted = (tiles * weights).flatten(1).unflatten(0, (-1, self.rows * self.columns))  # (B, T, C * S * S)
        share = weights.flatten().expand(1, self.rows * self.columns, -1)  # (1, T, S * S)
        return self._fold(weighted) / self._fold(share)

    def _fold(self, tiles: torch.Tensor) -> torch.Tensor:
        """The sum of overlapping tiles `(B, T, C * S * S)`, without the border: `(B, C, H, W)`."""
        extent = tuple((number - 1) * self.stride + self.size for number in (self.rows, self.columns))
        images = nn.functional.fold(tiles.transpose(1, 2), extent, kernel_size=self.size, stride=self.stride)
        return images[..., self.border : self.border + self.height, self.border : self.border + self.width]

    def _weights(self, like: torch.Tensor) -> torch.Tensor:
        if self.window == "uniform":
            return torch.ones(self.size, self.size, dtype=like.dtype, device=like.device)
        # Sampled at pixel centers, so that every weight is above 0: one tile alone may cover an image's corner.
        centers = (torch.arange(self.size, dtype=torch.float64, device=like.device) + 0.5) / self.size
        hann = (math.pi * centers).sin().square()
        return (hann[:, None] * hann).to(like.dtype)
