import os


os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes on two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from transformers.utils import logging as transformers_logging

from modeling_nim import NIMClassifierConfig, NIMConfig, NIMForImageClassification, NIMForPreTraining


torch.set_num_threads(1)
transformers_logging.disable_progress_bar()

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TINY_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def purifier() -> NIMForPreTraining:
    """A tiny NIM-MAE for 16x16 images, random weights, evaluation mode."""
    return NIMForPreTraining(NIMConfig(**TINY, **TINY_DECODER)).eval()


@pytest.fixture
def classifier() -> NIMForImageClassification:
    """A tiny classifier for 16x16 images and 5 classes; its head is wide enough for the logits to matter."""
    model = NIMForImageClassification(NIMClassifierConfig(**TINY, num_labels=5)).eval()
    torch.nn.init.normal_(model.classifier.weight)
    return model


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Four normalized images, 16x16."""
    return torch.randn(4, 3, 16, 16)
