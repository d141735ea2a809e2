"""Laws of bulk encoding and decoding: a shard's result is a function of the shard, whoever makes it and how often."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from filelock import FileLock
from PIL import Image
from test_training import rows, tiny_recipe

from monobath import Tokenizer, UserError
from monobath.cli import main
from monobath.data import Crops, LatentDataset, PhotoDataset
from monobath.data.bulk import claimed, finish, in_buckets, run_shard
from monobath.data.bulk_decoding import BulkDecoding, DecodingWork
from monobath.data.bulk_encoding import BulkEncoding, EncodingWork
from monobath.data.cache_shards import read_samples
from monobath.data.encoding import Caching, cache_latents
from monobath.data.shards import find_shards, read_pictures
from monobath.training import train
from monobath.training.config import LossConfig

SIZES = [(50, 34), (33, 47), (40, 40), (64, 32), (47, 33), (40, 40), (50, 34)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "photos"
    rng = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        file = folder / f"{number % 2}/p{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(size).save(file)
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return tiny_tokenizer()


def encoded(tokenizer, source, out: Path, **how) -> Path:
    work = EncodingWork(tokenizer, str(source), out, BulkEncoding(**({"pictures_a_shard": 3, "batch": 2} | how)))
    with claimed(work) as missing:
        for number in missing:
            report = run_shard(work, number)
            if report.error:
                raise UserError(report.error)
        finish(work)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def as_tar(photos: Path, out: Path) -> Path:
    with tarfile.open(out, "w") as tar:
        for file in sorted(photos.rglob("*.png")):
            tar.add(file, file.relative_to(photos).as_posix())
    return out


def as_parquet(photos: Path, out: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files = sorted(photos.rglob("*.png"))
    rows = [{"id": f.stem, "image": {"bytes": f.read_bytes(), "path": f.name}, "label": n} for n, f in enumerate(files)]
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out


# ---- what is written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tar", "parquet"])
def test_whole_pictures_of_any_size_are_what_the_tokenizer_makes_of_each(tokenizer, photos, tmp_path, layout):
    out = encoded(tokenizer, photos, tmp_path / "out", layout=layout)
    stored = [sample for path in sorted(out.glob("latents-*")) for sample in read_samples(path)]
    files = sorted(photos.rglob("*.png"), key=lambda f: f.relative_to(photos).as_posix())
    assert [sample.key for sample in stored] == [f.relative_to(photos).with_suffix("").as_posix() for f in files]
    for sample, file in zip(stored, files, strict=True):
        with Image.open(file) as picture:
            posterior = tokenizer.encode(picture)
            assert (sample.facts["width"], sample.facts["height"]) == picture.size
        moments = torch.from_numpy(np.load(io.BytesIO(sample.arrays)))
        expected = torch.cat([posterior.mean, posterior.logvar], 1)[0]
        torch.testing.assert_close(moments, expected.half(), rtol=1e-3, atol=1e-3)

    work = DecodingWork(tokenizer, out, tmp_path / "back", BulkDecoding(seed=3, batch=2))
    with claimed(work) as missing:
        assert not any(run_shard(work, number).error for number in missing)
        finish(work)
    pictures = [member for path in sorted(work.folder.where.glob("*.tar")) for member in pictures_in(path)]
    for pixels, sample in zip(pictures, stored, strict=True):
        z = torch.from_numpy(np.load(io.BytesIO(sample.arrays)))[None, :4].float()
        size = (sample.facts["height"], sample.facts["width"])
        alone = tokenizer.decode(z, size=size, seed=[3], output="uint8")[0].permute(1, 2, 0).numpy()
        assert np.abs(pixels.astype(int) - alone).max() <= 1  # batches round otherwise


def pictures_in(path: Path) -> list[np.ndarray]:
    with tarfile.open(path) as tar:
        return [np.array(Image.open(tar.extractfile(m))) for m in tar if m.name.endswith(".png")]  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["tar", "parquet"])
@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_crops_are_those_of_training(tokenizer, photos, tmp_path, kind, layout):
    """Items of the data set are those of `PhotoDataset` with the moments of `cache_latents`, whatever lies between."""
    crops = Crops(size=32, scale=(32, 40), seed=5)
    source = {"folder": photos}.get(kind) or (as_tar if kind == "tar" else as_parquet)(photos, tmp_path / f"in.{kind}")
    out = encoded(tokenizer, source, tmp_path / "out", crops=crops, copies=2, layout=layout)
    cache_latents(tokenizer, photos, tmp_path / "cache", crops, Caching(copies=2))
    ours, cached, live = LatentDataset(out), LatentDataset(tmp_path / "cache"), PhotoDataset(photos, crops)
    assert len(ours) == len(live) == len(SIZES)
    for epoch in range(3):
        for index in (0, 3, 6):
            found, before = ours[epoch, index], cached[epoch, index]
            assert found["image"].equal(live[epoch % 2, index]["image"])  # type: ignore[index]
            torch.testing.assert_close(found["moments"], before["moments"], rtol=1e-3, atol=1e-3)


def test_training_from_it_is_training_from_pictures(tokenizer, photos, tmp_path):
    tokenizer.save_pretrained(tmp_path / "base")
    trained = []
    for latents in (False, True):
        recipe = tiny_recipe(tmp_path / f"run-{latents}", photos, steps=3, batch_size=2)
        recipe.model, recipe.init = tokenizer.config, str(tmp_path / "base")
        recipe.loss = LossConfig(perceptual=0.0, kl=0.0)
        recipe.training.train_encoder = False
        if latents:
            crops = Crops(size=recipe.data.size, scale=tuple(recipe.data.scale), seed=recipe.training.seed)
            recipe.data.source = [str(encoded(tokenizer, photos, tmp_path / "out", crops=crops, layout="parquet"))]
            recipe.data.latents = True
        train(recipe)
        trained.append([row["loss"] for row in rows(Path(recipe.run)) if "loss" in row])
    assert len(trained[0]) == 3  # less than an epoch of seven pictures
    assert trained[1] == pytest.approx(trained[0], rel=2e-3)  # half precision


def test_labels_are_kept(tokenizer, photos, tmp_path):
    crops = Crops(size=32, scale=(32, 32))
    for source, expected in (
        (photos, [0, 0, 0, 0, 1, 1, 1]),
        (as_parquet(photos, tmp_path / "p.parquet"), [*range(7)]),
    ):
        out = encoded(tokenizer, source, tmp_path / f"of-{source.name}", crops=crops, labels=True)
        data = LatentDataset(out)
        assert [data[i]["label"] for i in range(7)] == expected
        assert data.labels == sorted(set(expected))


def test_other_programs_read_it(tokenizer, photos, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    wds = pytest.importorskip("webdataset")
    crops = Crops(size=32, scale=(32, 32))
    tar = encoded(tokenizer, photos, tmp_path / "tar", crops=crops)
    found = list(wds.WebDataset([str(p) for p in sorted(tar.glob("*.tar"))], shardshuffle=False).decode("rgb8"))
    parquet = encoded(tokenizer, photos, tmp_path / "parquet", crops=crops, layout="parquet")
    table = pq.read_table(sorted(parquet.glob("*.parquet")))
    assert [row["__key__"] for row in found] == table["key"].to_pylist()
    assert found[0]["moments.npy"].shape == (8, 4, 4)
    assert np.array_equal(found[0]["webp"], np.array(Image.open(io.BytesIO(table["image"][0].as_py()["bytes"]))))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert set(features) == set(table.schema.names)


# ---- exactly once -----------------------------------------------------------------------------------------------


def test_bytes_do_not_depend_on_interruption_order_or_repetition(tokenizer, photos, tmp_path):
    whole = contents(encoded(tokenizer, photos, tmp_path / "whole"))
    work = EncodingWork(tokenizer, str(photos), tmp_path / "parts", BulkEncoding(pictures_a_shard=3, batch=2))
    with claimed(work) as missing:
        assert missing == [0, 1, 2]
        first = run_shard(work, 2)
        assert run_shard(work, 2).again  # another worker was given it too
        (work.folder.where / "partial" / "left.tar").write_bytes(b"half a shard")
    assert not (work.folder.where / "latents-000000.tar").exists()
    with claimed(work) as missing:
        assert missing == [0, 1]
        (work.folder.where / "done/000002.json").unlink()  # killed between the shard and its report: it is made again
    with claimed(work) as missing:
        assert missing == [0, 1, 2]
        for number in reversed(missing):
            run_shard(work, number)
        reports = finish(work)
    assert reports[2].pictures == first.pictures == 1
    assert contents(work.folder.where) == whole
    with claimed(work) as missing:
        assert missing == []
        assert finish(work) == []


def test_a_shard_is_read_while_another_is_in_the_network(tokenizer, photos, tmp_path):
    whole = contents(encoded(tokenizer, photos, tmp_path / "whole"))
    read = [threading.Event() for _ in range(3)]

    class Watched(EncodingWork):
        def batches(self, number, report):
            yield from super().batches(number, report)
            read[number].set()

        def results(self, batch, report):
            assert read[1].wait(30), "the other shard is not read before this one has left the network"
            return super().results(batch, report)

    work = Watched(tokenizer, str(photos), tmp_path / "out", BulkEncoding(pictures_a_shard=3, batch=2))
    turn = threading.Lock()
    with claimed(work) as missing, ThreadPoolExecutor(2) as pool:
        assert not any(report.error for report in pool.map(lambda n: run_shard(work, n, turn), missing))
        finish(work)
    assert contents(tmp_path / "out") == whole


def test_batches_are_bounded_and_lose_nothing():
    sides = [(512, 512), (2048, 1024), (64, 96)] * 20
    batches = list(in_buckets(sides, lambda side: side, 4))
    assert sorted(number for batch in batches for number, _ in batch) == list(range(60))
    for batch in batches:
        assert len({side for _, side in batch}) == 1
        assert len(batch) == 1 or sum(h * w for _, (h, w) in batch) <= 4 * 512**2
        assert [number for number, _ in batch] == sorted(number for number, _ in batch)


# ---- mistakes ---------------------------------------------------------------------------------------------------


def test_broken_pictures_are_listed(tokenizer, photos, tmp_path):
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    (source / "0/a-broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (50, 4)).save(source / "1/z-tiny.png")
    out = encoded(tokenizer, source, tmp_path / "out")
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(Path(row["picture"]).name, row["reason"]) for row in listed] == [
        ("a-broken.jpg", "unreadable"), ("z-tiny.png", "tiny")
    ]  # fmt: skip
    assert json.loads((out / "latents.json").read_text())["counts"] == [2, 3, 2]


@pytest.mark.parametrize(("change", "message"), [
    ({"tokenizer": tiny_tokenizer(1)}, "encoder_sha256 .* instead of"), ({"batch": 3}, "batch 3 instead of 2"),
    ({"threads": 2}, "threads 2 instead of 1"),
])  # fmt: skip
def test_another_encoder_or_setting_is_refused(tokenizer, photos, tmp_path, change, message):
    encoded(tokenizer, photos, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        encoded(change.pop("tokenizer", tokenizer), photos, tmp_path, **change)
    assert contents(tmp_path) == before


def test_a_second_driver_is_refused(tokenizer, photos, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="is being written by another command"):
        encoded(tokenizer, photos, tmp_path)


def test_sources_that_cannot_be(tokenizer, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    tarfile.open(tmp_path / "empty.tar", "w").close()
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a.png", "a.b.png"):
        shutil.copy(photos / "0/p0.png", twice / name)
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.add(photos / "0/p0.png", "a.png")
    (tmp_path / "cut.tar").write_bytes(as_tar(photos, tmp_path / "whole.tar").read_bytes()[:1500])
    for name, message in [
        ("empty", "no pictures found in"), ("empty.tar", "there is no picture in"), ("absent", "does not exist"),
        ("twice", "the key a comes twice"), ("twice.tar", "the key a comes twice"), ("cut.tar", "cannot be read"),
        ("file://" + str(tmp_path / "absent.tar"), "absent.tar is not there"), ("nowhere://x/y.tar", "nowhere"),
    ]:  # fmt: skip
        source = name if "://" in name else tmp_path / name
        with pytest.raises(UserError, match=message):
            encoded(tokenizer, source, tmp_path / "out")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_source_that_vanishes_is_one_line_and_costs_nothing(tokenizer, photos, tmp_path):
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    work = EncodingWork(tokenizer, str(source), tmp_path / "out", BulkEncoding(pictures_a_shard=3, batch=2))
    with claimed(work) as missing:
        run_shard(work, missing[0])
        shutil.rmtree(source)
        assert "is not there: check the source" in run_shard(work, missing[1]).error
    assert [p.name for p in work.folder.where.glob("latents-*")] == ["latents-000000.tar"]
    shutil.copytree(photos, source)
    assert contents(encoded(tokenizer, source, work.folder.where)).keys() >= {"latents-000002.tar", "skipped.jsonl"}


def test_urls_are_sources_too(photos, tmp_path):
    as_tar(photos, tmp_path / "a-0.tar")
    as_parquet(photos, tmp_path / "b.parquet")
    local = [raw.data for raw in read_pictures(find_shards(str(photos))[0])]
    for url in (f"file://{photos}", f"file://{tmp_path}/a-{{0..0}}.tar", f"file://{tmp_path}/*.parquet"):
        (shard,) = find_shards(url)
        assert [raw.data for raw in read_pictures(shard)] == local, url


def test_whole_pictures_are_not_for_training(tokenizer, photos, tmp_path, capsys):
    out = encoded(tokenizer, photos, tmp_path / "out")
    with pytest.raises(UserError, match="holds latents of whole pictures"):
        LatentDataset(out)
    other = tmp_path / "other"
    tiny_tokenizer(1).save_pretrained(other)
    assert main(["decode-dataset", str(out), "--out", str(tmp_path / "back"), "--model", str(other)]) == 2
    assert "choose a model that shares it" in capsys.readouterr().err


def test_frechet_sums_do_not_grow_with_the_pictures():
    from monobath.evaluation.frechet import HalfSampled

    def held(sums: HalfSampled) -> int:
        return sum(t.nbytes for part in (sums.whole, *sums.halves) for t in (part.count, part.total, part.outer))

    sums = HalfSampled(8)
    empty = held(sums)
    for start in range(0, 50_000, 5000):
        sums.update(torch.randn(5000, 2, 8), range(start, start + 5000))
    assert held(sums) == empty
    assert int(sums.whole.count) == 100_000
