"""Laws of latent generators: their files and samples, what they learn from labelled caches, and `monobath generate`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randn, randomise, tiny_tokenizer
from PIL import Image
from test_docs import blocks

from monobath import Tokenizer, UserError
from monobath.cli import main
from monobath.data import Crops, LatentDataset, find_samples
from monobath.data.encoding import Caching, cache_latents
from monobath.data.statistics import latent_statistics
from monobath.generation import GenerationSampler, Generator, GeneratorConfig
from monobath.models.dit import DiTConfig
from monobath.models.identity import weights_sha256
from monobath.training import Interrupted, Recipe, Run, dump_recipe, load_recipe, train
from monobath.training.config import DataConfig, OptimizerConfig, TrainingConfig
from monobath.training.generation import GenerationConfig, GeneratorRecipe
from monobath.training.objectives.base import Batch, Draws
from monobath.training.objectives.generator import GenerationObjective

SIZE = 16
TINY = {"size": "custom", "patch": 1, "width": 16, "depth": 1, "heads": 2}
COLOURS = {3: (230, 30, 30), 5: (30, 30, 230), 9: (200, 200, 40)}  # labels need not begin at 0


def tiny_generator(seed: int = 0, **changes) -> Generator:
    config = {
        "dit": DiTConfig(**TINY, classes=3), "size": [2, 3], "labels": [3, 5, 9], "latent_mean": [0.5, -1, 0, 2],
        "latent_std": [1, 2, 0.5, 3], "sampler": GenerationSampler(steps=3, guidance=2.0),
    }  # fmt: skip
    return randomise(Generator(GeneratorConfig(**(config | changes))), seed).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Six pictures of each of three classes, which are their colours."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for label, colour in COLOURS.items():
        for i in range(6):
            noise = rng.integers(-25, 25, (SIZE, SIZE, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{label}-{i}.png")
            (folder / f"{label}-{i}.cls").write_text(str(label))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("model") / "tokenizer", tiny_tokenizer(encoder={"linear_skip": True})
    with torch.no_grad():  # latents are a linear map of the pixels, with little noise
        tokenizer.encoder.moments.weight.zero_()
        tokenizer.encoder.moments.bias[4:] = -8.0
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cache(photos, model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "latents"
    words = ["--data", str(photos), "--model", model, "--out", str(out), "--size", str(SIZE), "--copies", "2"]
    assert main(["cache-latents", *words, "--scale", str(SIZE), str(SIZE), "--labels"]) == 0
    return out


def tiny_recipe(run: Path, cache: Path, *, generator: dict | None = None, **training) -> Recipe:
    settings = {"steps": 6, "batch_size": 6, "checkpoint_every": 2, "sample_every": 0, "log_every": 1, "samples": 3}
    return GeneratorRecipe(
        run=str(run),
        data=DataConfig(source=[str(cache)], size=SIZE, scale=[SIZE, SIZE], latents=True, workers=0),
        generator=GenerationConfig(**({"dit": DiTConfig(**TINY)} | (generator or {}))),
        optimizer=OptimizerConfig(lr=3e-3, warmup=2),
        training=TrainingConfig(**(settings | training)),
    )


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> Path:
    recipe = tiny_recipe(tmp_path_factory.mktemp("trained") / "run", cache, sample_every=3)
    return train(recipe)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- a generator ----------------------------------------------------------------------------------------------------


def test_normalising_is_undone():
    generator, z = tiny_generator(), randn(2, 4, 3, 5)
    torch.testing.assert_close(generator.denormalise(generator.normalise(z)), z)
    torch.testing.assert_close(generator.normalise(z)[:, 3], (z[:, 3] - 2) / 3)


def test_a_sample_depends_on_its_seed_and_class_only():
    generator = tiny_generator()
    together = generator.sample([3, 9, None, 3], seed=7)
    assert together.shape == (4, 4, 2, 3)
    assert together.dtype == torch.float32
    for i, label in enumerate([3, 9, None, 3]):
        torch.testing.assert_close(generator.sample([label], seed=[7 + i])[0], together[i], rtol=1e-4, atol=1e-4)
    assert torch.equal(generator.sample([3, 9, None, 3], seed=[7, 8, 9, 10]), together)
    assert not torch.allclose(generator.sample([5], seed=7)[0], together[0])
    assert generator.sample([5], size=(5, 2)).shape == (1, 4, 5, 2)


def test_what_the_caller_leaves_out_is_what_the_generator_was_made_for():
    generator = tiny_generator()
    expected = generator.sample([3, 5], steps=3, guidance=2.0, interval=[0.0, 1.0])
    assert torch.equal(generator.sample([3, 5]), expected)
    for change in ({"steps": 4}, {"guidance": 1.0}, {"interval": [0.0, 0.5]}):
        assert not torch.allclose(generator.sample([3, 5], **change), expected)
    empty = generator.sample([3, 5], guidance=9.0, interval=[0.3, 0.3])
    assert torch.equal(empty, generator.sample([3, 5], guidance=1.0))


def test_without_classes_there_is_nothing_to_guide():
    generator = tiny_generator(dit=DiTConfig(**TINY), labels=[])
    assert generator.sample([None, None], guidance=1.0).shape == (2, 4, 2, 3)
    with pytest.raises(UserError, match=r"guidance=2.0: this generator was trained without classes"):
        generator.sample([None])
    with pytest.raises(UserError, match="class 3 is unknown to this generator: it was trained without classes"):
        generator.sample([3], guidance=1.0)


def test_saved_and_loaded_is_the_same(tmp_path):
    generator = tiny_generator()
    generator.save_pretrained(tmp_path / "g", extra={"step": 3})
    loaded = Generator.from_pretrained(tmp_path / "g")
    assert loaded.config == generator.config
    assert torch.equal(loaded.sample([3, 5]), generator.sample([3, 5]))
    alone = Generator.from_pretrained(tmp_path / "g" / "model.safetensors", dtype=torch.bfloat16)
    assert alone.sample([3]).dtype == torch.float32
    assert json.loads((tmp_path / "g" / "config.json").read_text())["training"] == {"step": 3}


def test_files_that_are_no_generator(tmp_path, model):
    with pytest.raises(UserError, match=r"no generator '.*nothing': give the folder that monobath train dit-64 wrote"):
        Generator.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"is not a monobath generator \(format 'monobath-tokenizer-1'"):
        Generator.from_pretrained(model)
    tiny_generator().save_pretrained(tmp_path / "g")
    with pytest.raises(UserError, match=r"is not a monobath tokenizer \(format 'monobath-generator-1'"):
        Tokenizer.from_pretrained(tmp_path / "g")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": [4]}, "class 4 is unknown to this generator: it knows 3, 5, 9"),
        ({"labels": []}, "no samples"),
        ({"steps": 0}, "steps=0"),
        ({"interval": [0.6, 0.2]}, r"interval is \[0.6, 0.2\]: give two times"),
        ({"interval": [0.6]}, r"interval is \[0.6\]"),
        ({"size": (0, 4)}, "above 0"),
        ({"seed": [1, 2]}, "seed has 2 entries for a batch of 1"),
    ],
)
def test_samples_that_cannot_be(options, words):
    with pytest.raises(UserError, match=words):
        tiny_generator().sample(**({"labels": [3]} | options))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": [1, 1, 2]}, r"labels are \[1, 1, 2\]: give 3 different ones"),
        ({"latent_mean": [0.0]}, "one number for each of the 4 latent channels"),
        ({"latent_std": [1.0, 1.0, 0.0, 1.0]}, "must be above 0"),
        ({"size": [2]}, r"size is \[2\]"),
        ({"size": [4, 2**32]}, r"size is \[4, 4294967296\].* at most 65536 patches"),
    ],
)
def test_configurations_that_cannot_be(changes, words):
    with pytest.raises(UserError, match=words):
        tiny_generator(**changes)


# ---- labelled caches ------------------------------------------------------------------------------------------------


def test_labels_travel_with_the_latents(photos, cache):
    dataset = LatentDataset(cache)
    assert dataset.labels == dataset.facts.labels == [3, 5, 9]
    expected = [sample.label for sample in find_samples(photos, labels=True)]
    for epoch in range(2):
        assert [dataset[epoch, i]["label"] for i in range(len(dataset))] == expected
    assert {s.label for s in find_samples(cache / "latents-000000.tar", labels=True)} == {3, 5, 9}  # webdataset's .cls


def test_for_generation_leaves_out_crops_and_other_classes(cache):
    whole, some = LatentDataset(cache, cache=True), LatentDataset(cache, cache=True).for_generation([9, 3])
    some.preload()
    assert len(some) == 12
    kept = [i for i in range(len(whole)) if whole[i]["label"] in (3, 9)]
    for index, there in enumerate(kept):
        one, other = some[1, index], whole[1, there]
        assert "image" not in one
        assert torch.equal(one["moments"], other["moments"])
        assert (one["label"], one["index"]) == (other["label"], index)
    with pytest.raises(UserError, match="has the label 4: there are 3, 5, 9"):
        whole.for_generation([4])


def test_caches_without_labels(photos, model, tmp_path, cache):
    tokenizer = Tokenizer.from_pretrained(model)
    facts = cache_latents(tokenizer, photos, tmp_path / "plain", Crops(size=SIZE, scale=(SIZE, SIZE)))
    assert facts.labels == []
    plain = LatentDataset(tmp_path / "plain")
    assert "label" not in plain[0]
    text = json.loads((tmp_path / "plain" / "latents.json").read_text())
    del text["labels"]  # as caches were before there were labels
    (tmp_path / "plain" / "latents.json").write_text(json.dumps(text))
    assert LatentDataset(tmp_path / "plain").facts == facts
    with pytest.raises(UserError, match=r"made otherwise \(labels \[3, 5, 9\] instead of \[\]\)"):
        cache_latents(tokenizer, photos, tmp_path / "plain", Crops(size=SIZE, scale=(SIZE, SIZE)), Caching(labels=True))
    with pytest.raises(UserError, match=r"only one of .* has labels"):
        LatentDataset([cache, tmp_path / "plain"])
    with pytest.raises(UserError, match=r"has no labels: .* cache-latents --labels, .* generator.conditional to false"):
        train(tiny_recipe(tmp_path / "run", tmp_path / "plain"))
    with pytest.raises(UserError, match="it was written without labels"):
        plain.for_generation([3])
    for picture in photos.glob("*.png"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / picture.name).write_bytes(picture.read_bytes())
    with pytest.raises(UserError, match=r"has no label: put an integer into a .cls file"):
        cache_latents(tokenizer, tmp_path / "bare", tmp_path / "none", Crops(size=SIZE), Caching(labels=True))


# ---- training -------------------------------------------------------------------------------------------------------


def test_the_true_velocity_costs_nothing(monkeypatch):
    generator = tiny_generator()
    objective = GenerationObjective(generator)
    moments, noise, own = randn(2, 8, 2, 3), randn(2, 4, 2, 3, seed=1), randn(2, 4, 2, 3, seed=2)
    t = torch.tensor([0.3, 1.0])
    z = generator.normalise(moments[:, :4] + (0.5 * moments[:, 4:]).exp() * own)

    def truth(x_t, times, numbers):
        torch.testing.assert_close(x_t, (1 - t)[:, None, None, None] * z + t[:, None, None, None] * noise)
        return z - noise

    monkeypatch.setattr(generator.dit, "forward", truth)
    batch = Batch(moments=moments, draws=Draws(t, noise, own), classes=torch.tensor([0, 1]))
    assert objective(batch).total.item() < 1e-10


def test_a_run_leaves_what_it_promises(trained, cache, model):
    run = trained.parent
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert Image.open(run / "samples" / "step-00000006.png").size == (3 * (SIZE + 2) + 2, SIZE + 4)
    generator = Generator.from_pretrained(trained)
    config = generator.config
    assert (config.labels, config.dit.classes, config.size, config.tokenizer) == ([3, 5, 9], 3, [2, 2], model)
    assert config.encoder_sha256 == weights_sha256(Tokenizer.from_pretrained(model).encoder)
    assert generator.sample([3, 9]).shape == (2, 4, 2, 2)
    dataset = LatentDataset(cache).for_generation()
    means = torch.stack([dataset[i]["moments"].float() for i in range(len(dataset))])[:, :4].mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor(config.latent_mean), means, rtol=1e-3, atol=1e-3)


def test_statistics_that_the_tokenizer_publishes(cache, photos, model, tmp_path):
    found = latent_statistics(Tokenizer.from_pretrained(model), photos, size=SIZE)

    def statistics(kind: str, **changes) -> tuple[list[float], list[float]]:
        recipe = tiny_recipe(tmp_path / kind, cache, generator={"statistics": kind, **changes}, steps=1)
        config = Generator.from_pretrained(train(recipe)).config
        return config.latent_mean, config.latent_std

    mean, std = statistics("overall")
    assert mean == pytest.approx([found.overall_mean] * 4, abs=0.02)  # these crops are mirrored at times
    assert std == pytest.approx([found.overall_std] * 4, rel=2e-2)
    with pytest.raises(UserError, match=r"publishes none: measure them with monobath stats"):
        statistics("published")
    words = ["--data", str(photos), "--model", model, "--size", str(SIZE), "--out", str(tmp_path / "measured")]
    assert main(["stats", *words]) == 0
    assert statistics("published", tokenizer=str(tmp_path / "measured")) == (found.mean, found.std)


def test_training_learns_the_classes(cache, tmp_path):
    """Colours are classes here, and the mean of a class' latents is where its samples must be."""
    recipe = tiny_recipe(tmp_path / "run", cache, steps=150, checkpoint_every=150, ema=0.9, batch_size=16)
    recipe.optimizer = OptimizerConfig(lr=1e-2, warmup=5)
    generator = Generator.from_pretrained(train(recipe))
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])
    dataset = LatentDataset(cache).for_generation()
    items = [dataset[i] for i in range(len(dataset))]
    centres = torch.stack(
        [torch.stack([i["moments"][:4].float() for i in items if i["label"] == label]).mean(0) for label in COLOURS]
    )
    labels = [*COLOURS] * 8
    samples = generator.sample(labels, steps=8)
    distance = (generator.normalise(samples)[:, None] - generator.normalise(centres)).square().sum((2, 3, 4))
    named = [[*COLOURS][number] for number in distance.argmin(1).tolist()]
    assert np.mean([a == b for a, b in zip(named, labels, strict=True)]) > 0.8


