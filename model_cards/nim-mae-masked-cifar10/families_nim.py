"""The two families of models, and the names that recipes give to their ways of pre-training.

All code that finds a model by its type or its name uses these tables.
"""

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, ViTMAEConfig

from .modeling_nim import NIMForImageClassification, NIMForPreTraining, NIMModel
from .modeling_nim_simmim import NIMSimMIMForImageClassification, NIMSimMIMForPreTraining, NIMSimMIMModel


@dataclass(frozen=True)
class Family:
    """An encoder with what is built on it; each class knows its configuration's (`config_class`).

    Args:
        name: what files of recipes call it.
        encoder, pretraining, classifier: the classes; `pretraining` is the purifier. The encoder's blocks are called
            `layers.0`, `layers.1`, ...: layer decay and Muon find them by that name.
        also_loads: model types of transformers whose checkpoints load into these classes.
    """

    name: str
    encoder: type[PreTrainedModel]
    pretraining: type[PreTrainedModel]
    classifier: type[PreTrainedModel]
    also_loads: tuple[str, ...] = ()

    @property
    def pretrained_types(self) -> tuple[str, ...]:
        """Model types of which `pretraining` and, to start fine-tuning, `classifier` are loaded."""
        return self.pretraining.config_class.model_type, *self.also_loads

    @property
    def models(self) -> tuple[type[PreTrainedModel], ...]:
        return self.encoder, self.pretraining, self.classifier


@dataclass(frozen=True)
class Architecture:
    """A family with the degradation that its pre-training undoes."""

    family: Family
    degradation: Literal["noise", "mask", "noise+mask"]


MAE = Family("mae", NIMModel, NIMForPreTraining, NIMForImageClassification, also_loads=(ViTMAEConfig.model_type,))
SIMMIM = Family("simmim", NIMSimMIMModel, NIMSimMIMForPreTraining, NIMSimMIMForImageClassification)
FAMILIES = (MAE, SIMMIM)

ARCHITECTURES = {
    "nim_mae": Architecture(MAE, "noise"),
    "mae": Architecture(MAE, "mask"),
    "nim_mae_masked": Architecture(MAE, "noise+mask"),
    "nim_simmim": Architecture(SIMMIM, "noise"),
    "simmim": Architecture(SIMMIM, "mask"),
}

# By model type, so that they are found also where nothing is registered with the Auto classes (remote code).
PURIFIERS = {name: family.pretraining for family in FAMILIES for name in family.pretrained_types}
CLASSIFIERS = {family.classifier.config_class.model_type: family.classifier for family in FAMILIES}
# What a classifier is loaded from: itself, or a pre-trained model, to be fine-tuned.
BEGINNINGS = {name: family.classifier for family in FAMILIES for name in family.pretrained_types} | CLASSIFIERS
