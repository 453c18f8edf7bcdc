"""Adversarial fine-tuning: who attacks whom with which draws, what learns, and that runs repeat exactly."""

import signal

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from remote_classifier import write_remote_classifier
from safetensors.torch import load_file
from training_runs import FINETUNE, PRETRAIN, SERVER, TINY, last_step, load_script, losses, run

from modeling_nim import NIMConfig, NIMForPreTraining, NIMPurifiedImageClassification
from modeling_nim.runs.models import load_purifier, set_attention
from modeling_nim.training.adversary import AdversaryRecipe, adversarial_images, as_attacked, epsilon_255_at
from modeling_nim.training.finetuning import Finetuning
from modeling_nim.training.models import load_classifier
from modeling_nim.training.optimization import OptimizationRecipe, make_plan, parameter_settings, soft_cross_entropy


HARDENED = {key: value for key, value in FINETUNE.items() if key != "augmentation"} | {
    "sigma": "uniform(0, 110)",
    "adversary": {
        "attack": "pgd",
        "epsilon_255": 16,
        "steps": 2,
        "trains": "both",
        "reconstruction_weight": 0.5,
    },
}


@pytest.fixture(scope="module")
def denoised(tmp_path_factory):
    """A pre-trained model, and the defended classifier fine-tuned from it for a few steps."""
    folder = tmp_path_factory.mktemp("denoised")
    run("run_pretrain", PRETRAIN, folder / "pretrain")
    run("run_finetune", FINETUNE | {"init": str(folder / "pretrain")}, folder / "finetune")
    return folder / "finetune" / "purified"


# The attack


def linear_forward(weight):
    return lambda images_01, seeds: images_01.flatten(1) @ weight


def test_the_attack_climbs_inside_its_budget_and_depends_on_the_names_alone():
    images_01, weight = torch.rand(6, 3, 8, 8), torch.randn(192, 5)
    targets = torch.randn(6, 5).softmax(dim=-1)
    recipe = AdversaryRecipe(attack="pgd", epsilon_255=8, steps=5)
    names = [f"image {number}" for number in range(6)]
    found = adversarial_images(linear_forward(weight), images_01, targets, names, 0, 8.0, recipe)
    assert (found - images_01).abs().max() <= 8 / 255 + 1e-7 and 0 <= found.min() and found.max() <= 1
    before, after = (
        soft_cross_entropy(linear_forward(weight)(images, []), targets, reduction="none")
        for images in (images_01, found)
    )
    assert (after > before).all()
    part = adversarial_images(linear_forward(weight), images_01[4:], targets[4:], names[4:], 0, 8.0, recipe)
    torch.testing.assert_close(part, found[4:], rtol=0, atol=1e-6)
    assert adversarial_images(linear_forward(weight), images_01, targets, names, 0, 0.0, recipe) is images_01


def test_fgsm_is_one_step_from_a_random_start():
    images_01, weight = torch.full((1, 3, 4, 4), 0.5), torch.randn(48, 2)
    questions = []

    def forward(images_01, seeds):
        questions.append((images_01.detach().clone(), list(seeds)))
        return linear_forward(weight)(images_01, seeds)

    recipe = AdversaryRecipe(attack="fgsm", epsilon_255=10, alpha_ratio=1.25, steps=7)
    found = adversarial_images(forward, images_01, torch.tensor([[1.0, 0.0]]), ["a"], 0, 10.0, recipe)
    ((start_01, seeds),) = questions
    assert len(seeds) == 1 and 0 < (start_01 - images_01).abs().max() <= 10 / 255
    ascent = (weight[:, 1] - weight[:, 0]).sign().view(1, 3, 4, 4)  # of the loss of class 0
    step = (start_01 + 1.25 * 10 / 255 * ascent - images_01).clamp(-10 / 255, 10 / 255)
    torch.testing.assert_close(found, images_01 + step, rtol=0, atol=1e-6)


def test_the_budget_grows_over_the_warm_up():
    plan = make_plan(OptimizationRecipe(batch_size=10, base_learning_rate=1e-3, epochs=5), 1, num_images=100)
    recipe = AdversaryRecipe(attack="pgd", epsilon_255=16, warmup_epochs=0.4)
    assert [epsilon_255_at(step, recipe, plan) for step in range(6)] == [4.0, 8.0, 12.0, 16.0, 16.0, 16.0]
    assert epsilon_255_at(0, AdversaryRecipe(attack="pgd", epsilon_255=16), plan) == 16
    assert epsilon_255_at(9, AdversaryRecipe(epsilon_255=16), plan) == 0


