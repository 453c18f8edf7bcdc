"""The paper's tables as data: what makes each row, and the paper's numbers (accuracy in percent, ImageNet).

`imagenet()` are the paper's own tables. `cifar10(full)` has the same rows over a choice of sigma distributions, and
tables of what the paper does not try; `full` is the size for a GPU, whose recipes are stacked on the small ones.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from modeling_nim.families_nim import ARCHITECTURES


ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Column:
    """Which row of a summary stands under `title`; the paper's number beside it stands under `paper_title`."""

    title: str
    attack: str
    name: str | None = None
    threat_model: str | None = None
    epsilon_255: float | None = None
    paper_title: str | None = None

    @property
    def wanted(self) -> dict[str, Any]:
        """The values of that row, as far as they are given."""
        given = {name: getattr(self, name) for name in ("attack", "name", "threat_model", "epsilon_255")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Step:
    """One command: a script with what follows it on its line, where its output goes, and the steps that come before.

    `makes` is the file that is there when the step is done.
    """

    script: str
    output_dir: str
    arguments: tuple[str, ...]
    needs: tuple["Step", ...] = ()
    makes: str = "config.json"

    @property
    def target(self) -> str:
        """The path of what is made."""
        return f"{self.output_dir}/{self.makes}"

    @property
    def command(self) -> str:
        """As a shell takes it."""
        launcher = "scripts/launch.py " if self.script.startswith("run_") else ""
        return f"python {launcher}scripts/{self.script} {shlex.join(self.arguments)}"


@dataclass(frozen=True)
class Row:
    """A row of a table: its labels, the step and the result that our numbers are read from, the paper's numbers."""

    labels: tuple[Any, ...]
    step: Step
    result: str
    model: str
    sigma: float | str | None
    paper: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    title: str
    label_names: tuple[str, ...]
    columns: tuple[str, ...]
    rows: list[Row]


@dataclass(frozen=True)
class Study:
    """`key` is what `--dataset` takes, and the name of the folder of results."""

    key: str
    columns: dict[str, Column]
    tables: list[Table]


def slug(value: str) -> str:
    """A sigma specification as part of a file name: "gamma(25, 3)" is gamma_25_3."""
    return re.sub(r"[^0-9A-Za-z.]+", "_", value).strip("_")


@dataclass(frozen=True)
class Lab:
    """Makes steps from the recipes of one folder; `small` is the share of training that the ablations get."""

    dataset: str
    full: bool = False
    pretrain_epochs: float | None = None  # None: what the recipe says
    finetune_epochs: float | None = None
    tag: str = ""  # at the end of the names of models that got less training

    @property
    def outputs(self) -> str:
        return f"outputs/{self.dataset}_full" if self.full else f"outputs/{self.dataset}"

    def step(self, script: str, recipe: str, output: str, overrides: Sequence[str], needs: Sequence[Step]) -> Step:
        folder = f"scripts/recipes/{self.dataset}"
        files, output_dir = [f"{folder}/{recipe}"], f"{self.outputs}/{output}"
        if self.full:
            stacked = "attack.yaml" if recipe.startswith("attack") else recipe
            files += [f"{folder}/full/{stacked}"]
            named = {override.partition("=")[0] for override in overrides}
            moved = [override for override in self._moved(files[0]) if override.partition("=")[0] not in named]
            overrides = [*moved, *FULL_OVERRIDES.get(recipe, []), *overrides]
        makes = {"run_attack.py": "summary.json", "run_certify.py": "certified.json"}.get(script, "config.json")
        return Step(script, output_dir, (*files, f"output_dir={output_dir}", *overrides), tuple(needs), makes)

    def _moved(self, recipe: str) -> list[str]:
        """Overrides with the paths of an evaluation's models at the full size."""
        content = yaml.safe_load((ROOT / recipe).read_text())
        named = {f"models.{i}.{k}": v for i, model in enumerate(content.get("models", [])) for k, v in model.items()}
        purifiers = content.get("reconstruction", {}).get("purifiers", {})
        named |= {f"reconstruction.purifiers.{name}": path for name, path in purifiers.items()}
        old = f"outputs/{self.dataset}/"
        return [
            f"{key}={self.outputs}/{value.removeprefix(old).removesuffix('-short')}"
            for key, value in named.items()
            if isinstance(value, str) and value.startswith(old)
        ]

    def convert(self, checkpoint: str, *options: str) -> Step:
        """A checkpoint of the authors of MAE."""
        output_dir = f"{self.outputs}/convert/{checkpoint}"
        arguments = ("--source", "mae", "--checkpoint", f"checkpoints/{checkpoint}.pth", *options)
        return Step("convert_checkpoint.py", output_dir, (*arguments, "--output_dir", output_dir))

    def pretrain(self, architecture: str, sigma: str | None = None, name: str = "", config: Sequence[str] = ()) -> Step:
        name = name or architecture + (f"-{slug(sigma)}" if sigma else "")
        overrides = [f"model.architecture={architecture}", *(f"model.config.{setting}" for setting in config)]
        overrides += [f"model.config.sigma={sigma}"] if sigma else []
        overrides += [f"optimization.epochs={self.pretrain_epochs:g}"] if self.pretrain_epochs else []
        recipe = f"pretrain_{ARCHITECTURES[architecture].family.name}.yaml"
        return self.step("run_pretrain.py", recipe, f"pretrain/{name}{self.tag}", overrides, ())

    def finetune(
        self, encoder: Step, images: str = "", sigma: str | None = None, suffix: str = "", more: Sequence[str] = ()
    ) -> Step:
        """A classifier of original images, or of images denoised at a `sigma` drawn from this distribution."""
        name = Path(encoder.output_dir).name.removesuffix(self.tag)
        settings = dict(word.split("=", 1) for word in encoder.arguments if "=" in word)
        family = ARCHITECTURES[settings["model.architecture"]].family.name
        recipe = "finetune.yaml" if self.dataset == "cifar10" else f"finetune_{family}.yaml"
        overrides = [f"init={encoder.output_dir}", f"images={'denoised' if sigma else 'original'}"]
        overrides += [f"sigma={sigma}", "defense_sigma=30"] if sigma else []
        overrides += more
        overrides += [f"optimization.epochs={self.finetune_epochs:g}"] if self.finetune_epochs else []
        return self.step("run_finetune.py", recipe, f"finetune/{name}{suffix}{self.tag}", overrides, [encoder])

    def denoised(self, encoder: Step, sigma: str = "uniform(0, 30)") -> Step:
        return self.finetune(encoder, sigma=sigma, suffix=f"-denoised_{slug(sigma)}")

    def original(self, encoder: Step) -> Step:
        return self.finetune(encoder, suffix="-original")

    def attack(self, result: str, purifier: Step, classifier: Step, sigma: str) -> Step:
        """The attack of Table 1: the classifier alone, and behind the purifier at `sigma` ("null": with masks)."""
        parts = [f"models.0.path={classifier.output_dir}", f"models.1.purifier={purifier.output_dir}"]
        parts += [f"models.1.classifier={classifier.output_dir}", f"models.1.sigma={sigma}"]
        return self.step("run_attack.py", "attack.yaml", f"attack/{result}", parts, [purifier, classifier])

    def ablation(self, result: str, purifier: Step, classifier: Step, sigma: float) -> Step:
        parts = [f"models.0.purifier={purifier.output_dir}", f"models.0.classifier={classifier.output_dir}"]
        parts += [f"models.0.sigma={sigma}"]
        return self.step("run_attack.py", "attack_ablation.yaml", f"attack/{result}", parts, [purifier, classifier])


FULL_OVERRIDES = {
    "attack.yaml": ["attacks.1.queries=1000", "attacks.1.num_images=1024"],
    "attack_standard.yaml": ["epsilon_255=[2, 4, 8]"],
    **dict.fromkeys(("attack_eot.yaml", "attack_votes.yaml", "attack_figures.yaml"), ["num_images=1000"]),
}

PAPER_COLUMNS = ("clean", "white_box", "gray_box", "black_box")
# system, its defense, the paper's numbers in these columns without the defense and with it
TABLE_1 = [
    ("SimMIM", "mask 0.6", (83.62, 6.65, 6.65, 3.03), (43.05, 13.12, 37.65, 49.80)),
    ("NIM-SimMIM", "sigma 30", (81.27, 10.91, 10.91, 0.68), (80.60, 42.38, 65.54, 72.36)),
    ("MAE", "mask 0.75", (83.05, 3.12, 3.12, 1.17), (44.96, 29.79, 39.71, 33.59)),
    ("MAE, released", "mask 0.75, ViT-L with GAN loss", (83.73, 2.13, 2.13, 1.67), (65.62, 34.66, 54.22, 56.84)),
    ("NIM-MAE", "sigma 30", (81.68, 7.36, 7.36, 2.44), (81.30, 43.92, 68.99, 72.85)),
]
# sigma in pre-training, sigma of the defense, clean and white-box accuracy
TABLE_2 = [
    ("25", 30, 79.18, 43.38),
    ("75", 80, 73.79, 58.96),
    ("150", 150, 63.46, 52.56),
    ("uniform(0, 100)", 40, 77.15, 45.41),
    ("uniform(0, 150)", 40, 77.42, 45.41),
    ("uniform(0, 250)", 40, 77.44, 44.98),
    ("gamma(15, 3)", 40, 77.82, 45.88),
    ("gamma(25, 3)", 40, 78.21, 45.78),
    ("gamma(40, 2)", 40, 78.42, 44.61),
    ("gamma(2, 50)", 40, 78.15, 42.07),
]
TABLE_3 = [
    ("25", 80.64, 42.73),
    ("uniform(0, 150)", 81.09, 43.79),
    ("gamma(15, 3)", 81.12, 44.24),
    ("gamma(15, 5)", 81.18, 43.69),
    ("gamma(20, 4)", 81.23, 43.05),
    ("gamma(25, 3)", 81.30, 43.54),
    ("gamma(40, 2)", 81.08, 43.83),
]
TABLE_4 = [  # sigma in fine-tuning; the first row is Table 2's of gamma(25, 3)
    ("0", 80.98, 42.79),
    ("30", 81.18, 43.22),
    ("uniform(0, 15)", 81.10, 43.03),
    ("uniform(0, 30)", 81.30, 43.54),
    ("uniform(0, 40)", 81.18, 43.46),
    ("uniform(20, 40)", 81.05, 43.40),
    ("uniform(0, 60)", 81.08, 43.12),
    ("gamma(15, 1)", 81.13, 42.25),
    ("gamma(10, 2)", 81.19, 43.46),
    ("gamma(15, 2)", 81.04, 43.52),
    ("gamma(5, 8)", 81.02, 42.97),
]
SIGMA = "gamma(25, 3)"  # the paper's choice in pre-training


def paper_row(system: str, defense: str, attack: Step, result: str, model: str, sigma: Any, numbers: tuple) -> Row:
    return Row((system, defense), attack, result, model, sigma, dict(zip(PAPER_COLUMNS, numbers, strict=False)))


def table_1(lab: Lab, systems: Sequence[str]) -> list[Row]:
    rows = []
    for system, defense, bare, defended in TABLE_1:
        if system not in systems:
            continue
        result = system.lower().replace("-", "_").replace(", ", "_")
        if system == "MAE, released":  # its fine-tuned ViT-B, pre-trained for 1,600 epochs, and its ViT-L for pictures
            classifier = lab.convert("mae_finetuned_vit_base")
            purifier = lab.convert("mae_visualize_vit_large_ganloss", "--no_norm_pix_loss")
        elif system.startswith("NIM"):
            purifier = lab.pretrain(result, SIGMA)
            classifier = lab.denoised(purifier)
        else:
            purifier = lab.pretrain(result)
            classifier = lab.finetune(purifier)
        masks = defense.startswith("mask")
        attack = lab.attack(result, purifier, classifier, "null" if masks else "30")
        rows.append(paper_row(system, "-", attack, result, "undefended", None, bare))
        rows.append(paper_row(system, defense, attack, result, "defended", "mask" if masks else 30, defended))
    return rows


def noise_and_masks(lab: Lab) -> list[Row]:
    """The system that the paper does not have: noise as in DMAE, a quarter of the patches seen (Wu et al. 2023)."""
    system, result, sigma = "NIM-MAE with masks (DMAE)", "nim_mae_masked", "uniform(0, 30)"
    purifier = lab.pretrain(result, "63.75", config=["norm_pix_loss=false"])
    classifier = lab.finetune(purifier, sigma=sigma, suffix=f"-denoised_{slug(sigma)}", more=["mask_ratio=0"])
    parts = f"purifier: {purifier.output_dir}, classifier: {classifier.output_dir}, sigma: 30"
    models = f"{{name: undefended, path: {classifier.output_dir}}}, {{name: defended, {parts}}}"
    models += f", {{name: without masks, {parts}, mask_ratio: 0}}"
    step = lab.step("run_attack.py", "attack.yaml", f"attack/{result}", [f"models=[{models}]"], [purifier, classifier])
    return [
        Row((system, "-"), step, result, "undefended", None),
        Row((system, "sigma 30, mask 0.75"), step, result, "defended", 30),
        Row((system, "sigma 30, no masks"), step, result, "without masks", 30),
    ]


def ablations(lab: Lab, pretrain_sigmas: Sequence[str] | None, finetune_sigmas: Sequence[str] | None) -> list[Table]:
    """Tables 2 to 4, or the rows of them whose sigma is named."""

    def purifier(sigma: str) -> Step:
        return lab.pretrain("nim_mae", sigma)

    def row(labels: tuple, result: str, classifier: Step, sigma: float, numbers: Sequence[float]) -> Row:
        attack = lab.ablation(result, classifier.needs[0], classifier, sigma)
        return Row(labels, attack, result, "defended", sigma, dict(zip(PAPER_COLUMNS, numbers, strict=False)))

    second = [
        row((pretrained, sigma), f"table2-{slug(pretrained)}", lab.original(purifier(pretrained)), sigma, numbers)
        for pretrained, sigma, *numbers in TABLE_2
        if pretrain_sigmas is None or pretrained in pretrain_sigmas
    ]
    third = [
        row((pretrained, 30), f"table3-{slug(pretrained)}", lab.denoised(purifier(pretrained)), 30, numbers)
        for pretrained, *numbers in TABLE_3
        if pretrain_sigmas is None or pretrained in pretrain_sigmas
    ]
    fourth = [replace(r, labels=("original images", 40)) for r in second if r.labels[0] == SIGMA]
    for finetuned, *numbers in TABLE_4:
        shared = finetuned == "uniform(0, 30)"  # Table 3 has it
        result = f"table3-{slug(SIGMA)}" if shared else f"table4-{slug(finetuned)}"
        if finetune_sigmas is None or finetuned in finetune_sigmas:
            fourth.append(
                row((finetuned, 30), result, lab.denoised(purifier(SIGMA), finetuned), 30, numbers),
            )
    columns = ("clean", "white_box")
    pretrained, finetuned = ("pretrain_sigma", "sigma"), ("finetune_sigma", "sigma")
    return [
        Table("Table 2: sigma in pre-training, fine-tuned on original images", pretrained, columns, second),
        Table("Table 3: sigma in pre-training, fine-tuned on denoised images", pretrained, columns, third),
        Table("Table 4: sigma in fine-tuning, pre-trained with gamma(25, 3)", finetuned, columns, fourth),
    ]


def imagenet() -> Study:
    """Tables 1 to 4, and the protocol of the paper's NeurIPS version, whose numbers this package does not have."""
    lab = Lab("imagenet")
    at_2, at_4 = {"attack": "pgd", "epsilon_255": 2}, {"threat_model": "white_box", "epsilon_255": 4}
    columns = {
        "clean": Column("Clean", "none", paper_title="Clean"),
        "white_box": Column("WB", name="pgd-10 a2", threat_model="white_box", paper_title="WB", **at_2),
        "gray_box": Column("GB", name="pgd-10 a2", threat_model="gray_box", paper_title="GB", **at_2),
        "black_box": Column("BB", "square", threat_model="black_box", epsilon_255=16, paper_title="BB"),
        "fgsm": Column("FGSM", "fgsm", **at_4),
        "pgd": Column("PGD-10", "pgd", name="pgd-10", **at_4),
        "autoattack": Column("AutoAttack", "autoattack_rand", **at_4),
    }
    purifier = lab.pretrain("nim_mae", SIGMA)
    parts = [purifier, lab.denoised(purifier)]
    places = ("models.1.purifier", "models.0.path", "models.1.classifier")
    directories = (part.output_dir for part in (*parts, parts[1]))
    overrides = [f"{place}={directory}" for place, directory in zip(places, directories, strict=True)]
    attack = lab.step("run_attack.py", "attack_neurips.yaml", "attack/nim_mae_neurips", overrides, parts)
    neurips = [
        Row(("NIM-MAE", sigma), attack, "nim_mae_neurips", model, sigma)
        for model, sigma in (("undefended", None), ("defended", 70), ("defended", 140))
    ]
    title, labels = "Table 1: MIM and NIM, with and without the defense", ("system", "defense")
    tables = [
        Table(title, labels, PAPER_COLUMNS, table_1(lab, [row[0] for row in TABLE_1]) + noise_and_masks(lab)),
        *ablations(lab, None, None),
        Table(
            "NeurIPS protocol: NIM-MAE at 4/255", ("system", "sigma"), ("clean", "fgsm", "pgd", "autoattack"), neurips
        ),
    ]
    return Study("imagenet", columns, tables)


def cifar10_columns() -> dict[str, Column]:
    """4/255 suits 32x32 as 2/255 suits 224x224, and stands beside the paper's numbers."""
    columns = {"clean": Column("Clean", "none", paper_title="Clean")}
    for name, letters, attack in (("white_box", "WB", "pgd"), ("gray_box", "GB", "pgd"), ("black_box", "BB", "square")):
        label = "pgd-10" if attack == "pgd" else None
        for epsilon_255 in (4, 2, 8):
            key, paper = (name, letters) if epsilon_255 == 4 else (f"{name}_{epsilon_255}", None)
            columns[key] = Column(f"{letters} {epsilon_255}/255", attack, label, name, epsilon_255, paper)
    columns["eot"] = Column("WB 4/255, PGD-20 x EOT-20", "pgd", "pgd-20 eot20", "white_box", 4)
    return columns


def cifar10_table_1(lab: Lab, larger: Step) -> list[Row]:
    """Table 1, where the paper's MAE of another size, a ViT-L with GAN loss, is `larger`.

    Beside it a classifier of original images, and sigma 50, which was chosen on the validation part.
    """
    nim, mae = lab.pretrain("nim_mae", SIGMA), lab.pretrain("mae")
    denoised, mae_classifier = lab.denoised(nim), lab.finetune(mae)
    released = next(row for row in TABLE_1 if row[0] == "MAE, released")
    rows = table_1(lab, ["SimMIM", "NIM-SimMIM", "MAE", "NIM-MAE"])
    step = lab.attack("mae_larger", larger, mae_classifier, "null")
    rows.append(paper_row("MAE", "mask 0.75, larger MAE", step, "mae_larger", "defended", "mask", released[3]))
    step = lab.attack("nim_mae_original", nim, lab.original(nim), "30")
    for defense, model, sigma in (("-", "undefended", None), ("sigma 30", "defended", 30)):
        system = "NIM-MAE, classifier of original images"
        rows.append(Row((system, defense), step, "nim_mae_original", model, sigma))
    parts = f"purifier: {nim.output_dir}, classifier: {denoised.output_dir}"
    models = [f"models=[{{name: defended, {parts}, sigma: 50}}]"]
    step = lab.step("run_attack.py", "attack.yaml", "attack/nim_mae_sigma_50", models, [nim, denoised])
    rows.append(Row(("NIM-MAE", "sigma 50"), step, "nim_mae_sigma_50", "defended", 50))
    rows += noise_and_masks(lab)
    return rows


def patch_statistics(lab: Lab) -> tuple[dict[str, list[Step]], list[Row]]:
    """Normalized patches, scaled back with mean and variance of the image or of the noisy image, beside raw pixels.

    Returns purifier and classifier of either kind, and the rows.
    """
    nim = lab.pretrain("nim_mae", SIGMA)
    denoised = lab.denoised(nim)
    statistics, normalized = [], {}
    attacks = {"raw pixels": ("nim_mae", lab.attack("nim_mae", nim, denoised, "30"))}
    for kind, target in (("input", "statistics of the input"), ("noisy", "statistics of the noisy image")):
        config = ("norm_pix_loss=true", f"patch_statistics={kind}")
        untimed = replace(lab, pretrain_epochs=None, finetune_epochs=None)
        purifier = untimed.pretrain("nim_mae", name=f"nim_mae-{kind}_statistics", config=config)
        normalized[kind] = [purifier, untimed.finetune(purifier, sigma="uniform(0, 30)")]
        result = f"{kind}_statistics"
        attacks[f"normalized, {target}"] = (result, lab.attack(result, *normalized[kind], "30"))
    for target, (result, step) in attacks.items():
        statistics.append(Row((target, "-"), step, result, "undefended", None))
        statistics.append(Row((target, "sigma 30"), step, result, "defended", 30))
    return normalized, statistics


def cifar10(full: bool = False) -> Study:
    """The systems at 2, 4 and 8/255.

    Tables 2 to 4 and Figures 3, 5 and 6 get less training than Table 1, except at the full size.
    """
    lab = Lab("cifar10", full) if full else Lab("cifar10", pretrain_epochs=3, finetune_epochs=2)
    short = lab if full else Lab("cifar10", pretrain_epochs=0.8, finetune_epochs=0.6, tag="-short")
    both = ("clean", "white_box_2", "white_box", "white_box_8", "gray_box_2", "gray_box", "gray_box_8")

    nim, mae = lab.pretrain("nim_mae", SIGMA), lab.pretrain("mae")
    denoised, mae_classifier = lab.denoised(nim), lab.finetune(mae)
    sizes = ("hidden_size=384", "intermediate_size=1536") if full else ("hidden_size=192", "intermediate_size=768")
    sizes += ("num_attention_heads=6",) if full else ("num_attention_heads=6", "num_hidden_layers=8")
    larger = replace(lab, pretrain_epochs=None).pretrain("mae", name="mae_larger", config=sizes)

    def attack(recipe: str, needs: Sequence[Step]) -> Step:
        script = "run_certify.py" if recipe == "certify" else "run_attack.py"
        output = "certify" if recipe == "certify" else f"attack/{recipe.removeprefix('attack_')}"
        return lab.step(script, f"{recipe}.yaml", output, (), needs)

    rows = cifar10_table_1(lab, larger)
    normalized, statistics = patch_statistics(lab)
    step = lab.attack("unseen", nim, mae_classifier, "30")
    unseen = [Row(("MAE's classifier", "-"), step, "unseen", "undefended", None)]
    unseen.append(Row(("MAE's classifier", "NIM-MAE, sigma 30"), step, "unseen", "defended", 30))
    step = attack("attack_votes", [nim, denoised])
    votes = [Row((n,), step, "votes", f"{n} vote{'' if n == 1 else 's'}", 30) for n in (1, 8, 32)]
    step = attack("attack_eot", [nim, denoised, *normalized["input"]])
    eot = [Row(("raw pixels", "sigma 30"), step, "eot", "defended", 30)]
    eot.append(Row(("normalized, statistics of the input", "sigma 30"), step, "eot", "statistics of the input", 30))

    sigmas = ("25", "75", "150", "uniform(0, 150)", "gamma(15, 3)", SIGMA)
    purifiers = {sigma: short.pretrain("nim_mae", sigma) for sigma in sigmas}
    classifiers = {f"NIM-MAE, {sigma}": short.original(purifier) for sigma, purifier in purifiers.items()}
    classifiers["MAE"] = short.finetune(short.pretrain("mae"))
    step = attack("attack_undefended", list(classifiers.values()))
    undefended = [Row((name,), step, "undefended", name, None) for name in classifiers]
    drawn = [mae, mae_classifier, larger, nim, denoised, *purifiers.values()]
    others = [
        Row(("standard",), attack("attack_standard", [nim, denoised]), "standard", "defended", 30),
        Row(("certified",), attack("certify", normalized["noisy"]), "certified", "defended", 30),
        Row(("figures",), attack("attack_figures", drawn), "figures", "defended", 30),
    ]
    table_1_columns = (*PAPER_COLUMNS, "white_box_2", "white_box_8", "gray_box_2", "gray_box_8")
    table_1_columns += ("black_box_2", "black_box_8")
    system, target = ("system", "defense"), ("target", "defense")
    tables = [
        Table("Table 1: MIM and NIM, with and without the defense", system, table_1_columns, rows),
        *ablations(short, sigmas, ("0", "30", "uniform(0, 30)", "uniform(0, 60)")),
        Table("Patch statistics: what is denoised and what the result is scaled back with", target, both, statistics),
        Table("The purifier before a classifier that was never fine-tuned on its images", system, both, unseen),
        Table(
            "Votes: draws that are averaged for one answer, by the defense and by the attacker",
            ("votes",),
            ("clean", "white_box"),
            votes,
        ),
        Table(
            "Expectation over the noise: PGD-10 and a stronger attack on the same images",
            target,
            ("clean", "white_box", "eot"),
            eot,
        ),
        Table(
            "Figure 5: no defense, fine-tuned on original images",
            ("system",),
            ("clean", "white_box_2", "white_box"),
            undefended,
        ),
        Table("Not in a table: figures 3, 4, 6, 7 and 8, the standard protocol, certificates", ("result",), (), others),
    ]
    return Study("cifar10_full" if full else "cifar10", cifar10_columns(), tables)


STUDIES = {"imagenet": imagenet, "cifar10": cifar10, "cifar10_full": lambda: cifar10(full=True)}
