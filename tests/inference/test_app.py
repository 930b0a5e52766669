import io
import json
import shutil
import socket
import time
import types
import zipfile

import cv2
import numpy as np
import pytest
from tiny import get_config

from mqformer_jax.inference import app
from mqformer_jax.inference.predictor import Predictor
from mqformer_jax.input.record import decode_rle
from mqformer_jax.segments import Segments
from mqformer_jax.tasks import PREDICTED


class Stripes(Predictor):
    """Stands for a Predictor: each prompt owns a stripe of the image, the last prompt nothing; remembers what it was
    asked.
    """

    def __init__(self):
        self.config, self.asked = get_config(), []

    def __call__(self, image, prompts, task="panoptic", regions=None, queries="all", score=None):
        self.asked.append(types.SimpleNamespace(prompts=prompts, task=task, regions=regions, queries=queries))
        n, (height, width) = len(prompts), image.shape[:2]
        stripe = np.arange(width) * n // width
        masks = np.repeat((stripe == np.arange(n)[:, None])[:, None], height, 1)
        masks[-1] &= n == 1
        boxes = np.array([[i * width / n, 0, (i + 1) * width / n, height] for i in range(n)], np.float32)
        order = np.arange(n)[::-1]  # as a model has it: in no order of ours
        found = Segments(list(prompts), masks[order], boxes[order], 0.9 - 0.2 * order, order, order)
        return found if score is None else found.above(score)


IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def test_prompts_are_split_at_semicolons_and_star_marks_a_region():
    assert app.read_prompts(" ball;the  red star ;sky* ; \n grass *;") == (
        ["ball", "the red star", "sky", "grass"],
        [False, False, True, True],
    )
    assert app.read_prompts("ball; ball*; *") == (["ball"], [True])
    assert app.read_prompts(" ; ") == ([], [])


@pytest.mark.parametrize(
    "task, regions", [("panoptic", [False, True, False]), ("instance", [False, True, False]), ("semantic", None)]
)
def test_region_flags_are_passed_only_to_panoptic_and_instance_tasks(task, regions):
    predictor = Stripes()
    app.answer(predictor, IMAGE, "ball; sky*; star", task, queries="learnable")
    (asked,) = predictor.asked
    assert (
        asked.prompts == ["ball", "sky", "star"]
        and asked.regions == regions
        and (asked.task, asked.queries) == (task, "learnable")
    )