def test_resumed_equals_uninterrupted(cache, tmp_path, monkeypatch):
    whole = Generator.from_pretrained(train(tiny_recipe(tmp_path / "whole", cache)))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "told_to_stop", lambda run: run.done == 3)
        with pytest.raises(Interrupted):
            train(tiny_recipe(tmp_path / "cut", cache))
    cut = Generator.from_pretrained(train(tiny_recipe(tmp_path / "cut", cache)))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))
    assert cut.config == whole.config
    for change in ({"dit": DiTConfig(**(TINY | {"depth": 2}))}, {"classes": [3, 5]}, {"conditional": False}):
        with pytest.raises(UserError, match="holds a run of another model"):
            train(tiny_recipe(tmp_path / "cut", cache, generator=change))


def test_dropped_classes(cache, tmp_path):
    """As many as asked for, decided by the seed of the batch, and by each rank for its own part."""
    run = Run(tiny_recipe(tmp_path / "run", cache, generator={"drop": 0.25}))
    task = run.task
    numbers = task._numbers([3, 5, 9, 9] * 500, 11)
    kept = torch.tensor([0, 1, 2, 2] * 500)
    dropped = numbers == 3
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(numbers[~dropped], kept[~dropped])
    parts = []
    for rank in range(2):
        task.place = dataclasses.replace(task.place, rank=rank, world=2)
        parts.append(task._numbers([3, 5, 9, 9] * 250, 11))
    assert torch.equal(torch.cat(parts), numbers)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.kl=1e-3"], "unknown key loss.kl: the nearest valid one is "),
        (["model.encoder.base=32"], "unknown key model.encoder.base: the nearest valid one is "),
        (["times.zero_noise=0.5"], "times.zero_noise is 0.5: it is for tokenizers"),
        (["data.validation=y"], r"data.validation is \['y'\]: it is for tokenizers"),
        (["data.latents=false"], "a generator learns from what monobath cache-latents wrote"),
        (["generator.drop=1"], "generator.drop is 1.0: it is a fraction"),
        (["generator.dit.classes=4"], "the labels of the data decide"),
        (["generator.dit.size=S/7"], "PATCH in 1, 2, 4, 8"),
        (["generator.sampler.interval=[1, 0]"], "give two times"),
        (["trains=tokenizer"], "unknown key generator in .*: the nearest valid one is "),
    ],
)
def test_mistakes_in_recipes(overrides, words):
    with pytest.raises(UserError, match=words):
        load_recipe("dit-64", ["data.source=x", *overrides])


