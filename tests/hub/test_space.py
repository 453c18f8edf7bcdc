"""The page of space/app.py: what it computes, and that it works in a browser."""

import argparse
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from reference import released_configs
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
)


pytestmark = pytest.mark.filterwarnings("ignore:::gradio")  # gradio's use of pandas warns

SPACE = Path(__file__).parents[2] / "space"
RELEASED = SPACE.parent / "model_cards"
SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def app():
    specification = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    """A purified model for the ten digits and a classifier without defense, random weights."""
    folder = tmp_path_factory.mktemp("space")
    torch.manual_seed(0)
    labels = {"id2label": {index: f"digit {index}" for index in range(10)}}
    purifier = NIMForPreTraining(NIMConfig(**SIZES, **DECODER, intermediate_size=64))
    classifier = NIMForImageClassification(NIMClassifierConfig(**SIZES, intermediate_size=64, **labels))
    torch.nn.init.normal_(classifier.classifier.weight)
    NIMPurifiedImageClassification.from_parts(purifier, classifier, sigma=30).save_pretrained(folder / "purified")
    classifier.save_pretrained(folder / "undefended")
    return str(folder / "purified"), str(folder / "undefended")


@pytest.fixture(scope="module")
def page(app, model_dirs):
    model, undefended = model_dirs
    return app.Page([app.Choice(model, undefended), app.Choice(str(RELEASED / "nim-cifar10"))])


def shown_by(app, page, *arguments, name="purified"):
    """What `run` shows, by row: the verdict, the pictures and the bars."""
    values, rows = iter(page.run(name, *arguments)), {}
    for row, pictures in app.PICTURES.items():
        rows[row] = {"verdict": next(values)}
        rows[row] |= {picture: next(values) for picture in pictures}
        rows[row]["bars"] = next(values)
    assert not list(values)
    return rows


@pytest.fixture(scope="module")
def digit():
    with Image.open(SPACE / "examples" / "digit-3.png") as image:
        return image.convert("RGB")


def levels(image):
    return np.asarray(image, dtype=int)


def test_attacks_stay_within_their_budget_and_find_the_linear_model_s_worst(app):
    torch.manual_seed(0)
    images_01 = torch.rand(1, 3, 8, 8)
    weights = torch.randn(2, 3 * 8 * 8)

    def linear(images):
        return images.flatten(1) @ weights.T

    for epsilon in (0.0, 8 / 255, 0.5):
        label = linear(images_01).argmax(dim=-1)
        adversarial_01 = app.pgd(linear, images_01, label, epsilon, torch.Generator().manual_seed(0))
        assert (adversarial_01 - images_01).abs().max() <= epsilon + 1e-6
        assert adversarial_01.min() >= 0 and adversarial_01.max() <= 1
        direction = (weights[1 - label] - weights[label])[0]  # raises the loss most where every pixel follows its sign
        worst = (images_01.flatten() + epsilon * direction.sign()).clamp(0, 1)
        assert torch.allclose(adversarial_01.flatten(), worst, atol=1e-5)


def test_pictures_show_what_was_classified(app, page, digit):
    rows = shown_by(app, page, digit, 8, 30, 1, 0)
    bare, bare_attacked = (levels(rows["undefended"][name]) for name in ("clean", "attacked"))
    clean, attacked, noisy, purified = (levels(rows["defended"][name]) for name in app.PICTURES["defended"])
    assert bare.shape == clean.shape == purified.shape == (256, 256, 3)
    original = levels(digit.resize((256, 256), Image.Resampling.NEAREST))
    assert np.abs(clean - original).max() <= 1 and np.abs(bare - original).max() <= 1
    for before, after in ((clean, attacked), (bare, bare_attacked)):
        assert 6 <= np.abs(after - before).max() <= 9  # eps 8/255, and rounding to levels
    inside = (attacked > 90) & (attacked < 165)  # where noise is not cut off
    assert 25 < np.std((noisy - attacked)[inside]) < 35  # sigma 30
    assert np.abs(purified - noisy).max() > 20
    assert rows["hardened"] == {"verdict": "", "bars": ""} | dict.fromkeys(app.PICTURES["hardened"])


def test_the_seed_decides_everything(app, page, digit):
    first, again, other = (shown_by(app, page, digit, 8, 30, 2, seed) for seed in (5, 5, 6))
    for row, pictures in app.PICTURES.items():
        for name in ("verdict", "bars", *pictures):
            same = first[row][name] == again[row][name]
            assert same, (row, name)
    assert first["defended"]["noisy"] != other["defended"]["noisy"]


def test_without_an_attack_the_answers_stay(app, page, digit):
    rows = shown_by(app, page, digit, 0, 30, 1, 0)
    for row in ("undefended", "defended"):
        assert rows[row]["clean"] == rows[row]["attacked"]
        assert "the answer stays" in rows[row]["verdict"]
    before, after = re.search(r"\*\*(\d+) hold\*\* \((\d+) without", rows["defended"]["verdict"]).groups()
    assert before == after  # the same draws meet the same image


