"""Sigma specifications, the draws, and Eq. 3."""

import re

import pytest
import torch
from scipy import stats

from modeling_nim.noise_nim import (
    DISTRIBUTIONS,
    add_noise,
    clamp_to_image_range,
    denormalize,
    draw_by_image,
    noise_samplers,
    normalize,
    parse_sigma,
    sample_epsilon,
    sample_mask_noise,
    sample_sigma,
)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (30, ("fixed", 30.0, 0.0)),
        ("30", ("fixed", 30.0, 0.0)),
        (" 2.5 ", ("fixed", 2.5, 0.0)),
        ("uniform(0, 30)", ("uniform", 0.0, 30.0)),
        ("gamma( 25,3 )", ("gamma", 25.0, 3.0)),
        ("laplace(30, 10)", ("laplace", 30.0, 10.0)),
    ],
)
def test_parse_sigma_reads_every_form(spec, expected):
    parsed = parse_sigma(spec)
    assert (parsed.kind, parsed.a, parsed.b) == expected


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "normal(0, 1)",
        "uniform(30)",
        "uniform(30, 30)",
        "gamma(0, 3)",
        "laplace(30, 0)",
        "gamma(25, x)",
        "-1",
        -1,
        "nan",
        "inf",
    ],
)
def test_parse_sigma_refuses_and_says_what_to_write(spec):
    with pytest.raises(ValueError, match="sigma.*write a number such as"):
        parse_sigma(spec)


class Folded:
    """|X| for X of Laplace's law: P(|X| <= x) is P(X <= x) - P(X < -x)."""

    def __init__(self, center, scale):
        self.law = stats.laplace(center, scale)

    def cdf(self, x):
        return self.law.cdf(x) - self.law.cdf(-x)

    def mean(self):
        return self.law.expect(abs)


@pytest.mark.parametrize("generator", [None, seeded(7)])
@pytest.mark.parametrize(
    ("spec", "law"),
    [
        ("uniform(10, 40)", stats.uniform(10, 30)),
        ("gamma(25, 3)", stats.gamma(25, scale=3)),
        ("laplace(60, 10)", Folded(60, 10)),
        ("laplace(5, 10)", Folded(5, 10)),
    ],
)
def test_sampled_sigma_follows_its_distribution(spec, law, generator):
    sigma = sample_sigma(spec, 4000, generator)
    assert sigma.dtype == torch.float32 and sigma.shape == (4000,)
    assert stats.kstest(sigma.numpy(), law.cdf).pvalue > 1e-3
    assert parse_sigma(spec).mean == pytest.approx(law.mean())


def test_fixed_sigma_draws_nothing():
    generator = seeded()
    before = generator.get_state()
    assert sample_sigma("30", 3, generator).tolist() == [30.0] * 3
    assert torch.equal(generator.get_state(), before)


def test_add_noise_is_equation_3_in_normalized_units():
    images_01, epsilon = torch.rand(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    noisy = add_noise(normalize(images_01, MEAN, STD), torch.tensor([30.0, 255.0]), epsilon, STD)
    expected = images_01 + epsilon * torch.tensor([30 / 255, 1.0]).view(-1, 1, 1, 1)
    torch.testing.assert_close(denormalize(noisy, MEAN, STD), expected)
    assert expected.min() < 0, "the noisy image is not clamped, and this draw shows it"


@pytest.mark.parametrize("sigma", [-1, torch.tensor([3.0, -2.0])])
def test_add_noise_refuses_negative_sigma(sigma):
    with pytest.raises(ValueError, match="sigma must be >= 0.*-[12]"):
        add_noise(torch.zeros(2, 3, 4, 4), sigma, torch.zeros(2, 3, 4, 4), STD)


@pytest.mark.parametrize(
    ("sigma", "shape", "message"),
    [(torch.ones(3), (2, 3, 4, 4), "one number or one per image"), (torch.ones(2), (2, 3, 4, 5), "epsilon has shape")],
)
def test_add_noise_refuses_shapes_that_do_not_fit(sigma, shape, message):
    with pytest.raises(ValueError, match=message):
        add_noise(torch.zeros(2, 3, 4, 4), sigma, torch.zeros(shape), STD)


@pytest.mark.parametrize("sigma", [30, "uniform(0, 30)", "gamma(25, 3)"])
def test_a_generator_gives_each_image_the_same_draw_at_any_batch_size(sigma):
    samplers = noise_samplers(sigma, (3, 6, 6))
    samplers["noise"] = lambda number, generator: sample_mask_noise((number, 16), generator)
    together, one_by_one = seeded(3), seeded(3)
    batch = draw_by_image(samplers, 5, together)
    singles = [draw_by_image(samplers, 1, one_by_one) for _ in range(5)]
    for name in samplers:
        assert torch.equal(batch[name], torch.cat([single[name] for single in singles]))
    assert torch.equal(together.get_state(), one_by_one.get_state())
    assert len(batch["epsilon"].unique()) == 5 * 3 * 6 * 6


def test_a_list_of_generators_gives_each_image_its_own_stream():
    images = torch.zeros(3, 3, 4, 4)
    epsilon = sample_epsilon(images.shape, [seeded(1), seeded(2), seeded(1)])
    assert torch.equal(epsilon[0], epsilon[2]) and not torch.equal(epsilon[0], epsilon[1])
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        sample_epsilon(images.shape, [seeded(), seeded()])


def test_a_generator_leaves_the_global_rng_alone():
    before = torch.get_rng_state()
    for sample in (lambda n, g: sample_sigma("gamma(25, 3)", n, g), lambda n, g: sample_epsilon((n, 3, 4, 4), g)):
        draw_by_image({"draw": sample}, 2, seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_clamp_is_the_image_range_and_lets_gradients_through_inside_it():
    images_01 = torch.tensor([-0.5, 0.25, 1.5]).view(1, 1, 1, 3).expand(1, 3, 1, 3).clone().requires_grad_()
    clamped = denormalize(clamp_to_image_range(normalize(images_01, MEAN, STD), MEAN, STD), MEAN, STD)
    torch.testing.assert_close(clamped[0, :, 0], torch.tensor([0.0, 0.25, 1.0]).expand(3, 3))
    clamped.sum().backward()
    torch.testing.assert_close(images_01.grad[0, :, 0], torch.tensor([0.0, 1.0, 0.0]).expand(3, 3))


def test_every_distribution_says_how_it_is_written():
    for name, law in DISTRIBUTIONS.items():
        with pytest.raises(ValueError, match=re.escape(law.form)):
            parse_sigma("-1")
        assert law.form.startswith(f"{name}(")


def test_one_sigma_is_added_and_no_distribution():
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="is a distribution: draw one number per image"):
        add_noise(images, "gamma(25, 3)", torch.ones_like(images), STD)
