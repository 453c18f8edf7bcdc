"""Noisy image modeling: vision transformers pre-trained to denoise, and kept as a defense of their classifiers."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from .configuration_nim import (
    MODEL_SIZES,
    NIMClassifierConfig,
    NIMConfig,
    NIMSimMIMClassifierConfig,
    NIMSimMIMConfig,
)
from .configuration_nim_purified import NIMPurifiedConfig
from .families_nim import FAMILIES, MAE
from .image_processing import image_processor_for
from .modeling_nim import NIMForImageClassification, NIMForPreTraining, NIMModel, ResizePositions
from .modeling_nim_purified import NIMPurifiedImageClassification
from .modeling_nim_simmim import NIMSimMIMForImageClassification, NIMSimMIMForPreTraining, NIMSimMIMModel
from .noise_nim import add_noise, denormalize, normalize, parse_sigma, sample_sigma
from .pipeline_nim import register_pipeline


__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "MODEL_SIZES",
    "NIMClassifierConfig",
    "NIMConfig",
    "NIMForImageClassification",
    "NIMForPreTraining",
    "NIMModel",
    "NIMPurifiedConfig",
    "NIMPurifiedImageClassification",
    "NIMSimMIMClassifierConfig",
    "NIMSimMIMConfig",
    "NIMSimMIMForImageClassification",
    "NIMSimMIMForPreTraining",
    "NIMSimMIMModel",
    "add_noise",
    "denormalize",
    "image_processor_for",
    "normalize",
    "parse_sigma",
    "sample_sigma",
]

# Every model class, by the name that its configuration gives it (`architectures`).
MODELS = {
    model.__name__: model
    for model in (*(model for family in FAMILIES for model in family.models), NIMPurifiedImageClassification)
}

_auto_classes = (AutoModel, AutoModelForPreTraining, AutoModelForImageClassification)
for _auto_class, _model in [
    *(pair for family in FAMILIES for pair in zip(_auto_classes, family.models, strict=True)),
    (AutoModelForImageClassification, NIMPurifiedImageClassification),
]:
    _config = _model.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _auto_class.register(_config, _model, exist_ok=True)
    # Saved models carry their code, so that trust_remote_code=True loads them where this package is not installed.
    _config.register_for_auto_class()
    _model.register_for_auto_class(_auto_class.__name__)

# transformers' own MAE checkpoints load into these classes: with today's key names, with those of before version 5, and
# with what version 5 writes when it goes back to old names ("decoder.decoder_encoder.layer.0" for
# "decoder.decoder_layers.0"). `from_pretrained(DIR, image_size=...)` fits the positions.
for _model in MAE.models:
    register_checkpoint_conversion_mapping(
        _model.__name__,
        [WeightRenaming(r"encoder\.layer\.", "layers.")]
        + get_checkpoint_conversion_mapping("ViTMAEForPreTraining")
        + [
            WeightConverter(table, table, [ResizePositions()]) for table in ("position_embeddings", "decoder_pos_embed")
        ],
        overwrite=True,
    )

register_pipeline()
