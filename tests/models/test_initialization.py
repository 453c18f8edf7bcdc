"""Fresh weights are distributed as the reference's are; fixed tables are compared by value."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForImageClassification

from modeling_nim import (
    MODEL_SIZES,
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMModel,
    NIMPurifiedImageClassification,
    NIMSimMIMClassifierConfig,
    NIMSimMIMConfig,
    NIMSimMIMForImageClassification,
    NIMSimMIMForPreTraining,
    NIMSimMIMModel,
)


WIDTH, DECODER_WIDTH, LAYERS, LABELS = 160, 128, 3, 50
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 4 * WIDTH,
}
DECODER = {
    "decoder_hidden_size": DECODER_WIDTH,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 4 * DECODER_WIDTH,
}


def assert_follows(values: torch.Tensor, law) -> None:
    """Kolmogorov-Smirnov; with the seed fixed, a right distribution passes always and a wrong one practically never."""
    sample = values.detach().double().flatten().numpy()
    assert stats.kstest(sample, law.cdf).pvalue > 1e-3, f"mean {sample.mean():.3g}, std {sample.std():.3g}"


def uniform(bound: float):
    return stats.uniform(-bound, 2 * bound)


def xavier(fan_in: int, fan_out: int):
    return uniform(math.sqrt(6 / (fan_in + fan_out)))


def sincos_by_hand(side: int, width: int) -> np.ndarray:
    """Entry by entry: columns of the image in the first half, rows in the second."""
    table = np.zeros((1 + side * side, width))
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                frequency = 10000 ** (-k / quarter)
                for offset, position in ((0, column), (width // 2, row)):
                    table[1 + row * side + column, offset + k] = math.sin(position * frequency)
                    table[1 + row * side + column, offset + quarter + k] = math.cos(position * frequency)
    return table


@pytest.fixture(scope="module")
def mae():
    torch.manual_seed(0)
    return NIMForPreTraining(NIMConfig(**SIZES, **DECODER))


@pytest.fixture(scope="module")
def simmim():
    torch.manual_seed(0)
    return NIMSimMIMForPreTraining(NIMSimMIMConfig(**SIZES))


def test_mae_positions_by_value(mae):
    for table, width in [
        (mae.vit.embeddings.position_embeddings, WIDTH),
        (mae.decoder.decoder_pos_embed, DECODER_WIDTH),
    ]:
        np.testing.assert_allclose(table[0].numpy(), sincos_by_hand(4, width), atol=1e-6)
        assert not table.requires_grad


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_mae_linear_layers_are_xavier_with_the_bound_of_the_fused_projection(mae, part):
    layers, width = (mae.vit.layers, WIDTH) if part == "encoder" else (mae.decoder.decoder_layers, DECODER_WIDTH)
    for layer in layers:
        for projection in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            assert_follows(projection.weight, xavier(width, 3 * width))
        assert_follows(layer.attention.o_proj.weight, xavier(width, width))
        assert_follows(layer.mlp.fc1.weight, xavier(width, 4 * width))
        assert_follows(layer.mlp.fc2.weight, xavier(4 * width, width))


def test_mae_projections_and_tokens(mae):
    patch = 3 * 8 * 8
    projection = mae.vit.embeddings.patch_embeddings.projection
    assert_follows(projection.weight, xavier(patch, WIDTH))
    assert_follows(projection.bias, uniform(patch**-0.5))
    assert_follows(mae.decoder.decoder_embed.weight, xavier(WIDTH, DECODER_WIDTH))
    assert_follows(mae.decoder.decoder_pred.weight, xavier(DECODER_WIDTH, patch))
    assert_follows(mae.vit.embeddings.cls_token, stats.norm(0, 0.02))
    assert_follows(mae.decoder.mask_token, stats.norm(0, 0.02))


def test_biases_are_zero_and_norms_are_one(mae, simmim):
    for model in (mae, simmim):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.LayerNorm):
                assert (module.weight == 1).all() and (module.bias == 0).all(), name
            elif isinstance(module, torch.nn.Linear) and module.bias is not None:
                assert (module.bias == 0).all(), name


def test_simmim_is_cut_at_one_standard_deviation_and_rescaled_with_depth(simmim):
    def cut_normal(std):
        return stats.truncnorm(-1, 1, scale=std)

    assert_follows(simmim.beit.embeddings.cls_token, cut_normal(0.02))
    assert_follows(simmim.beit.embeddings.mask_token, cut_normal(0.02))
    assert_follows(simmim.beit.embeddings.patch_embeddings.projection.weight, cut_normal(0.02))
    assert (simmim.beit.embeddings.patch_embeddings.projection.bias == 0).all()
    for number, layer in enumerate(simmim.beit.layers, start=1):
        for linear in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj, layer.mlp.fc1):
            assert_follows(linear.weight, cut_normal(0.02))
        for linear in (layer.attention.o_proj, layer.mlp.fc2):
            assert_follows(linear.weight, cut_normal(0.02 / math.sqrt(2 * number)))
        assert (layer.lambda_1 == 0.1).all() and (layer.lambda_2 == 0.1).all()
        assert layer.attention.k_proj.bias is None
    assert (simmim.beit.shared_position_bias.relative_position_bias_table == 0).all()
    assert_follows(simmim.decoder.weight, uniform(WIDTH**-0.5))
    assert_follows(simmim.decoder.bias, uniform(WIDTH**-0.5))


def test_simmim_classifier_from_scratch_is_not_cut():
    model = NIMSimMIMForImageClassification(NIMSimMIMClassifierConfig(**SIZES, num_labels=LABELS))
    assert_follows(model.beit.layers[0].mlp.fc1.weight, stats.norm(0, 0.02))
    assert_follows(model.beit.layers[2].mlp.fc2.weight, stats.norm(0, 0.02 / math.sqrt(6)))
    assert_follows(model.classifier.weight, stats.norm(0, 2e-5))


@pytest.mark.parametrize(
    ("pretrained", "cls"), [("mae", NIMForImageClassification), ("simmim", NIMSimMIMForImageClassification)]
)
def test_fine_tuning_starts_from_a_head_of_almost_zero_and_the_loaded_encoder(request, tmp_path, pretrained, cls):
    source = request.getfixturevalue(pretrained)
    source.save_pretrained(tmp_path)
    model, info = cls.from_pretrained(tmp_path, num_labels=LABELS, output_loading_info=True)
    assert set(info["missing_keys"]) == {
        f"{name}.{kind}" for name in ("fc_norm", "classifier") for kind in ("weight", "bias")
    }
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_follows(model.classifier.weight, stats.norm(0, 2e-5))
    assert (model.classifier.bias == 0).all() and (model.fc_norm.weight == 1).all() and (model.fc_norm.bias == 0).all()
    loaded, given = model.base_model.layers.state_dict(), source.base_model.layers.state_dict()
    for name, weight in given.items():
        assert torch.equal(loaded[name], weight), name


@pytest.mark.parametrize(  # the counts that the sizes are known by, 1,000 classes at 224 pixels
    ("size", "expected"),
    [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656), ("large", 304_326_632), ("huge", 632_045_800)],
)
def test_sizes_have_the_known_numbers_of_parameters(size, expected):
    fields = {key: value for key, value in MODEL_SIZES[size].items() if not key.startswith("decoder")}
    with torch.device("meta"):
        model = NIMForImageClassification(NIMClassifierConfig(**fields, num_labels=1000))
        NIMForPreTraining(NIMConfig(**MODEL_SIZES[size]))
        NIMSimMIMForPreTraining(NIMSimMIMConfig(**MODEL_SIZES[size]))
    assert model.num_parameters() == expected
    assert model.config.patch_size == (14 if size == "huge" else 16)


TABLES = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
FROZEN = {  # what is not trained, fresh and loaded: MAE fine-tunes its table of positions; pre-training keeps it fixed
    "encoder": {"embeddings.position_embeddings"},
    "noise": TABLES | {"decoder.mask_token"},
    "mask": TABLES,
    "classifier": set(),
    "simmim encoder": set(),
    "simmim noise": {"beit.embeddings.mask_token"},
    "simmim mask": set(),
    "simmim classifier": set(),
}


def build(name: str):
    degradation, simmim = name.split()[-1], name.startswith("simmim")
    if name.endswith("classifier"):
        config, cls = (
            (NIMSimMIMClassifierConfig, NIMSimMIMForImageClassification)
            if simmim
            else (NIMClassifierConfig, NIMForImageClassification)
        )
        return cls(config(**SIZES))
    fields = {} if degradation == "encoder" else {"degradation": degradation}
    if simmim:
        config = NIMSimMIMConfig(**SIZES, mask_patch_size=16, **fields)
        return (NIMSimMIMModel if degradation == "encoder" else NIMSimMIMForPreTraining)(config)
    config = NIMConfig(**SIZES, **DECODER, **fields)
    return (NIMModel if degradation == "encoder" else NIMForPreTraining)(config)


def frozen_in(model: torch.nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


@pytest.mark.parametrize("name", FROZEN)
def test_loading_freezes_what_building_freezes_and_no_more(tmp_path, name):
    model = build(name)
    assert frozen_in(model) == FROZEN[name]
    model.save_pretrained(tmp_path)
    loaded, _ = type(model).from_pretrained(tmp_path, output_loading_info=True)
    for again in (loaded, type(model).from_pretrained(tmp_path)):
        assert frozen_in(again) == FROZEN[name]


def test_a_pre_trained_model_is_fine_tuned_with_its_positions(tmp_path):
    """Official MAE's classifier trains its position table: a pre-trained one starts as a fresh one does."""
    build("noise").save_pretrained(tmp_path)
    assert frozen_in(NIMForImageClassification.from_pretrained(tmp_path)) == set()
    assert frozen_in(NIMModel.from_pretrained(tmp_path)) == {"embeddings.position_embeddings"}


def test_a_composed_model_keeps_what_its_parts_freeze(tmp_path):
    expected = {f"purifier.{name}" for name in FROZEN["noise"]}
    model = NIMPurifiedImageClassification.from_parts(build("noise"), build("classifier"))
    model.save_pretrained(tmp_path)
    for loaded in (model, NIMPurifiedImageClassification.from_pretrained(tmp_path)):
        assert frozen_in(loaded) == expected
    assert frozen_in(AutoModelForImageClassification.from_pretrained(tmp_path)) == expected