@pytest.mark.parametrize(
    ("generator", "words"),
    [
        ({"classes": [3, 4]}, "no picture in .* has the label 4: there are 3, 5, 9"),
        ({"dit": DiTConfig(**(TINY | {"latent_channels": 16}))}, "have 4 channels: set it to that"),
        ({"dit": DiTConfig(**(TINY | {"patch": 4}))}, "does not divide latents of 2×2"),
        ({"tokenizer": "nowhere", "statistics": "published"}, "cannot be loaded .* name one with generator.tokenizer"),
        ({"tokenizer": "f8c4", "statistics": "published"}, "holds latents of another encoder than f8c4's"),
    ],
)
def test_recipes_that_do_not_go_with_the_cache(cache, tmp_path, generator, words):
    with pytest.raises(UserError, match=words):
        train(tiny_recipe(tmp_path / "run", cache, generator=generator))
    assert not (tmp_path / "run").exists()


def test_old_recipes_train_tokenizers():
    recipe = load_recipe("cpu-default", ["data.source=x"])
    assert recipe.trains == "tokenizer"
    assert load_recipe("dit-64", ["data.source=x"]).generator.dit.width > 0
    assert "generator:" not in dump_recipe(recipe)


# ---- the command line -----------------------------------------------------------------------------------------------


