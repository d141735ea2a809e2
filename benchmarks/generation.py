"""What a decoder means for generation: one latent generator's samples, decoded by several decoders of its encoder.

    python benchmarks/generation.py train --data LABELLED.tar --classes 0 1 2 … --out runs/generation
    python benchmarks/generation.py sample --count 1000 --guidance 2 --out runs/generation
    python benchmarks/generation.py score --data LABELLED.tar --held-out OTHERS.tar --out runs/generation \\
        --decoders kl=runs/kl/model multi-step=runs/teacher/model:8 one-step=f8c4
    python benchmarks/generation.py show --out runs/generation

`train` caches the latents of the labelled pictures and trains a DiT on them (--recipe, and any KEY=VALUE of it).
`sample` makes latents, classes in turn, and keeps them, so that all decoders are given the same ones. `score` decodes
them and measures

- FD-EffLite: Fréchet distance of EfficientNet-Lite2's features of whole pictures to those of all real ones of the same
  classes (--data). It falls with the number of samples: compare rows of as many. ± is one standard error, from
  half-samples of the samples.
- gFID with --fid, the same with Inception's features, where its weights can be had;
- how often a linear probe, trained on the real pictures' features, names a sample's class;
- the time of the generator and of the decoder, apart: medians of interleaved repeats on one batch, after a warm-up.

Beside them stand the held-out pictures themselves, and what each decoder makes of their own latents: what no generator
can do better than. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.utils import make_grid
from trainings import device, exit_code, markdown, trained

from monobath import Tokenizer, UserError
from monobath.cli.shared import lasting_name
from monobath.data import Crops, iterate_eval, make_dataset
from monobath.data.encoding import Caching, cache_latents
from monobath.devices import synchronize
from monobath.evaluation.compare import half_sample_estimate
from monobath.evaluation.frechet import CropFeatures, Gaussian, HalfSampled, frechet_distance
from monobath.evaluation.metrics import SetMetric, load_metrics
from monobath.files import write_file, write_text
from monobath.generation import Generator
from monobath.generation.rendering import check_fits, decoder_seeds, in_turn
from monobath.images import tensor_to_pil
from monobath.training import load_recipe

FEATURES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {}
"""Networks of features by metric: uint8 pictures `(B, 3, H, W)` → `(B, dim)`, on the CPU."""
LABELS = {"fd_efflite": "FD-EffLite", "gfid": "gFID"}
PENALTY = 1e-3
"""Weight of the probe's squared weights."""


def _efflite() -> Callable[[Tensor], Tensor]:
    network = CropFeatures(device())
    return lambda images: torch.cat([network.pooled(part.to(device())) for part in images.split(network.chunk)]).cpu()


def _inception() -> Callable[[Tensor], Tensor]:
    _, (metric,) = load_metrics(["rfid"], device=device())
    assert isinstance(metric, SetMetric)
    return lambda images: metric.features(images.to(device()), range(len(images)))[:, 0].cpu()


FEATURES |= {"fd_efflite": _efflite, "gfid": _inception}


# ---- train and sample -----------------------------------------------------------------------------------------------


def run_training(args: argparse.Namespace) -> None:
    if not args.data:
        raise UserError("train needs --data: folders or shards of labelled pictures")
    cache = args.out / f"latents-{Path(args.tokenizer).name}-{args.size}x{args.copies}"
    tokenizer = Tokenizer.from_pretrained(args.tokenizer, device=device())
    crops = Crops(size=args.size, scale=(args.size, args.size))
    options = Caching(copies=args.copies, labels=True, model=lasting_name(args.tokenizer))
    cache_latents(tokenizer, args.data, cache, crops, options)
    own = [f"name={args.name}", f"run={args.out / args.name}", f"data.size={args.size}",
           f"data.scale=[{args.size}, {args.size}]", f"generator.classes={args.classes}"]  # fmt: skip
    recipe = load_recipe(args.recipe, [*own, f"data.source={json.dumps([str(cache)])}", *args.overrides])
    trained(recipe)


