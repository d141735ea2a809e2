"""The training loop, on accelerate: one process on a CPU, or many GPUs through `accelerate launch`.

    train(recipe)        # the same call on the same run folder resumes, bit for bit on a CPU

A step's random numbers and crops depend only on (seed, step), never on what ran before. Nothing in a step waits for
the device: non-finite steps are skipped by the optimizer itself, and counted when a line is logged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor

from ..data import make_loader
from ..errors import UserError
from ..files import write_file, write_text
from ..images import tensor_to_pil
from . import checkpoints
from .adversary import Adversary
from .config import OptimizerConfig, Recipe
from .ema import EMA
from .generation import GenerationTask
from .objectives import draw_seed
from .optimizers import (
    evaluation_weights,
    is_schedule_free,
    make_optimizer,
    restore_training_weights,
    training_weights,
)
from .progress import Progress
from .tasks import Place, Task, TokenizerTask, same_model

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Ctrl-C or a termination signal arrived; the run was saved first."""


def train(recipe: Recipe) -> Path:
    """Train what the recipe says; go on where the run folder stands.

    Returns:
        The folder of the finished slim EMA model, for `Tokenizer.from_pretrained` or `Generator.from_pretrained`.

    Raises:
        UserError: the recipe cannot run (no data, other model in the folder, package missing, non-finite losses …).
        Interrupted: a signal arrived, or the time was up; the state is saved.
    """
    return _Run(recipe).go()


def learning_rate(config: OptimizerConfig, step: int, steps: int, anew: int = 0) -> float:
    """Rate of step 0 … steps−1: linear warm-up, then a cosine to zero or a constant; schedule-free always constant.

    At `anew` the optimizer began again without what it knew (see `travel.py`): it warms up to the schedule once more.
    """
    if anew and config.kind == "adamw" and step - anew < config.warmup:
        return learning_rate(config, step, steps) * (step - anew + 1) / config.warmup
    if config.kind == "radam_schedulefree":
        return config.lr
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(1, steps - config.warmup)
    return config.lr * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * done, dtype=torch.float64))))


