"""transformers' own common tests on every configuration and model class: `make test-transformers`.

Not collected by plain pytest, since the source distribution of transformers has to be downloaded. `SKIPPED` says what
is left out, each with its reason; everything else that skips is skipped by transformers itself.
"""

import copy
import unittest
from collections.abc import Callable

import source
import torch
import transformers
from conftest import TINY, TINY_DECODER
from transformers import PreTrainedConfig

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMModel,
    NIMPurifiedConfig,
    NIMPurifiedImageClassification,
    NIMSimMIMClassifierConfig,
    NIMSimMIMConfig,
    NIMSimMIMForImageClassification,
    NIMSimMIMForPreTraining,
    NIMSimMIMModel,
)


common = source.load("test_modeling_common")
configuration = source.load("test_configuration_common")


def zero_init(config):
    """transformers' function takes every field with "_std" in its name, also `image_std`, for a scale of weights."""
    config = copy.deepcopy(config)
    scales = [name for name in vars(config) if name in ("initializer_range", "layer_scale_init_value")]
    for name in scales:
        setattr(config, name, 1e-10)
    for name in config.sub_configs:
        setattr(config, name, zero_init(getattr(config, name)))
    return config


common._config_zero_init = zero_init
# So that the tests of classifiers (labels, problem types, another number of labels) run for ours.
for _class in (NIMForImageClassification, NIMSimMIMForImageClassification, NIMPurifiedImageClassification):
    common.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[_class.config_class.model_type] = _class.__name__

SMALL = {**TINY, "initializer_range": 0.02}
NUM_TOKENS = (TINY["image_size"] // TINY["patch_size"]) ** 2 + 1

# By class, the beginnings of tests' names.
ALWAYS_OUR_NAMES = "models are saved under this package's key names, whatever they were loaded from"
ATTENTION_AND_MASKS = (
    "it hides patches and gives an attention mask for all; tests/models/test_numerics.py compares the kernels"
)
SKIPPED: dict[str, dict[str, str]] = {
    "every model": {"test_reverse_loading_mapping": ALWAYS_OUR_NAMES},
    **{
        name: {"test_eager_matches_sdpa_inference": ATTENTION_AND_MASKS}
        for name in (
            "NIMModel",
            "NIMForPreTraining",
            "NIMSimMIMModel",
            "NIMSimMIMForPreTraining",
            "NIMPurifiedImageClassification",
        )
    },
}


def simmim(config_class: type, **fields):
    return config_class(**SMALL, mask_patch_size=8, drop_path_rate=0.0, **fields)


def purified() -> NIMPurifiedConfig:
    return NIMPurifiedConfig(
        purifier_config=NIMConfig(**SMALL, **TINY_DECODER, sigma="30"),
        classifier_config=NIMClassifierConfig(**SMALL, num_labels=5),
    )


CONFIGURATIONS = {
    NIMConfig: {**SMALL, **TINY_DECODER},
    NIMClassifierConfig: SMALL,
    NIMSimMIMConfig: SMALL,
    NIMSimMIMClassifierConfig: SMALL,
    NIMPurifiedConfig: {"sigma": "40", "num_votes": 2},
}

MODELS = {
    NIMModel: lambda: NIMConfig(**SMALL, **TINY_DECODER),
    NIMForPreTraining: lambda: NIMConfig(**SMALL, **TINY_DECODER, sigma="30"),
    NIMForImageClassification: lambda: NIMClassifierConfig(**SMALL, num_labels=5),
    NIMSimMIMModel: lambda: simmim(NIMSimMIMConfig),
    NIMSimMIMForPreTraining: lambda: simmim(NIMSimMIMConfig, sigma="30"),
    NIMSimMIMForImageClassification: lambda: simmim(NIMSimMIMClassifierConfig, num_labels=5),
    NIMPurifiedImageClassification: purified,
}


DRAWING = (NIMForPreTraining, NIMSimMIMForPreTraining, NIMPurifiedImageClassification)


def noise_and_masks() -> NIMConfig:
    return NIMConfig(**SMALL, **TINY_DECODER, degradation="noise+mask", norm_pix_loss=False, sigma="30")


class Tester:
    """Configurations and inputs that the common tests ask of a model's tester."""

    def __init__(self, parent: unittest.TestCase, model_class: type, config: Callable[[], PreTrainedConfig]):
        self.parent, self.model_class, self.config = parent, model_class, config
        self.is_training = model_class not in (NIMModel, NIMSimMIMModel)  # encoders have no loss
        seen = 1 - config().mask_ratio if self.hides_patches else 1
        self.batch_size, self.seq_length = 3, 1 + int(seen * (NUM_TOKENS - 1))
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"):
            setattr(self, name, TINY[name])

    @property
    def hides_patches(self) -> bool:
        return "mask" in getattr(self.config(), "degradation", "")

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, 3, TINY["image_size"], TINY["image_size"]]
        inputs = {"pixel_values": common.floats_tensor(shape)}
        if self.model_class in DRAWING:  # two calls are compared, so the noise is an input
            inputs["epsilon"] = common.floats_tensor(shape)
        if self.hides_patches:
            inputs["noise"] = common.floats_tensor([self.batch_size, NUM_TOKENS - 1])
        return self.config(), inputs


def common_tests(model_class: type, config: Callable[[], PreTrainedConfig]) -> type[unittest.TestCase]:
    class Test(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (model_class,)
        test_resize_embeddings = False
        # 5.18 makes all weights trainable in its test of gradients, also a mask token that no mask puts into the graph.
        test_all_params_have_gradient = not transformers.__version__.startswith("5.18.")

        def setUp(self):
            self.model_tester = Tester(self, model_class, config)
            torch.manual_seed(0)

        def test_model_get_set_embeddings(self):
            # As transformers' own vision tests do: images have no table of words, but a projection of patches.
            model = model_class(config())
            assert isinstance(model.get_input_embeddings(), torch.nn.Module)
            assert model.get_output_embeddings() is None

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = copy.deepcopy(inputs_dict)
            if return_labels and "Classification" in model_class.__name__:
                inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
            return inputs

    Test.__name__ = Test.__qualname__ = f"Test{model_class.__name__}"
    for start, reason in {**SKIPPED["every model"], **SKIPPED.get(model_class.__name__, {})}.items():
        names = [name for name in dir(Test) if name.startswith(start)]
        if not names:
            raise AttributeError(f"SKIPPED names {start}, which transformers does not have: take it out")
        for name in names:
            setattr(Test, name, unittest.skip(reason)(lambda self: None))
    return Test


def configuration_tests(config_class: type) -> type[unittest.TestCase]:
    class Test(unittest.TestCase):
        def test_common(self):
            tester = configuration.ConfigTester(
                self, config_class=config_class, has_text_modality=False, **CONFIGURATIONS[config_class]
            )
            tester.run_common_tests()

    Test.__name__ = Test.__qualname__ = f"Test{config_class.__name__}"
    return Test


for _class, _config in MODELS.items():
    globals()[f"Test{_class.__name__}"] = common_tests(_class, _config)
TestNoiseAndMasks = common_tests(NIMForPreTraining, noise_and_masks)
for _class in CONFIGURATIONS:
    globals()[f"Test{_class.__name__}"] = configuration_tests(_class)
