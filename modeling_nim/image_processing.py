"""The image processor that is saved beside every model."""

import os
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


BICUBIC = 3


def image_processor_for(config: PreTrainedConfig) -> ViTImageProcessorPil:
    """The processor that turns PIL images into the `pixel_values` of a model with this configuration.

    From 64 pixels on it is ImageNet's evaluation transform: shortest edge to size * 256 / 224 (bicubic), centre crop.
    Smaller models see the whole image, resized to a square. Mean and standard deviation are the configuration's.
    """
    size = config.image_size
    crop = size >= 64
    return ViTImageProcessorPil(
        do_convert_rgb=True,
        do_resize=True,
        size={"shortest_edge": round(size * 256 / 224)} if crop else {"height": size, "width": size},
        resample=BICUBIC,
        do_center_crop=crop,
        crop_size={"height": size, "width": size} if crop else None,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    )


class ImageProcessorMixin:
    """Makes `save_pretrained` and `push_to_hub` of a model write its image processor too, unless the folder has one."""

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs):
        """As transformers', and always under this package's key names, whatever names the weights were loaded from."""
        kwargs.setdefault("save_original_format", False)
        folder = Path(save_directory)
        # First the processor: the parent may upload the folder before it returns.
        if is_main_process and not (folder / "preprocessor_config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            image_processor_for(self.config).save_pretrained(folder)
        return super().save_pretrained(folder, is_main_process=is_main_process, **kwargs)
