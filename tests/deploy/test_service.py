"""The service: what it answers, what it refuses, and that a crowd gets right answers or status 429."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from certipatch.certification.certify import certify
from certipatch.certification.restore import read_certification, restore
from certipatch.cli.serve import about
from certipatch.data.load import load_source
from certipatch.deploy.predictor import Predictor
from certipatch.geometry.masks import MaskSet
from certipatch.models.runs import open_run
from certipatch.records.read import read_records
from certipatch.runtime.devices import make_fabric
from inputs import refused

fastapi = pytest.importorskip("fastapi", reason="needs the extra serve")
from starlette.testclient import TestClient  # noqa: E402

from certipatch.deploy.service import Limits, service  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = "http://127.0.0.1:8000"
MASKS = MaskSet.covering(image_size=(32, 32), patch_size=(16, 16), masks_per_axis=3)


@pytest.fixture(scope="module")
def certified(trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, fabric = tmp_path_factory.mktemp("serve") / "c", make_fabric(device="cpu")
    certify(open_run(trained), load_source(str(photos)), MASKS, out, fabric=fabric, data="photos", prove=True)
    return out


@pytest.fixture(scope="module")
def predictor(trained: Path, certified: Path) -> Predictor:
    manifest, opened = read_certification(certified), open_run(trained)
    defense = restore(manifest, opened, make_fabric(device="cpu"))
    return Predictor.of(opened.spec, defense, manifest.rounding)


def client(predictor, certified: Path, limits: Limits, base_url: str = HERE) -> TestClient:
    app = service(predictor, about(certified), limits, {"127.0.0.1", "localhost"})
    return TestClient(app, base_url=base_url)


@pytest.fixture(scope="module")
def calling(predictor: Predictor, certified: Path) -> Iterator[TestClient]:
    with client(predictor, certified, Limits(bytes=100_000)) as found:
        while found.get("/health").status_code == 503:
            pass
        yield found


def test_answers_and_proofs_are_those_of_the_records(calling: TestClient, photos: Path, certified: Path):
    proven = Counter()
    for record in read_records(certified):
        data = (photos / record.name).read_bytes()
        found = calling.post("/predict", content=data).json()
        assert (found["label"], found["case"]) == (record.defended_label, record.case)
        assert found["pixels"] == record.pixels
        assert len(found["one_mask"]) == len(MASKS)
        assert "unchangeable" not in found
        proof = calling.post("/prove", content=data).json()
        assert proof["unchangeable"] == (record.unchangeable and record.margin >= proof["min_margin"])
        assert (proof["failing_pair"] is None) == bool(record.unchangeable)
        proven[proof["unchangeable"]] += 1
    assert min(proven[True], proven[False]) > 0


def test_what_is_known_of_the_model(calling: TestClient, certified: Path):
    found = calling.get("/about").json()
    certificates = sum(record.certified and record.margin >= 1e-3 for record in read_records(certified))
    assert found["certified_robust_accuracy"]["count"] == certificates
    assert found["proven_answers"]["wrong"]["count"] == 0
    assert (found["patch_size"], found["image_size"]) == ([16, 16], [32, 32])
    assert len(found["windows"]) == len(MASKS)
    assert found["classes"] == ["blue", "green", "red"]
    assert "12,400,006" in found["patents"]
    assert calling.get("/health").json() == {"ready": True, "waiting": 0}


def bomb() -> bytes:
    """A small file of 200 million pixels."""
    data = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 422, "the file is empty"),
        (b"no image at all", 422, "not an image of a known format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), 422, "cannot be read"),
        (bytes(100_001), 413, "at most 100000 bytes"),
    ],
)
@pytest.mark.parametrize("route", ["/predict", "/prove"])
def test_bodies_that_are_no_image(calling: TestClient, route: str, body: bytes, status: int, words: str):
    answer = calling.post(route, content=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_a_bomb_and_a_body_without_a_stated_length(calling: TestClient):
    answer = calling.post("/predict", content=bomb())
    assert answer.status_code == 422
    assert "DecompressionBomb" in answer.json()["error"]

    def pieces():
        for _ in range(200):
            yield bytes(1000)

    answer = calling.post("/predict", content=pieces())
    assert answer.status_code == 413
    assert "found more" in answer.json()["error"]


def test_pages_of_other_sites_and_other_names_are_refused(calling: TestClient, predictor, certified: Path):
    """DNS rebinding, and a page elsewhere that posts to the user's own machine."""
    elsewhere = {"Origin": "https://evil.example"}
    assert calling.post("/predict", content=b"x", headers=elsewhere).status_code == 403
    assert calling.get("/about", headers={"Host": "evil.example:8000"}).status_code == 403
    assert calling.get("/about", headers={"Origin": HERE}).status_code == 200
    policy = calling.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy


