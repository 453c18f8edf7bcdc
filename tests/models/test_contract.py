"""What both pre-training families have in common, and the defended classifier on top of it."""

import pytest
import torch
from conftest import TINY
from test_numerics import CLASSIFIERS, PURIFIERS, every_purifier, nim_mae, nim_simmim

from modeling_nim import NIMPurifiedImageClassification
from modeling_nim.noise_nim import clamp_to_image_range


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@every_purifier
def test_forward_is_degrade_reconstruct_and_score(name, pixel_values):
    model = PURIFIERS[name]()
    degraded, hidden = model.degrade(pixel_values, generator=seeded(1, 2, 3, 4))
    output = model.reconstruct(degraded, hidden, pixel_values)
    assert output.loss is None
    whole = model(pixel_values, generator=seeded(1, 2, 3, 4))
    assert torch.equal(whole.loss, model.forward_loss(pixel_values, output))
    for field in ("logits", "reconstruction", "degraded_pixel_values"):
        assert torch.equal(whole[field], output[field]), field
    assert torch.equal(whole.to_tuple()[0], whole.loss)
    assert torch.equal(model.hide(degraded, hidden), whole.degraded_pixel_values)


@every_purifier
def test_purify_computes_no_loss(name, pixel_values, monkeypatch):
    model = PURIFIERS[name]()
    output = model(pixel_values, generator=seeded(1, 2, 3, 4))
    monkeypatch.setattr(model, "forward_loss", None)
    purified = model.purify(pixel_values, generator=seeded(1, 2, 3, 4))
    expected = output.reconstruction
    if model.config.degradation == "mask":
        hidden = output.mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
        expected = torch.where(hidden, expected, pixel_values)
    assert torch.equal(purified, clamp_to_image_range(expected, model.config.image_mean, model.config.image_std))


@every_purifier
def test_draws_are_those_that_the_model_makes_itself(name, pixel_values):
    model = PURIFIERS[name]()
    expected = model(pixel_values, generator=seeded(1, 2, 3, 4))
    draws = model.draw(4, seeded(1, 2, 3, 4))
    assert torch.equal(model(pixel_values, **draws).degraded_pixel_values, expected.degraded_pixel_values)
    shared = model(pixel_values, generator=torch.Generator().manual_seed(9)).degraded_pixel_values
    draws = model.draw(4, torch.Generator().manual_seed(9))
    assert torch.equal(model(pixel_values, **draws).degraded_pixel_values, shared)
    torch.manual_seed(5)
    global_draws = model.draw(4)
    torch.manual_seed(5)
    assert torch.equal(
        model(pixel_values).degraded_pixel_values, model(pixel_values, **global_draws).degraded_pixel_values
    )


def test_draws_of_another_size_and_sigma():
    model = PURIFIERS["nim_mae"]()
    draws = model.draw(2, seeded(1, 2), sigma="uniform(10, 20)", image_size=(24, 40))
    generator = torch.Generator().manual_seed(2)
    assert draws["sigma"][1] == 10 + 10 * torch.rand(1, generator=generator)
    assert torch.equal(draws["epsilon"][1], torch.randn(3, 24, 40, generator=generator))
    with pytest.raises(ValueError, match="sigma 30 belongs to"):
        PURIFIERS["simmim"]().draw(2, sigma=30)


def test_nim_mae_takes_a_mask_in_place_of_its_order(pixel_values):
    model = PURIFIERS["mae"]()
    output = model(pixel_values, noise=torch.rand(4, 16))
    given = model(pixel_values, bool_masked_pos=output.mask.view(4, 4, 4).bool())
    assert torch.equal(given.mask, output.mask)
    torch.testing.assert_close(given.loss, output.loss)
    with pytest.raises(ValueError, match=r"must hide 12 of 16 patches.*got \[16, 16, 16, 16\]"):
        model(pixel_values, bool_masked_pos=torch.ones(4, 16))


def defended(name: str, **fields) -> NIMPurifiedImageClassification:
    return NIMPurifiedImageClassification.from_parts(PURIFIERS[name](), CLASSIFIERS["mae"](), **fields)


@pytest.mark.parametrize("votes", [1, 3])
@pytest.mark.parametrize(
    ("name", "sigma"),
    [("nim_mae", "uniform(0, 90)"), ("nim_simmim", 30), ("mae", None), ("nim_mae_masked", "uniform(0, 90)")],
)
def test_the_defense_draws_votes_one_after_the_other(name, sigma, votes, pixel_values):
    model = defended(name)
    expected = model(pixel_values, sigma=sigma, num_votes=votes, generator=seeded(1, 2, 3, 4))
    draws = model.draw(4, seeded(1, 2, 3, 4), sigma, votes)
    assert {draw.shape[:2] if votes > 1 else draw.shape[:1] for draw in draws.values()} == {
        (4, votes) if votes > 1 else (4,)
    }
    of_votes = [[model.purifier.draw(1, [g], sigma) for _ in range(votes)] for g in seeded(1, 2, 3, 4)]
    for key, draw in draws.items():
        each = torch.stack([torch.cat([vote[key] for vote in of_image]) for of_image in of_votes])  # (4, K, ...)
        assert torch.equal(draw if votes > 1 else draw[:, None], each)
    found = model(pixel_values, num_votes=votes, **draws)
    assert torch.equal(found.logits, expected.logits)
    if votes > 1:  # draws say how many votes they are
        assert torch.equal(model(pixel_values, **draws).logits, expected.logits)
    alone = model(pixel_values[2:3], sigma=sigma, num_votes=votes, generator=seeded(3))
    torch.testing.assert_close(alone.logits[0], expected.logits[2])


