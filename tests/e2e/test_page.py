"""The page at / in a real browser: every control, an upload, an error, an abstention, both tasks."""

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from service_processes import CONFIG, Start, publish
from torch import Tensor, nn
from zo_fit_runs import serving_hospital

from services.hospital.model import VictimConfig, build_victim
from services.keys import make_key
from services.protocol.images import encode_png
from training.victim.files import save_victim

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
MODES = ["--modes", "sanitize,smooth,certify", "--smooth-n", "12", "--certify-n0", "4", "--certify-n", "16"]
SCAN = np.random.default_rng(0).random((1, 32, 32), dtype=np.float32)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page; fails the test that makes it ask elsewhere, or that leaves an error in its console."""
    contexts, wrong = [], []

    def open_page(url: str, **options) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on(
            "request", lambda one: wrong.append(one.url) if not one.url.startswith((url, "data:", "blob:")) else None
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda one: wrong.append(one.text) if "Content Security Policy" in one.text else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def gateway(start: Start, victim: tuple[Path, nn.Module], artifact: tuple[Path, nn.Module], tmp_path: Path) -> str:
    samples = tmp_path / "samples"
    samples.mkdir()
    for name, image in (("scan.png", SCAN), ("scan.attacked.png", 1 - SCAN)):
        (samples / name).write_bytes(encode_png(image))
    (samples / "notes.txt").write_text("no image")
    _, hospital = start("services.hospital", "--model", str(victim[0]))
    own = ["--artifact", str(artifact[0]), "--victim-url", hospital, "--page-samples", str(samples), "--page-compare"]
    return start("services.gateway", *own, *MODES)[1]


def upload(page: Page, data: bytes, name: str = "scan.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


def pixels(page: Page, canvas: str) -> np.ndarray:
    told = page.evaluate(f"document.getElementById('{canvas}').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(told.partition(",")[2]))).convert("RGB"))


def test_an_upload_is_shown_before_and_after_and_answered_as_predict_answers(visit, gateway: str) -> None:
    page = visit(gateway)
    upload(page, encode_png(SCAN))
    told = httpx.post(f"{gateway}/predict", files={"file": encode_png(SCAN)}).json()
    expect(page.locator("#verdict")).to_have_text(told["label"])
    expect(page.locator("#meaning")).to_contain_text("nothing is certified")
    assert page.locator("#classes tbody th").all_text_contents() == told["labels"]
    shares = [float(bar.get_attribute("value") or "nan") for bar in page.locator("meter").all()]
    assert shares == pytest.approx(told["probabilities"])
    expect(page.locator("#evidence")).to_contain_text("version 1")
    shown = {name: pixels(page, name) for name in ("original", "sanitized", "difference")}
    assert all(image.std() > 5 for image in shown.values())
    assert (shown["original"] != shown["sanitized"]).any()
    # The picture is the scan itself: every pixel a square of its own grey.
    original = shown["original"]
    step = len(original) / 32
    centres = ((np.arange(32) + 0.5) * step).astype(int)
    assert np.abs(original[np.ix_(centres, centres)][..., 0] - np.rint(255 * SCAN[0])).max() <= 1
    expect(page.locator("#state")).to_contain_text("yes")
    expect(page.locator("#state")).to_contain_text("queries spent by you")


def test_zoom_and_amplification_move_all_three_pictures(visit, gateway: str) -> None:
    page = visit(gateway)
    upload(page, encode_png(SCAN))
    expect(page.locator("#pictures")).to_be_visible()
    before = {name: pixels(page, name) for name in ("original", "sanitized", "difference")}

    def moved() -> list[str]:
        after = {name: pixels(page, name) for name in before}
        changed = [name for name in before if (after[name] != before[name]).any()]
        before.update(after)
        return changed

    every = ["original", "sanitized", "difference"]
    page.get_by_role("button", name="Zoom in").click()
    expect(page.locator("#zoom")).to_have_text("1.5")
    assert moved() == every
    page.locator("#sanitized").focus()
    page.keyboard.press("+")
    assert moved() == every
    page.keyboard.press("ArrowRight")
    assert moved() == every
    box = page.locator("#original").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 70)
    page.mouse.up()
    assert moved() == every
    page.mouse.wheel(0, -100)
    expect(page.locator("#zoom")).to_have_text("2.7")
    assert moved() == every
    page.get_by_role("button", name="Zoom out").click()
    assert moved() == every
    page.get_by_role("button", name="Whole image").click()
    expect(page.locator("#zoom")).to_have_text("1")
    assert moved() == every
    page.locator("#amplify").fill("6")
    expect(page.locator("#times")).to_have_text("64")
    expect(page.locator("#scale-text")).to_contain_text("−2 to +2 grey levels")
    assert moved() == ["difference"]


def test_modes_samples_and_the_bare_model(visit, gateway: str) -> None:
    page = visit(gateway)
    page.get_by_role("button", name="scan", exact=True).click()
    expect(page.locator("#verdict")).not_to_be_empty()
    for mode, says in (("smooth", "majority of 12"), ("certify", "Certified: no change")):
        page.get_by_label("How the answer is found").select_option(mode)
        expect(page.locator("#evidence")).to_contain_text(mode)
        expect(page.locator("#meaning")).to_contain_text(says)
        expect(page.get_by_role("columnheader", name="Votes", exact=True)).to_be_visible()
    page.get_by_label("ask the bare model too").check()
    told = httpx.post(f"{gateway}/page/bare", files={"file": encode_png(SCAN)}).json()
    expect(page.locator("#bare-verdict")).to_contain_text(f"The bare model says: {told['label']}.")
    page.get_by_role("button", name="scan (attacked)").click()
    raw = httpx.post(f"{gateway}/page/bare", files={"file": encode_png(1 - SCAN)}).json()
    expect(page.locator("#bare-verdict")).to_contain_text(f"The bare model says: {raw['label']}.")
    expect(page.locator("#samples button")).to_have_count(2)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator("#busy")).to_be_hidden()


def test_what_is_no_image_is_said_in_the_gateways_words_and_the_next_image_is_answered(visit, gateway: str) -> None:
    page = visit(gateway)
    upload(page, b"not an image")
    expect(page.get_by_role("alert")).to_contain_text("image")
    expect(page.locator("#answer")).to_be_hidden()
    upload(page, encode_png(SCAN))
    expect(page.locator("#verdict")).not_to_be_empty()
    expect(page.locator("#error")).to_be_hidden()


class Undecided(nn.Module):
    """Answers by one pixel: noise decides."""

    def forward(self, images: Tensor) -> Tensor:
        bright = 1000 * (images[:, 0, 7, 7] - 0.5)
        return torch.stack([bright, -bright, torch.full_like(bright, -9e3)], dim=1)


def test_an_abstention_is_no_answer_and_says_so(visit, start: Start, artifact) -> None:
    with serving_hospital(Undecided(), CONFIG) as url:
        flags = ["--modes", "smooth", "--smooth-n", "60", "--sigma", "1"]
        _, gateway = start("services.gateway", "--artifact", str(artifact[0]), "--victim-url", url, *flags)
        page = visit(gateway)
        upload(page, encode_png(np.full((1, 32, 32), 0.5, np.float32)))
        expect(page.locator("#verdict")).to_have_text("No answer")
        expect(page.locator("#meaning")).to_contain_text("abstains")


def test_a_mask_is_laid_over_the_picture_and_what_abstains_is_hatched(
    visit, start: Start, artifact, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    config = VictimConfig(labels=("background", "lesion"), task="segmentation", channels=1, size=(32, 32), width=0.25)
    save_victim(tmp_path / "segmenter", build_victim(config), config)
    publish(tmp_path / "masks", 1, labels=[])
    _, hospital = start("services.hospital", "--model", str(tmp_path / "segmenter"))
    own = ["--artifact", str(tmp_path / "masks"), "--victim-url", hospital]
    page = visit(start("services.gateway", *own, *MODES)[1])
    upload(page, encode_png(SCAN))
    expect(page.locator("#verdict")).to_contain_text("of the image is marked")
    before = pixels(page, "original")
    page.get_by_label("Opacity of the mask").fill("0")
    bare = pixels(page, "original")
    assert (bare[..., 0] == bare[..., 2]).all()
    assert (before[..., 0] != before[..., 2]).any()
    page.get_by_label("Opacity of the mask").fill("100")
    page.get_by_label("How the answer is found").select_option("smooth")
    expect(page.locator("#legend-abstains")).to_be_visible()
    blue = (pixels(page, "original") == (86, 180, 233)).all(axis=2)
    assert 0 < blue.mean() < 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out_and_every_control_has_a_name(visit, gateway: str, scheme: str) -> None:
    page = visit(gateway, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    upload(page, encode_png(SCAN))
    expect(page.locator("#verdict")).not_to_be_empty()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]
    nameless = page.evaluate(
        "[...document.querySelectorAll('input, select, button, canvas, meter')].filter(one => !one.labels?.length"
        " && !one.ariaLabel && !one.textContent.trim()).map(one => one.outerHTML)"
    )
    assert nameless == []


def test_everything_can_be_reached_by_keyboard(visit, gateway: str) -> None:
    page = visit(gateway)
    upload(page, encode_png(SCAN))
    expect(page.locator("#pictures")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    wanted = {"file", "mode", "key", "compare", "again", "original", "sanitized", "difference", "zoom-in", "zoom-out"}
    assert wanted | {"zoom-reset", "amplify", "scan", "scan (attacked)", "Evidence"} <= reached


def test_a_key_is_sent_where_the_gateway_wants_one(visit, start: Start, victim, artifact, tmp_path: Path) -> None:
    key, entry = make_key("clinic")
    (tmp_path / "keys.toml").write_text(entry)
    _, hospital = start("services.hospital", "--model", str(victim[0]))
    own = ["--artifact", str(artifact[0]), "--victim-url", hospital, "--keys", str(tmp_path / "keys.toml")]
    page = visit(start("services.gateway", *own)[1])
    upload(page, encode_png(SCAN))
    expect(page.get_by_role("alert")).to_contain_text("key")
    page.get_by_label("API key").fill(key)
    page.keyboard.press("Tab")
    expect(page.locator("#mode option")).to_have_count(1)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator("#verdict")).not_to_be_empty()


def test_the_page_can_be_switched_off_and_comparing_is_off_by_default(start: Start, victim, artifact) -> None:
    _, hospital = start("services.hospital", "--model", str(victim[0]))
    own = ["--artifact", str(artifact[0]), "--victim-url", hospital]
    _, without = start("services.gateway", *own, "--no-page")
    _, default = start("services.gateway", *own)
    for path in ("", "/page/page.js", "/page/state", "/page/samples"):
        assert httpx.get(f"{without}{path}").status_code == 404
        told = httpx.get(f"{default}{path}")
        assert told.status_code == 200
    policy = httpx.get(default).headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    files = {"file": encode_png(SCAN)}
    assert httpx.post(f"{default}/page/bare", files=files).status_code == 404
    assert httpx.get(f"{default}/page/state").json()["compare"] is False
    before = httpx.get(f"{default}/page/state").json()["queries"]
    assert httpx.post(f"{default}/page/sanitized", files=files).status_code == 200
    assert httpx.get(f"{default}/page/state").json()["queries"] == before
    assert httpx.get(f"{default}/page/samples/..%2F..%2Fkeys.toml").status_code == 404
