"""The image processor that is saved beside every model."""

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
