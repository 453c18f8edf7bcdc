"""Images larger than the model: cut into tiles and put together, by value, by gradient, by memory."""

import numpy as np
import pytest
import torch
from conftest import TINY, TINY_DECODER
from PIL import Image
from test_numerics import PURIFIERS, every_purifier, nim_mae, nim_simmim, relative_error

from modeling_nim import NIMConfig, NIMSimMIMConfig, image_processor_for
from modeling_nim.noise_nim import add_noise, clamp_to_image_range
from modeling_nim.tiles_nim import TileGrid


def test_tiles_are_windows_of_the_reflected_image():
    grid = TileGrid(height=9, width=13, size=8, stride=4, border=2)
    images = torch.arange(2 * 3 * 9 * 13, dtype=torch.float32).view(2, 3, 9, 13)
    assert (grid.rows, grid.columns) == (3, 4)  # 9 + 4 pixels need two steps of 4 beyond the first tile, 13 + 4 three
    tiles = grid.cut(images).view(2, 3, 4, 3, 8, 8)
    for row, column in [(0, 0), (1, 2), (2, 3)]:
        # A row or column outside of the image is that of its mirror image: -1 is 1, and 9 is 7 where the last one is 8.
        rows = [abs(4 * row - 2 + i) for i in range(8)]
        columns = [abs(4 * column - 2 + i) for i in range(8)]
        rows = [i if i < 9 else 16 - i for i in rows]
        columns = [i if i < 13 else 24 - i for i in columns]
        assert torch.equal(tiles[:, row, column], images[:, :, rows][..., columns])


@pytest.mark.parametrize("window", ["hann", "uniform"])
@pytest.mark.parametrize(
    ("height", "width", "stride", "border"), [(8, 8, 4, 0), (8, 8, 4, 2), (8, 9, 3, 5), (23, 17, 8, 0), (21, 30, 1, 7)]
)
def test_tiles_that_nobody_changed_are_the_image(height, width, stride, border, window):
    grid = TileGrid(height, width, 8, stride, border, window)
    images = torch.randn(2, 3, height, width, dtype=torch.double)
    torch.testing.assert_close(grid.blend(grid.cut(images)), images, atol=1e-12, rtol=0)


def test_overlapping_tiles_are_averaged_by_their_windows():
    """Two tiles of 4 pixels in a row, 2 apart, the first full of zeros and the second of ones."""
    tiles = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    uniform = TileGrid(4, 6, 4, 2, 0, "uniform").blend(tiles)[0, 0, 0]
    assert uniform.tolist() == [0, 0, 0.5, 0.5, 1, 1]
    # sin^2 at 1/8, 3/8, 5/8 and 7/8 of half a turn: a, 1 - a, 1 - a, a; the windows of a half stride sum to 1.
    low = (1 - 2**-0.5) / 2
    hann = TileGrid(4, 6, 4, 2, 0).blend(tiles)[0, 0, 0]
    torch.testing.assert_close(hann, torch.tensor([0, 0, low, 1 - low, 1, 1]))


@every_purifier
def test_one_tile_is_the_plain_model(name):
    """Without a border, and although the tiles' machinery is what runs."""
    model = PURIFIERS[name]()
    images = torch.randn(2, 3, 16, 16)
    draws = model.draw(2, torch.Generator().manual_seed(1))
    expected = model.purify(images, **draws)
    grid = TileGrid(16, 16, 16, 8, 0)
    assert grid.rows == grid.columns == 1
    model._tiles = lambda *_: grid
    torch.testing.assert_close(model.purify(images, **draws), expected, atol=1e-6, rtol=0)


