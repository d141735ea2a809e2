"""What each stage of training costs with decoder S/2: images a second and peak memory of whole optimizer steps.

    python benchmarks/stages.py [--devices cpu cuda] [--stages encoder pretrain …] [--batch 2] [--steps 3]

The stages are those of the packaged `ssdd-stage*` recipes with the paper's f8c4 encoder (34 M parameters): encoder and
decoder together at 128², the decoder alone at 128² and at 256² on the frozen encoder, and distillation at 256² from a
teacher of 12 steps. Losses take EfficientNet-Lite0 for VGG and DINOv2, which are not everywhere; networks run eagerly.
Random weights: only cost is measured. Each stage runs in a fresh process. Memory is the peak of the whole process on a
CPU, of PyTorch's allocator on a GPU. Further arguments are recipe keys, such as training.checkpointing=true.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = {
    "encoder": ("ssdd-stage0-encoder", "encoder and decoder together, 128²"),
    "pretrain": ("ssdd-stage1-pretrain", "decoder, frozen encoder, 128²"),
    "finetune": ("ssdd-stage2-finetune", "decoder, frozen encoder, 256²"),
    "distill": ("ssdd-stage3-distill", "distillation, 256²"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], help="default: cpu, and a GPU if there is one")
    parser.add_argument("--decoder", default="S/2", help="SIZE/PATCH")
    parser.add_argument("--batch", type=int, default=2, help="images a step on a CPU")
    parser.add_argument("--gpu-batch", type=int, default=32, help="images a step on a GPU")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, of which the median counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", choices=STAGES, help=argparse.SUPPRESS)  # what each fresh process is called with
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="recipe keys")
    args = parser.parse_args(arguments)
    if args.measure:
        sys.stdout.write(json.dumps(measure(args)) + "\n")
        return 0
    found = [
        fresh_process(stage, device, args) for device in args.devices or available_devices() for stage in args.stages
    ]
    head = ["stage", "device", "batch", "images/s", "peak memory, GB", "CPU s per 1000 images"]
    lines = [head, ["---"] * len(head)]
    for row in found:
        cells = [STAGES[row["stage"]][1], row["device"], str(row["batch"]), f"{row['images_per_second']:.3g}"]
        cpu = "" if row["device"] == "cuda" else f"{row['cpu_seconds']:,.0f}"
        lines.append([*cells, f"{row['peak_gb']:.2f}", cpu])
    sys.stdout.write("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
    about = sorted({f"{row['device']}: {row['threads']} threads, {row['name']}" for row in found})
    sys.stdout.write(f"\n{args.decoder}, {args.precision}, median of {args.steps} steps; {'; '.join(about)}\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def available_devices() -> list[str]:
    """Asked of another process: this one stays small, since a process inherits the peak of the one that started it."""
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return ["cpu", "cuda"] if subprocess.run([sys.executable, "-c", code]).returncode == 0 else ["cpu"]


def fresh_process(stage: str, device: str, args: argparse.Namespace) -> dict[str, Any]:
    """One stage, measured."""
    batch = args.batch if device == "cpu" else args.gpu_batch
    command = [sys.executable, __file__, "--measure", stage, "--decoder", args.decoder, "--batch", str(batch)]
    command += ["--precision", args.precision, "--steps", str(args.steps), *args.overrides]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{stage} on {device} failed with exit code {done.returncode} (negative: a signal)")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Some steps of a stage, in this process."""
    import torch

    from monobath import Tokenizer, resources
    from monobath.devices import synchronize
    from monobath.training import Run, load_recipe

    stage = args.measure
    with tempfile.TemporaryDirectory() as folder:
        common = [
            f"model.decoder.size={args.decoder}", f"run={folder}/run", "data.workers=0", "data.cache=true",
            f"training.batch_size={args.batch}", f"training.precision={args.precision}", "training.compile=false",
            "training.sample_every=0", "loss.perceptual_backbone=efflite", "loss.repa_features=efflite",
        ]  # fmt: skip
        before = {"pretrain": "init_encoder", "finetune": "init", "distill": "distill.teacher"}.get(stage)
        start = [f"{before}={folder}/model"] if before else []
        recipe = load_recipe(STAGES[stage][0], [*common, *start, *args.overrides])
        recipe.data.source = [str(path) for path in resources.sample_paths()]
        if start:
            torch.manual_seed(0)
            Tokenizer(recipe.model).save_pretrained(f"{folder}/model")
        run = Run(recipe)
        seconds, cpu = [], []
        for number in range(1 + args.steps):  # the first warms up
            clock, cpu_clock = time.perf_counter(), time.process_time()
            run.step()
            synchronize(run.device)
            if number:
                seconds.append(time.perf_counter() - clock)
                cpu.append(time.process_time() - cpu_clock)
        on_gpu = run.device.type == "cuda"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "stage": stage,
            "device": run.device.type,
            "name": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "batch": args.batch,
            "images_per_second": args.batch / statistics.median(seconds),
            "cpu_seconds": 1000 * statistics.median(cpu) / args.batch,
            "peak_gb": (torch.cuda.max_memory_allocated() if on_gpu else peak) / 1e9,
        }


if __name__ == "__main__":
    sys.exit(main())