def run_sampling(args: argparse.Namespace) -> None:
    generator = Generator.from_pretrained(args.out / args.name / "model", device=device())
    sampler = generator.config.sampler
    facts: dict[str, Any] = {
        "model": args.name,
        "count": args.count,
        "steps": args.steps or sampler.steps,
        "guidance": sampler.guidance if args.guidance is None else args.guidance,
        "interval": args.interval or sampler.interval,
        "seed": args.seed,
    }
    low, high = facts["interval"]
    name = f"{args.name}-{facts['steps']}-cfg{facts['guidance']:g}-{low:g}-{high:g}-{args.count}-seed{args.seed}"
    folder = args.out / "samples" / name
    if (folder / "facts.json").is_file():
        return
    labels, parts = in_turn(generator, None, args.count), []
    for start in range(0, args.count, args.batch):
        own = labels[start : start + args.batch]
        parts.append(generator.sample(own, seed=[args.seed + start + i for i in range(len(own))], **_options(facts)))
        Console(stderr=True).print(f"{name}: {start + len(own)} of {args.count} latents")
    latents = torch.cat(parts).cpu()
    write_file(folder / "latents.safetensors", lambda file: save_file({"latents": latents}, file))
    write_text(folder / "facts.json", json.dumps(facts | {"labels": labels}) + "\n")


def _options(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("steps", "guidance", "interval")}


# ---- score ----------------------------------------------------------------------------------------------------------


def run_scoring(args: argparse.Namespace) -> None:
    if not args.data or not args.held_out:
        raise UserError("score needs --data and --held-out: labelled pictures to compare with, and others")
    if not args.decoders:
        raise UserError("score needs --decoders: NAME=MODEL or NAME=MODEL:STEPS")
    found = sorted((args.out / "samples").glob("*/facts.json"))
    if not found:
        raise UserError(f"{args.out} holds no samples: run sample first")
    judges = {key: Judge(key, args) for key in ["fd_efflite", *(["gfid"] if args.fid else [])]}
    held_out = list(_real(args.held_out, args))
    own_labels = [int(label) for batch in held_out for label in batch["label"]]
    beside = args.out / "held-out"
    _score(beside / "pictures.json", judges, lambda: (b["image"] for b in held_out), own_labels, {"decoder": ""})
    for decoder in args.decoders:
        name, tokenizer, steps = _decoder(decoder)
        protocol = {"decoder": decoder}
        again = partial(_reconstructed, held_out, tokenizer, steps)
        _score(beside / f"{name}.json", judges, again, own_labels, protocol)
        for file in found:
            facts = json.loads(file.read_text(encoding="utf-8"))
            generator = Generator.from_pretrained(args.out / facts["model"] / "model", device=device())
            check_fits(generator, tokenizer, decoder)
            latents = load_file(file.parent / "latents.safetensors")["latents"]
            pictures = partial(_decoded, latents, tokenizer, steps, facts["seed"], args.batch)
            _score(file.parent / f"{name}.json", judges, pictures, facts["labels"], protocol)
            grid, columns = file.parent / f"{name}.png", len(generator.config.labels) or 8
            if not grid.is_file():
                shown = _decoded(latents[: 8 * columns], tokenizer, steps, facts["seed"], args.batch)
                write_file(grid, tensor_to_pil(make_grid(torch.cat(list(shown)), nrow=columns)).save)
    _time(args, [json.loads(file.read_text(encoding="utf-8")) for file in found])


def _decoded(latents: Tensor, tokenizer: Tokenizer, steps: int | None, seed: int, size: int) -> Iterator[Tensor]:
    """Pictures of latents, in batches of `size`."""
    for start in range(0, len(latents), size):
        z = latents[start : start + size].to(device())
        seeds = decoder_seeds(range(seed + start, seed + start + len(z)))
        yield tokenizer.decode(z, steps=steps, seed=seeds, output="uint8").cpu()


