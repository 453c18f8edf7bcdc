"""Configuration of the defended classifier."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .checks_nim import MAX_SIDE_PIXELS, check_normalization
from .configuration_nim import NIMClassifierConfig, NIMConfig
from .families_nim import CLASSIFIERS, PURIFIERS
from .loading_nim import LoadedConfigMixin
from .noise_nim import parse_sigma


MAX_VOTES = 100_000  # draws of one answer; more change nothing that could be measured


@strict
class NIMPurifiedConfig(LoadedConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`NIMPurifiedImageClassification`] (Eq. 9): a purifier, a classifier, and how the noise is drawn.

    Args:
        purifier_config, classifier_config (`PreTrainedConfig` or `dict`):
            Configurations of the parts; the classifier may be any image classifier of transformers.
        sigma (`str`, *optional*, defaults to `"30"`):
            Scale of the defense's noise on 0..255 (sigma_dfs in Eq. 9; the paper's Table 1 uses 30).
        num_votes (`int`, *optional*, defaults to 1):
            Noise draws whose class probabilities are averaged.
        image_size (`int`, *optional*):
            Side of the square images that the defense takes and purifies; None is the purifier's. The purifier covers
            larger images in tiles.
        image_geometry (`dict`, *optional*):
            How the classifier's own image processor resizes and crops to `image_size`, in a ViT image processor's
            words; None is `image_processor_for`'s way.
        classifier_image_size (`int`, *optional*):
            Side of the square images that the classifier takes; None takes the purified images as they are.
        classifier_image_mean, classifier_image_std (`list[float]`, *optional*):
            Normalization that the classifier expects; None means the purifier's.
    """

    model_type = "nim_purified"
    sub_configs = {"purifier_config": AutoConfig, "classifier_config": AutoConfig}

    purifier_config: dict | PreTrainedConfig | None = None
    classifier_config: dict | PreTrainedConfig | None = None
    sigma: str | float | int = "30"
    num_votes: int = 1
    image_size: int | None = None
    image_geometry: dict[str, Any] | None = None
    classifier_image_size: int | None = None
    classifier_image_mean: list[float] | tuple[float, ...] | None = None
    classifier_image_std: list[float] | tuple[float, ...] | None = None

    def __post_init__(self, **kwargs):
        parse_sigma(self.sigma)
        if not 1 <= self.num_votes <= MAX_VOTES:
            raise ValueError(f"num_votes must be at least 1 and at most {MAX_VOTES}, got {self.num_votes}")
        self.purifier_config = _sub_config(self.purifier_config, NIMConfig)
        self.classifier_config = _sub_config(self.classifier_config, NIMClassifierConfig)
        if not hasattr(self.purifier_config, "adds_noise"):
            raise ValueError(
                f"purifier_config is of a {self.purifier_config.model_type!r} model, which cannot purify; give that of "
                f"a pre-trained one ({', '.join(PURIFIERS)})"
            )
        smallest = self.purifier_config.image_size
        self.image_size = smallest if self.image_size is None else self.image_size
        if self.image_size < smallest:
            raise ValueError(
                f"image_size {self.image_size} is below the purifier's {smallest}: the purifier covers larger images "
                "in tiles but cannot shrink; give it at least its own size"
            )
        for name in ("image_size", "classifier_image_size"):
            side = getattr(self, name)
            if side is not None and not 1 <= side <= MAX_SIDE_PIXELS:
                raise ValueError(f"{name} must be at least 1 and at most {MAX_SIDE_PIXELS} pixels, got {side}")
        check_normalization(
            "classifier_image_",
            self.classifier_image_mean if self.classifier_image_mean is not None else self.image_mean,
            self.classifier_image_std if self.classifier_image_std is not None else self.image_std,
        )
        num_labels = kwargs.pop("num_labels", None)
        if num_labels is not None:  # from `from_pretrained`, which refuses weights of another number
            self.classifier_config.num_labels = num_labels
        # The labels are copied from the classifier: the pipeline and the Hub read them here.
        self.id2label = dict(self.classifier_config.id2label)
        self.label2id = {name: index for index, name in self.id2label.items()}
        if not type(self).__module__.startswith("transformers_modules."):
            # The imported package has its pipeline registered; with this entry transformers would still refuse to build
            # one without trust_remote_code.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers'; ValueError where a part has no configuration."""
        for part in ("purifier_config", "classifier_config"):
            if config_dict.get(part) is None:
                raise ValueError(f"config.json of a purified model has no {part}: write it again with save_pretrained")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Adds the name of the pipeline with sigma, votes and purified image, for users without this package."""
        config = super().to_dict()
        for part in ("purifier_config", "classifier_config"):
            config[part]["_name_or_path"] = ""  # it was a path on the machine that composed the model
        pipeline = {"impl": "pipeline_nim.NIMImageClassificationPipeline", "pt": ["AutoModelForImageClassification"]}
        return config | {"custom_pipelines": {"image-classification": pipeline}}

    @property
    def num_labels(self) -> int | None:
        """Number of classes of the classifier; setting it changes the classifier's configuration."""
        return None if self.id2label is None else len(self.id2label)

    @num_labels.setter
    def num_labels(self, number: int) -> None:
        self.classifier_config.num_labels = number
        self.id2label, self.label2id = dict(self.classifier_config.id2label), dict(self.classifier_config.label2id)

    @property
    def image_mean(self) -> list[float]:
        """Mean that `pixel_values` are normalized with: the purifier's."""
        return list(self.purifier_config.image_mean)

    @property
    def image_std(self) -> list[float]:
        """Standard deviation that `pixel_values` are normalized with: the purifier's."""
        return list(self.purifier_config.image_std)


def _sub_config(config: Any, default: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A part's configuration from a dict by its `model_type`, also where this package's types are not registered."""
    if isinstance(config, PreTrainedConfig):
        return config
    config = dict(config or {})
    model_type = config.pop("model_type", default.model_type)
    own = {model.config_class.model_type: model.config_class for model in (*PURIFIERS.values(), *CLASSIFIERS.values())}
    if model_type not in own and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model type {model_type!r} is neither one of ours ({', '.join(own)}) nor known to transformers"
        )
    cls = own[model_type] if model_type in own else CONFIG_MAPPING[model_type]
    return cls(**config)
