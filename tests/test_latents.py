"""Laws of latent statistics and of cached latents: the same numbers as the encoder run live, in the same order."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import losses_of, rand_images, randn, tiny_tokenizer
from PIL import Image
from test_training import same, tiny_recipe, weights

from monobath import Tokenizer, UserError
from monobath.data import (
    Crops,
    LatentDataset,
    PhotoDataset,
    encoding,
    find_samples,
    iterate_eval,
    make_dataset,
    make_loader,
    statistics,
)
from monobath.data.cache import check_encoder
from monobath.data.cache_shards import Stored, npy, write_samples
from monobath.data.encoding import Caching, cache_latents
from monobath.data.statistics import LatentMoments, latent_statistics, store_statistics
from monobath.images import to_float
from monobath.models.encoder import Posterior
from monobath.models.identity import weights_sha256
from monobath.tokenizer import SamplerConfig, TokenizerConfig
from monobath.training import Interrupted, Run, train
from monobath.training.config import LossConfig, TimesConfig
from monobath.training.objectives.base import AutoencoderObjective, Draws

SIZE = 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Nine pictures of several sizes, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(50, 34), (33, 47), (40, 40), (64, 32)] * 2):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"p{number}.png")
    (folder / "p3-broken.jpg").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    return tiny_tokenizer()


def cached(tokenizer: Tokenizer, photos: Path, out: Path, **changes) -> Path:
    crops = {"size": SIZE, "scale": (SIZE, 40), "seed": 5}
    crops |= {name: changes.pop(name) for name in [*changes] if name in Crops.__dataclass_fields__}
    options = Caching(**({"copies": 3, "batch_size": 4} | changes))
    cache_latents(tokenizer, photos, out, Crops(**crops), options)
    return out


@pytest.fixture(scope="module")
def cache(tokenizer, photos, tmp_path_factory) -> Path:
    return cached(tokenizer, photos, tmp_path_factory.mktemp("cache") / "latents", shard_mb=0.1)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ---- statistics -------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_posterior_samples():
    """E[z] and Var[z] against a great many samples, and in one pass as in one go."""
    generator = torch.Generator().manual_seed(1)
    means = 3 + 2 * torch.randn(40, 3, 4, 5, generator=generator) * torch.tensor([1.0, 2.0, 0.5])[None, :, None, None]
    logvar = torch.randn(40, 3, 4, 5, generator=generator)
    sums = LatentMoments()
    for part in torch.cat([means, logvar], 1).split([1, 7, 32]):
        sums.add(Posterior(part, (32, 40)))
    found = sums.result()
    draws = means + (0.5 * logvar).exp() * torch.randn(2000, *means.shape, generator=generator)
    channels = draws.transpose(0, 2).flatten(1).double()
    assert found.pictures == 40
    torch.testing.assert_close(torch.tensor(found.mean), channels.mean(1).float(), rtol=0, atol=5e-3)
    torch.testing.assert_close(torch.tensor(found.std), channels.std(1).float(), rtol=3e-3, atol=0)
    assert found.overall_mean == pytest.approx(channels.mean().item(), abs=5e-3)
    assert found.overall_std == pytest.approx(channels.std().item(), rel=3e-3)
    exact = (means.double().transpose(0, 1).flatten(1).var(1, correction=0)
             + logvar.double().exp().transpose(0, 1).flatten(1).mean(1)).sqrt()  # fmt: skip
    torch.testing.assert_close(torch.tensor(found.std, dtype=torch.float64), exact, rtol=1e-12, atol=0)


def test_statistics_survive_a_mean_far_from_zero():
    """Float32 sums of squares would lose a spread of 1 at a mean of 10 000."""
    sums = LatentMoments()
    for seed in range(50):
        means = 10_000 + randn(4, 2, 8, 8, seed=seed).double()
        moments = torch.cat([means, torch.full_like(means, -30.0)], 1)
        posterior = Posterior(moments, (64, 64))
        posterior.mean = means
        sums.add(posterior)
    assert sums.result().std == pytest.approx([1.0, 1.0], rel=0.02)


def test_statistics_of_pictures_do_not_depend_on_the_batches(tokenizer, photos):
    found = [latent_statistics(tokenizer, photos, size=28, batch_size=size) for size in (1, 3, 16)]
    assert found[0].pictures == 8
    for other in found[1:]:
        np.testing.assert_allclose(other.mean, found[0].mean, rtol=1e-5)
        np.testing.assert_allclose(other.std, found[0].std, rtol=1e-5)
    batch = torch.cat(
        [part["image"] for part in iterate_eval(make_dataset(photos, Crops(size=28, augment=False)), batch_size=8)]
    )
    posterior = tokenizer.encode(batch)
    np.testing.assert_allclose(found[0].mean, posterior.mean.mean((0, 2, 3)), rtol=1e-4)
    variance = posterior.mean.var((0, 2, 3), correction=0) + posterior.std.square().mean((0, 2, 3))
    np.testing.assert_allclose(found[0].std, variance.sqrt(), rtol=1e-4)
    assert latent_statistics(tokenizer, photos, size=28, limit=2).pictures == 2


def test_statistics_that_cannot_be():
    with pytest.raises(UserError, match="no picture"):
        LatentMoments().result()
    for value in (0.0, float("nan")):
        sums = LatentMoments()
        posterior = Posterior(torch.full((2, 8, 1, 1), value), (8, 8))
        posterior.logvar = torch.full((2, 4, 1, 1), -float("inf"))
        sums.add(posterior)
        with pytest.raises(UserError, match="cannot be scaled"):
            sums.result()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_stored_and_nothing_else_changes(tokenizer, photos, tmp_path, dtype):
    tokenizer.save_pretrained(tmp_path / "a", dtype=dtype, extra={"step": 7})
    statistics = latent_statistics(tokenizer, photos, size=SIZE)
    store_statistics(str(tmp_path / "a"), statistics, tmp_path / "b", size=SIZE)
    store_statistics(str(tmp_path / "a/model.safetensors"), statistics, tmp_path / "c", size=SIZE)
    before = contents(tmp_path / "a")
    for name in ("b", "c"):
        loaded = Tokenizer.from_pretrained(tmp_path / name)
        config = loaded.config
        assert config.shift_factor == statistics.overall_mean
        assert config.scaling_factor == 1 / statistics.overall_std
        assert (config.latent_mean, config.latent_std) == (statistics.mean, statistics.std)
        kept = dataclasses.replace(config, shift_factor=0.0, scaling_factor=1.0, latent_mean=[], latent_std=[])
        assert kept == tokenizer.config
        training = json.loads((tmp_path / name / "config.json").read_text())["training"]
        assert training == {"step": 7, "latent_statistics": {"pictures": 8, "size": SIZE}}
        x = rand_images(1, 3, 16, 24)
        assert torch.equal(loaded(x), Tokenizer.from_pretrained(tmp_path / "a")(x))
        assert abs((tmp_path / name / "model.safetensors").stat().st_size - len(before["model.safetensors"])) < 2000
    assert contents(tmp_path / "a") == before
    store_statistics(str(tmp_path / "a"), statistics, tmp_path / "a", size=SIZE)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert Tokenizer.from_pretrained(tmp_path / "a").config == Tokenizer.from_pretrained(tmp_path / "b").config


def test_a_config_with_too_few_channels_is_refused():
    with pytest.raises(UserError, match=r"latent_std is \[1\.0\]: give one number for each of the 4"):
        TokenizerConfig(latent_std=[1.0])


def test_packaged_and_remote_models_are_not_changed_in_place(tmp_path):
    with pytest.raises(UserError, match="default is packaged"):
        statistics.check_writable("default")
    with pytest.raises(UserError, match="not a model folder"):
        statistics.check_writable("user/repository")
    with pytest.raises(UserError, match="not a model folder"):
        statistics.check_writable(str(tmp_path))


# ---- the cache --------------------------------------------------------------------------------------------------


def test_a_cache_holds_the_crops_of_training_and_their_moments(tokenizer, photos, cache):
    live = PhotoDataset(photos, Crops(size=SIZE, scale=(SIZE, 40), seed=5))
    dataset = LatentDataset(cache)
    assert len(dataset) == len(live) == 9
    for epoch, index in itertools.product(range(5), range(9)):
        item = dataset[epoch, index]
        assert item["index"] == index
        assert torch.equal(item["image"], live[epoch % 3, index]["image"])
        assert (item["moments"].dtype, item["moments"].shape) == (torch.float16, (8, 4, 4))
        posterior = tokenizer.encode(item["image"])
        stored = Posterior(item["moments"][None], (SIZE, SIZE))
        torch.testing.assert_close(stored.mean, posterior.mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stored.logvar, posterior.logvar, rtol=1e-3, atol=1e-4)
    with pytest.raises(IndexError):
        dataset[0, 9]


def test_the_sign_of_a_zero_is_no_other_encoder():
    first, second = tiny_tokenizer().encoder, tiny_tokenizer().encoder
    with torch.no_grad():
        first.conv_in.weight[0, 0, 0, 0], second.conv_in.weight[0, 0, 0, 0] = 0.0, -0.0
    assert torch.signbit(second.conv_in.weight[0, 0, 0, 0])
    assert weights_sha256(first) == weights_sha256(second)
    with torch.no_grad():
        second.conv_in.weight[0, 0, 0, 0] = 1e-30
    assert weights_sha256(first) != weights_sha256(second)


def test_a_cache_is_plain_webdataset_shards(cache, photos):
    names = [p.name for p in sorted(cache.iterdir())]
    assert names == ["latents-000000.tar", "latents-000001.tar", "latents-000002.tar", "latents.json"]
    facts = json.loads((cache / "latents.json").read_text())
    assert facts["encoder_sha256"] == weights_sha256(tiny_tokenizer().encoder)
    assert (facts["pictures"], facts["copies"], facts["complete"], facts["factor"]) == (9, 3, True, 8)
    with tarfile.open(cache / "latents-000001.tar") as shard:
        members = shard.getnames()
        first = json.loads(shard.extractfile(members[0]).read())
    assert members[:3] == ["000000009.json", "000000009.moments.npy", "000000009.webp"]
    assert first == {"picture": "p3.png", "copy": 0}  # p3-broken is sample 3, and p3 follows it
    assert len(members) == 27
    assert all(path.stat().st_size < 0.1 * 2**20 for path in cache.glob("*.tar"))
    assert len(find_samples(cache)) == 27  # which sample grids and other tools read as pictures


def test_an_interrupted_cache_goes_on_to_the_same_bytes(tokenizer, photos, cache, tmp_path, monkeypatch):
    write, calls = encoding.write_samples, itertools.count()

    def die(path, samples):
        if next(calls) == 1:
            next(iter(samples))
            raise KeyboardInterrupt
        write(path, samples)

    monkeypatch.setattr(encoding, "write_samples", die)
    with pytest.raises(KeyboardInterrupt):
        cached(tokenizer, photos, tmp_path / "b", shard_mb=0.1)
    assert sorted(contents(tmp_path / "b")) == ["latents-000000.tar", "latents.json"]
    with pytest.raises(UserError, match="not finished: the same monobath cache-latents command goes on"):
        LatentDataset(tmp_path / "b")
    monkeypatch.undo()
    seen = []
    cached(tokenizer, photos, tmp_path / "b", shard_mb=0.1, progress=lambda done, total: seen.append((done, total)))
    assert contents(tmp_path / "b") == contents(cache)
    assert seen[0] == (13, 27)  # the first shard's nine were there
    assert seen[-1] == (27, 27)
    (tmp_path / "b/latents-000001.tar").unlink()  # as after a fault
    cached(tokenizer, photos, tmp_path / "b", shard_mb=0.1, workers=2)
    assert contents(tmp_path / "b") == contents(cache)
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("*.tar")}
    cached(tokenizer, photos, tmp_path / "b", shard_mb=0.1)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "b").glob("*.tar")} == times


def test_another_cache_in_the_folder_is_refused(photos, cache, tokenizer):
    before = contents(cache)
    with pytest.raises(UserError, match=r"made otherwise \(seed 6 instead of 5\): choose another folder"):
        cached(tokenizer, photos, cache, shard_mb=0.1, seed=6)
    with pytest.raises(UserError, match=r"encoder_sha256 \w{12} instead of \w{12}"):
        cached(tiny_tokenizer(seed=1), photos, cache, shard_mb=0.1)
    assert contents(cache) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 36, "scale": (36, 40)}, "size=36 must be divisible by the encoder's factor 8"),
        ({"copies": 0}, "copies is 0: it must be at least 1"),
        ({"shard_mb": 0}, "shard_mb is 0: it must be above 0"),
        ({"scale": (16, 40)}, r"scale=\(16, 40\) does not fit size=32"),
    ],
)
def test_settings_that_cannot_be(tokenizer, photos, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        cached(tokenizer, photos, tmp_path / "a", **changes)
    assert not (tmp_path / "a").exists()


def test_streams_and_latents_beyond_half_precision_are_refused(photos, tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="cannot be cached; give local folders"):
        cached(tokenizer, "https://example.org/{0..3}.tar", tmp_path / "a")  # type: ignore[arg-type]
    with torch.no_grad():
        tokenizer.encoder.moments.bias[0] = 1e6
    with pytest.raises(UserError, match="which half precision cannot hold"):
        cached(tokenizer, photos, tmp_path / "a")
    assert not list((tmp_path / "a").glob("*"))


def test_what_is_no_cache(cache, tmp_path):
    with pytest.raises(UserError, match=r"holds no latents\.json"):
        LatentDataset(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in contents(cache).items():
        (copy / name).write_bytes(content)
    shard = copy / "latents-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"latents-000001\.tar (cannot be read|lacks)"):
        LatentDataset(copy)
    dataset_path = copy / "latents-000002.tar"
    shard.write_bytes(whole)
    dataset = LatentDataset(copy)
    dataset_path.write_bytes(dataset_path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"latents-000002\.tar: sample 000000024 cannot be read"):
        dataset[0, 8]
    (copy / "latents.json").write_text("{")
    with pytest.raises(UserError, match=r"latents\.json is corrupt"):
        LatentDataset(copy)


def test_several_caches_are_one(tokenizer, photos, cache, tmp_path):
    other = cached(tokenizer, photos, tmp_path / "b", copies=2, seed=6)
    both = LatentDataset([cache, other])
    assert len(both) == 18
    assert torch.equal(both[4, 11]["image"], LatentDataset(other)[0, 2]["image"])
    flipless = cached(tokenizer, photos, tmp_path / "c", flip=False)
    with pytest.raises(UserError, match=r"has flip False, but .* has True"):
        LatentDataset([cache, flipless])


# ---- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "memory"), [(0, False), (2, False), (2, True)])
def test_batches_are_those_of_the_pictures_for_any_number_of_workers(photos, cache, workers, memory):
    live = islice(make_loader(PhotoDataset(photos, Crops(size=SIZE, scale=(SIZE, 40), seed=5)), batch_size=4), 6)
    expected = list(live)
    dataset = LatentDataset(cache, seed=5, cache=memory)
    found = list(islice(make_loader(dataset, batch_size=4, num_workers=workers), 6))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert a["moments"].shape == (4, 8, 4, 4)
    later = list(islice(make_loader(dataset, batch_size=4, num_workers=workers, start_sample=8), 4))
    for a, b in zip(later, found[2:], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("image", "moments", "index"))


# ---- training ---------------------------------------------------------------------------------------------------


def test_losses_from_the_cache_are_those_of_the_live_encoder(tokenizer, cache):
    model = Tokenizer(dataclasses.replace(tokenizer.config, sampler=SamplerConfig()))
    model.load_state_dict(tokenizer.state_dict())
    objective = AutoencoderObjective(model, LossConfig(perceptual=0.1), train_encoder=False)
    batch = next(iter(make_loader(LatentDataset(cache), batch_size=4)))
    x = to_float(batch["image"])
    draws = Draws.make(0, tuple(x.shape), (4, 4, 4, 4), TimesConfig(ones=0.5))
    given = (objective, x, draws.t, draws.noise, draws.latent_noise)
    live, stored = losses_of(*given).named, losses_of(*given, batch["moments"]).named
    assert live.keys() == stored.keys()
    for name, value in live.items():
        torch.testing.assert_close(stored[name], value, rtol=1e-3, atol=0)
    other = losses_of(*given, batch["moments"].flip(0)).named
    assert abs(other["flow"] - live["flow"]) > 10 * abs(stored["flow"] - live["flow"])


def from_cache(run: Path, source: Path, model: Path, **training):
    recipe = tiny_recipe(run, source, sample_every=0, train_encoder=False, **training)
    recipe.init = str(model)
    recipe.data.latents = True
    return recipe


@pytest.fixture(scope="module")
def start(tmp_path_factory, photos) -> tuple[Path, Path]:
    """A model of the tiny recipe, and a cache by it."""
    root = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    Tokenizer(tiny_recipe(root, photos).model).save_pretrained(root / "model")
    tokenizer = Tokenizer.from_pretrained(root / "model")
    cached(tokenizer, photos, root / "cache", copies=2, seed=0, model="a model")
    return root / "model", root / "cache"


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_a_run_from_the_cache_follows_the_live_run_and_resumes(start, photos, tmp_path, monkeypatch):
    model, cache = start
    live = from_cache(tmp_path / "live", photos, model, steps=4)
    live.data.latents = False
    train(live)
    straight = train(from_cache(tmp_path / "straight", cache, model, steps=4))
    # Two epochs of nine pictures: 16 of 18 samples, all of them the live run's crops.
    np.testing.assert_allclose(losses(tmp_path / "straight"), losses(tmp_path / "live"), rtol=2e-3)

    class Killed(Exception):
        pass

    step = Run.step

    def die(self):
        if self.done == 3:
            raise Killed
        step(self)

    monkeypatch.setattr(Run, "step", die)
    with pytest.raises(Killed):
        train(from_cache(tmp_path / "cut", cache, model, steps=4))
    monkeypatch.undo()
    resumed = from_cache(tmp_path / "cut", cache, model, steps=4)
    resumed.data.workers = 2
    a, b = (Tokenizer.from_pretrained(folder).state_dict() for folder in (straight, train(resumed)))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")


def test_the_encoder_does_not_run(start, tmp_path, monkeypatch):
    model, cache = start
    run = Run(from_cache(tmp_path / "run", cache, model, steps=1))
    monkeypatch.setattr(type(run.model.encoder), "forward", lambda *_: pytest.fail("the encoder ran"))
    run.train()


def test_sample_grids_show_crops_of_the_cache(start, tmp_path):
    model, cache = start
    recipe = from_cache(tmp_path / "run", cache, model, steps=1)
    recipe.training.sample_every = 1
    train(recipe)
    assert (tmp_path / "run/samples/step-00000001.png").is_file()


def test_a_cache_of_another_encoder_is_refused_with_both_hashes(start, photos, tmp_path):
    model, cache = start
    recipe = from_cache(tmp_path / "run", cache, model, steps=1)
    recipe.init = ""
    torch.manual_seed(1)
    recipe.training.seed = 1
    with pytest.raises(UserError) as caught:
        train(recipe)
    own, theirs = weights_sha256(Tokenizer.from_pretrained(model).encoder)[:12], "this run's encoder is "
    assert f"holds latents of the encoder {own} (a model), but {theirs}" in str(caught.value)
    assert "start from that model (init), or run monobath cache-latents" in str(caught.value)
    assert own not in str(caught.value).partition(theirs)[2]
    check_encoder(LatentDataset(cache), Tokenizer.from_pretrained(model).encoder)


@pytest.mark.parametrize(
    ("section", "name", "value", "words"),
    [
        ("training", "train_encoder", True, "data.latents is true with training.train_encoder true"),
        (
            "data",
            "scale",
            [32, 44],
            r'data.scale is \[32, 44\], but .* of scale \[32, 40\]: add --data.scale "\[32, 40\]"',
        ),
        ("data", "flip", False, 'data.flip is False, but .* of flip True: add --data.flip "true"'),
        ("data", "size", 40, "data.size is 40, but .* of size 32"),
    ],
)
def test_recipes_that_ask_for_other_crops(start, tmp_path, section, name, value, words):
    model, cache = start
    recipe = from_cache(tmp_path / "run", cache, model, steps=1)
    setattr(getattr(recipe, section), name, value)
    if name == "size":
        recipe.data.scale = [value, value]
    with pytest.raises(UserError, match=words):
        train(recipe)
    assert not (tmp_path / "run").exists()


def test_windows_are_parts_of_the_cached_crops(start):
    _, cache = start
    whole, parts = LatentDataset(cache, seed=3), LatentDataset(cache, seed=3, window=16)
    places = set()
    for epoch in range(4):
        crop, part = whole[epoch, 1], parts[epoch, 1]
        assert part["image"].shape == (3, 16, 16)
        found = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if torch.equal(part["moments"], crop["moments"][:, top : top + 2, left : left + 2])
        ]
        assert len(found) == 1
        top, left = (8 * place for place in found[0])
        assert torch.equal(part["image"], crop["image"][:, top : top + 16, left : left + 16])
        assert torch.equal(part["moments"], LatentDataset(cache, seed=3, window=16)[epoch, 1]["moments"])
        places.add(found[0])
    assert len(places) > 1
    assert torch.equal(LatentDataset(cache, window=32)[0]["moments"], whole[0]["moments"])
    for window in (12, 40, 0):
        with pytest.raises(UserError, match=f"a window of {window} pixels"):
            LatentDataset(cache, window=window)


def test_a_run_trains_on_windows_and_resumes(start, tmp_path, monkeypatch):
    model, cache = start

    def recipe(run):
        made = from_cache(run, cache, model, steps=4)
        made.data.size = 16
        return made

    whole = train(recipe(tmp_path / "whole"))
    stop = Run.told_to_stop
    monkeypatch.setattr(Run, "told_to_stop", lambda run: run.done == 2 or stop(run))
    with pytest.raises(Interrupted):
        train(recipe(tmp_path / "parts"))
    monkeypatch.undo()
    assert same(weights(train(recipe(tmp_path / "parts"))), weights(whole))


def test_a_run_from_before_new_fields_of_the_model_goes_on(photos, tmp_path):
    recipe = tiny_recipe(tmp_path / "run", photos, steps=2, sample_every=0)
    train(recipe)
    file = tmp_path / "run/config.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if "latent_mean" not in line))
    train(tiny_recipe(tmp_path / "run", photos, steps=4, sample_every=0))


def test_shard_files_are_written_alike(tmp_path):
    crop, moments = torch.zeros(3, 8, 8, dtype=torch.uint8), np.full((8, 1, 1), 1.5)
    for name in ("a.tar", "b.tar"):
        sample = Stored(key="3", arrays=npy(moments), picture=encoding.lossless(crop), facts={"picture": "é"})
        write_samples(tmp_path / name, [sample])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