def test_what_is_attacked_is_put_back_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.BatchNorm1d(2))
    model[2].requires_grad_(False).eval()
    with as_attacked(model):
        assert not any(module.training for module in model.modules())
        assert not any(weight.requires_grad for weight in model.parameters())
    assert [module.training for module in model] == [True, True, False]
    assert [weight.requires_grad for weight in model.parameters()] == [True, True, False, False]


# One step, in a process of its own because of what Accelerate keeps


def _check_draws(model_dir):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    purifier = load_purifier(model_dir)
    model = NIMPurifiedImageClassification.from_parts(purifier, load_classifier(model_dir, list("0123456789"), 0.0))
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    assert frozen == [
        "purifier.vit.embeddings.position_embeddings",
        "purifier.decoder.mask_token",
        "purifier.decoder.decoder_pos_embed",
    ]
    recipe = load_script("run_finetune").FinetuneRecipe(
        seed=3,
        output_dir="unused",
        data=None,
        optimization=None,
        init=str(model_dir),
        images="denoised",
        sigma="uniform(0, 110)",
        adversary=AdversaryRecipe(attack="pgd", steps=2, trains="both", reconstruction_weight=0.5),
    )
    finetuning = Finetuning(accelerator, recipe, model, model)
    finetuning.train()
    met, questions = [], []

    def note(module, arguments, keywords):
        met.append((module.training, keywords["sigma"], keywords["epsilon"]))
        questions.append(arguments[0].detach())

    model.register_forward_pre_hook(note, with_kwargs=True)
    images_01, targets = torch.rand(2, 3, 32, 32), torch.eye(10)[[1, 7]]
    which = (np.array([0, 0]), np.array([5, 9]))
    clean = finetuning.clean(images_01, targets)
    assert clean.targets is targets and not clean.features
    adversarial_01 = finetuning.attack(clean, which, 8.0)
    assert all(weight.grad is None for weight in model.parameters())
    loss = finetuning.loss(adversarial_01, clean, which)

    assert [training for training, _, _ in met] == [False, False, True]
    assert all(torch.equal(sigma, met[-1][1]) for _, sigma, _ in met)  # the sigma that the image will meet
    noises = torch.stack([epsilon for _, _, epsilon in met]).flatten(2)  # (3, 2, D)
    correlations = torch.corrcoef(noises.flatten(0, 1))
    assert (correlations - torch.eye(6)).abs().max() < 0.08  # six independent draws of 3,072 numbers

    with torch.no_grad():
        pixel_values = finetuning.normalize(adversarial_01)
        output = model(pixel_values, sigma=met[-1][1], epsilon=met[-1][2])
        distance = (output.purified_pixel_values - finetuning.normalize(images_01)).square().mean()
        expected = soft_cross_entropy(output.logits, targets) + 0.5 * distance
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and distance > 0.01
    loss.backward()
    for part in (model.purifier, model.classifier):
        assert all(weight.grad.abs().max() > 0 for weight in part.parameters() if weight.requires_grad)

    # in the next epoch the attack begins elsewhere in the ball, and meets other noise
    later = len(met)
    finetuning.attack(clean, (which[0] + 1, which[1]), 8.0)
    starts = [(questions[number] - finetuning.normalize(images_01)).flatten() for number in (0, later)]
    noises = [met[number][2].flatten() for number in (0, later)]
    for pair in (starts, noises):
        assert torch.corrcoef(torch.stack(pair))[0, 1].abs() < 0.08
    assert starts[1].abs().max() > 0.1 and not torch.equal(met[0][1], met[later][1])


def test_attack_and_training_meet_one_sigma_and_different_noise(denoised):
    process = SERVER.Process(target=_check_draws, args=(str(denoised),))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_layer_decay_reaches_the_classifier_of_a_composed_model(denoised):
    model = NIMPurifiedImageClassification.from_pretrained(denoised)
    alone = parameter_settings(model.classifier, 0.05, 0.5)
    composed = parameter_settings(model, 0.05, 0.5)
    assert alone["vit.layers.0.layernorm_before.weight"] == (0.5, 0.0)
    assert {name: composed[f"classifier.{name}"] for name in alone} == alone
    assert composed["purifier.vit.layers.0.layernorm_before.weight"] == (1.0, 0.0)


# Whole runs


def changed(before: dict, after: dict, part: str) -> bool:
    names = [name for name in before if name.startswith(f"{part}.")]
    assert names
    return any(not torch.equal(before[name], after[name]) for name in names)


