"""The page of space/app.py: what it computes, and that it works in a browser."""

import importlib.util
import shutil
import sys
import time
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_nim import (
    NIMClassifierConfig,
    NIMConfig,
    NIMForImageClassification,
    NIMForPreTraining,
    NIMPurifiedImageClassification,
)


pytestmark = pytest.mark.filterwarnings("ignore:::gradio")  # its use of pandas is not ours to mend

SPACE = Path(__file__).parents[2] / "space"
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
    """A purified model for the ten digits and a classifier without defence, random weights."""
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
    return app.Page(*model_dirs)


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
        adversarial_01 = app.pgd(linear, images_01, epsilon, torch.Generator().manual_seed(0))
        assert (adversarial_01 - images_01).abs().max() <= epsilon + 1e-6
        assert adversarial_01.min() >= 0 and adversarial_01.max() <= 1
        label = linear(images_01).argmax()
        direction = weights[1 - label] - weights[label]  # raises the loss most where every pixel follows its sign
        worst = (images_01.flatten() + epsilon * direction.sign()).clamp(0, 1)
        assert torch.allclose(adversarial_01.flatten(), worst, atol=1e-5)


def test_pictures_show_what_was_classified(app, page, digit):
    shown = page.run(digit, 8, 30, 1, 0)
    bare, bare_attacked, clean, attacked, noisy, purified = [levels(image) for image in shown[:6]]
    assert bare.shape == clean.shape == purified.shape == (256, 256, 3)
    original = levels(digit.resize((256, 256), Image.Resampling.NEAREST))
    assert np.abs(clean - original).max() <= 1 and np.abs(bare - original).max() <= 1
    for before, after in ((clean, attacked), (bare, bare_attacked)):
        assert 6 <= np.abs(after - before).max() <= 9  # eps 8/255, and rounding to levels
    inside = (attacked > 90) & (attacked < 165)  # where noise is not cut off
    assert 25 < np.std((noisy - attacked)[inside]) < 35  # sigma 30
    assert np.abs(purified - noisy).max() > 20


def test_the_seed_decides_everything(page, digit):
    first, again, other = (page.run(digit, 8, 30, 2, seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first[:6], again[:6], strict=True))
    assert first[6:] == again[6:]
    assert not np.array_equal(first[4], other[4])


def test_without_an_attack_the_answers_stay(page, digit):
    shown = page.run(digit, 0, 30, 1, 0)
    assert np.array_equal(shown[0], shown[1]) and np.array_equal(shown[2], shown[3])
    assert all("the answer stays" in verdict for verdict in shown[6:8])


def test_the_undefended_model_is_the_classifier_inside_where_none_is_named(app, model_dirs, page, digit):
    alone = app.Page(model_dirs[0], None)
    assert alone.run(digit, 8, 30, 1, 0)[8] == page.run(digit, 8, 30, 1, 0)[8]  # here they have the same weights


def test_class_names_are_text_and_many_classes_are_cut_to_the_likeliest(app):
    names = ["<b>bold</b>"] + [f"class {index}" for index in range(99)]
    before = [0.5] + [0.5 / 99] * 99
    after = [0.1] + [0.9 / 99] * 98 + [0.9 / 99 + 0.2]
    bars = app.bars_html(names, before, after)
    assert "&lt;b&gt;bold&lt;/b&gt;" in bars and "<b>" not in bars
    assert bars.count('class="pair"') == 10 and "class 98" in bars


def test_missing_input_gets_a_message(app, page, tmp_path, digit):
    with pytest.raises(gr.Error, match="Pick one of the images"):
        page.run(None, 8, 30, 1, 0)
    with pytest.raises(gr.Error, match="seed must be"):
        page.run(digit, 8, 30, 1, None)
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(gr.Error, match="notes.png is no image"):
        app.read_upload(str(tmp_path / "notes.png"))


def test_a_missing_model_is_one_line(app, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", str(tmp_path / "absent")])
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
def url(app, page):
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
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


PICTURES = ["undefended-clean", "undefended-attacked"] + [
    f"defended-{picture}" for picture in ("clean", "attacked", "noisy", "purified")
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
    thumbnails = wait_for(lambda: len(find("#examples button img")) == 10 and find("#examples button"), "the examples")
    thumbnails[3].click()
    wait_for(lambda: loaded("#chosen img"), "the chosen image")
    find("#run")[0].click()
    first = wait_for(sources, "six pictures")
    verdict = wait_for(lambda: find("#defended-verdict")[0].text, "the verdict")
    assert "digit" in verdict and "eps 8/255" in verdict
    assert len(find("#defended-bars .pair")) == len(find("#undefended-bars .pair")) == 10
    assert "does not prove" in find("#caveat")[0].text

    epsilon = find("#epsilon input[type=number]")[0]
    epsilon.send_keys(Keys.CONTROL, "a")
    epsilon.send_keys("24", Keys.TAB)
    find("#run")[0].click()
    wait_for(lambda: "eps 24/255" in find("#defended-verdict")[0].text, "the second attack")
    second = wait_for(
        lambda: (now := sources()) and now["defended-purified"] != first["defended-purified"] and now, "new ones"
    )
    changed = {name for name in PICTURES if first[name] != second[name]}
    assert changed == set(PICTURES) - {"undefended-clean", "defended-clean"}

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
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors
