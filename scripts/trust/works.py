"""What writes files: training, caching latents, saving a model, a report. Each works in a folder, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from trial import Loss

from monobath import Tokenizer, UserError
from monobath.data.cache import LatentDataset
from monobath.data.encoding import Caching, cache_latents
from monobath.data.pictures import Crops
from monobath.decoders import UViTConfig
from monobath.evaluation.compare import Settings, evaluate
from monobath.evaluation.report import write_evaluation
from monobath.evaluation.system import TokenizerSystem
from monobath.models.encoder import EncoderConfig
from monobath.tokenizer import TokenizerConfig
from monobath.training import checkpoints, train
from monobath.training.config import DataConfig, LossConfig, OptimizerConfig, TrainingConfig
from monobath.training.ema import EMA
from monobath.training.recipe import TokenizerRecipe

MINE = "README.md"
"""A file of the user's, in a folder that is written again."""


@dataclass(frozen=True)
class Work:
    """Something that writes files, again and again the same."""

    name: str
    prepare: Callable[[Path], None]
    """Makes what is there before."""
    run: Callable[[Path], object]
    """The command."""
    check: Callable[[Path], None]
    """A `Loss` where what stands there, after a kill, is neither old nor new nor refused."""


def tiny_config() -> TokenizerConfig:
    """Of a tokenizer f8c4 with 17 000 parameters."""
    return TokenizerConfig(
        encoder=EncoderConfig(base=16, multipliers=[1, 1], patch=4, blocks=1, middle_attention=False, linear_skip=True),
        decoder=UViTConfig(size="custom", prediction="x", patch=4, channels=[16, 16], middle_blocks=1, heads=2,
                           down_blocks=1, linear_skip=True),
    )  # fmt: skip


def tiny_tokenizer(seed: int = 0) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(tiny_config()).eval()


def make_photos(folder: Path, count: int = 8) -> Path:
    """Small pictures, no two alike, none square."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((44, 36), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def works(photos: Path, names: Sequence[str] = ()) -> list[Work]:
    """Those of these names; default: all. Photos: a folder of `make_photos`."""
    return [makes(photos) for name, makes in WORKS.items() if not names or name in names]


def training(photos: Path) -> Work:
    """Five steps, with a checkpoint at each, and the finished model."""

    def run(folder: Path) -> Path:
        return train(TokenizerRecipe(
            name="tiny", run=str(folder / "run"), model=tiny_config(),
            data=DataConfig(source=[str(photos)], size=32, scale=[32, 36], workers=0),
            loss=LossConfig(perceptual=0.0), optimizer=OptimizerConfig(warmup=2),
            training=TrainingConfig(steps=5, batch_size=2, log_every=1, checkpoint_every=1, sample_every=2, samples=2),
        ))  # fmt: skip

    def check(folder: Path) -> None:
        newest, model = checkpoints.latest(folder / "run"), tiny_tokenizer()
        if newest is not None:
            checkpoints.load(newest, model=model, ema=EMA(model, 0.9))

    return Work("train", lambda folder: None, run, check)


def caching(photos: Path) -> Work:
    """Crops of all photos in four shards."""
    tokenizer = tiny_tokenizer()

    def run(folder: Path) -> object:
        options = Caching(copies=2, shard_mb=0.06, batch_size=3)
        return cache_latents(tokenizer, str(photos), folder / "cache", Crops(size=32, scale=(32, 36)), options)

    def check(folder: Path) -> None:
        try:
            dataset = LatentDataset(folder / "cache")
        except UserError:
            return
        if len([dataset[number] for number in range(len(dataset))]) != 8:
            raise Loss("a cache is taken for finished, and is not")

    return Work("cache-latents", lambda folder: None, run, check)


def saving(photos: Path) -> Work:
    """A model in the place of an older one, beside a file of the user's."""
    old, new = tiny_tokenizer(1), tiny_tokenizer(2)

    def prepare(folder: Path) -> None:
        old.save_pretrained(folder / "model")
        (folder / "model" / MINE).write_text("mine")

    def check(folder: Path) -> None:
        found = Tokenizer.from_pretrained(folder / "model").state_dict()
        whole = [all(torch.equal(found[k], v) for k, v in known.state_dict().items()) for known in (old, new)]
        if not any(whole):
            raise Loss("the saved model is neither the old nor the new one")

    return Work("save_pretrained", prepare, lambda folder: new.save_pretrained(folder / "model"), check)


def reporting(photos: Path) -> Work:
    """The report of `monobath eval`, in the place of an older one."""
    tiny_tokenizer().save_pretrained(photos.parent / "evaluated")
    system = TokenizerSystem(str(photos.parent / "evaluated"))
    evaluation, kept = evaluate([system], str(photos), Settings(size=32, metrics=["psnr", "ssim"], keep=2))

    def prepare(folder: Path) -> None:
        for name in ("results.json", "report.html", "comparison.png"):
            (folder / name).write_text("{}")

    def run(folder: Path) -> object:
        return write_evaluation(folder, [evaluation], kept, by_size=False)

    def check(folder: Path) -> None:
        json.loads((folder / "results.json").read_text())
        if (folder / "comparison.png").read_bytes() != b"{}":
            Image.open(folder / "comparison.png").load()

    return Work("report", prepare, run, check)


WORKS = {"train": training, "cache-latents": caching, "save_pretrained": saving, "report": reporting}


def fresh(work: Work, folder: Path) -> Path:
    """The folder as it is before the work."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work.prepare(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes | str]:
    """Of all files, without what tells the time: events of TensorBoard, rates in metrics.jsonl, zip archives' order."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or "tfevents" in name:
            continue
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = str([{k: v for k, v in row.items() if k != "images_per_second"} for row in rows])
        else:
            found[name] = path.read_bytes()
    return found


def compare(found: dict[str, bytes | str], reference: dict[str, bytes | str]) -> None:
    """A `Loss` where a file is missing, left over or different."""
    left, missing = sorted(found.keys() - reference.keys()), sorted(reference.keys() - found.keys())
    different = [name for name in reference if name in found and found[name] != reference[name]]
    if left or missing or different:
        raise Loss(f"left over: {left}; missing: {missing}; different: {different}")