@pytest.mark.parametrize("trains", ["classifier", "purifier", "both"])
def test_what_is_to_learn_learns_and_nothing_else(trains, denoised, tmp_path):
    adversary = HARDENED["adversary"] | {"trains": trains, "reconstruction_weight": 0 if trains == "classifier" else 1}
    recipe = HARDENED | {"init": str(denoised), "adversary": adversary, "defense_sigma": 75}
    recipe["optimization"] = {"batch_size": 16, "base_learning_rate": 0.016, "steps": 2}
    run("run_finetune", recipe, tmp_path / "run", "validation.split=test")
    before, after = load_file(denoised / "model.safetensors"), load_file(tmp_path / "run/purified/model.safetensors")
    assert changed(before, after, "purifier") == (trains != "classifier")
    assert changed(before, after, "classifier") == (trains != "purifier")
    assert NIMPurifiedImageClassification.from_pretrained(tmp_path / "run/purified").config.sigma == 75
    for part, folder in (("purifier", "run/purifier"), ("classifier", "run")):
        alone = tmp_path / folder / "model.safetensors"
        assert alone.exists() == (changed(before, after, part))
        if alone.exists():
            weights = load_file(alone)
            assert weights and all(torch.equal(after[f"{part}.{name}"], weights[name]) for name in weights)


def test_without_a_budget_it_is_plain_fine_tuning_to_the_bit(denoised, tmp_path):
    recipe = FINETUNE | {"init": str(denoised)}
    recipe["optimization"] = FINETUNE["optimization"] | {"steps": 3}
    run("run_finetune", recipe, tmp_path / "plain")
    weights = {"plain": load_file(tmp_path / "plain" / "model.safetensors")}
    for name, epsilon_255 in (("zero", 0), ("attacked", 8)):
        overrides = ("adversary.attack=pgd", f"adversary.epsilon_255={epsilon_255}", "adversary.steps=2")
        run("run_finetune", recipe, tmp_path / name, *overrides)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
    assert losses(tmp_path / "zero") == losses(tmp_path / "plain")
    assert all(torch.equal(weights["plain"][key], weights["zero"][key]) for key in weights["plain"])
    assert losses(tmp_path / "attacked")[1] > losses(tmp_path / "plain")[1]


@pytest.mark.parametrize(("num_processes", "step"), [(1, 1), (1, 8), (2, 5)])
def test_killed_run_goes_on_exactly(num_processes, step, denoised, tmp_path):
    recipe = HARDENED | {"init": str(denoised)}
    recipe["optimization"] = HARDENED["optimization"] | {"steps": 8}
    run("run_finetune", recipe, tmp_path / "unbroken", num_processes=num_processes)
    run(
        "run_finetune",
        recipe,
        tmp_path / "killed",
        num_processes=num_processes,
        exit_code=-signal.SIGKILL,
        interruption=("step", step, signal.SIGKILL),
    )
    assert last_step(tmp_path / "killed") == step - 1
    run("run_finetune", recipe, tmp_path / "killed", num_processes=num_processes)
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    for folder in ("purified", "purifier", "."):
        unbroken, resumed = (
            load_file(tmp_path / name / folder / "model.safetensors") for name in ("unbroken", "killed")
        )
        assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_two_processes_and_accumulation_give_the_single_process_curve(denoised, tmp_path):
    recipe = HARDENED | {"init": str(denoised), "drop_path_rate": 0.0}
    recipe["optimization"] = HARDENED["optimization"] | {"steps": 6}
    run("run_finetune", recipe, tmp_path / "one")
    run("run_finetune", recipe, tmp_path / "two", num_processes=2)
    run("run_finetune", recipe, tmp_path / "parts", "optimization.gradient_accumulation_steps=2")
    for name in ("two", "parts"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=2e-3)


def test_plain_adversarial_training_has_no_purifier(denoised, tmp_path):
    recipe = HARDENED | {"init": str(denoised), "images": "original", "adversary": {"attack": "fgsm"}}
    recipe["optimization"] = HARDENED["optimization"] | {"steps": 3}
    run("run_finetune", recipe, tmp_path / "run", "execution.mixed_precision=bf16")
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "purified").exists() and not (tmp_path / "run" / "purifier").exists()


