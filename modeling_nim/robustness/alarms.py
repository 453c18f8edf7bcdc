"""Alarms about suspicious results. Each is printed, and stored with the summary; nothing here runs a model."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

from .records import Record, model_key
from .scores import interval, length, norm_of, percent, scores


Alarm = dict[str, str]  # "alarm", "where", "message"
Groups = dict[tuple, list[Record]]  # by Record.group


def _alarm(alarm: str, where: str, message: str) -> Alarm:
    return {"alarm": alarm, "where": where, "message": message}


def print_alarms(accelerator: Accelerator, alarms: Sequence[Alarm]) -> None:
    """Prints a line for each alarm, from the main process alone."""
    for alarm in alarms:
        accelerator.print(f"ALARM {alarm['alarm']} [{alarm['where']}]: {alarm['message']}")


def of_models(models: dict[str, dict[str, Any]]) -> list[Alarm]:
    """Alarms from the checks of models, by `model_key`; `checks.inspect_target` explains the keys of a check."""
    alarms = []
    for name, model in models.items():
        if not model.get("repeatable", True):
            message = "the same images and draws gave other logits: the model is random beyond its declared noise"
            alarms.append(_alarm("undeclared_randomness", name, message + "; no result here can be repeated"))
        if not model.get("draws_differ", True):
            message = "the model is declared random, and other draws gave the same logits: its noise does not arrive"
            alarms.append(
                _alarm("draws_never_differ", name, message + ", so EOT and the averages over draws mean nothing")
            )
        if not model.get("continuous", True):
            message = (
                "the last bit of the pixels changes the answer: the noise is made from the image, or rounding hides"
            )
            alarms.append(
                _alarm("depends_on_the_last_bit", name, message + " the gradient; an attacker can shop for draws")
            )
        if not model.get("independent", True):
            message = "the answer to an image depends on the others in its batch: results change with batch_size"
            alarms.append(
                _alarm("depends_on_the_batch", name, message + "; one draw for all, or statistics of the batch?")
            )
    return alarms


def of_clean_accuracy(name: str, right: Sequence[float], model: dict[str, Any]) -> list[Alarm]:
    """Alarms on clean accuracy, per image in [0, 1], against chance and what the model's card states."""
    accuracy, (low, high) = percent(right), interval(right)
    alarms = []
    chance = model.get("chance")
    if chance is not None and low <= 100 * chance:
        message = (
            f"{accuracy:.1f}% of {len(right)} images are right without an attack, guessing gives {100 * chance:.1f}%"
        )
        message += ": are the labels those of the model, in its order, and is this what it was trained on?"
        alarms.append(_alarm("no_better_than_chance", name, message))
    stated = model.get("stated")
    if stated is not None and high < stated["low"] and accuracy < stated["accuracy"] - 2:
        message = f"{accuracy:.1f}% of {len(right)} images are right without an attack, {stated['source']} states "
        message += f"{stated['accuracy']:.1f}%: is it run as it was trained, on the data that it was trained for?"
        alarms.append(_alarm("below_what_is_stated", name, message))
    return alarms


def of_records(groups: Groups, attacks: dict[tuple, dict[str, Any]], models: dict[str, dict[str, Any]]) -> list[Alarm]:
    """Alarms on the records of each model, attack and budget."""
    alarms = []
    for group, members in groups.items():
        model, sigma, label, threat, epsilon = group
        where = f"{model_key(model, sigma)}, {label}, {threat}, epsilon {epsilon:g}/255"
        low, high = min(record.pixel_min for record in members), max(record.pixel_max for record in members)
        if low < 0 or high > 1:
            message = f"scored pixels lie in [{low:g}, {high:g}], images are [0, 1]"
            alarms.append(_alarm("pixels_out_of_range", where, message))
        if label == "none":
            key = model_key(model, sigma)
            alarms += of_clean_accuracy(key, scores(members)["mean"], models.get(key, {}))
        else:
            control = groups.get((model, sigma, "none", "clean", 0.0), [])
            alarms += _of_attack(where, group, members, control, attacks)
    return alarms + _where_white_box_is_weaker(groups, attacks)


def _of_attack(where: str, group: tuple, members: list[Record], control: list[Record], attacks: dict) -> list[Alarm]:
    alarms = []
    threat, epsilon, norm = group[3], group[4], norm_of(attacks, group)
    settings = attacks.get(group, {})
    largest = max(length(record, norm) for record in members)
    if largest > epsilon + 1e-3:
        alarms.append(_alarm("beyond_epsilon", where, f"a scored perturbation measures {largest:.4f}/255"))
    zero = sum(record.zero_gradients > 0 for record in members) / len(members)
    if zero > 0:
        message = f"{100 * zero:.1f}% of the attacks met a gradient of exactly zero: the model hides its gradients"
        alarms.append(_alarm("zero_gradients", where, message + ", and a high accuracy says little"))
    if not all(math.isfinite(record.loss) for record in members):
        message = "the model answers with NaN or infinity under this attack: what counts as right there means nothing"
        alarms.append(_alarm("answers_not_finite", where, message))
    alpha = settings.get("alpha_255")
    if alpha is not None and settings.get("steps", 1) > 1 and epsilon > 0 and alpha >= epsilon:
        message = f"the step {alpha:g}/255 is not smaller than epsilon: iterates jump between corners"
        message += ", so the attack is weaker than its step count says"
        alarms.append(_alarm("step_not_smaller_than_epsilon", where, message))
    accuracy = percent(scores(members)["mean"])
    if norm == "linf" and epsilon >= 128 and threat.startswith("white_box") and accuracy > 5:
        message = f"{accuracy:.1f}% survive a budget that can turn any image gray: the attack does not work here"
        alarms.append(_alarm("survives_large_epsilon", where, message))
    clean = percent(scores(members, "clean_predictions")["mean"])
    if (
        threat.startswith("white_box")
        and _is_not_small(members, epsilon, norm)
        and _takes_nothing(members, control, clean, accuracy)
    ):
        message = f"{clean:.1f}% without the attack, {accuracy:.1f}% under it: at this budget the attack should take "
        message += "something; are the gradients those of the model?"
        alarms.append(_alarm("attack_without_effect", where, message))
    return alarms


