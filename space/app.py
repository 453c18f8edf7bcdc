"""A page to try the defence: attack an image, and see what noise and denoising make of the attack.

    python space/app.py                                      # the model that `make demo` has trained
    python space/app.py --model org/nim-digits --undefended org/nim-digits-undefended --port 7860

`--model` is a purified model and `--undefended` a classifier without defence, each a directory or a Hub id; without the
second, the classifier inside the first one stands there without its purifier. `--examples` is a folder of images to pick
from. On the Hub, where a Space has no command line, the variables NIM_MODEL, NIM_UNDEFENDED and NIM_EXAMPLES say the same.

Only transformers and gradio are needed: the models bring their own code (`trust_remote_code=True`).
"""

import argparse
import html
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import gradio as gr
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification


HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "outputs" / "demo"
STEPS = 10  # of the attack; the step is a quarter of its budget
SHOWN_CLASSES = 10
MIN_SHOWN_PIXELS = 256  # small images are enlarged without smoothing, so that every pixel is visible

INTRO = """
# Attack it, then purify it

The attacker changes each pixel a little, just so that the classifier errs. The defended model adds noise of its own, lets
a network that has learnt to denoise remove it together with the attack, and classifies what comes out. Each model is
attacked with **full knowledge**: the gradient passes through noise, denoiser and classifier; only the random draw is secret.
"""

CAVEAT = f"""
**What this picture does not prove.** It is one image, one attack (PGD, {STEPS} steps, each with one noise draw) and the
noise of one seed. Longer attacks that average over many draws succeed more often, and another seed may give another answer.
The label that is attacked is the model's own answer on the clean image, right or wrong. Only accuracies over many images,
with intervals and with the strongest attacks, say how good a defence is: see the project's results.
"""

CSS = """
.nim-verdict { font-size: 1.02em; margin-top: -.4em; }
.nim-caption { font-size: .9em; opacity: .75; }
#examples .gallery-container, #examples .grid-wrap { height: auto; min-height: 0; overflow: visible; }
#examples .grid-container {
  display: grid; grid-template: none / repeat(5, minmax(0, 1fr)); grid-auto-rows: auto; gap: 4px; padding: 4px;
}
#examples .thumbnail-item { width: 100%; min-width: 0; height: auto; aspect-ratio: 1; }
#examples img, #chosen img, .nim-picture img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.nim-bars { display: grid; grid-template-columns: max-content 1fr; gap: .16em .7em; font-size: .86em; align-items: center; }
.nim-bars .name { text-align: right; }
.nim-bars .pair { display: grid; gap: 1px; }
.nim-bars .bar { height: .55em; min-width: 1px; border-radius: 2px; }
.nim-before { background: #4c78a8; }
.nim-after { background: #e45756; }
.nim-key { font-size: .86em; margin-bottom: .5em; }
.nim-key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
.nim-key i + i, .nim-key .nim-after { margin-left: .9em; }
"""