@every_purifier
def test_larger_images_are_purified_tile_by_tile(name):
    """Against a loop over tiles that are cut and weighted by hand."""
    model = PURIFIERS[name]()
    config = model.config
    images = torch.randn(2, 3, 20, 33)
    draws = model.draw(2, torch.Generator().manual_seed(1), image_size=(20, 33))
    purified = model.purify(images, **draws)

    masks = config.hides_patches
    noisy = images
    if config.adds_noise:
        noisy = add_noise(images, draws["sigma"], draws["epsilon"], config.image_std)
    rows, columns = -(-(20 + 8 - 16) // 8) + 1, -(-(33 + 8 - 16) // 8) + 1
    below, right = (rows - 1) * 8 + 16 - 20 - 4, (columns - 1) * 8 + 16 - 33 - 4
    pad = torch.nn.ReflectionPad2d((4, right, 4, below))
    noisy, clean = pad(noisy), pad(images)
    total, weight = torch.zeros_like(clean), torch.zeros_like(clean)
    window = torch.sin(torch.pi * (torch.arange(16) + 0.5) / 16) ** 2
    window = window[:, None] * window
    if masks:
        noise = draws["noise"].view(2, rows * columns, -1)
    for row in range(rows):
        for column in range(columns):
            part = (..., slice(8 * row, 8 * row + 16), slice(8 * column, 8 * column + 16))
            output = model.reconstruct(
                noisy[part],
                model.degrade(clean[part], noise=noise[:, row * columns + column])[1] if masks else None,
                clean[part],
            )
            tile = output.reconstruction
            if masks and not config.adds_noise:
                hidden = output.mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
                tile = torch.where(hidden, tile, clean[part])
            total[part] += tile * window
            weight[part] += window
    expected = (total / weight)[..., 4:24, 4:37]
    expected = clamp_to_image_range(expected, config.image_mean, config.image_std)
    assert purified.shape == images.shape
    torch.testing.assert_close(purified, expected, atol=1e-5, rtol=0)


@every_purifier
def test_gradients_through_tiles_agree_with_finite_differences_in_every_micro_batch(name):
    model = PURIFIERS[name]().double()
    images = (0.3 * torch.randn(1, 3, 18, 24, dtype=torch.double)).requires_grad_()
    draws = {
        key: draw.double() for key, draw in model.draw(1, torch.Generator().manual_seed(1), image_size=(18, 24)).items()
    }
    gradients = []
    for batch_size in (64, 4):  # of 3 x 3 tiles: without and with computing them again
        model.config.tile_batch_size = batch_size
        assert torch.autograd.gradcheck(
            lambda x: model.purify(x, **draws), (images,), eps=1e-7, atol=1e-5, fast_mode=True
        )
        gradients += torch.autograd.grad(model.purify(images, **draws).square().sum(), images)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)


def test_no_more_tiles_than_a_micro_batch_are_computed_at_once(monkeypatch):
    model = nim_mae(tile_batch_size=5)
    sizes, own = [], model.reconstruct
    monkeypatch.setattr(model, "reconstruct", lambda images, *rest: sizes.append(len(images)) or own(images, *rest))
    images = torch.randn(2, 3, 24, 24)  # 3 x 3 tiles each
    model.purify(images, sigma=30, generator=torch.Generator().manual_seed(1))
    assert sizes == [5, 5, 5, 3]
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
        model.purify(images.requires_grad_(), sigma=30)
    activations = sum(held)
    model.config.tile_batch_size = 64
    held.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
        model.purify(images, sigma=30)
    assert activations < 0.2 * sum(held)


