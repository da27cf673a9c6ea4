"""The page as people use it: a headless Chromium types, slides, uploads and compares."""

import io
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs gradio")

from demo_server import browser, running_page  # noqa: E402

from diffusers_wadi.demo.texts import START_SEED  # noqa: E402
from diffusers_wadi.shapes import judge_image  # noqa: E402

PROMPT = "a purple star left of a cyan circle on a white background"
TABS = ["Generate", "Strength", "Control", "High resolution", "Compare", "Inspect"]


@pytest.fixture(scope="module")
def chromium():
    running_page()  # before Playwright takes the event loop of this thread
    with browser() as chromium:
        yield chromium


@pytest.fixture
def opened(chromium):
    """(width) -> a fresh view of the page that shows its first images."""
    contexts = []

    def open_view(width):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 844}))
        view = contexts[-1].new_page()
        view.goto(running_page().local_url)
        until(lambda: drawn(view))
        return view

    yield open_view
    for context in contexts:
        context.close()


def until(found, seconds=60):
    """What `found` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it did not come in time"
        time.sleep(0.05)
    return value


def drawn(view):
    """The images of the open tab's galleries, as files with their settings."""
    addresses = view.locator(".grid-wrap img").filter(visible=True).evaluate_all("images => images.map(i => i.src)")
    return [Image.open(io.BytesIO(view.request.get(address).body())) for address in addresses]


def drawn_with(view, **settings):
    """The images of the open tab once the first has these settings."""

    def found():
        images = drawn(view)
        return images if images and settings.items() <= images[0].text.items() else []

    return until(found)


def show(view, name):
    tab = view.get_by_role("tab", name=name, exact=True).filter(visible=True)
    if tab.count():
        tab.click()
    else:  # behind the dots of a narrow window
        view.locator(".overflow-menu > button").click()
        view.locator(".overflow-dropdown button").filter(has_text=name).click()


def field(view, label):
    return view.get_by_label(label, exact=True).filter(visible=True).first


def press(view, name):
    view.get_by_role("button", name=name, exact=True).filter(visible=True).click()


def holds(image, prompt):
    return all(judge_image(np.asarray(image.convert("RGB")), prompt).values())


def said(view):
    return view.locator(".prose.said").filter(visible=True).first.inner_text()


def test_types_slides_and_compares(opened):
    view = opened(1280)
    field(view, "Prompt").fill(PROMPT)
    field(view, "Prompt").press("Enter")
    images = drawn_with(view, prompt=PROMPT)
    assert len(images) == 4 and sum(holds(image, PROMPT) for image in images) >= 2
    assert [image.text["seed"] for image in images] == [str(START_SEED + i) for i in range(4)]
    assert " per image" in said(view)
    show(view, "Strength")
    view.locator("input[type=range]").filter(visible=True).fill("0.5")
    drawn_with(view, strength="0.5")
    show(view, "Compare")
    field(view, "Prompt").fill(PROMPT)
    view.locator("input[type=range]").filter(visible=True).first.fill("12")
    press(view, "Compare")
    images = drawn_with(view, prompt=PROMPT, steps="12")
    assert [image.text["steps"] for image in images] == ["12", "1"] and holds(images[0], PROMPT)
    assert "as fast" in said(view)


@pytest.mark.slow
def test_dice_examples_live_download_and_errors(opened, tmp_path):
    view = opened(1280)
    press(view, "🎲 New seed")
    until(lambda: drawn(view)[0].text["seed"] != str(START_SEED))
    view.get_by_role("button", name=PROMPT, exact=True).filter(visible=True).click()  # an example
    drawn_with(view, prompt=PROMPT)
    field(view, "Prompt").press_sequentially("!")  # nothing: Live is off
    view.get_by_label("Live: draw again while I type").check()
    drawn_with(view, prompt=PROMPT + "!")
    field(view, "Prompt").fill("")
    field(view, "Prompt").press_sequentially("a blue ring")
    drawn_with(view, prompt="a blue ring")
    field(view, "Prompt").fill(PROMPT)  # as if pasted
    drawn_with(view, prompt=PROMPT)
    view.locator(".thumbnail-item").first.click()
    with view.expect_download() as download:
        press(view, "Download")
    download.value.save_as(tmp_path / "image.png")
    assert Image.open(tmp_path / "image.png").text["prompt"] == PROMPT
    field(view, "Prompt").fill("x" * 301)
    view.get_by_text("The prompt has 301 characters").first.wait_for()
    assert not view.get_by_text("Traceback").count()


@pytest.mark.slow
def test_the_path_and_an_uploaded_condition(opened, tmp_path):
    view = opened(1280)
    show(view, "Strength")
    press(view, "Images along the path, 0 to 1.5")
    assert len(until(lambda: drawn(view))) == 7
    show(view, "Control")
    view.get_by_text("No ControlNet is loaded").wait_for()
    Image.linear_gradient("L").save(tmp_path / "ramp.png")
    view.locator("canvas").first.wait_for()

    def condition():
        """Whether it is the ramp; the editor takes a while to begin, and with an upload."""
        view.locator("input[type=file]").first.set_input_files(tmp_path / "ramp.png")
        view.wait_for_timeout(1000)
        press(view, "Show the condition")
        view.locator(".condition img").wait_for()
        view.wait_for_timeout(300)
        address = view.locator(".condition img").get_attribute("src")
        seen = np.asarray(Image.open(io.BytesIO(view.request.get(address).body())).convert("L"), dtype=float)
        return seen.shape == (64, 64) and seen[-1].mean() - seen[0].mean() > 200

    until(condition)


@pytest.mark.slow
def test_a_phone(opened):
    view = opened(390)
    field(view, "Prompt").fill(PROMPT)
    field(view, "Prompt").press("Enter")
    assert sum(holds(image, PROMPT) for image in drawn_with(view, prompt=PROMPT)) >= 2
    for name in TABS:
        show(view, name)
        if name == "Inspect":
            press(view, "Measure")
            view.get_by_text("directions by").wait_for()
        assert view.evaluate("document.documentElement.scrollWidth") == 390, name  # nothing to scroll sideways