@pytest.mark.parametrize("votes", [1, 2])
def test_the_defense_shows_its_stages_of_the_first_vote(votes, pixel_values):
    model = defended("nim_mae", sigma=50)
    output = model(
        pixel_values, generator=seeded(1, 2, 3, 4), num_votes=votes, output_hidden_states=True, output_attentions=True
    )
    draws = model.draw(4, seeded(1, 2, 3, 4))  # one vote
    alone = model.purifier(pixel_values, **draws)
    assert torch.equal(output.degraded_pixel_values, alone.degraded_pixel_values)
    torch.testing.assert_close(output.purified_pixel_values, model.purifier.purify(pixel_values, **draws))
    model.classifier.set_attn_implementation("eager")
    seen = model.classifier(output.purified_pixel_values, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == TINY["num_hidden_layers"] + 1
    torch.testing.assert_close(output.hidden_states, seen.hidden_states)
    if votes == 1:
        torch.testing.assert_close(output.logits, seen.logits)
        assert torch.equal(output.to_tuple()[0], output.logits)


def test_a_hiding_purifier_shows_what_it_hid(pixel_values):
    model = defended("mae")
    noise = torch.rand(4, 2, 16)
    output = model(pixel_values, noise=noise)
    expected = model.purifier(pixel_values, noise=noise[:, 0])
    assert torch.equal(output.degraded_pixel_values, expected.degraded_pixel_values)
    zeros = (output.degraded_pixel_values == 0).all(dim=1).float().mean(dim=(1, 2))
    assert zeros.tolist() == [0.75] * 4


@pytest.mark.parametrize("degradation", ["noise", "mask"])
@pytest.mark.parametrize("build", [nim_mae, nim_simmim])
def test_one_field_chooses_the_error_of_both_families(build, degradation, pixel_values):
    assert (nim_mae().config.reconstruction_loss, nim_simmim().config.reconstruction_loss) == ("mse", "l1")
    for kind, error in (("mse", torch.square), ("l1", torch.abs)):
        model = build(
            degradation=degradation, reconstruction_loss=kind, **({"norm_pix_loss": False} if build is nim_mae else {})
        )
        output = model(pixel_values, generator=torch.Generator().manual_seed(1))
        errors = error(output.reconstruction - pixel_values)
        if output.mask is not None:
            hidden = output.mask.view(4, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
            errors = errors[hidden.expand_as(errors)]
        torch.testing.assert_close(output.loss, errors.mean())


@pytest.mark.parametrize("use_reentrant", [True, False])
@every_purifier
def test_both_ways_of_checkpointing_give_the_same_gradients(name, use_reentrant, pixel_values):
    model = PURIFIERS[name]().train()
    draws = model.draw(4, seeded(1, 2, 3, 4))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.zero_grad()
        model(pixel_values.clone().requires_grad_(), **draws).loss.backward()
        gradients.append(
            {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, msg=key)


@pytest.mark.parametrize("votes", [1, 3])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_other_kinds_of_labels_are_taken_where_the_configuration_says_so(name, votes, pixel_values):
    classifier = CLASSIFIERS[name]()
    soft = torch.rand(4, 5)
    for problem_type, loss, votes_of in (
        ("regression", torch.nn.functional.mse_loss, lambda logits: logits),
        ("multi_label_classification", torch.nn.functional.binary_cross_entropy_with_logits, torch.sigmoid),
    ):
        with pytest.raises(ValueError, match="or set problem_type"):
            classifier.config.problem_type = None
            classifier(pixel_values, labels=soft)
        classifier.config.problem_type = problem_type
        output = classifier(pixel_values, labels=soft)
        torch.testing.assert_close(output.loss, loss(output.logits, soft))
        model = NIMPurifiedImageClassification.from_parts(PURIFIERS["nim_mae"](), classifier, sigma=50)
        draws = model.draw(4, seeded(1, 2, 3, 4), num_votes=votes)
        output = model(pixel_values, labels=soft, **draws)
        torch.testing.assert_close(output.loss, loss(output.logits, soft))
        single = [
            model(pixel_values, **{key: draw[:, vote] if votes > 1 else draw for key, draw in draws.items()}).logits
            for vote in range(votes)
        ]
        torch.testing.assert_close(
            votes_of(output.logits), torch.stack([votes_of(x) for x in single]).mean(0), atol=1e-5, rtol=1e-4
        )


def test_another_number_of_labels_is_refused_or_given_a_fresh_head(tmp_path, pixel_values):
    defended("nim_mae").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="(?s)size mismatch|ignore_mismatched_sizes"):
        NIMPurifiedImageClassification.from_pretrained(tmp_path, num_labels=42)
    model = NIMPurifiedImageClassification.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True)
    assert model(pixel_values).logits.shape == (4, 42) and model.config.num_labels == 42
    assert NIMPurifiedImageClassification.from_pretrained(tmp_path).config.num_labels == 5
