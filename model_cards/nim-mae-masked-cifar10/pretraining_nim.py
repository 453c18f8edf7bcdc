"""Base of both pre-training families: degrade (Eq. 3, Eq. 1 or both), reconstruct, score; purifying omits the score.

An image larger than the model is degraded whole and reconstructed in overlapping tiles (`tile_*` of the configuration),
so that sigma, epsilon and what is certified mean the same at every size.

A family implements `reconstruct` and `forward_loss`, and defines its masks (`mask_square_size`,
`_hidden_from_noise`, `_hidden_from_mask`, `_mask_from_hidden`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput
from transformers.utils.generic import can_return_tuple

from .noise_nim import (
    Generators,
    add_noise,
    clamp_to_image_range,
    draw_by_image,
    noise_samplers,
    sample_mask_noise,
)
from .tiles_nim import TileGrid


@dataclass
class NIMForPreTrainingOutput(ViTMAEForPreTrainingOutput):
    """
    Output of [`NIMForPreTraining`] and [`NIMSimMIMForPreTraining`].

    Args:
        loss: scalar; the mean error over all patches where there is noise (Eq. 4), else over the hidden ones (Eq. 2).
        logits: `(B, N, patch * patch * C)`, the prediction of every patch, channels last; normalized per patch with
            `norm_pix_loss`.
        reconstruction: `(B, C, H, W)`, the prediction as normalized images, not clamped.
        degraded_pixel_values: `(B, C, H, W)`, what the encoder saw: noisy images, hidden patches zero.
        mask: `(B, N)`, 1 where a patch was hidden; None where none was.
        ids_restore: `(B, N)`, the inverse of the order in which NIM-MAE hides patches.
    """

    reconstruction: torch.Tensor | None = None
    degraded_pixel_values: torch.Tensor | None = None


class NIMPreTrainingMixin:
    """Methods of a model that is trained to undo a degradation, and that then defends a classifier.

    `forward` is `degrade`, `reconstruct`, `forward_loss`; `purify` is `degrade`, `restore`, where `restore` is
    `reconstruct` and a clamp. `draw` makes their random numbers beforehand.
    """

    def draw(
        self,
        batch_size: int,
        generators: Generators = None,
        sigma: str | float | int | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The random numbers of `batch_size` images, as keyword arguments of `forward` and `purify`.

        A model that is given them is deterministic, and its compiled graph holds no draws. Images of the same
        generators get the numbers that `forward(..., generator=generators)` draws for itself.

        Args:
            batch_size: number of images, B.
            generators: one for each image, or one that is drawn image by image, or None for the global one.
            sigma: a specification on 0..255 in place of the configuration's.
            image_size: side, or height and width, of the images; None is the configuration's.

        Returns:
            `sigma` `(B,)` on 0..255 and `epsilon` `(B, C, H, W)` (section 2.4, Eq. 3) of a model that undoes noise, and
            `noise` `(B, M)` (Eq. 1), with M squares in the tiles of an image, of one that fills masks; on the device of
            the generators. An image draws them in this order.
        """
        first = generators[0] if isinstance(generators, Sequence) else generators
        device = self.device if first is None else first.device
        size = self.config.image_size if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        names = ["noise"] if self.config.hides_patches else []
        if self.config.adds_noise:
            sigma = self.config.sigma if sigma is None else sigma
            names = ["sigma", "epsilon", *names]
        elif sigma is not None:
            raise ValueError(f'sigma {sigma!r} belongs to degradation="noise"; this model hides patches: leave it out')
        shape = (batch_size, self.config.num_channels, height, width)
        like = torch.empty(shape, device="meta")
        return self._draw(names, like, generators, sigma, device)

    def _draw(
        self,
        names: Sequence[str],
        images: torch.Tensor,
        generators: Generators,
        sigma: str | float | int | None,
        device: torch.device,
        interpolate_pos_encoding: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The random numbers of these names; only shape and precision of the images `(B, C, H, W)` are used."""
        batch_size, *shape = images.shape

        def draw_noise(number: int, generator: torch.Generator | None) -> torch.Tensor:
            pieces = self._num_pieces(*shape[1:], self.mask_square_size, interpolate_pos_encoding)
            return sample_mask_noise((number, pieces), generator, device)

        samplers = noise_samplers(sigma, shape, device, images.dtype) | {"noise": draw_noise}
        return draw_by_image({name: samplers[name] for name in names}, batch_size, generators)

    def degrade(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The first step of Eq. 9; arguments as in `purify`.

        Returns:
            The images `(B, C, H, W)`, with the noise of Eq. 3 where there is noise; and what tells `reconstruct`
            which patches are hidden, `(B, N)`, one tile after the other, or None where every patch is seen.
        """
        config = self.config
        channels = len(config.image_std)
        is_tensor = isinstance(pixel_values, torch.Tensor)
        fits = is_tensor and pixel_values.ndim == 4 and pixel_values.shape[1] == channels
        if not fits or not pixel_values.is_floating_point():
            found = f"{tuple(pixel_values.shape)}, {pixel_values.dtype}" if is_tensor else type(pixel_values).__name__
            raise ValueError(f"pixel_values must be normalized images (B, {channels}, H, W) of floats, got {found}")
        if not config.adds_noise and (sigma is not None or epsilon is not None):
            raise ValueError(
                '`sigma` and `epsilon` belong to degradation="noise"; this model hides patches: use `noise`'
            )
        if not config.hides_patches and (noise is not None or bool_masked_pos is not None):
            here = f'"{config.degradation}"' + (" with mask_ratio 0" if "mask" in config.degradation else "")
            raise ValueError(
                f'`noise` and `bool_masked_pos` belong to degradation="mask"; here it is {here}: use `epsilon`'
            )
        names = []
        if config.adds_noise:
            sigma = config.sigma if sigma is None else sigma
            names += [] if isinstance(sigma, torch.Tensor) else ["sigma"]
            names += ["epsilon"] if epsilon is None else []
        if config.hides_patches and noise is None and bool_masked_pos is None:
            names += ["noise"]
        draws = self._draw(names, pixel_values, generator, sigma, pixel_values.device, interpolate_pos_encoding)
        degraded = pixel_values
        if config.adds_noise:
            sigma, epsilon = draws.get("sigma", sigma), draws.get("epsilon", epsilon)
            degraded = add_noise(pixel_values, sigma, epsilon, config.image_std)
        if not config.hides_patches:
            return degraded, None
        noise = draws.get("noise", noise)
        return degraded, self._hidden(pixel_values, noise, bool_masked_pos, interpolate_pos_encoding)

    def _hidden(
        self,
        images: torch.Tensor,
        noise: torch.Tensor | None,
        bool_masked_pos: torch.Tensor | None,
        interpolate_pos_encoding: bool,
    ) -> torch.Tensor:
        """What tells `reconstruct` which patches of the images are hidden, `(B, N)`, one tile after the other."""
        batch_size, _, height, width = images.shape
        if self._tiles(height, width, interpolate_pos_encoding):
            height = width = self.config.image_size  # of a tile: masks are made tile by tile
        if bool_masked_pos is not None:
            num_patches = self._num_pieces(*images.shape[-2:], self.config.patch_size, interpolate_pos_encoding)
            if bool_masked_pos.shape[0] != batch_size or bool_masked_pos[0].numel() != num_patches:
                raise ValueError(
                    f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}: pass ({batch_size}, {num_patches}), "
                    "one value for each patch"
                )
            mask = bool_masked_pos.reshape(-1, (height // self.config.patch_size) * (width // self.config.patch_size))
            return self._hidden_from_mask(mask.to(images.device)).view(batch_size, -1)
        side = self.mask_square_size
        shape = (batch_size, self._num_pieces(*images.shape[-2:], side, interpolate_pos_encoding))
        if noise.shape != shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}: pass {shape}, one number for each square of "
                f"{side}x{side} pixels"
            )
        noise = noise.to(images.device).reshape(-1, (height // side) * (width // side))
        return self._hidden_from_noise(noise, height, width).view(batch_size, -1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> NIMForPreTrainingOutput | tuple:
        r"""
        Degrades the images, reconstructs them, and scores the reconstruction.

        Args:
            pixel_values: `(B, C, H, W)`, clean and normalized, of the configured size.
            sigma: scale of the noise on 0..255: a number, one per image `(B,)`, a specification such as
                `"uniform(0, 30)"`, or None for the configuration's.
            epsilon: `(B, C, H, W)`, the standard normal noise of Eq. 3; drawn when None.
            generator: where draws come from: None is the global RNG; one generator is shared by the images, drawn image
                by image (independent of the batch size); a list gives each image its own.
            noise: `(B, M)`, for masks: its order decides which of the M squares of an image are hidden, as in ViTMAE;
                those with the largest numbers are.
            bool_masked_pos: `(B, N)` or `(B, H / patch, W / patch)`, the mask itself, in place of `noise`.
            interpolate_pos_encoding: NIM-SimMIM takes images of another size, its relative positions being
                interpolated.

        Raises:
            ValueError: the image size is not the configured one, sigma is negative, a mask or a draw does not fit, or
                an argument belongs to the other degradation.
        """
        self._check_image_size(pixel_values, interpolate_pos_encoding)
        degraded, hidden = self.degrade(
            pixel_values, sigma, epsilon, generator, noise, bool_masked_pos, interpolate_pos_encoding
        )
        output = self.reconstruct(degraded, hidden, pixel_values, interpolate_pos_encoding, **kwargs)
        return NIMForPreTrainingOutput(**{**output, "loss": self.forward_loss(pixel_values, output)})

    def purify(
        self,
        pixel_values: torch.Tensor,
        sigma: str | float | int | torch.Tensor | None = None,
        epsilon: torch.Tensor | None = None,
        generator: Generators = None,
        noise: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        r"""
        The defense's first two steps in Eq. 9: degrade and reconstruct; gradients pass through both, on purpose.

        Takes the arguments of `forward`, and images of any size from the configured one up, square or not; larger ones
        are reconstructed in tiles, at most `tile_batch_size` of them in memory. `noise` and `bool_masked_pos` then hold
        those of one tile after the other. With masks alone the visible patches are pasted back into the reconstruction;
        with noise they, too, are reconstructed.

        Returns:
            `(B, C, H, W)`, normalized, clamped to the range of [0, 1] images.
        """
        degraded, hidden = self.degrade(
            pixel_values, sigma, epsilon, generator, noise, bool_masked_pos, interpolate_pos_encoding
        )
        return self.restore(degraded, hidden, pixel_values, interpolate_pos_encoding)

    def restore(
        self,
        degraded: torch.Tensor,
        hidden: torch.Tensor | None,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """The second step of `purify`: what `degrade` gave, reconstructed and clamped.

        Args:
            degraded, hidden: the two results of `degrade`.
            pixel_values: `(B, C, H, W)`, the images before that, for visible patches and for
                `patch_statistics="input"`.

        Returns:
            `(B, C, H, W)`, normalized, clamped to the range of [0, 1] images.
        """
        grid = self._tiles(*degraded.shape[-2:], interpolate_pos_encoding)
        if grid is None:
            images = self._restore(degraded, hidden, pixel_values, interpolate_pos_encoding)
        else:
            parts = [grid.cut(degraded), None, grid.cut(pixel_values)]
            if hidden is not None:
                parts[1] = hidden.reshape(len(parts[0]), -1)  # (B * T, N)
            images = grid.blend(self._restore_in_batches(*parts))
        return clamp_to_image_range(images, self.config.image_mean, self.config.image_std)

    def _restore_in_batches(
        self, degraded: torch.Tensor, hidden: torch.Tensor | None, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        if torch.compiler.is_exporting():  # a graph that takes every batch size has no loop over batches
            return self._restore(degraded, hidden, pixel_values)
        size = self.config.tile_batch_size
        batches = zip(
            degraded.split(size),
            [None] * -(-len(degraded) // size) if hidden is None else hidden.split(size),
            pixel_values.split(size),
            strict=True,
        )
        if len(degraded) <= size or not torch.is_grad_enabled():
            return torch.cat([self._restore(*batch) for batch in batches])
        # The backward pass computes these again: otherwise memory would hold the activations of all tiles at once.
        return torch.cat([checkpoint(self._restore, *batch, use_reentrant=False) for batch in batches])

    def _restore(
        self,
        degraded: torch.Tensor,
        hidden: torch.Tensor | None,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """The reconstruction of images that the model takes in one piece, visible patches pasted back, not clamped."""
        output = self.reconstruct(degraded, hidden, pixel_values, interpolate_pos_encoding)
        images = output.reconstruction.to(pixel_values.dtype)
        if output.mask is not None and not self.config.adds_noise:
            images = torch.where(self._pixel_mask(output.mask, images).bool(), images, pixel_values)
        return images

    def patchify(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(B, C, H, W)` to patches `(B, N, patch * patch * C)`, channels last as in MAE."""
        batch_size, channels, height, width = images.shape
        patch = self.config.patch_size
        patches = images.reshape(batch_size, channels, height // patch, patch, width // patch, patch)
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def _error(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The error of each number, which the loss averages."""
        difference = prediction - target
        return difference.square() if self.config.reconstruction_loss == "mse" else difference.abs()

    def _tiles(self, height: int, width: int, interpolate_pos_encoding: bool = False) -> TileGrid | None:
        """The tiles of larger images; None where the model takes the images in one piece."""
        config, size = self.config, self.config.image_size
        if interpolate_pos_encoding or (height, width) == (size, size):
            return None
        stride = size // 2 if config.tile_stride is None else config.tile_stride
        border = size // 4 if config.tile_border is None else config.tile_border
        return TileGrid(height, width, size, stride, border, config.tile_window)

    def _num_pieces(self, height: int, width: int, side: int, interpolate_pos_encoding: bool = False) -> int:
        """Number of squares of `side` pixels in an image, or in all of its tiles."""
        grid = self._tiles(height, width, interpolate_pos_encoding)
        if grid is None:
            return (height // side) * (width // side)
        return grid.rows * grid.columns * (grid.size // side) ** 2

    def _pixel_mask(self, mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Patches `(B, N)` to pixels `(B, 1, H, W)`."""
        patch = self.config.patch_size
        mask = mask.to(like.dtype).view(-1, 1, like.shape[-2] // patch, like.shape[-1] // patch)
        return mask.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)

    def hide(
        self, images: torch.Tensor, hidden: torch.Tensor | None, interpolate_pos_encoding: bool = False
    ) -> torch.Tensor:
        """The degraded images as the encoder sees them: zeros in the patches that `hidden`, of `degrade`, hides. Where
        tiles overlap, a pixel keeps the share of the tiles that see it."""
        if hidden is None:
            return images
        grid = self._tiles(*images.shape[-2:], interpolate_pos_encoding)
        if grid is None:
            return images * (1 - self._pixel_mask(self._mask_from_hidden(hidden), images))
        hidden = hidden.reshape(len(images) * grid.rows * grid.columns, -1)  # (B * T, N)
        one_tile = images[..., : grid.size, : grid.size]
        return images * (1 - grid.blend(self._pixel_mask(self._mask_from_hidden(hidden), one_tile)))