# From this budget on, a white-box attack that takes no accuracy from a model is suspicious.
NOT_SMALL_255 = {"linf": 4.0, "l2": 128.0}
# On photographs 2/255 in every pixel is a large L2 distance, and fools a model without a defense.
NOT_SMALL_L2_OF_LINF_255 = 512.0


def _is_not_small(members: list[Record], epsilon_255: float, norm: str) -> bool:
    mean_l2_255 = sum(record.l2_255 for record in members) / len(members)
    return epsilon_255 >= NOT_SMALL_255[norm] or (norm == "linf" and mean_l2_255 >= NOT_SMALL_L2_OF_LINF_255)


def _takes_nothing(members: list[Record], control: list[Record], clean: float, accuracy: float) -> bool:
    """Whether an attack costs less than a point of accuracy and raises the loss by less than half.

    The loss of a robust model rises by more.
    """
    if clean < 20 or accuracy < clean - 1:
        return False
    attacked = {record.image_id for record in members}
    losses = [record.loss for record in control if record.image_id in attacked]
    before = sum(losses) / len(losses) if losses else math.inf
    return sum(record.loss for record in members) / len(members) < 1.5 * before


def of_comparisons(comparisons: Sequence[dict[str, Any]]) -> list[Alarm]:
    """Alarms on pairs of models that the images cannot rank; of each attack the pair farthest apart is named."""
    undecided: dict[tuple, list[dict]] = defaultdict(list)
    for comparison in comparisons:
        first, second = comparison["accuracy_majority"]
        if first != second and comparison["p_value"] >= 0.05:
            key = (comparison["name"], comparison["threat_model"], comparison["epsilon_255"])
            undecided[key].append(comparison)
    alarms = []
    for (label, threat, epsilon), pairs in undecided.items():
        farthest = max(pairs, key=lambda pair: abs(pair["accuracy_majority"][0] - pair["accuracy_majority"][1]))
        (first, second), (a, b) = farthest["models"], farthest["accuracy_majority"]
        message = f"{farthest['num_images']} images do not rank {len(pairs)} pair(s) of models, such as {first} "
        message += f"({a:.1f}) and {second} ({b:.1f}; McNemar p = {farthest['p_value']:.2g})"
        alarms.append(_alarm("too_few_images", f"{label}, {threat}, epsilon {epsilon:g}/255", message))
    return alarms


def _where_white_box_is_weaker(groups: Groups, attacks: dict[tuple, dict[str, Any]]) -> list[Alarm]:
    """Alarms where every white-box attack does worse than a weaker attacker, beyond chance (paired over the images)."""
    families: dict[tuple, dict[str, list[tuple[str, dict[str, float]]]]] = defaultdict(lambda: defaultdict(list))
    for group, members in groups.items():
        model, sigma, label, threat, epsilon = group
        if label == "none":
            continue
        accuracies: dict[str, list[float]] = defaultdict(list)
        for record in members:
            right = sum(prediction == record.label for prediction in record.predictions)
            accuracies[record.image_id].append(right / len(record.predictions))
        means = {image: sum(values) / len(values) for image, values in accuracies.items()}
        families[model, sigma, epsilon, norm_of(attacks, group)][threat].append((label, means))
    alarms = []
    for (model, sigma, epsilon, _), threats in families.items():
        for threat in ("gray_box", "black_box"):
            for label, weaker in threats.get(threat, []):
                verdicts = []
                for white_label, white in threats.get("white_box", []):
                    images = sorted(set(white) & set(weaker))
                    differences = [white[image] - weaker[image] for image in images]
                    if images:
                        verdicts.append((_mean_beyond_chance(differences), white_label, differences))
                if verdicts and all(beyond for beyond, _, _ in verdicts):  # no white-box attack is as good
                    _, white_label, differences = min(verdicts, key=lambda verdict: sum(verdict[2]) / len(verdict[2]))
                    more = 100 * sum(differences) / len(differences)
                    message = f"{white_label} with full knowledge leaves {more:.1f} points more than {label} ({threat})"
                    where = f"{model_key(model, sigma)}, epsilon {epsilon:g}/255"
                    alarms.append(
                        _alarm("white_box_weaker", where, message + ": the white-box attack is not to be believed")
                    )
    return alarms


def _mean_beyond_chance(differences: Sequence[float]) -> bool:
    """Whether a mean of paired differences is above zero by more than its 95% half-width."""
    mean = sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / max(len(differences) - 1, 1)
    return mean > 1.96 * math.sqrt(variance / len(differences))
