"""Attacks of foolbox, secml-torch and ART as attacks of one's own: `peer_attacks:foolbox_pgd` in a recipe.

Each meets the model as its users wire it, a module from [0, 1] images to logits with fresh noise in every call, and
gets as many gradients as ours: `eot_samples` of them are averaged in each step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from modeling_nim.robustness.draws import ATTACK, isolated_global_rng, stream_seed
from modeling_nim.robustness.oracle import Oracle
from modeling_nim.robustness.torchattacks_peer import TensorModel


@contextmanager
def _opened(oracle: Oracle, images_01: torch.Tensor, rows_per_image: int = 1) -> Iterator[TensorModel]:
    """The model of an oracle for a library that draws from the global generators; what it is asked counts as queries.

    `rows_per_image` is how many rows of one pass belong to an image.
    """
    model = TensorModel(oracle, images_01.device).eval()
    with isolated_global_rng(stream_seed(oracle.seed, oracle.image_ids[0], ATTACK, oracle.restart)):
        yield model
    oracle.queries += model.calls * rows_per_image


def _mean(number: int, ask: Callable[[], tuple]) -> list:
    """The means of what `ask` returns when it is asked `number` times."""
    answers = [ask() for _ in range(number)]
    return [sum(values) / number for values in zip(*answers, strict=True)]


def foolbox_pgd(oracle: Oracle, images_01: torch.Tensor, epsilon: float, alpha: float, steps: int) -> torch.Tensor:
    """foolbox' LinfPGD with the gradient of each step averaged over fresh draws."""
    import foolbox

    class PGD(foolbox.attacks.LinfPGD):
        def value_and_grad(self, loss_fn, x):
            one = super().value_and_grad
            return tuple(_mean(oracle.eot_samples, lambda: one(loss_fn, x)))

    with _opened(oracle, images_01) as model:
        theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device=images_01.device)
        return PGD(abs_stepsize=alpha, steps=steps, random_start=True).run(
            theirs, images_01, oracle.labels, epsilon=epsilon
        )


def foolbox_fmn(oracle: Oracle, images_01: torch.Tensor, epsilon: float, steps: int) -> torch.Tensor:
    """foolbox' fast minimum norm attack; what it finds beyond epsilon is cut off there."""
    import foolbox

    with _opened(oracle, images_01) as model:
        theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device=images_01.device)
        found = foolbox.attacks.LInfFMNAttack(steps=steps).run(theirs, images_01, oracle.labels)
    return images_01 + (found.to(images_01) - images_01).clamp(-epsilon, epsilon)


def _run_secml(attack, model: TensorModel, images_01: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from secmlt.models.pytorch.base_pytorch_nn import BasePyTorchClassifier
    from torch.utils.data import DataLoader, TensorDataset

    batches = DataLoader(TensorDataset(images_01, labels), batch_size=len(images_01))
    found = attack(BasePyTorchClassifier(model), batches)
    return torch.cat([batch for batch, _ in found])


def secml_pgd(oracle: Oracle, images_01: torch.Tensor, epsilon: float, alpha: float, steps: int) -> torch.Tensor:
    """secml-torch's own PGD with the gradient of each step averaged over fresh draws."""
    from secmlt.adv.evasion.pgd import PGDNative

    class PGD(PGDNative):
        def _loss_and_grad(self, model, samples, delta, target, multiplier):
            one = super()._loss_and_grad

            def ask():
                scores, losses = one(model, samples, delta, target, multiplier)
                return scores.detach(), losses, delta.grad.clone()

            scores, losses, delta.grad = _mean(oracle.eot_samples, ask)
            return scores, losses

    with _opened(oracle, images_01) as model:
        attack = PGD("linf", epsilon=epsilon, num_steps=steps, step_size=alpha, random_start=True)
        return _run_secml(attack, model, images_01, oracle.labels)


def secml_eot(oracle: Oracle, images_01: torch.Tensor, epsilon: float, alpha: float, steps: int) -> torch.Tensor:
    """secml-torch's PGD with its own EoT: loss differences at `eot_samples` neighbors (an even number)."""
    from secmlt.adv.evasion.modular_attacks.eot_gradient import EoTGradientMixin
    from secmlt.adv.evasion.pgd import PGDNative

    class PGD(EoTGradientMixin, PGDNative):
        pass

    settings = {"epsilon": epsilon, "num_steps": steps, "step_size": alpha, "random_start": True}
    with _opened(oracle, images_01, rows_per_image=oracle.eot_samples // 2) as model:  # pairs: one pass for each side
        attack = PGD(eot_samples=oracle.eot_samples, perturbation_model="linf", **settings)
        return _run_secml(attack, model, images_01, oracle.labels)


def art_apgd(oracle: Oracle, images_01: torch.Tensor, epsilon: float, steps: int) -> torch.Tensor:
    """ART's AutoPGD on the cross-entropy, gradients and the losses that it compares averaged over fresh draws each."""
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    class Classifier(PyTorchClassifier):
        def loss_gradient(self, x, y, **others):
            one = super().loss_gradient
            return _mean(oracle.eot_samples, lambda: (one(x, y, **others),))[0]

        def compute_loss(self, x, y, reduction="none", **others):
            one = super().compute_loss
            return _mean(oracle.eot_samples, lambda: (one(x, y, reduction=reduction, **others),))[0]

    with _opened(oracle, images_01) as model:
        with torch.no_grad():
            num_classes = model(images_01[:1]).shape[1]
        theirs = Classifier(
            model,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=tuple(images_01.shape[1:]),
            nb_classes=num_classes,
            clip_values=(0.0, 1.0),
            device_type="cpu" if images_01.device.type == "cpu" else "gpu",
        )
        attack = AutoProjectedGradientDescent(
            theirs,
            eps=epsilon,
            eps_step=2 * epsilon,
            max_iter=steps,
            nb_random_init=1,
            batch_size=len(images_01),
            verbose=False,
        )
        found = attack.generate(images_01.cpu().numpy(), y=oracle.labels.cpu().numpy())
    return torch.from_numpy(found).to(images_01)
