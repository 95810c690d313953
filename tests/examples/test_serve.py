"""The HTTP service, run as a program."""

import http.client
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from src.data.samples import write_samples
from src.deploy import Predictor
from tests.conftest import ROOT


def post(port: int, content: bytes, top_k: int = 2):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/classify?top_k={top_k}", content)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    """The example's port; the model is the checkpoint of the shared run."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "log.txt", "w") as log:
        program, model = ROOT / "examples/serve.py", trained / "checkpoints/best.ckpt"
        command = [sys.executable, str(program), f"--model={model}", f"--port={port}"]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert process.poll() is None, (folder / "log.txt").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield port
        assert process.poll() is None, (folder / "log.txt").read_text()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("digits"))


def test_an_image_is_classified_over_http(server, trained, digits):
    digit = digits[3]
    found = post(server, digit.read_bytes())
    expected = Predictor(trained / "checkpoints/best.ckpt")([digit], top_k=2)[0]
    assert [each["name"] for each in found] == [each.name for each in expected]
    assert found[0]["probability"] == pytest.approx(expected[0].probability, abs=1e-4)
    with pytest.raises(urllib.error.HTTPError, match="422"):
        post(server, b"no image")
    assert len(post(server, digit.read_bytes())) == 2, "a bad image must not end the service"


@pytest.mark.parametrize("top_k", [0, -1, 10**9])
def test_a_number_of_classes_that_makes_no_sense_is_refused(server, digits, top_k):
    with pytest.raises(urllib.error.HTTPError, match="422"):
        post(server, digits[0].read_bytes(), top_k)


def test_eight_clients_at_once(server, digits):
    contents = [digit.read_bytes() for digit in digits[:8]]
    alone = [post(server, content) for content in contents]
    with ThreadPoolExecutor(8) as clients:
        together = list(clients.map(lambda k: post(server, contents[k % 8]), range(80)))
    assert together == alone * 10


def unfinished_request(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/classify")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"half")
    return connection


def test_requests_beyond_the_limit_are_turned_away_and_connections_are_not(server, digits):
    content = digits[0].read_bytes()
    idle = [socket.create_connection(("127.0.0.1", server)) for _ in range(40)]
    assert len(post(server, content)) == 2
    requests = [unfinished_request(server) for _ in range(31)]
    time.sleep(0.5)
    assert len(post(server, content)) == 2, "the thirty-second"
    requests.append(unfinished_request(server))
    time.sleep(0.5)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        post(server, content)
    for each in (*idle, *requests):
        each.close()
    time.sleep(0.5)
    assert len(post(server, content)) == 2


def test_a_large_body_is_not_read_to_its_end(server, digits):
    """A request that declares a gigabyte gets status 413 after the first ten megabytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=60)
    connection.putrequest("POST", "/classify")
    connection.putheader("Content-Length", str(10**9))
    connection.endheaders()
    try:
        for _ in range(40):
            connection.send(bytes(1 << 20))
    except OSError:
        pass  # it has closed the connection
    answer = connection.sock.recv(100) if connection.sock else b""
    assert b"413" in answer
    connection.close()
    assert len(post(server, digits[0].read_bytes())) == 2


def test_an_image_with_too_many_pixels(server, tmp_path):
    """A small file that would take gigabytes when decoded."""
    Image.new("1", (9_000, 9_000)).save(tmp_path / "big.png")
    start = time.monotonic()
    with pytest.raises(urllib.error.HTTPError, match="422"):
        post(server, (tmp_path / "big.png").read_bytes())
    assert time.monotonic() - start < 2


def test_a_missing_model_is_one_line(run_here):
    pytest.importorskip("fastapi")
    done = run_here("examples/serve.py", "--model=none.mindir")
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.mindir: no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_weights_without_a_config_take_a_recipe(run_here, tmp_path):
    """The message asked for --config, which the program did not have."""
    pytest.importorskip("fastapi")
    (tmp_path / "alone.safetensors").write_bytes(
        (ROOT / "pretrained/cvt_nano_cifar10/model.safetensors").read_bytes()
    )
    words = ("examples/serve.py", "--model=alone.safetensors")
    assert "give its recipe with --config" in run_here(*words).stderr
    done = run_here(*words, "--config=none.yaml")
    assert "none.yaml: No such file" in done.stderr