def _reconstructed(batches: Iterable[dict[str, Any]], tokenizer: Tokenizer, steps: int | None) -> Iterator[Tensor]:
    """Pictures, encoded and decoded."""
    for batch in batches:
        yield tokenizer.decode(tokenizer.encode(batch["image"]).mode(), steps=steps, output="uint8").cpu()


class Judge:
    """Real pictures' features of one network, the distance to them, and the probe that they train.

    Args:
        key: of `FEATURES`.
        args: where the real pictures are.
    """

    def __init__(self, key: str, args: argparse.Namespace) -> None:
        self.key, self.network = key, None
        self.classes = _classes(args)
        self.protocol = {"data": [Path(d).name for d in args.data], "classes": self.classes, "size": args.size}
        file = args.out / "real" / f"{key}.safetensors"
        beside = file.with_suffix(".json")
        if not beside.is_file() or json.loads(beside.read_text(encoding="utf-8")) != self.protocol:
            batches = list(_real(args.data, args))
            labels, features = torch.cat([b["label"] for b in batches]), self.features(b["image"] for b in batches)
            write_file(file, lambda path: save_file({"features": features, "labels": labels}, path))
            write_text(beside, json.dumps(self.protocol) + "\n")
        real = load_file(file)
        self.real = _gaussians(real["features"])[0]
        self.mean, self.std = real["features"].mean(0), real["features"].std(0) + 1e-6
        numbers = torch.tensor([self.classes.index(int(label)) for label in real["labels"]])
        self.weight, self.bias = fit_probe((real["features"] - self.mean) / self.std, numbers)

    def features(self, batches: Iterable[Tensor]) -> Tensor:
        """float32 `(N, dim)` of batches of uint8 pictures."""
        self.network = self.network or FEATURES[self.key]()
        return torch.cat([self.network(batch) for batch in batches])

    def measure(self, batches: Iterable[Tensor], labels: Sequence[int | None]) -> dict[str, Any]:
        """The distance of a set and of its half-samples, and which of its pictures the probe names right."""
        features = self.features(batches)
        distances = [frechet_distance(self.real, other) for other in _gaussians(features)]
        named = (((features - self.mean) / self.std) @ self.weight + self.bias).argmax(1)
        right = [label is not None and self.classes[int(n)] == label for n, label in zip(named, labels, strict=True)]
        return {"distances": distances, "right": [int(r) for r in right]}


def fit_probe(features: Tensor, numbers: Tensor, penalty: float = PENALTY) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression, to convergence: weights `(dim, classes)` and biases `(classes,)`.

    Args:
        features: standardised, `(N, dim)`.
        numbers: classes 0, 1, …, `(N,)`.
        penalty: weight of half the squared weights.
    """
    weight = torch.zeros(features.shape[1], int(numbers.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, numbers) + 0.5 * penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _score(
    file: Path,
    judges: dict[str, Judge],
    pictures: Callable[[], Iterable[Tensor]],
    labels: Sequence[int | None],
    facts: dict[str, Any],
) -> None:
    """Measure what is not in `file` yet: pictures of such labels."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key, judge in judges.items():
        protocol = {**judge.protocol, **facts}
        if before.get(key, {}).get("protocol") == protocol:
            continue
        before[key] = {"protocol": protocol, **judge.measure(pictures(), labels)}
        write_text(file, json.dumps(before) + "\n")
        accuracy = statistics.fmean(before[key]["right"])
        Console(stderr=True).print(
            f"{file.parent.name}/{file.stem}: {LABELS[key]} {before[key]['distances'][0]:.1f}, probe {accuracy:.1%}"
        )


def _gaussians(features: Tensor) -> list[Gaussian]:
    """The whole set's, and those of its half-samples."""
    halves = HalfSampled(features.shape[1])
    for start in range(0, len(features), 1000):
        part = features[start : start + 1000, None]
        halves.update(part, range(start, start + len(part)))
    return halves.gaussians()