class _Run:
    def __init__(self, recipe: Recipe) -> None:
        started = time.monotonic()
        self.recipe, self.run = recipe, Path(recipe.run)
        self.accelerator = _accelerator(recipe)
        self.main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        training = recipe.training
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        share = self.world * training.accumulation
        if training.batch_size % share:
            raise UserError(
                f"training.batch_size={training.batch_size} must be divisible by {share} "
                f"({self.world} processes × {training.accumulation} accumulation steps)"
            )
        self.micro = training.batch_size // share

        place = Place(device=self.device, rank=self.rank, world=self.world, micro=self.micro)
        self.task: Task = (GenerationTask if recipe.trains == "generator" else TokenizerTask)(recipe, place)
        self.dataset = self.task.dataset
        if self.main:
            self._claim_folder()

        torch.manual_seed(training.seed)
        self.task.build()
        self.model = self.task.model
        self.objective: Any = self.task.objective
        self.objective.to(self.device)
        if training.channels_last:
            self.objective.to(memory_format=torch.channels_last)
        self.ema = EMA(self.model, training.ema, warmup=training.ema_warmup)
        self.optimizer: Any = make_optimizer(self.objective, recipe.optimizer)
        self.schedule_free = is_schedule_free(self.optimizer)
        self.step = self.anew = 0
        self.adversary = None
        if recipe.loss.adversarial:
            self.adversary = Adversary(recipe.loss, self.accelerator, recipe.optimizer.clip)
            self.objective.judge = self.adversary.judge
        self._resume()
        self.task.resumed()
        if training.compile:
            self.task.compile()
        self.prepared, self.optimizer = self.accelerator.prepare(self.objective, self.optimizer)
        if self._scaler_state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)
        self.bad = torch.zeros(3, device=self.device)  # non-finite steps: in a row, most in a row, in all
        self.sums: dict[str, Tensor] = {}
        self.stop_signal: int | None = None
        self.deadline = started + 60 * training.minutes if training.minutes else float("inf")

    # ---- the loop -------------------------------------------------------------------------------

    def go(self) -> Path:
        training = self.recipe.training
        loader = make_loader(
            self.dataset,
            batch_size=self.micro,
            num_workers=self.recipe.data.workers,
            seed=training.seed,
            start_sample=self.step * training.batch_size,
            rank=self.rank,
            world_size=self.world,
            pin_memory=self.device.type == "cuda",
        )
        batches = iter(loader)
        with self._signals(), Progress(training.steps, self.step, self.run, enabled=self.main) as progress:
            if self.step == 0:
                self._sample(progress)
            while self.step < training.steps:
                self._step(batches)
                self.step += 1
                last = self.step == training.steps
                if self.step % training.log_every == 0 or last:
                    self._log(progress)
                if self.step % min(training.log_every, training.max_bad) == 0 or last:
                    self._stop_if_bad()
                progress.advance(training.batch_size)
                if training.sample_every and (self.step % training.sample_every == 0 or last):
                    self._sample(progress)
                stopping = self._told_to_stop()
                if self.step % training.checkpoint_every == 0 or last or stopping:
                    self._save()
                if stopping and not last:
                    raise Interrupted(
                        f"stopped at step {self.step} of {training.steps}; saved: the same command goes on"
                    )
        if self.main:
            self.ema.model.save_pretrained(  # type: ignore[operator]
                self.run / "model", extra={"recipe": dataclasses.asdict(self.recipe), "step": self.step}
            )
            if self.dataset.skipped_count:
                log.warning("%d unusable pictures were skipped", self.dataset.skipped_count)
        self.accelerator.wait_for_everyone()
        return self.run / "model"

    def _step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        training, accumulation = self.recipe.training, self.recipe.training.accumulation
        rate = learning_rate(self.recipe.optimizer, self.step, training.steps, self.anew)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        if self.adversary is not None:
            self.adversary.begin_step(self.step, training.steps)
        totals: dict[str, Tensor] = {}
        for micro in range(accumulation):
            position = self.step * accumulation + micro
            seed = draw_seed(training.seed, position)
            inputs = self.task.inputs(next(batches), seed, position)
            torch.manual_seed(seed + self.rank)  # dropout
            syncing = micro == accumulation - 1
            with contextlib.nullcontext() if syncing else self.accelerator.no_sync(self.prepared):
                losses = self.prepared(*inputs)
                self.accelerator.backward(losses["loss"] / accumulation)
            self.task.learned(position)
            if self.adversary is not None:
                losses["discriminator"] = self.adversary.learn(
                    self.objective.real, self.objective.generated, accumulation
                )
            for name, value in losses.items():
                totals[name] = totals.get(name, 0) + value.detach() / accumulation
        self._update(totals, rate)

    def _update(self, totals: dict[str, Tensor], rate: float) -> None:
        training = self.recipe.training
        self.accelerator.unscale_gradients(self.optimizer)
        if self.adversary is not None:
            self.adversary.end_step()
        clip = self.recipe.optimizer.clip or float("inf")
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        # Gradients are averaged over processes, so all of them see the same norm and decide alike.
        finite = torch.isfinite(norm)
        if self.accelerator.scaler is None and self.schedule_free:
            if finite:  # waits for the device: this optimizer cannot skip by itself
                self.optimizer.step()
        else:
            if self.accelerator.scaler is None:
                # Fused AdamW leaves weights and moments alone when told that infinities were found: no host sync.
                self.optimizer.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        bad = (~finite).float()
        in_a_row = (self.bad[0] + 1) * bad
        self.bad = torch.stack([in_a_row, torch.maximum(self.bad[1], in_a_row), self.bad[2] + bad])
        with evaluation_weights(self.optimizer.optimizer):
            if self.step < training.ema_start * training.steps:
                self.ema.copy(self.model)
            else:
                self.ema.update(self.model)
        totals["grad_norm"] = norm.detach()
        for name, value in totals.items():
            kept = torch.where(finite, value.float(), 0.0)
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + kept
        self.sums["count"] = self.sums.get("count", torch.zeros((), device=self.device)) + finite.float()
        self.rate = rate

    # ---- what is written ------------------------------------------------------------------------

    def _log(self, progress: Progress) -> None:
        names = sorted(self.sums)
        values = self.accelerator.reduce(torch.stack([self.sums[n] for n in names]), reduction="sum").tolist()
        sums = dict(zip(names, values, strict=True))
        count = sums.pop("count")
        skipped = int(self.bad[2].item())
        self.sums = {}
        row = {name: total / count for name, total in sums.items()} if count else {}
        progress.log(self.step, {**row, "lr": self.rate, "skipped_steps": skipped})

    def _stop_if_bad(self) -> None:
        """Looked at every few steps only, since it waits for the device; no row of bad steps is missed for that."""
        in_a_row = int(self.bad[1].item())
        if in_a_row >= self.recipe.training.max_bad:
            raise UserError(
                f"losses were not finite for {in_a_row} steps in a row, up to step {self.step}: lower optimizer.lr, "
                "set training.precision to fp32, or start again from an earlier checkpoint"
            )

    def _sample(self, progress: Progress) -> None:
        if not self.main:
            return
        with self._autocast():
            shown = self.task.show(self.ema.model)
        if shown is None:
            return
        grid, figures = shown
        write_file(self.run / "samples" / f"step-{self.step:08d}.png", tensor_to_pil(grid).save)
        progress.image(self.step, grid)
        if figures:
            progress.log(self.step, figures)

    def _save(self) -> None:
        if self.main:
            scaler, optimizer = self.accelerator.scaler, self.optimizer.optimizer
            # A checkpoint holds the weights to evaluate; where those to train are others, it holds them too.
            weights = [p.cpu() for p in training_weights(optimizer)] if self.schedule_free else None
            with evaluation_weights(optimizer):
                checkpoints.save(
                    self.run,
                    self.step,
                    model=self.model,
                    ema=self.ema,
                    trainer={
                        "kind": self.recipe.optimizer.kind,
                        "optimizer": optimizer.state_dict(),
                        "anew": self.anew,
                        "training_weights": weights,
                        "losses": {name: p.detach().cpu() for name, p in self._loss_parameters().items()},
                        "scaler": scaler.state_dict() if scaler is not None else None,
                        "adversary": self.adversary.state() if self.adversary is not None else None,
                    },
                    recipe=dataclasses.asdict(self.recipe),
                    keep=self.recipe.training.keep,
                )
        self.accelerator.wait_for_everyone()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.autocast()

    # ---- set-up ---------------------------------------------------------------------------------

    def _claim_folder(self) -> None:
        """Store the resolved recipe; refuse a folder that holds a run of another model."""
        file, resolved = self.run / "config.yaml", dataclasses.asdict(self.recipe)
        if file.is_file():
            try:
                before = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise UserError(f"{file} is corrupt ({error}): choose another --run") from None
            if checkpoints.latest(self.run) and not same_model(self.task, before):
                raise UserError(f"{self.run} holds a run of another model: choose another --run, or delete that folder")
            now = json.loads(json.dumps(resolved))
            changed = [k for k, v in now.items() if k in before and _lasting(before[k]) != _lasting(v)]
            if changed:
                log.warning("%s: the recipe changed since this run began, in: %s", self.run, ", ".join(changed))
        write_text(file, yaml.safe_dump(json.loads(json.dumps(resolved)), sort_keys=False))

    def _resume(self) -> None:
        self._scaler_state = None
        path = checkpoints.latest(self.run)
        if path is None:
            return
        state, trainer = checkpoints.load(path, model=self.model, ema=self.ema)
        try:
            if trainer.get("kind", "adamw") != self.recipe.optimizer.kind:
                raise ValueError(f"its optimizer is {trainer.get('kind', 'adamw')}")
            own, saved = self._loss_parameters(), trainer.get("losses", {})
            if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in saved.items()}:
                raise ValueError("its losses train other parameters")
            if (self.adversary is None) != (trainer.get("adversary") is None):
                raise ValueError("only one of them has an adversarial loss")
            if self.adversary is not None:
                self.adversary.load(trainer["adversary"])
            for name, parameter in own.items():
                parameter.data.copy_(saved[name])
            self.anew = trainer.get("anew", 0)
            if trainer["optimizer"] is None:  # it did not fit where the checkpoint came from
                self.anew = state["step"]
            else:
                self.optimizer.load_state_dict(trainer["optimizer"])
        except (ValueError, KeyError) as error:
            raise UserError(f"checkpoint {path} does not fit this recipe ({error}): choose another --run") from None
        if self.schedule_free and trainer["optimizer"] is not None:
            restore_training_weights(self.optimizer, trainer["training_weights"])
        self._scaler_state = trainer["scaler"]
        self.step = state["step"]
        if self.main:
            log.info("resuming %s at step %d", self.run, self.step)

    def _loss_parameters(self) -> dict[str, Tensor]:
        """What trains but is no part of the model, such as REPA's projector: kept in checkpoints only."""
        model = {id(p) for p in self.model.parameters()}
        trained = ((n, p) for n, p in self.objective.named_parameters() if p.requires_grad)
        return {name: p for name, p in trained if id(p) not in model}

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Within: Ctrl-C and SIGTERM finish the step and save; a second Ctrl-C stops at once."""

        def remember(number: int, frame: FrameType | None) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number

        kept = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            kept = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)

    def _told_to_stop(self) -> bool:
        """True on every process as soon as one was, or its time is up, so that they leave the loop together."""
        own = self.stop_signal is not None or time.monotonic() >= self.deadline
        if self.world == 1:
            return own
        flag = torch.tensor(float(own), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)


def _lasting(values: Any) -> Any:
    """A part of a recipe without what may differ from one sitting to the next."""
    return {k: v for k, v in values.items() if k != "minutes"} if isinstance(values, dict) else values


def _accelerator(recipe: Recipe) -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError:
        raise UserError("training needs accelerate: pip install 'monobath[train]'") from None
    precision = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[recipe.training.precision]
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError('training.precision is "fp16", which needs a GPU: use bf16 or fp32')
    # accelerate remembers the precision of a process' first run; a second run may want another.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=precision, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