def test_a_frozen_classifier_may_answer_for_the_labels(denoised, tmp_path):
    """A purifier that learns what the classifier says of clean images needs no labels: other ones change nothing."""
    adversary = {"attack": "fgsm", "trains": "purifier", "targets": "clean_answer"}
    recipe = HARDENED | {"init": str(denoised), "adversary": adversary}
    recipe["optimization"] = HARDENED["optimization"] | {"steps": 3}
    run("run_finetune", recipe, tmp_path / "sharp")
    run("run_finetune", recipe, tmp_path / "smoothed", "label_smoothing=0.9")
    assert losses(tmp_path / "sharp") == losses(tmp_path / "smoothed")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["adversary.trains=both", "images=original"], "adversary.trains both needs the purifier"),
        (["adversary.reconstruction_weight=1"], "adversary.reconstruction_weight 1.0 is for a purifier that learns"),
        (["adversary.targets=clean_answer"], "adversary.targets clean_answer asks a frozen classifier"),
        (["image_size=40"], "image_size 40 is for a purifier that learns on images larger than its own"),
        (["adversary.steps=0"], "adversary.steps' must be at least 1 "),
        (["adversary.epsilon_255=-1"], "adversary.epsilon_255' must be at least 0"),
        (["adversary.attack=square"], "adversary.attack' must be one of ['none', 'fgsm', 'pgd'], got 'square'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(overrides, message, denoised, tmp_path):
    printed = run("run_finetune", FINETUNE | {"init": str(denoised)}, tmp_path / "run", *overrides, exit_code=2)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_composed_model_of_other_classes_is_refused(denoised, tmp_path):
    model = NIMPurifiedImageClassification.from_pretrained(denoised)
    purifier = NIMForPreTraining(NIMConfig(**TINY))
    head = type(model.classifier)(
        type(model.classifier.config)(**model.classifier.config.to_dict() | {"num_labels": 4})
    )
    NIMPurifiedImageClassification.from_parts(purifier, head).save_pretrained(tmp_path / "four")
    printed = run("run_finetune", FINETUNE | {"init": str(tmp_path / "four")}, tmp_path / "run", exit_code=2)
    assert "knows 4 classes and the data have 10" in printed


def test_a_purifier_learns_in_tiles_before_a_classifier_with_code_of_its_own(denoised, tmp_path):
    classifier = write_remote_classifier(tmp_path / "classifier", num_labels=7)
    recipe = HARDENED | {"init": classifier, "purifier": str(denoised.parent.parent / "pretrain")}
    recipe |= {"image_size": 40, "crop": {"crop": "native", "shorter_side": 48}}  # tiles of 32 pixels
    adversary = {"attack": "fgsm", "trains": "purifier", "targets": "clean_answer", "reconstruction_weight": 1}
    recipe |= {"adversary": adversary, "feature_loss": {"weight": 1}, "drop_path_rate": 0.0}
    recipe["optimization"] = {"batch_size": 16, "base_learning_rate": 0.016, "steps": 2}

    printed = run("run_finetune", recipe, tmp_path / "untrusted", exit_code=2)
    assert "has Python code of its own; read it, and set trust_remote_code=true" in printed
    printed = run("run_finetune", recipe, tmp_path / "run", "trust_remote_code=true", "execution.mixed_precision=bf16")
    assert "attention: eager (17 tokens)" in printed and "purified/" not in printed
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (denoised.parent.parent / "pretrain", tmp_path / "run/purifier")
    )
    frozen = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed", "decoder.mask_token"}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert not (tmp_path / "run" / "purified").exists()  # the classifier's weights and code stay where they are
    assert NIMForPreTraining.from_pretrained(tmp_path / "run" / "purifier").config.image_size == 32


def test_a_model_that_is_no_classifier_cannot_be_the_frozen_one(denoised, tmp_path):
    pretrain = str(denoised.parent.parent / "pretrain")
    printed = run(
        "run_finetune", FINETUNE | {"init": pretrain}, tmp_path / "run", "adversary.trains=purifier", exit_code=2
    )
    assert "is a 'nim' model, no classifier; name a fine-tuned or purified one" in printed


@pytest.mark.parametrize(
    "implementation, mixed_precision, device, image_size, chosen",
    [
        ("auto", "bf16", "cpu", 32, "eager"),
        ("auto", "bf16", "cpu", 256, "sdpa"),  # 1,025 tokens: the memory for all pairs counts
        ("auto", "bf16", "cuda", 32, "sdpa"),
        ("auto", "no", "cpu", 32, "eager"),
        ("auto", "no", "cpu", 64, "sdpa"),
        ("sdpa", "bf16", "cpu", 32, "sdpa"),
        ("eager", "no", "cuda", 256, "eager"),
        (None, "bf16", "cpu", 32, "sdpa"),
    ],
)
def test_attention_is_what_is_fastest_for_the_size(implementation, mixed_precision, device, image_size, chosen):
    with torch.device("meta"):
        model = NIMForPreTraining(NIMConfig(**TINY | {"image_size": image_size}, attn_implementation="sdpa"))
    said = set_attention([model], implementation, mixed_precision, torch.device(device))
    assert said == f"{chosen} ({(image_size // 8) ** 2 + 1} tokens)"
    assert model.config._attn_implementation == chosen
