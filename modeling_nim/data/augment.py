"""Fine-tuning augmentation in batches on the device: RandAugment, erasing, mixup, cutmix.

What happens to an image follows from its own seed (`data.randomness`), so it does not depend on the process or the batch
that the image is in. Mixup and cutmix mix neighbours within a batch.
"""

from dataclasses import dataclass


@dataclass
class AugmentationRecipe:
    """The `augmentation` section; everything is off by default. The paper's values (MAE's) are in the comments."""

    rand_augment_ops: int = 0  # 2
    rand_augment_magnitude: float = 9.0  # of 10
    rand_augment_std: float = 0.5
    erase_probability: float = 0.0  # 0.25
    mixup_alpha: float = 0.0  # 0.8
    cutmix_alpha: float = 0.0  # 1.0
    switch_probability: float = 0.5