def test_without_proofs(predictor, certified: Path, photos: Path):
    with client(predictor, certified, Limits(prove=False)) as calling:
        assert calling.get("/about").json()["proofs"] is False
        assert calling.post("/prove", content=b"x").status_code == 404


class Slow:
    """A model that answers when it is told to."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.go, self.seen = predictor, threading.Event(), 0

    def __getattr__(self, name: str):
        return getattr(self.predictor, name)

    def look(self, pixels, *, prove: bool):
        self.seen += 1
        if self.seen > 1:  # the first is the warming up
            assert self.go.wait(30)
        return self.predictor.look(pixels, prove=prove)


def test_a_full_queue_says_so_at_once(predictor, certified: Path, photos: Path):
    slow, data = Slow(predictor), (photos / "red" / "0.png").read_bytes()
    with client(slow, certified, Limits(queue=2)) as calling, ThreadPoolExecutor(3) as pool:
        while calling.get("/health").status_code == 503:
            pass
        waiting = [pool.submit(calling.post, "/predict", content=data) for _ in range(2)]
        while calling.get("/health").json()["waiting"] < 2:
            pass
        answer = calling.post("/predict", content=data)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        slow.go.set()
        assert [one.result().json()["class"] for one in waiting] == ["red", "red"]
        assert calling.get("/health").json()["waiting"] == 0


@pytest.fixture(scope="module")
def running(trained: Path, certified: Path) -> Iterator[str]:
    """``certipatch serve`` in a process of its own, on a free port."""
    command = ["serve", "--model", str(trained), "--certified", str(certified), "--port", "0", "--queue", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "certipatch", *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    yield address
    process.terminate()
    assert process.wait(20) in (0, -15)
    process.stdout.close()


def post(address: str, data: bytes) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data=data), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_crowd(running: str, photos: Path, certified: Path):
    """200 requests from 8 clients: each gets its image's own answer, or is told to come again and does."""
    while post(f"{running}/predict", b"")[0] == 503:
        pass
    records = read_records(certified)
    tries = Counter()

    def ask(number: int) -> bool:
        record = records[number % len(records)]
        data = (photos / record.name).read_bytes()
        while True:
            status, found = post(f"{running}/predict", data)
            tries[status] += 1
            if status != 429:
                return (found.get("label"), found.get("pixels")) == (record.defended_label, record.pixels)

    with ThreadPoolExecutor(8) as clients:
        assert all(clients.map(ask, range(200)))
    assert tries[200] == 200
    assert set(tries) <= {200, 429}


def test_command_line_errors(cli, trained: Path, certified: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(cli("serve", model=trained, certified=certified, port=port), f"port {port}", "choose another")
    refused(cli("serve", model=trained, certified=trained, port=0), "expected records of certify")
    monkeypatch.delitem(sys.modules, "certipatch.deploy.service")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    done = cli("serve", model=trained, certified=certified, port=0)
    refused(done, "expected the extra serve", "no fastapi", "certipatch[serve]", code=3)


def test_a_folder_certified_for_another_model(cli, trained: Path, photos: Path, tmp_path: Path):
    import safetensors.torch

    weights = safetensors.torch.load_file(trained / "model.safetensors")
    weights["13.bias"] += 1
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    other = {"model": "small-cnn", "weights": tmp_path / "w.safetensors"}
    done = cli("certify", **other, data=photos, patch=5, masks_per_axis=2, limit=3, out=tmp_path / "c")
    assert done.code == 0, done.err
    refused(cli("serve", model=trained, certified=tmp_path / "c", port=0), "is of another model", "weights")