def test_legend_uses_overlay_colors_in_prompt_order():
    reply = app.answer(Stripes(), IMAGE, "ball; sky*; star", "panoptic")
    assert [(r.prompt, round(r.score, 2), round(r.share, 3)) for r in reply.rows] == [
        ("ball", 0.9, 0.333),
        ("sky", 0.7, 0.333),
    ]
    color = np.array([int(reply.rows[0].color[i : i + 2], 16) for i in (1, 3, 5)])
    seen = reply.overlay[:, : reply.overlay.shape[1] // 4].reshape(-1, 3).mean(0)
    others = np.array([int(reply.rows[1].color[i : i + 2], 16) for i in (1, 3, 5)])
    assert np.abs(seen - color).sum() < np.abs(seen - others).sum()


def test_archive_contains_each_mask_as_png_and_rle():
    reply = app.answer(Stripes(), IMAGE, "ball; a/b “c”; star", "referring")
    with zipfile.ZipFile(io.BytesIO(reply.archive)) as zipped:
        read = lambda name: cv2.imdecode(np.frombuffer(zipped.read(name), np.uint8), cv2.IMREAD_UNCHANGED)
        said = json.loads(zipped.read("segments.json"))
        assert [s["file"] for s in said["segments"]] == ["masks/01_ball.png", "masks/02_a_b_c_.png"]
        for i, segment in enumerate(said["segments"]):
            mask = read(segment["file"]) == 255
            np.testing.assert_array_equal(mask, decode_rle(segment["segmentation"]["counts"].encode(), 40, 60))
            assert (
                mask[:, 20 * i : 20 * i + 20].all()
                and mask.sum() == segment["area"] == 800
                and segment["bbox"] == [20 * i, 0, 20, 40]
            )
        np.testing.assert_array_equal(read("overlay.png")[..., ::-1], reply.overlay)


def test_archive_stores_mattes_as_grayscale_alpha():
    found = Segments(
        ["cat"], np.ones((1, 4, 4), bool), np.array([[0, 0, 4, 4.0]]), np.ones(1), np.zeros(1, int), np.zeros(1, int)
    )
    found.alphas = np.full((1, 4, 4), 0.5, np.float32)
    with zipfile.ZipFile(io.BytesIO(app.archive(found, IMAGE, {"task": "matting"}))) as zipped:
        matte = cv2.imdecode(np.frombuffer(zipped.read("masks/01_cat.png"), np.uint8), cv2.IMREAD_UNCHANGED)
    assert (matte == 128).all() and app.legend(found)[0].share == 0.5


def test_instances_below_the_score_are_left_out():
    assert [
        r.prompt for r in app.answer(Stripes(), IMAGE, "ball; sky; star", "instance", score_threshold=0.8).rows
    ] == ["ball"]


def test_matting_is_offered_only_with_a_refiner():
    predictor = Stripes()
    assert "matting" in PREDICTED
    assert app.tasks_of(predictor) == [task for task in PREDICTED if task != "matting"]
    predictor.refiner = object()
    assert app.tasks_of(predictor) == list(PREDICTED)


def test_the_foreground_needs_no_prompt():
    predictor = Stripes()
    assert [r.prompt for r in app.answer(predictor, IMAGE, "", "foreground").rows] == ["foreground"]


@pytest.mark.parametrize(
    "image, text, task, said",
    [
        (None, "ball", "panoptic", "Upload or paste an image"),
        (IMAGE, " ; *", "panoptic", "at least one thing"),
        (IMAGE, "sky*", "instance", "remove the [*] from"),
    ],
)
def test_invalid_request_gives_one_line_error(image, text, task, said):
    with pytest.raises(ValueError, match=said) as error:
        app.answer(Stripes(), image, text, task)
    assert "\n" not in str(error.value)


def test_prompts_are_html_escaped_in_the_legend():
    table = app.legend_html([app.Row("<script>", "#ff0000", 0.5, 0.25)])
    assert "&lt;script&gt;" in table and "<script>" not in table and "25.0%" in table
    assert "Nothing" in app.legend_html([])


def test_missing_gradio_error_gives_the_install_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'mqformer_jax\[demo\]'"):
        app.main(app.arguments().parse_args(["--checkpoint=nowhere"]))


@pytest.mark.browser
def test_port_in_use_gives_clear_error(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"--port={port}: .* name another"):
            app.launch(Stripes(), "stripes", str(tmp_path), port)


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    pytest.importorskip("gradio", reason="gradio is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = (
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-quic",
    )
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        *quiet,
        "window-size=1280,1000",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


@pytest.fixture
def site(tmp_path):
    """A served page and the predictor behind it."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    predictor = Stripes()
    blocks = app.launch(predictor, "stripes", str(tmp_path), port, wait=False)
    yield types.SimpleNamespace(url=blocks.local_url, predictor=predictor)
    blocks.close()


class Page:
    """What a visitor does and sees."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        self.wait(lambda: self.all("#segment"))

    def all(self, css):
        return self.browser.find_elements("css selector", css)

    def wait(self, true, seconds=120):
        end = time.monotonic() + seconds
        while not (value := true()):
            assert time.monotonic() < end, self.browser.find_element("css selector", "body").text
            time.sleep(0.1)
        return value

    def upload(self, path):
        self.all("#photo input[type=file]")[0].send_keys(str(path))
        self.wait(lambda: self.all("#photo img"))

    def pick(self, group, label):
        next(x for x in self.all(f"{group} label") if x.text.lower() == label).click()

    def rows(self):
        return [
            [cell.text for cell in row.find_elements("css selector", "td")][1:]
            for row in self.all("table.legend tr")[1:]
        ]

    def toast(self):
        return " ".join(x.text for x in self.all(".toast-body"))

    def hosts(self):
        """Of all that the page asked for."""
        sent = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
        return {url.split("/")[2].split(":")[0] for url in urls if url.startswith("http")}


@pytest.mark.browser
def test_web_page_shows_segments_and_offers_mask_download(browser, site, tmp_path):
    cv2.imwrite(str(tmp_path / "photo.png"), IMAGE)
    page = Page(browser, site.url)
    page.upload(tmp_path / "photo.png")
    page.all("#prompts textarea")[0].send_keys("ball; sky*; star")
    page.all("#segment")[0].click()
    assert "does not work on photographs" in page.all("#title")[0].text, "the page says what the model knows"
    assert page.wait(page.rows) == [["ball", "0.90", "33.3%"], ["sky", "0.70", "33.3%"]]
    assert page.wait(lambda: page.all("#shown img"))[0].get_property("naturalWidth") == 360
    page.all("#download")[0].click()
    page.wait((tmp_path / "segments.zip").exists)
    with zipfile.ZipFile(tmp_path / "segments.zip") as zipped:
        assert sorted(zipped.namelist()) == ["masks/01_ball.png", "masks/02_sky.png", "overlay.png", "segments.json"]

    page.pick("#queries", "conditional")
    page.wait(lambda: site.predictor.asked[-1].queries == "conditional")
    assert not any(x.is_displayed() for x in page.all("#score_threshold"))
    page.pick("#task", "instance")
    page.wait(lambda: any(x.is_displayed() for x in page.all("#score_threshold")))
    page.all("#segment")[0].click()
    page.wait(lambda: site.predictor.asked[-1].task == "instance")
    assert page.hosts() == {"127.0.0.1"}


@pytest.mark.browser
def test_web_page_shows_error_messages_for_invalid_input(browser, site, tmp_path):
    page = Page(browser, site.url)
    page.all("#segment")[0].click()
    page.wait(lambda: "Upload or paste an image first" in page.toast())
    (tmp_path / "notes.png").write_text("no picture")
    page.upload(tmp_path / "notes.png")
    page.all("#prompts textarea")[0].send_keys("ball")
    page.all("#segment")[0].click()
    page.wait(lambda: "notes.png: not an image" in page.toast())
    assert "/" not in page.toast() and not page.rows() and not site.predictor.asked