def pgd(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    images_01: torch.Tensor,
    epsilon: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Projected gradient ascent on the cross-entropy of the model's own answer, within epsilon (L-infinity) of the image.

    Args:
        logits_of: classifies `(1, 3, H, W)` images in [0, 1]; may draw fresh noise in every call.
        epsilon: of the [0, 1] range.
    """
    with torch.no_grad():
        label = logits_of(images_01).argmax(dim=-1)
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
    """The two models, and what the page shows for one image."""

    def __init__(self, model: str, undefended: str | None):
        self.defended = AutoModelForImageClassification.from_pretrained(model, trust_remote_code=True).eval()
        if not hasattr(self.defended, "purify") or self.defended.config.purifier_config.degradation != "noise":
            raise ValueError(f"{model} is no classifier behind a denoiser: pass a NIMPurifiedImageClassification")
        self.processor = AutoImageProcessor.from_pretrained(model)
        config = self.defended.config
        # (1, 3, 1, 1) each
        self.mean, self.std = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (config.image_mean, config.image_std)
        )
        self.undefended, self.undefended_name = self._own_classifier, "its classifier, without the purifier"
        self.undefended_processor = self.processor
        if undefended is not None:
            bare = AutoModelForImageClassification.from_pretrained(undefended, trust_remote_code=True).eval()
            self.undefended_processor = AutoImageProcessor.from_pretrained(undefended)
            mean, std = (
                torch.tensor(values).view(1, -1, 1, 1)
                for values in (self.undefended_processor.image_mean, self.undefended_processor.image_std)
            )
            self.undefended = lambda images_01: bare((images_01 - mean) / std).logits
            self.undefended_name = "a classifier trained on clean images"
        self.class_names = [config.id2label[index] for index in range(config.num_labels)]

    def _own_classifier(self, images_01: torch.Tensor) -> torch.Tensor:
        pixel_values = (images_01 - self.mean) / self.std
        return self.defended.classifier(self.defended.prepare_for_classifier(pixel_values)).logits

    def run(self, image: Image.Image | None, epsilon_255: float, sigma_255: float, votes: int, seed: int) -> tuple:
        """Attack both models; see `build` for where the results go."""
        if image is None:
            raise gr.Error("Pick one of the images first, or upload one.")
        if seed is None or int(seed) < 0:
            raise gr.Error("The seed must be a whole number, 0 or more.")
        epsilon, seed, votes = epsilon_255 / 255, int(seed), int(votes)

        bare_01 = _images_01(self.undefended_processor, image)
        bare_attacked_01 = pgd(self.undefended, bare_01, epsilon, _generator(seed, "start"))

        images_01 = _images_01(self.processor, image)
        attackers_noise = _generator(seed, "attack")

        def defended(images: torch.Tensor, generator: torch.Generator, num_votes: int):
            pixel_values = (images - self.mean) / self.std
            return self.defended(pixel_values, sigma=sigma_255, generator=generator, num_votes=num_votes)

        attacked_01 = pgd(
            lambda x: defended(x, attackers_noise, 1).logits, images_01, epsilon, _generator(seed, "start")
        )
        with torch.no_grad():
            clean, attacked = (defended(x, _generator(seed, "defence"), votes) for x in (images_01, attacked_01))
            before = [self.undefended(bare_01), clean.logits]
            after = [self.undefended(bare_attacked_01), attacked.logits]
        # The first of the draws that were classified.
        stages = (attacked.degraded_pixel_values, attacked.purified_pixel_values)
        shown = [bare_01, bare_attacked_01, images_01, attacked_01, *(x * self.std + self.mean for x in stages)]
        probabilities = [(b.softmax(-1)[0], a.softmax(-1)[0]) for b, a in zip(before, after, strict=True)]
        bars = [bars_html(self.class_names, b.tolist(), a.tolist()) for b, a in probabilities]
        verdicts = [self.verdict(b, a, epsilon_255) for b, a in probabilities]
        return (*[to_pil(x) for x in shown], *verdicts, *bars)

    def verdict(self, before: torch.Tensor, after: torch.Tensor, epsilon_255: float) -> str:
        """One line: the answer before and after the attack."""
        first, second = int(before.argmax()), int(after.argmax())
        name = [html.escape(str(self.class_names[index])) for index in (first, second)]
        withstood = "the answer stays" if first == second else "**the attack succeeds**"
        return (
            f"{name[0]} ({before[first]:.0%}) → {name[1]} ({after[second]:.0%}) at eps {epsilon_255:g}/255: {withstood}"
        )


def _generator(seed: int, purpose: str) -> torch.Generator:
    """Separate streams: the attacker must not meet the draws of the defence."""
    return torch.Generator().manual_seed(3 * seed + ("defence", "attack", "start").index(purpose))


def _images_01(processor, image: Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt", do_normalize=False)["pixel_values"]  # (1, 3, H, W)


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
        f'<div class="name">{html.escape(str(class_names[index]))}</div><div class="pair">'
        f'<div class="bar nim-before" title="before: {before[index]:.1%}" style="width: {100 * before[index]:.2f}%"></div>'
        f'<div class="bar nim-after" title="after: {after[index]:.1%}" style="width: {100 * after[index]:.2f}%"></div></div>'
        for index in sorted(likeliest)
    ]
    key = '<div class="nim-key"><i class="nim-before"></i>before<i class="nim-after"></i>after the attack</div>'
    return f'{key}<div class="nim-bars">{"".join(rows)}</div>'


def read_upload(path: str) -> Image.Image:
    """The uploaded file as an image; a message on the page where it is none."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        raise gr.Error(f"{Path(path).name} is no image that can be read. Upload a PNG or JPEG file.") from None


def build(page: Page, examples: Sequence[Path]) -> gr.Blocks:
    sigma = page.defended.config.sigma
    fixed_sigma = float(sigma) if str(sigma).replace(".", "", 1).isdigit() else 30.0
    with gr.Blocks(title="Noisy image modeling: attack and purify", analytics_enabled=False) as blocks:
        gr.Markdown(INTRO)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                gallery = gr.Gallery(
                    value=[str(path) for path in examples],
                    label="Pick an image",
                    show_label=False,
                    object_fit="contain",
                    allow_preview=False,
                    interactive=False,
                    elem_id="examples",
                    buttons=[],
                )
                upload = gr.UploadButton("... or upload one", elem_id="upload", size="sm")
                chosen = gr.Image(
                    label="Chosen",
                    type="pil",
                    interactive=False,
                    height=170,
                    elem_id="chosen",
                    format="png",
                    buttons=[],
                )
                epsilon = gr.Slider(
                    0, 32, value=8, step=1, label="eps: largest change of a pixel, of 255", elem_id="epsilon"
                )
                sigma_255 = gr.Slider(
                    0, 150, value=fixed_sigma, step=1, label="sigma: noise of the defence, of 255", elem_id="sigma"
                )
                votes = gr.Slider(
                    1, 16, value=1, step=1, label="votes: noise draws averaged per answer", elem_id="votes"
                )
                seed = gr.Number(0, precision=0, label="seed", elem_id="seed")
                button = gr.Button("Attack", variant="primary", elem_id="run")
            with gr.Column(scale=3):
                outputs = {}
                rows = [
                    ("undefended", f"Undefended: {page.undefended_name}", ("clean", "attacked")),
                    ("defended", "Defended: noise, denoiser, classifier", ("clean", "attacked", "noisy", "purified")),
                ]
                for name, title, pictures in rows:
                    gr.Markdown(f"### {title}")
                    verdict = gr.Markdown("", elem_id=f"{name}-verdict", elem_classes="nim-verdict")
                    with gr.Row():
                        for picture in pictures:
                            with gr.Column(min_width=110):
                                gr.Markdown(picture, elem_classes="nim-caption")
                                outputs[f"{name}-{picture}"] = gr.Image(
                                    show_label=False,
                                    interactive=False,
                                    height=150,
                                    format="png",
                                    buttons=[],
                                    elem_id=f"{name}-{picture}",
                                    elem_classes="nim-picture",
                                )
                        for _ in range(4 - len(pictures)):
                            gr.Column(min_width=110)  # the rows stay aligned
                        with gr.Column(scale=2, min_width=220):
                            bars = gr.HTML("", elem_id=f"{name}-bars")
                    outputs |= {f"{name}-verdict": verdict, f"{name}-bars": bars}
                gr.Markdown(CAVEAT, elem_id="caveat")

        def pick(event: gr.SelectData) -> Image.Image:
            return read_upload(str(examples[event.index]))

        gallery.select(pick, None, chosen, show_progress="hidden")
        upload.upload(read_upload, upload, chosen, show_progress="hidden")
        order = [f"{name}-{picture}" for name, _, pictures in rows for picture in pictures]
        order += ["undefended-verdict", "defended-verdict", "undefended-bars", "defended-bars"]
        button.click(
            page.run, [chosen, epsilon, sigma_255, votes, seed], [outputs[name] for name in order], api_name="attack"
        )
    return blocks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment = os.environ.get
    parser.add_argument("--model", default=environment("NIM_MODEL", str(DEMO / "finetune_denoised" / "purified")))
    parser.add_argument("--undefended", default=environment("NIM_UNDEFENDED"), help="default: the demo's, or none")
    parser.add_argument("--examples", type=Path, default=Path(environment("NIM_EXAMPLES", HERE / "examples")))
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to other machines")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    args = parser.parse_args()

    if args.model == str(DEMO / "finetune_denoised" / "purified") and args.undefended is None:
        args.undefended = str(DEMO / "finetune_original")
    suffixes = (".png", ".jpg", ".jpeg")
    examples = sorted(path for path in args.examples.glob("*") if path.suffix.lower() in suffixes)
    try:
        for model in filter(None, (args.model, args.undefended)):
            if os.sep in str(Path(model).parent) and not Path(model).is_dir():
                raise FileNotFoundError(f"there is no model {model}: train it with `make demo`, or pass --model")
        if not examples:
            raise FileNotFoundError(f"{args.examples} holds no .png or .jpg image: pass another folder with --examples")
        blocks = build(Page(args.model, args.undefended), examples)
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