@pytest.mark.parametrize("name", ["nim_mae", "nim_simmim", "mae", "nim_mae_masked"])
def test_batches_of_larger_images_do_not_depend_on_each_other(name):
    model = PURIFIERS[name]()
    images = torch.randn(3, 3, 18, 30)
    together = model.purify(images, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    alone = torch.cat([model.purify(image[None], generator=generator) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_noisy_statistics_see_the_noisy_tile_alone():
    """What certification rests on holds for tiles: a shift that the noise takes back changes nothing."""
    model = nim_mae(patch_statistics="noisy")
    images, shift = torch.randn(1, 3, 24, 24), 0.2 * torch.randn(1, 3, 24, 24)
    epsilon = torch.randn(1, 3, 24, 24)
    std = torch.tensor(model.config.image_std).view(1, 3, 1, 1)
    first = model.purify(images, sigma=30, epsilon=epsilon)
    second = model.purify(images + shift, sigma=30, epsilon=epsilon - shift * std * 255 / 30)
    assert relative_error(second, first) < 1e-5


def test_masks_of_tiles_are_shown_as_shares():
    model = nim_simmim(degradation="mask", tile_border=0, tile_stride=16, tile_window="uniform")
    mask = torch.zeros(1, 2 * 2 * 16)  # four tiles side by side
    mask[0, 16 + 5] = 1  # in the tile at the upper right
    images = torch.rand(1, 3, 32, 32) + 0.1
    degraded, hidden = model.degrade(images, bool_masked_pos=mask)
    shown = model.hide(degraded, hidden)
    expected = images.clone()
    expected[..., 4:8, 20:24] = 0
    torch.testing.assert_close(shown, expected)
    changed = (
        model.purify(images, bool_masked_pos=mask)
        != clamp_to_image_range(images, model.config.image_mean, model.config.image_std)
    ).any(dim=1)[0]
    assert changed[4:8, 20:24].all() and changed.sum() == 16
    with pytest.raises(ValueError, match=r"noise has shape \(1, 4\): pass \(1, 16\)"):
        model.purify(images, noise=torch.rand(1, 4))
    with pytest.raises(ValueError, match=r"bool_masked_pos has shape \(1, 16\): pass \(1, 64\)"):
        model.purify(images, bool_masked_pos=mask[:, :16])


@pytest.mark.parametrize("name", ["nim_mae", "nim_simmim", "simmim"])
def test_images_below_the_size_of_a_tile_are_refused(name):
    with pytest.raises(ValueError, match="images are 12x40, smaller than a tile of 16x16: resize"):
        PURIFIERS[name]().purify(torch.randn(1, 3, 12, 40))


@pytest.mark.parametrize("config_class", [NIMConfig, NIMSimMIMConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile_stride": 0}, "tile_stride 0 must be above 0"),
        ({"tile_border": -1}, "tile_border -1 not below 0"),
        ({"tile_stride": 200, "tile_border": 30}, "at most image_size 224"),
        ({"tile_batch_size": 0}, "tile_batch_size must be at least 1, got 0"),
        ({"tile_window": "triangle"}, "triangle"),
    ],
)
def test_tiles_that_cannot_be_are_refused(config_class, fields, message):
    with pytest.raises(Exception, match=message):
        config_class(**fields)


def test_tiles_compile_into_one_graph():
    model = nim_mae(tile_batch_size=4)
    images, epsilon = torch.randn(1, 3, 24, 18), torch.randn(1, 3, 24, 18)
    compiled = torch.compile(model.purify, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model.purify(images, sigma=30, epsilon=epsilon)
        torch.testing.assert_close(compiled(images, sigma=30, epsilon=epsilon), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_tiles_stay_within_two_percent():
    model = nim_mae(norm_pix_loss=False)
    images, epsilon = torch.randn(2, 3, 24, 18), torch.randn(2, 3, 24, 18)
    with torch.no_grad():
        expected = model.purify(images, sigma=30, epsilon=epsilon)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model.purify(images, sigma=30, epsilon=epsilon)
    assert found.dtype == torch.float32 and relative_error(found, expected) < 2e-2


def test_the_processor_of_a_purifier_with_tiles_leaves_a_photograph_its_size():
    config = NIMConfig(**TINY, **TINY_DECODER, tile_stride=12)
    photograph = Image.fromarray(np.full((40, 70, 3), 255, np.uint8))
    pixel_values = image_processor_for(config)(photograph, return_tensors="pt")["pixel_values"]
    white = (1 - torch.tensor(config.image_mean)) / torch.tensor(config.image_std)
    torch.testing.assert_close(pixel_values, white.view(1, 3, 1, 1).expand(1, 3, 40, 70))
