"""The demo page: the function behind it, and the page itself in headless Chromium."""

from __future__ import annotations

import http.client
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time

import mindspore as ms
import numpy as np
import pytest
from PIL import Image

from src.deploy import Predictor
from tests.conftest import ROOT, run_command

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key of an element's id


@pytest.fixture(scope="module")
def demo():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A file with 16 bits a pixel, which Pillow's conversion to RGB makes nearly white."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.zeros((48, 64), np.uint16)
    pixels[8:40, 28:36] = 40_000  # a one
    pixels[:, :28] = 3_000
    Image.fromarray(pixels).save(path)
    return path


def test_the_function_returns_the_predictors_classes_and_a_picture(demo, trained, photo):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    predictor = Predictor(trained, runtime={"mode": "pynative"})
    with Image.open(photo) as image:
        classes, picture = demo.explain(predictor, image)
    expected = {each.name: each.probability for each in predictor([str(photo)], top_k=5)[0]}
    assert classes == pytest.approx(expected, rel=1e-5)
    assert picture.width > 800 and np.asarray(picture.convert("L")).std() > 10


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    if importlib.util.find_spec("gradio"):
        pytest.skip("Gradio is installed")
    done = run_command("examples/demo.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().endswith("examples/demo.py needs Gradio: pip install gradio")
    assert len(done.stderr.splitlines()) == 1


def test_an_exported_file_is_refused(run_here):
    done = run_here("examples/demo.py", "--model=mine.onnx")
    assert (done.returncode, done.stdout) == (2, "")
    assert "mine.onnx: is an exported file" in done.stderr


class Browser:
    """A headless Chromium, driven by the WebDriver protocol through chromedriver."""

    def __init__(self, port: int) -> None:
        self._port = port
        options = {"binary": CHROMIUM, "args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        self._session = ""
        value = self._call("POST", "/session", {"capabilities": capabilities})
        self._session = f"/session/{value['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        connection.request(method, path, None if body is None else json.dumps(body))
        value = json.load(connection.getresponse())["value"]
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(f"{path}: {value['message']}")
        return value

    def open(self, url: str) -> None:
        self._call("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str):
        """The value that a piece of JavaScript returns."""
        return self._call("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def upload(self, selector: str, file: str) -> None:
        body = {"using": "css selector", "value": selector}
        element = self._call("POST", f"{self._session}/element", body)[ELEMENT]
        self._call("POST", f"{self._session}/element/{element}/value", {"text": file})

    def close(self) -> None:
        self._call("DELETE", self._session)


def wait_for(condition, seconds: float = 120):
    """The first true value of a condition."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.5)
    raise AssertionError("it did not come true in time")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def page(trained, tmp_path):
    """The address of the page of the shared run."""
    pytest.importorskip("gradio", reason="the demo page needs Gradio")
    port = free_port()
    options = ["--model", str(trained), "--port", str(port)]
    command = [sys.executable, str(ROOT / "examples/demo.py"), *options]
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or listens(port), 240)
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser(tmp_path):
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    port = free_port()
    with open(tmp_path / "driver.txt", "w") as log:
        driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], stdout=log, stderr=log)
    try:
        wait_for(lambda: listens(port), 60)
        browser = Browser(port)
        yield browser
        browser.close()
    finally:
        driver.terminate()
        driver.wait(30)


def test_an_uploaded_image_shows_its_classes_and_the_attention(browser, page, trained, photo):
    browser.open(page)
    selector = "input[type=file]"
    wait_for(lambda: browser.run(f"return document.querySelector({selector!r}) !== null"))
    browser.upload(selector, str(photo))
    wait_for(lambda: browser.run("return document.querySelectorAll('img').length > 0"))
    browser.run(
        "[...document.querySelectorAll('button')].find(b => b.innerText.trim() == 'Submit').click()"
    )
    best = Predictor(trained)([str(photo)], top_k=1)[0][0]
    shown = f"{100 * best.probability:.0f}%"
    wait_for(lambda: shown in browser.run("return document.body.innerText"))
    assert browser.run("return document.querySelector('[data-testid=label-output-value]').innerText"
                       ).strip() == best.name  # fmt: skip
    widths = "return [...document.querySelectorAll('img')].map(i => i.naturalWidth)"
    wait_for(lambda: max(browser.run(widths)) > 800)
