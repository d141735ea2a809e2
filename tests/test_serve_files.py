"""What surrounds the service: the container file, the guide, and bad input from the benchmark, in a smaller number."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import randn, tiny_tokenizer
from PIL import Image
from serve_running import listening, requests, running

from monobath import resources
from monobath.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs/serve.md").read_text(encoding="utf-8")


def test_the_container_does_what_the_guide_says():
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    steps = re.findall(r"^([A-Z]+) (.*)$", text, re.MULTILINE)
    installed = [rest for word, rest in steps if word == "RUN" and rest.startswith("pip")]
    (command,) = [json.loads(rest) for word, rest in steps if word == "CMD"]
    assert len(installed) == 1
    assert f"`{installed[0]}`" in GUIDE
    assert f"`{' '.join(command)}`" in GUIDE
    assert ("EXPOSE", command[-1]) in steps
    for comment in re.findall(r"^#   (podman .*)$", text, re.MULTILINE):
        assert comment in GUIDE
    argument = re.search(r"--build-arg (\w+)=(\S+)", GUIDE)
    assert argument
    assert f"ARG {argument[1]}=" in text
    for word, rest in steps:
        if word == "COPY":
            assert all((ROOT / name).exists() for name in rest.split()[:-1])
    users = [rest for word, rest in steps if word == "USER"]
    assert users, "the service runs as root"


def test_the_guides_clients_work(tmp_path, monkeypatch):
    """Its curl commands and its lines for diffusers, in order."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(resources.sample_paths()[0], "photo.jpg")  # the content decides what it is, not the name
    photo = Image.open("photo.jpg").convert("RGB")
    with running(served={"default": Tokenizer.from_pretrained("default")}) as server:
        text = GUIDE.replace("http://127.0.0.1:8000", server.url)
        commands = re.findall(r"^curl .*$", text, re.MULTILINE)
        assert len(commands) == 4
        for command in commands:
            done = subprocess.run(shlex.split(command), capture_output=True, check=True)
            assert b"detail" not in done.stdout
        (block,) = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        names = {"photo": photo}
        exec(compile(block, "serve.md", "exec"), names)
        assert names["picture"].size == photo.size
    assert Image.open("out.png").size == Image.open("out.jpg").size == photo.size == (256, 256)
    assert "shape: [1, 16, 32, 32]" in Path("headers.txt").read_text()


def test_only_two_modules_know_ray():
    for file in sorted((ROOT / "src/monobath").rglob("*.py")):
        known = re.search(r"^\s*(?:import|from) ray\b", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert not known or file.name == "ray.py", file


def test_a_replica_answers_as_the_one_process_does(tmp_path, monkeypatch):
    """Without a cluster, whose start takes a minute on two cores: `benchmarks/serving.py kill` has one."""
    serve = pytest.importorskip("ray.serve", reason="ray is missing: pip install 'monobath[ray]'")
    from monobath.app.ray import Settings, app, build_replica

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tiny")
    settings = Settings(models=f"tiny={tmp_path / 'tiny'}", max_replicas=3)
    assert inspect.signature(app).parameters["settings"].annotation is Settings  # `serve run` reads it
    options = app(settings)._bound_deployment._deployment_config
    assert (options.autoscaling_config.min_replicas, options.autoscaling_config.max_replicas) == (1, 3)
    replica = SimpleNamespace(_deployment_config=options)
    monkeypatch.setattr(serve, "get_replica_context", lambda: replica)
    cases = [(randn(1, 4, 2, 3, seed=1), 1), (randn(2, 4, 2, 3, seed=2), 2), (randn(1, 4, 3, 2, seed=3), 3)]
    with listening(build_replica(settings, "sesame")) as url, ThreadPoolExecutor(4) as pool:
        address = url.replace("//", "//me:sesame@") + "/decode"

        def ask(z, seed):
            query = {"shape": list(z.shape), "output_type": "pt", "seed": seed}
            return requests.post(address, data=z.numpy().tobytes(), params=query, timeout=30)

        replies = [pool.submit(ask, *case) for case in cases]
        wrong = ask(torch.zeros(1, 5, 2, 3), 0)
        assert requests.get(url + "/models", timeout=30).status_code == 401
        for (z, seed), reply in zip(cases, replies, strict=True):
            assert reply.result().status_code == 200, reply.result().text
            expected = tokenizer.decode(z, seed=[seed] * len(z))
            found = torch.frombuffer(bytearray(reply.result().content), dtype=torch.float32).reshape(expected.shape)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (wrong.status_code, wrong.json()["detail"][:26]) == (400, "latents are (1, 5, 2, 3): ")


def test_mutated_requests_get_an_answer_or_a_message(monkeypatch):
    pytest.importorskip("hypothesis", reason="hypothesis is missing: pip install 'monobath[dev]'")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    check = importlib.import_module("serving").check_mutated
    picture = resources.sample_paths()[0].read_bytes()[:5000]
    with running(served={"default": Tokenizer.from_pretrained("default")}) as server:

        def post(path, body, headers):
            reply = server.post(path, body, headers=headers)
            return reply.status_code, reply.content, {name.lower(): value for name, value in reply.headers.items()}

        statuses = check(post, picture, 250)
    assert {200, 400, 404, 422} <= set(statuses)
    assert max(statuses) < 500