def test_the_share_of_fresh_draws_is_counted_and_speaks_beside_an_unlucky_one(app, page, digit):
    """The answer with each of the 20 streams, drawn here again from the model itself."""
    rows = shown_by(app, page, digit, 8, 60, 2, 3)
    system = page.models("purified").defended
    images_01 = app._images_01(system.processor, digit)
    with torch.no_grad():
        answer = system.logits(images_01, sigma_255=60, generator=app._generator(3, "defense"), votes=2).argmax()
        fresh = [
            system.logits(images_01, sigma_255=60, generator=app._generator(3, "fresh", draw), votes=2).argmax()
            for draw in range(20)
        ]
    held = sum(int(label == answer) for label in fresh)
    assert f"({held} without the attack)" in rows["defended"]["verdict"]
    assert "Of 20 fresh draws" in rows["defended"]["verdict"] and "fresh" not in rows["undefended"]["verdict"]
    seeds = {app._generator(seed, "fresh", draw).initial_seed() for seed in range(3) for draw in range(20)}
    others = {app._generator(seed, p).initial_seed() for seed in range(3) for p in ("defense", "attack", "start")}
    assert len(seeds) == 60 and not seeds & others


def test_the_verdict_says_what_happened(app):
    before, after = torch.tensor([0.9, 0.1]), torch.tensor([0.25, 0.75])
    assert app.verdict(["a", "<b>"], before, after, 4, None) == (
        "a (90%) → &lt;b&gt; (75%) at eps 4/255: **the attack succeeds**"
    )
    assert app.verdict(["a", "b"], before, after, 4, (20, 17)) == (
        "a (90%) → b (75%) at eps 4/255: **the attack succeeds** with this draw. Of 20 fresh draws **17 hold** "
        "(20 without the attack)"
    )


def test_the_undefended_model_is_the_classifier_inside_where_none_is_named(app, model_dirs, page, digit):
    alone = app.Page([app.Choice(model_dirs[0])])
    own, named = (shown_by(app, p, digit, 8, 30, 1, 0)["undefended"] for p in (alone, page))
    assert own["bars"] == named["bars"]  # here they have the same weights


def test_an_undefended_and_a_hardened_sibling_are_found(app, model_dirs, tmp_path, digit):
    for name in ("model", "model-hardened"):
        shutil.copytree(model_dirs[0], tmp_path / name)
    shutil.copytree(model_dirs[1], tmp_path / "model-undefended")
    args = argparse.Namespace(
        models=[str(tmp_path / "model")], undefended=None, hardened=None, purifier=None, classifier=None
    )
    [choice] = app.make_choices(args)
    assert choice.hardened == str(tmp_path / "model-hardened")
    assert choice.undefended == str(tmp_path / "model-undefended")
    rows = shown_by(app, app.Page([choice]), digit, 8, 30, 1, 0, name="model")
    for name in ("verdict", "bars", *app.PICTURES["hardened"]):
        assert rows["hardened"][name] == rows["defended"][name]  # here they have the same weights


def test_a_purifier_and_any_classifier_make_a_page(app, tmp_path):
    torch.manual_seed(0)
    labels = {"id2label": {index: f"class {index}" for index in range(12)}}
    sizes = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**sizes, intermediate_size=64, **labels)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "vit")
    page = app.Page([app.Choice(str(RELEASED / "nim-mae-digits"), classifier=str(tmp_path / "vit"))])
    with Image.open(SPACE / "examples" / "photo-cat.jpg") as photograph:
        rows = shown_by(app, page, photograph, 8, 30, 1, 0, name="nim-mae-digits")
    assert rows["defended"]["purified"].size == rows["defended"]["clean"].size
    assert "class" in rows["defended"]["verdict"]
    first = page.run_first("nim-mae-digits", photograph, 8, 30, 1, 0)  # a larger image, in tiles: it waits
    assert "Press Attack" in first[0] and all(not value or "Press Attack" in value for value in first)
    with pytest.raises(ValueError, match="two parts of one model"):
        app.make_choices(argparse.Namespace(models=[], undefended=None, hardened=None, purifier="p", classifier=None))


