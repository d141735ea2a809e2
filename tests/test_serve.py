"""The HTTP service: its own routes, limits, batches, who may come in, how it starts and stops."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes

import numpy as np
import pytest
import torch
from conftest import randn, tiny_tokenizer
from PIL import Image
from serve_running import Running, picture, png, query, raw, requests, running, wait_for
from test_bad_input import bomb

from monobath import Tokenizer
from monobath.app.protocol import latent_picture
from monobath.app.service import (
    Batcher,
    Full,
    Job,
    Limits,
    Service,
    names_and_sources,
)
from monobath.cli import main
from monobath.errors import UserError

remote = pytest.importorskip("diffusers.utils.remote_utils", reason="diffusers is missing: monobath[diffusers]")


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


# ---- our own routes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["png", "jpg"])
def test_reconstruct(server, image_format):
    image = picture(21, 37)
    reply = server.post("/reconstruct", png(image), {"image_format": image_format})
    assert reply.status_code == 200, reply.text
    tokenizer = server.service.models["plain"]
    posterior = tokenizer.encode(image)
    (expected,) = tokenizer.decode(posterior.mode(), size=posterior.size, output="pil")
    found = Image.open(io.BytesIO(reply.content))
    assert found.size == (37, 21)
    if image_format == "png":
        assert np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    error = np.square(np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)).mean()
    assert float(reply.headers["psnr"]) == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)
    assert float(reply.headers["bits-per-pixel"]) == pytest.approx(4 * 3 * 5 * 16 / (21 * 37), abs=1e-3)


@pytest.mark.parametrize(("model", "sizes"), [("staged", [(8, 6), (16, 12), (32, 24)]), ("plain", [(32, 24)])])
def test_previews_come_coarsest_first(server, model, sizes):
    z = randn(1, 4, 3, 4)
    options = query(z, progressive=True, image_format="png")
    reply = server.post(f"/models/{model}/decode", raw(z), options)
    head = f"Content-Type: {reply.headers['content-type']}\r\n\r\n".encode()
    parts = message_from_bytes(head + reply.content).get_payload()
    images = [Image.open(io.BytesIO(part.get_payload(decode=True))) for part in parts]
    assert [image.size for image in images] == sizes
    tokenizer = server.service.models[model]
    for image, expected in zip(images, tokenizer.decode_progressive(z, output="uint8"), strict=True):
        assert np.abs(np.asarray(image, dtype=int) - expected[0].permute(1, 2, 0).int().numpy()).max() <= 1
    assert server.post(f"/models/{model}/decode", raw(z)[4:], options).status_code == 400
    wait_for(lambda: server.service.taken == 0)


def test_latents_that_are_not_packed_are_cropped_to_the_picture(server):
    z = randn(1, 4, 3, 5)
    reply = server.post("/decode", raw(z), query(z, output_type="pt", height=21, width=37, seed=3))
    assert json.loads(reply.headers["shape"]) == [1, 3, 21, 37]
    expected = server.service.models["plain"].decode(z, size=(21, 37), seed=3)
    found = torch.frombuffer(bytearray(reply.content), dtype=torch.float32).reshape(expected.shape)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_is_served_and_counted(server):
    first, second = server.get("/models").json()
    assert (first["name"], first["previews"], second["name"], second["previews"]) == ("plain", 1, "staged", 3)
    assert (first["latent_channels"], first["factor"]) == (4, 8)
    assert server.get("/health").json() == {"status": "ok"}
    assert server.post("/decode").status_code == 422
    text = server.get("/metrics").text
    assert 'monobath_requests_total{route="/decode",status="422"}' in text
    assert "monobath_batch_samples_bucket" in text
    schema = server.get("/openapi.json").json()
    assert {"/decode", "/encode", "/reconstruct", "/models/staged/decode", "/models", "/health"} <= set(schema["paths"])
    assert server.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("status", "path", "data", "message"),
    [
        (404, "/nothing", b"", "Not Found"),
        (404, "/models/nobody/decode", b"", "Not Found"),
        (422, "/decode", b"", "shape: Field required"),
        (422, "/decode?shape=1&shape=4&shape=1&shape=1&colour=blue", b"", "colour: Extra inputs"),
        (422, "/decode?shape=1&shape=4&shape=1&shape=1&output_type=mp4", b"", "output_type: Input should be 'pil' or"),
        (422, "/decode?shape=1&shape=4&shape=1&shape=1&scaling_factor=0", b"", "scaling_factor is 0: give 1"),
        (422, "/decode?shape=1&shape=4&shape=1&shape=1&scaling_factor=nan", b"", "finite"),
        (422, "/decode?shape=1&shape=4&shape=1", b"", "need height and width"),
        (422, "/decode?shape=1&shape=4&shape=1&shape=1&width=8", b"", "belong together"),
        (400, "/decode?shape=1&shape=4&shape=1&shape=1", b"123", "the body has 3 bytes, but shape=[1, 4, 1, 1] of"),
        (400, "/decode?shape=1&shape=4&shape=1&shape=1", b"\xff" * 16, "NaN or infinity"),
        (400, "/decode?shape=2&shape=4&shape=1&shape=1", bytes(32), "a jpg holds one picture, and these are 2"),
        (400, "/decode?shape=1&shape=4&shape=1&shape=1&height=9&width=8", bytes(16), "does not fit"),
        (400, "/decode?shape=1&shape=4&shape=16&height=9&width=8", bytes(256), "packed latents are (1, 4, 16): a"),
        (400, "/decode?shape=1&shape=4&shape=1&shape=1&steps=9&progressive=True", b"\xff" * 16, "NaN or infinity"),
        (400, "/encode", b"words", "the body is not a picture that can be read"),
        (400, "/encode?shape=1&shape=3&shape=1&shape=1", b"\0\0\xc0\x7f" * 3, "expected [-1, 1]"),
        (413, "/encode", bomb(50_000, 50_000), "max_pixels="),
        (413, "/reconstruct", bomb(3000, 3000), "above max_pixels="),
        (413, "/decode?shape=1&shape=4&shape=16&shape=16&steps=1000", bytes(4096), "in 1000 steps = 16,384,000 pixels"),
    ],
)  # fmt: skip
def test_every_error_is_one_line_of_json(server, status, path, data, message):
    reply = server.post(path, data)
    assert reply.status_code == status, reply.text
    assert list(reply.json()) == ["detail"]
    assert message in reply.json()["detail"]
    assert "\n" not in reply.json()["detail"]


def test_a_fault_of_ours_is_json_too(server, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("secret in /somewhere")

    monkeypatch.setattr(server.service.models["plain"], "decode", broken)
    z = randn(1, 4, 1, 1)
    reply = server.post("/decode", raw(z), query(z))
    assert (reply.status_code, reply.json()) == (500, {"detail": "internal error: the server's log says more"})


# ---- under load -------------------------------------------------------------------------------------------------


def test_many_clients_get_their_own_pictures():
    """Of several shapes, models and batch sizes at once: each as if it were alone."""
    served = {"plain": Tokenizer.from_pretrained("default"), "staged": Tokenizer.from_pretrained("progressive")}
    cases = [(name, randn(b, 16, h, w, seed=i) / 4, i) for i, (name, b, h, w) in enumerate(
        [("plain", 1, 2, 3), ("plain", 2, 2, 3), ("plain", 1, 3, 2), ("staged", 1, 2, 3)] * 6)]  # fmt: skip
    with running(served=served, max_batch=4, max_wait_ms=20) as server:

        def ask(case):
            name, z, seed = case
            reply = server.post(f"/models/{name}/decode", raw(z), query(z, output_type="pt", seed=seed))
            assert reply.status_code == 200, reply.text
            return torch.frombuffer(bytearray(reply.content), dtype=torch.float32)

        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(ask, cases))
        text = server.get("/metrics").text
    for (name, z, seed), pixels in zip(cases, found, strict=True):
        expected = server.service.models[name].decode(z, seed=[seed] * len(z))
        torch.testing.assert_close(pixels.reshape(expected.shape), expected, atol=1e-5, rtol=0)
    batches = float(text.partition("monobath_batch_samples_count ")[2].split()[0])
    assert batches < len(cases), "nothing was batched"


def test_one_bad_request_does_not_spoil_its_batch():
    good, bad = randn(1, 4, 2, 2), torch.full((1, 4, 2, 2), torch.nan)
    service = Service({"plain": tiny_tokenizer()}, Limits())
    jobs = [Job(model="plain", kind="decode", data=z, size=(16, 16)) for z in (good, bad, good)]
    first, second, third = asyncio.run(service.run(jobs))
    assert isinstance(second, UserError)
    expected = service.models["plain"].decode(good)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(third, expected, atol=1e-5, rtol=0)


class Slow:
    """A model that waits until it is let go."""

    def __init__(self, server: Running, monkeypatch) -> None:
        self.begun, self.go, self.calls = threading.Event(), threading.Event(), []
        decode = server.service.models["plain"].decode

        def slowly(z, **options):
            self.calls.append(len(z))
            self.begun.set()
            assert self.go.wait(20)
            return decode(z, **options)

        monkeypatch.setattr(server.service.models["plain"], "decode", slowly)


def test_a_full_house_says_when_to_come_again(monkeypatch):
    z = randn(1, 4, 1, 1)
    with running(max_queue=2) as server, ThreadPoolExecutor(3) as pool:
        slow = Slow(server, monkeypatch)
        waiting = [pool.submit(server.post, "/decode", raw(z), query(z)) for _ in range(2)]
        wait_for(lambda: server.service.taken == 2)
        reply = server.post("/decode", raw(z), query(z))
        assert reply.status_code == 503
        assert int(reply.headers["retry-after"]) >= 1
        slow.go.set()
        assert [future.result().status_code for future in waiting] == [200, 200]
        assert server.post("/decode", raw(z), query(z)).status_code == 200


def test_a_client_that_leaves_frees_its_place(monkeypatch):
    z = randn(1, 4, 1, 1)
    with running(max_queue=8) as server, ThreadPoolExecutor(3) as pool:
        slow = Slow(server, monkeypatch)
        first = pool.submit(server.post, "/decode", raw(z), query(z))
        wait_for(slow.begun.is_set)
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(server.url + "/decode", data=raw(z), params=query(z), timeout=0.3)
        wait_for(lambda: server.service.taken == 1)
        slow.go.set()
        assert first.result().status_code == 200
    assert slow.calls == [1], "the work of a client that had left was done"


def test_requests_have_a_time(monkeypatch):
    z = randn(1, 4, 1, 1)
    with running(timeout=0.3) as server:
        slow = Slow(server, monkeypatch)
        reply = server.post("/decode", raw(z), query(z))
        slow.go.set()
        assert reply.status_code == 503
        assert "longer than timeout=0.3 s" in reply.json()["detail"]
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            answer = b""
            while b"send it again" not in answer:
                answer += connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within timeout=0.3 s" in answer
        wait_for(lambda: server.service.taken == 0)


def test_batches_are_bounded_in_samples_and_pixels():
    async def gather(sizes, **limits):
        seen = []

        async def run(jobs):
            seen.append([job.samples for job in jobs])
            await asyncio.sleep(0.01)
            return [job.samples for job in jobs]

        batcher = Batcher(run, Limits(max_wait_ms=50, **limits), lambda answered: answered < len(sizes))
        jobs = [Job(model="m", kind="decode", data=torch.zeros(n, 4, 1, 1), size=(8, 8)) for n in sizes]
        assert await asyncio.gather(*map(batcher.submit, jobs)) == sizes
        return seen

    assert asyncio.run(gather([1, 1, 1, 1, 1], max_batch=2, max_pixels=10**6)) == [[1, 1], [1, 1], [1]]
    assert asyncio.run(gather([9, 1], max_batch=4, max_pixels=10**6)) == [[9], [1]]
    assert asyncio.run(gather([1, 1, 1], max_batch=8, max_pixels=128)) == [[1, 1], [1]]


def test_places():
    service = Service({}, Limits(max_queue=1))
    with service.place(), pytest.raises(Full), service.place():
        pass
    assert service.taken == 0


# ---- who may come in --------------------------------------------------------------------------------------------


def test_the_token_guards_everything_but_health():
    with running(token="säsam öffne") as server:
        for path in ("/", "/models", "/metrics", "/docs", "/openapi.json"):
            reply = server.get(path)
            assert (reply.status_code, list(reply.json())) == (401, ["detail"])
            assert reply.headers["www-authenticate"].startswith("Basic ")
        assert server.get("/health").status_code == 200
        for wrong in ("Bearer", "Bearer säsam", "Basic x", "Basic eDp5", "säsam öffne", "Bearer \xff"):
            assert server.get("/models", headers={"Authorization": wrong.encode()}).status_code == 401
        right = {"Authorization": "Bearer säsam öffne".encode()}
        assert server.get("/models", headers=right).status_code == 200
        assert server.get("/models", auth=("anybody", "säsam öffne".encode())).status_code == 200
    with running(token="sesame") as server:  # in the address, for diffusers' client
        address = server.url.replace("//", "//me:sesame@") + "/decode"
        assert remote.remote_decode(address, randn(1, 4, 2, 3), do_scaling=False).size == (24, 16)
        with pytest.raises(RuntimeError, match="this server needs its token"):
            remote.remote_decode(server.url + "/decode", randn(1, 4, 2, 3), do_scaling=False)


def test_no_other_origin_is_let_in(server):
    reply = server.get("/models", headers={"Origin": "http://127.0.0.1:1"})
    assert not [name for name in reply.headers if name.lower().startswith("access-control")]


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "set MONOBATH_TOKEN, or add --no_token"),
        (["--port", "{taken}"], "cannot be listened on (Address already in use): choose another port"),
        (["--port", "70000"], "cannot be listened on"),
        (["--model", "no-such-model", "--port", "0"], "no tokenizer 'no-such-model'"),
        (["--model", "default", "x/default"], "'default' is taken"),
        (["--model", "x/a b"], "'a b' is taken or no name for an address; write NAME=x/a b"),
        (["--max_queue", "0"], "max_queue is 0"),
        (["--max_wait_ms", "-1"], "max_wait_ms is -1.0"),
    ],
)
def test_what_is_wrong_with_a_command_is_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.delenv("MONOBATH_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        filled = [argument.format(taken=taken.getsockname()[1]) for argument in arguments]
        assert main(["serve", "--no_page", *filled]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_names():
    assert names_and_sources(["default", "some/where", "mine=runs/x/model"]) == {
        "default": "default", "where": "some/where", "mine": "runs/x/model",
    }  # fmt: skip
    assert next(iter(names_and_sources(None))) == "default"


def test_sigterm_answers_what_is_open_and_leaves_nothing_behind(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "monobath", "serve", "--port", "0", "--model", f"tiny={tmp_path / 'tiny'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("serving tiny at http://127.0.0.1:")
            url = line.split()[-1]
            assert requests.get(url + "/health", timeout=60).status_code == 200
            (folder,) = (tmp_path / "temporary").glob("monobath-*")
            assert folder.stat().st_mode & 0o077 == 0
            uploaded = requests.post(url + "/gradio_api/upload", files={"files": ("a.png", png(picture()))}, timeout=30)
            assert [path for path in folder.rglob("*.png") if path.name == "a.png"], uploaded.text
            page = requests.get(url, timeout=30)
            assert os.path.dirname(os.path.dirname(sys.executable)) not in page.text
            assert str(tmp_path / "tiny") not in page.text
            z = randn(1, 4, 64, 96)
            heart = requests.get(url + "/gradio_api/heartbeat/x", stream=True, timeout=60)  # an open page
            assert next(heart.iter_lines()) == b"data: ALIVE"
            with ThreadPoolExecutor(1) as pool:
                steps = query(z, steps=4, output_type="pt")
                last = pool.submit(requests.post, url + "/decode", data=raw(z), params=steps, timeout=60)
                wait_for(lambda: "in_progress 1.0" in requests.get(url + "/metrics", timeout=30).text)
                process.send_signal(signal.SIGTERM)
                assert last.result().status_code == 200
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert list((tmp_path / "temporary").glob("monobath-*")) == []


# ---- figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_latents_as_a_picture(channels):
    z = randn(1, channels, 3, 5)
    image = latent_picture(z, 8)
    assert image.size == (40, 24)
    assert np.array_equal(np.asarray(image), np.asarray(latent_picture(z, 8)))
    assert np.asarray(latent_picture(torch.zeros(1, channels, 3, 5), 8)).std() == 0
