"""The served example of docs/deploy.md, as it is printed there."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from src.data.samples import write_samples
from src.deploy import Predictor
from tests.conftest import ROOT


def post(port: int, content: bytes):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/classify?top_k=2", content)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_an_image_is_classified_over_http(trained, tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    page = (ROOT / "docs/deploy.md").read_text()
    code = re.search(r"```python\n(import sys\n.*?)```", page, re.S)[1]
    (tmp_path / "serve.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    weights = trained / "checkpoints/best.ckpt"
    digit = write_samples(tmp_path / "digits")[3]
    with open(tmp_path / "log.txt", "w") as log:
        command = [sys.executable, "serve.py", str(weights), str(port)]
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log.txt").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.5)
        found = post(port, digit.read_bytes())
        expected = Predictor(weights)([digit], top_k=2)[0]
        assert [each["name"] for each in found] == [each.name for each in expected]
        assert found[0]["probability"] == pytest.approx(expected[0].probability, abs=1e-4)
        with pytest.raises(urllib.error.HTTPError, match="422"):
            post(port, b"no image")
        assert len(post(port, digit.read_bytes())) == 2, "it goes on after a bad image"
    finally:
        server.terminate()
        server.wait(30)