def test_every_released_model_is_offered_with_examples_of_its_own_data(app):
    args = argparse.Namespace(models=[], undefended=None, hardened=None, purifier=None, classifier=None)
    choices = app.make_choices(args)
    purified = {
        folder.name
        for folder, config in released_configs().items()
        if (purifier := config.get("purifier_config"))
        and purifier["degradation"] == "noise"  # the page is about noise alone
        and not folder.name.endswith("-hardened")
    }
    page, examples = app.Page(choices), sorted((SPACE / "examples").iterdir())
    photographs = {choice.name.split("/")[-1] for choice in app.photographs()}  # none without the classifier's package
    assert page.choices.keys() == purified | photographs >= {"nim-digits", "nim-cifar10"}
    for name in page.choices:
        models = page.models(name)
        own = app.examples_for(models.class_names, examples)
        kind = "digit" if "digits" in name else "cifar10" if "cifar10" in name else "photo"
        assert {path.name.split("-")[0] for path in own} == {kind} and len(own) >= 5
        assert app.kind_of(own) in app.CREDITS
        image = app.read_image(str(own[0]), models)
        about = models.about(image)
        assert "On anything else its answer means nothing." in about
        assert models.class_names[0] in about and models.defended.in_tiles == (kind == "photo")
        if kind != "photo":
            assert {"digit": "scikit-learn digits", "cifar10": "CIFAR-10"}[kind] in about and "32x32 pixels" in about


def test_examples_of_no_known_kind_are_all_offered(app, tmp_path):
    own = [tmp_path / "x.png", tmp_path / "y.jpg"]
    assert app.examples_for(["cat", "dog"], own) == own


def test_class_names_are_text_and_many_classes_are_cut_to_the_likeliest(app):
    names = ["<b>bold</b>"] + [f"class {index}" for index in range(99)]
    before = [0.5] + [0.5 / 99] * 99
    after = [0.1] + [0.9 / 99] * 98 + [0.9 / 99 + 0.2]
    bars = app.bars_html(names, before, after)
    assert "&lt;b&gt;bold&lt;/b&gt;" in bars and "<b>" not in bars
    assert bars.count('class="pair"') == 10 and "class 98" in bars
    assert '<div class="percent">50% → 10%</div>' in bars


def test_missing_input_gets_a_message(app, page, tmp_path, digit):
    with pytest.raises(gr.Error, match="Pick one of the images"):
        page.run("purified", None, 8, 30, 1, 0)
    with pytest.raises(gr.Error, match="seed must be"):
        page.run("purified", digit, 8, 30, 1, None)
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(gr.Error, match="notes.png is no image"):
        app.read_image(str(tmp_path / "notes.png"), page.models("purified"))