def test_train_and_generate(cache, photos, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(dump_recipe(tiny_recipe(Path("unused"), cache, steps=2)))
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "r.yaml"), "--data", str(cache), "--run", str(run)]) == 0
    out = tmp_path / "out"
    words = ["--model", str(run / "model"), "--count", "5", "--steps", "2", "--batch", "2", "--device", "cpu"]
    assert main(["generate", *words, "--classes", "9", "3", "--guidance", "3", "--out", str(out)]) == 0
    assert "5 pictures in" in capsys.readouterr().out
    assert [sample.label for sample in find_samples(out / "samples", labels=True)] == [9, 3, 9, 3, 9]
    assert Image.open(out / "samples" / "000004.png").size == (SIZE, SIZE)
    assert Image.open(out / "grid.png").size == (2 * (SIZE + 2) + 2, 3 * (SIZE + 2) + 2)
    facts = json.loads((out / "generate.json").read_text())
    assert (facts["classes"], facts["guidance"], facts["interval"], facts["steps"]) == ([3, 9], 3.0, [0.0, 1.0], 2)
    assert facts["seconds"]["generator"] > 0 < facts["seconds"]["decoder"]

    second = tmp_path / "second"  # the fourth sample alone, in another batch
    more = ["--classes", "3", "--guidance", "3", "--seed", "3", "--out", str(second)]
    assert main(["generate", *words[:2], "--count", "1", "--steps", "2", *more]) == 0
    one, other = (np.asarray(Image.open(f)).astype(int) for f in (second / "samples/000000.png",
                                                                  out / "samples/000003.png"))  # fmt: skip
    assert abs(one - other).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model M --out OUT --classes 4", "class 4 is unknown to this generator: it knows 3, 5, 9"),
        ("--model M --out OUT --count 0", "--count is 0: it must be at least 1"),
        ("--model M --out OUT --interval 0.5", "interval is [0.5]: give two times"),
        ("--model nowhere --out OUT", "no generator 'nowhere'"),
        ("--model T --out OUT", "is not a monobath generator"),
        ("--model M --tokenizer f8c4 --out OUT", "choose a --tokenizer with that encoder"),
        ("--model M --tokenizer nowhere --out OUT", "no tokenizer 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_2(trained, model, tmp_path, capsys, words, message):
    named = {"M": str(trained), "T": model, "OUT": str(tmp_path / "out")}
    assert main(["generate", *(named.get(word, word) for word in words.split())]) == 2
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_samples_are_never_written_over(trained, tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    assert main(["generate", "--model", str(trained), "--out", str(tmp_path)]) == 2
    assert "is there already: choose another --out" in capsys.readouterr().err


def test_a_tokenizer_of_other_channels_is_refused(tmp_path, trained):
    from monobath.generation.rendering import check_fits

    other = tiny_tokenizer(encoder={"latent_channels": 3}, decoder={"latent_channels": 3})
    with pytest.raises(UserError, match="decodes latents of 3 channels, but the generator makes 4"):
        check_fits(Generator.from_pretrained(trained), other, "other")


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_runs(tmp_path, monkeypatch):
    """docs/generate.md, its blocks in order, at tiny size."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        (tmp_path / f"labelled/{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (200 * (i % 2), 80, 10 * i)).save(tmp_path / f"labelled/{i % 2}/{i}.png")
    smaller = {
        "cache-latents": ["--copies", "1"],
        "train": ["--generator.dit.width=8", "--generator.dit.heads=1", "--generator.dit.depth=1",
                  "--training.steps=1", "--training.batch_size=2", "--training.sample_every=0"],
        "generate": ["--steps", "2"],
    }  # fmt: skip
    verbs = []
    for language, block in blocks(Path(__file__).resolve().parent.parent / "docs" / "generate.md"):
        if language == "py":
            exec(compile(block, "generate.md", "exec"), found := {})
            assert [picture.size for picture in found["pictures"]] == [(64, 64)] * 3
            continue
        for line in block.splitlines():
            program, verb, *rest = shlex.split(line)
            assert program == "monobath"
            assert main([verb, *rest, *smaller[verb]]) == 0, line
            verbs.append(verb)
    assert verbs == ["cache-latents", "train", "generate"]
    assert len(list(Path("runs/generated/samples").glob("*.png"))) == 16
    assert Path("runs/generated/grid.png").is_file()
    assert Path("runs/generated/generate.json").is_file()
