"""Bulk work on Ray: what a cluster writes, through lost machines and killed drivers, is what one process writes."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from PIL import Image
from test_bulk import contents, encoded

from monobath import Tokenizer, UserError
from monobath.data.bulk_encoding import BulkEncoding, EncodingWork

ray = pytest.importorskip("ray")
pytest.importorskip("pyarrow")
pytest.importorskip("pandas")

from monobath.integrations.ray import Cluster, DecodeLatents, EncodeImages, Measure, run  # noqa: E402

SHARDS = 12


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(2 * SHARDS):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize([(50, 34), (33, 47)][number % 2]).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return tiny_tokenizer()


class Slow(EncodingWork):
    """So that a machine can be lost in the middle."""

    def batches(self, number, report):
        time.sleep(0.3)
        return super().batches(number, report)


def test_a_cluster_that_loses_a_machine_writes_the_same_bytes(tokenizer, photos, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster as Machines

    alone = encoded(tokenizer, photos, tmp_path / "alone", pictures_a_shard=2, batch=32)
    for name, value in (("worker_niceness", "0"), ("USAGE_STATS_ENABLED", "0"), ("BACKEND_LOG_LEVEL", "fatal")):
        monkeypatch.setenv(f"RAY_{name}", value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    others = [machines.add_node(num_cpus=1) for _ in range(2)]
    try:
        ray.init(address=machines.address, log_to_driver=False)
        work = Slow(tokenizer, str(photos), tmp_path / "cluster", BulkEncoding(pictures_a_shard=2))
        seen = []

        def lose_one(report, total):
            seen.append(report.number)
            if len(seen) == 2:
                machines.remove_node(others[0], allow_graceful=False)

        reports = run(work, Cluster(workers=3), lose_one)
        assert sum(report.pictures for report in reports) == 2 * SHARDS
        assert len(machines.list_all_nodes()) == 2
    finally:
        ray.shutdown()
        machines.shutdown()
    assert contents(work.folder.where) == contents(alone)


def test_a_killed_driver_and_the_same_command_again_write_the_same_bytes(tokenizer, photos, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    alone = encoded(tokenizer, photos, tmp_path / "alone", pictures_a_shard=2, batch=32, model=str(tmp_path / "model"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "monobath", "encode-dataset", str(photos), "--out", str(out)]
    command += ["--model", str(tmp_path / "model"), "--shard_pictures", "2", "--workers", "1", "--device", "cpu"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    waiting = time.monotonic() + 200
    while not list(out.glob("done/*.json")) and killed.poll() is None and time.monotonic() < waiting:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{2 * SHARDS}" in done.stdout
    assert contents(out) == contents(alone)


def test_the_callable_classes_on_rows_of_any_size(tokenizer, photos):
    files = sorted(photos.iterdir())[:3]
    rows = {"image": np.array([f.read_bytes() for f in files], dtype=object), "key": np.array([f.stem for f in files])}
    latents = EncodeImages(tokenizer, batch=2)(rows)
    assert latents["latent"].dtype == object
    assert (latents["height"].tolist(), latents["width"].tolist()) == ([34, 47, 34], [50, 33, 50])
    pictures = DecodeLatents(tokenizer, seed=3)(latents)
    assert pictures["key"].tolist() == ["00", "01", "02"]
    originals = [np.array(Image.open(f)) for f in files]
    for image, latent, original in zip(pictures["image"], latents["latent"], originals, strict=True):
        z = torch.from_numpy(latent)[None].float()
        torch.testing.assert_close(z, tokenizer.encode(original).mode(), rtol=1e-3, atol=1e-3)
        alone = tokenizer.decode(z, size=original.shape[:2], seed=[3], output="uint8")[0].permute(1, 2, 0).numpy()
        assert np.abs(image.astype(int) - alone).max() <= 1
    pairs = {"output": pictures["image"], "original": np.array([f.read_bytes() for f in files], dtype=object)}
    measured = Measure(["psnr"])(pairs)
    for figure, image, original in zip(measured["psnr"], pictures["image"], originals, strict=True):
        expected = 10 * np.log10(255**2 / np.square(image.astype(float) - original).mean())
        assert figure == pytest.approx(expected, rel=1e-4)


def test_rows_that_are_no_pictures_say_which_and_grey_ones_are_files_of_the_same(tokenizer):
    encode = EncodeImages(tokenizer)
    grey = np.random.default_rng(0).integers(0, 256, (24, 32), dtype=np.uint8)
    stacked = np.stack([grey] * 3, axis=-1)
    expected = encode({"image": stacked[None]})["latent"]
    for same in (grey, grey[..., None], np.concatenate([stacked, np.full_like(grey, 255)[..., None]], axis=-1)):
        assert np.array_equal(encode({"image": same[None]})["latent"], expected)
    broken = np.array([b"no picture"], dtype=object)
    for rows, message in (
        ({"image": broken, "key": np.array(["a7"])}, "row 0 of a batch, key a7: image is no picture"),
        ({"image": stacked[None] / 255}, "of float64, not uint8"), ({"image": stacked.transpose(2, 0, 1)[None]}, "not"),
        ({"jpg": broken}, "there is no column image, but jpg: rename"), ({"image": [{"bytes": None}]}, "embedded"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            encode(rows)
    file = io.BytesIO()
    np.save(file, np.concatenate([expected[0], np.zeros_like(expected[0])]))
    sides = {"height": np.array([24]), "width": np.array([32])}
    of_parquet = DecodeLatents(tokenizer)({"moments": np.array([file.getvalue()], dtype=object)} | sides)
    assert np.array_equal(of_parquet["image"], DecodeLatents(tokenizer)({"latent": expected} | sides)["image"])


def test_eval_on_ray_gives_the_figures_of_eval(tokenizer, photos, tmp_path):
    from monobath.evaluation.compare import Settings, evaluate
    from monobath.evaluation.metrics import SetMetric
    from monobath.evaluation.results import MetricInfo
    from monobath.evaluation.system import TokenizerSystem
    from monobath.integrations.ray import engine

    tokenizer.save_pretrained(tmp_path / "model")
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    (source / "00-broken.jpg").write_bytes(b"no picture")
    systems = [TokenizerSystem(str(tmp_path / "model"))]
    colours = SetMetric(info=MetricInfo(key="fd_colours", label="FD of colours", details="", kind="set", better="lower",
                                          interval=""), dim=3,
                        features=lambda images, indices: images.float().mean((2, 3))[:, None])  # fmt: skip
    settings = Settings(size=32, metrics=["psnr", colours], batch_size=4, limit=10, keep=2)
    here, kept = evaluate(systems, str(source), settings)
    with engine(Cluster(workers=1)) as measure:
        there, kept_there = evaluate(systems, str(source), dataclasses.replace(settings, engine=measure))
    assert there.names == here.names
    assert there.skipped == here.skipped == 1
    for key, figure in here.systems[0].figures.items():
        assert there.systems[0].figures[key].value == pytest.approx(figure.value, rel=1e-5)
        assert there.systems[0].figures[key].low == pytest.approx(figure.low, rel=1e-4)
    assert kept_there.originals.equal(kept.originals)