def test_an_upload_is_read_as_the_loader_and_the_pipeline_read_it(app, page, tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "ramp.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "ramp.tiff")
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    Image.new("RGB", (4, 40)).save(tmp_path / "stripe.png")
    for name in ("purified", "nim-cifar10"):  # the package's own code, and the code beside released weights
        models = page.models(name)
        for file in ("ramp.png", "ramp.tiff"):
            assert np.abs(levels(app.read_image(str(tmp_path / file), models))[..., 0] - ramp / 257).max() <= 0.51
        for file, why in (("nan.tiff", "NaN"), ("stripe.png", "4x40 pixels")):
            with pytest.raises(gr.Error, match=f"{file} cannot be read: .*{why}"):
                app.read_image(str(tmp_path / file), models)


def test_a_missing_model_is_one_line(app, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["app.py", "--models", str(tmp_path / "absent")])
    assert app.main() == 2
    assert capsys.readouterr().err.startswith("error: there is no model")


def test_the_space_header_names_the_app_and_its_requirements():
    import yaml

    header = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py"
    assert header["sdk_version"].split(".")[0] == gr.__version__.split(".")[0]
    assert len(header["short_description"]) <= 60  # the Hub's limit
    requirements = (SPACE / "requirements.txt").read_text(encoding="utf-8")
    assert all(name in requirements for name in ("gradio", "torch", "transformers", "Pillow"))
    page = (SPACE / "README.md").read_text(encoding="utf-8")
    for kind in ("digit", "cifar10", "photo"):
        assert f"`{kind}-*`" in page  # whose these images are


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("no chromium and chromedriver found: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1360,1180",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def url(app, model_dirs):
    """A page of two models, the first with a hardened one beside it."""
    hardened = str(RELEASED / "nim-digits-hardened")
    page = app.Page([app.Choice(*model_dirs, hardened), app.Choice(str(RELEASED / "nim-cifar10"))])
    blocks = app.build(page, sorted((SPACE / "examples").glob("*.png")))
    _, url, _ = blocks.launch(
        prevent_thread_lock=True,
        quiet=True,
        css=app.CSS,
        allowed_paths=[str(SPACE / "examples")],
        server_name="127.0.0.1",
    )
    yield url
    blocks.close()


def wait_for(condition, what, seconds=60):
    """What `condition` gives as soon as it is true. An element that the page just replaced is looked for again."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.wait import WebDriverWait

    wait = WebDriverWait(None, seconds, poll_frequency=0.2, ignored_exceptions=[StaleElementReferenceException])
    return wait.until(lambda _: condition(), f"waited {seconds} s for {what}")


PICTURES = ["undefended-clean", "undefended-attacked"] + [
    f"{row}-{picture}" for row in ("defended", "hardened") for picture in ("clean", "attacked", "noisy", "purified")
]


def test_in_a_browser_pictures_change_and_a_wrong_file_gets_a_message(browser, url, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def find(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def sources():
        """The address of every picture, once all are loaded; gradio names files by their content."""
        script = (
            "const i = document.querySelector('#' + arguments[0] + ' img'); return i && i.naturalWidth ? i.src : ''"
        )
        found = {name: browser.execute_script(script, name) for name in PICTURES}
        return found if all(found.values()) else None

    def loaded(selector):
        script = "const i = document.querySelector(arguments[0]); return Boolean(i && i.naturalWidth)"
        return browser.execute_script(script, selector)

    browser.get(url)
    first = wait_for(sources, "ten pictures of the example that is chosen when the page opens")
    assert loaded("#chosen img")
    wait_for(lambda: len(find("#examples button img")) == 10, "the examples")
    thumbnail = find("#examples button")[3]
    chosen = browser.execute_script("return document.querySelector('#chosen img').src")
    thumbnail.click()
    wait_for(lambda: browser.execute_script("return document.querySelector('#chosen img').src") != chosen, "the choice")
    find("#run")[0].click()
    first = wait_for(
        lambda: (now := sources()) and now["defended-purified"] != first["defended-purified"] and now, "its pictures"
    )
    verdict = wait_for(lambda: find("#defended-verdict")[0].text, "the verdict")
    first = wait_for(sources, "the rest of its pictures")
    assert "digit" in verdict and "eps 8/255" in verdict and "Of 20 fresh draws" in verdict
    for row in ("undefended", "defended", "hardened"):
        assert len(find(f"#{row}-bars .pair")) == 10
    assert "Of 20 fresh draws" in find("#hardened-verdict")[0].text
    assert all("→" in bar.text and "%" in bar.text for bar in find("#defended-bars .percent"))
    assert "does not prove" in find("#caveat")[0].text
    assert "knows 10 classes" in find("#about")[0].text

    epsilon = find("#epsilon input[type=number]")[0]
    epsilon.send_keys(Keys.CONTROL, "a")
    epsilon.send_keys("24", Keys.TAB)
    find("#run")[0].click()
    wait_for(lambda: "eps 24/255" in find("#defended-verdict")[0].text, "the second attack")
    moving = {name for name in PICTURES if not name.endswith("-clean")}
    second = wait_for(
        lambda: (now := sources()) and all(now[name] != first[name] for name in moving) and now, "new pictures"
    )
    assert {name for name in PICTURES if first[name] != second[name]} == moving

    (tmp_path / "notes.png").write_text("no image")
    upload = find("input[data-testid$='upload-button']")[0]
    upload.send_keys(str(tmp_path / "notes.png"))
    wait_for(lambda: any("notes.png is no image" in toast.text for toast in find(".toast-body")), "the message")

    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "noise.png")
    chosen = browser.execute_script("return document.querySelector('#chosen img').src")
    find("input[data-testid$='upload-button']")[0].send_keys(str(tmp_path / "noise.png"))
    wait_for(lambda: browser.execute_script("return document.querySelector('#chosen img').src") != chosen, "the upload")
    find("#run")[0].click()
    wait_for(
        lambda: (now := sources()) and now["defended-clean"] != second["defended-clean"], "the uploaded image's turn"
    )

    find("#model input")[0].click()  # another model: its own examples, its own pictures
    wait_for(  # the list fades in: an entry has no text, and takes no click, before it can be seen
        lambda: next(
            (option for option in find("#model ul li, ul[role=listbox] li") if "nim-cifar10" in option.text), None
        ),
        "the other model in the list",
    ).click()
    wait_for(lambda: "CIFAR-10" in find("#about")[0].text, "what the other model was trained on")
    wait_for(lambda: "eps 4/255" in find("#defended-verdict")[0].text, "the attack on its first example")
    assert any(name in find("#defended-bars")[0].text for name in ("airplane", "truck"))
    assert not find("#hardened") or not find("#hardened")[0].is_displayed()  # it has none beside it
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors


@pytest.mark.parametrize("width", [390, 1360, 1920])
def test_the_page_fits_every_width(browser, url, width):
    """No sideways scrolling, on a phone neither, and every picture is square and inside the window."""
    from selenium.webdriver.common.by import By

    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        browser.get(url)
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#defended-bars .pair"), "the first attack")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for name in PICTURES:
            box = browser.find_element(By.ID, name).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] >= 100
        for bar in browser.find_elements(By.CSS_SELECTOR, "#defended-bars .percent"):
            assert bar.rect["x"] + bar.rect["width"] <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