def _classes(args: argparse.Namespace) -> list[int]:
    """Labels that the generator knows."""
    models = sorted(args.out.glob("samples/*/facts.json"))
    name = json.loads(models[0].read_text(encoding="utf-8"))["model"]
    return Generator.from_pretrained(args.out / name / "model").config.labels


def _real(data: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Batches of labelled pictures of the generator's classes."""
    dataset = make_dataset(list(data), Crops(size=args.size, augment=False), labels=True)
    known = torch.tensor(_classes(args))
    for batch in iterate_eval(dataset, batch_size=args.batch):
        own = torch.isin(batch["label"], known)
        if own.any():
            yield {"image": batch["image"][own], "label": batch["label"][own]}


def _decoder(text: str) -> tuple[str, Tokenizer, int | None]:
    """NAME=MODEL or NAME=MODEL:STEPS."""
    name, separator, model = text.partition("=")
    path, _, steps = model.rpartition(":")
    if not steps.isdigit():
        path, steps = model, ""
    if not (separator and name and path) or name == "pictures":
        raise UserError(f"--decoders {text}: write NAME=MODEL or NAME=MODEL:STEPS, with a NAME of its own")
    return name, Tokenizer.from_pretrained(path, device=device()), int(steps) if steps else None


def _generation(facts: dict[str, Any]) -> str:
    """Name of a generator's row of times."""
    return "generator " + json.dumps({"model": facts["model"], **_options(facts)}, sort_keys=True)


def _time(args: argparse.Namespace, samples: Sequence[dict[str, Any]]) -> None:
    """Seconds a picture of the generator, as it made each of the samples, and of every decoder: `times.json`.

    All in turns on one batch.
    """
    file = args.out / "times.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    protocol = {"batch": args.batch, "device": str(device()), "threads": torch.get_num_threads()}
    if before.get("protocol") == protocol and set(before["seconds"]) >= {*map(_generation, samples), *args.decoders}:
        return
    systems: dict[str, Callable[[], Any]] = {}
    for facts in samples:
        generator = Generator.from_pretrained(args.out / facts["model"] / "model", device=device())
        labels = in_turn(generator, None, args.batch)
        systems[_generation(facts)] = partial(generator.sample, labels, **_options(facts))
    z = systems[_generation(samples[0])]()
    for decoder in args.decoders:
        _, tokenizer, steps = _decoder(decoder)
        systems[decoder] = lambda t=tokenizer, s=steps: t.decode(z, steps=s, output="uint8")
    took: dict[str, list[float]] = {name: [] for name in systems}
    for repeat in range(args.repeats + 1):
        for name, run in systems.items():
            seconds = _seconds(run) / args.batch
            if repeat:  # the first is the warm-up
                took[name].append(seconds)
    write_text(file, json.dumps({"protocol": protocol, "clock": _clock_name(), "seconds": took}) + "\n")


def _clock_name() -> str:
    """On a CPU this process' own seconds are counted, which other work changes little; on a GPU those that pass."""
    return "wall" if device().type == "cuda" else "CPU"


def _seconds(run: Callable[[], Any]) -> float:
    clock = time.perf_counter if device().type == "cuda" else time.process_time
    synchronize(device())
    began = clock()
    run()
    synchronize(device())
    return clock() - began


# ---- show -----------------------------------------------------------------------------------------------------------


def show(args: argparse.Namespace) -> None:
    file = args.out / "times.json"
    times = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"seconds": {}, "clock": "CPU"}
    lines = []
    for facts_file in sorted((args.out / "samples").glob("*/facts.json")):
        facts = json.loads(facts_file.read_text(encoding="utf-8"))
        low, high = facts["interval"]
        settings = [str(facts["steps"]), f"{facts['guidance']:g} in ({low:g}, {high:g}]", str(facts["count"])]
        seconds = times["seconds"].get(_generation(facts))
        made = statistics.median(seconds) if seconds else None
        for score in sorted(facts_file.parent.glob("*.json")):
            if score != facts_file:
                lines.append([score.stem, *settings, *_cells(score, times, made)])
    lines += [
        [f"held-out pictures{'' if score.stem == 'pictures' else f' through {score.stem}'}", "", "", "", "", "", "",
         *_cells(score, times, None)[3:]]
        for score in sorted((args.out / "held-out").glob("*.json"), key=lambda path: (path.stem != "pictures", path))
    ]  # fmt: skip
    clock = times["clock"]
    head = ["decoder", "steps", "guidance", "samples", f"generator, {clock} ms", f"decoder, {clock} ms", "their sum",
            LABELS["fd_efflite"], "class named", *([LABELS["gfid"]] if args.fid else [])]  # fmt: skip
    lines = [line if args.fid else line[:9] for line in lines]
    sys.stdout.write(markdown(head, lines))


def _cells(score: Path, times: dict[str, Any], made: float | None) -> list[str]:
    """Times, a picture, and figures of one row."""
    found = json.loads(score.read_text(encoding="utf-8"))
    first = found["fd_efflite"]
    decoder = times["seconds"].get(first["protocol"]["decoder"])
    decoded = statistics.median(decoder) if decoder else None
    both = made + decoded if made is not None and decoded is not None else None
    cells = ["" if seconds is None else f"{1000 * seconds:.1f}" for seconds in (made, decoded, both)]
    right = first["right"]
    accuracy = statistics.fmean(right)
    error = (accuracy * (1 - accuracy) / len(right)) ** 0.5
    cells += [_distance(first), f"{accuracy:.1%} ± {error:.1%}"]
    return [*cells, _distance(found["gfid"]) if "gfid" in found else ""]


def _distance(found: dict[str, Any]) -> str:
    import numpy as np

    estimate = half_sample_estimate(np.asarray(found["distances"]))
    return f"{estimate.value:.1f} ± {(estimate.high - estimate.low) / 4:.1f}"


ACTIONS = {"train": run_training, "sample": run_sampling, "score": run_scoring, "show": show}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training, the samples and the scores")
    parser.add_argument("--data", nargs="+", default=[], help="labelled pictures: to train on, or to compare with")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures, in pixels")
    parser.add_argument("--name", default="dit", help="of the generator's run folder")
    parser.add_argument("--batch", type=int, default=50, help="samples at once")
    parser.add_argument("--fid", action="store_true", help="gFID too")
    train = parser.add_argument_group("train")
    train.add_argument("--tokenizer", default="f8c4", help="whose encoder: packaged name or folder")
    train.add_argument("--classes", type=int, nargs="+", default=[], help="labels; default: all")
    train.add_argument("--copies", type=int, default=4, help="mirrored or not, of each picture")
    train.add_argument("--recipe", default="dit-64")
    sample = parser.add_argument_group("sample")
    sample.add_argument("--count", type=int, default=1000, help="samples")
    sample.add_argument("--steps", type=int, help="of the generator; as guidance, default: what it was made for")
    sample.add_argument("--guidance", type=float)
    sample.add_argument("--interval", type=float, nargs=2)
    sample.add_argument("--seed", type=int, default=0)
    score = parser.add_argument_group("score")
    score.add_argument("--held-out", nargs="+", default=[], help="labelled pictures that nothing was trained on")
    score.add_argument("--decoders", nargs="+", default=[], help="NAME=MODEL or NAME=MODEL:STEPS")
    score.add_argument("--repeats", type=int, default=5, help="timed repeats")
    args, rest = parser.parse_known_args(arguments)
    wrong = [text for text in rest if args.action != "train" or text.startswith("-") or "=" not in text]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    args.overrides = rest
    ACTIONS[args.action](args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
