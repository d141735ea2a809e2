"""The training loop, on accelerate: one process on a CPU, or many GPUs through `accelerate launch`.

    train(recipe)        # the same call on the same run folder resumes, bit for bit on a CPU

    run = Run(recipe)    # the same, step by step
    run.step()
    run.save()

A step's random numbers and crops depend only on (seed, step), never on what ran before. Nothing in a step waits for
the device: non-finite steps are skipped by the optimizer itself, and counted when a line is logged.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import make_loader
from ..errors import UserError, explained_as
from ..files import write_file
from ..images import tensor_to_pil
from . import checkpoints, optimizers
from .ema import EMA
from .objectives.base import draw_seed
from .processes import make_accelerator
from .progress import Progress
from .recipe import Recipe, TokenizerRecipe
from .stopping import Stopping
from .tasks import Place, task_of

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
    return Run(recipe).train()


class Run:
    """A training run that can be stepped; it goes on where its folder stands.

    Args:
        recipe: what is trained, and how.

    Attributes:
        folder: the run folder.
        done: optimizer steps so far.
        model, objective, ema, optimizer: what learns, what it minimises, its average, and what moves it.

    Raises:
        UserError: see `train`.
    """

    def __init__(self, recipe: Recipe) -> None:
        training = recipe.training
        self.stopping = Stopping(training.minutes)
        self.recipe, self.folder = recipe, Path(recipe.run)
        self.accelerator = make_accelerator(recipe)
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        share = self.world * training.accumulation
        if training.batch_size % share:
            raise UserError(
                f"training.batch_size={training.batch_size} must be divisible by {share} "
                f"({self.world} processes × {training.accumulation} accumulation steps)"
            )
        self.micro = training.batch_size // share
        self.task = task_of(recipe, Place(device=self.device, rank=self.rank, world=self.world, micro=self.micro))
        self.dataset = self.task.dataset
        if self.main:
            checkpoints.claim(self.folder, recipe.to_dict(), self.task.has_model)

        torch.manual_seed(training.seed)
        self.task.build()
        self.model, self.objective = self.task.model, self.task.objective
        self.objective.to(self.device)
        if training.channels_last and not training.shard:  # which needs rows that follow one another
            self.objective.to(memory_format=torch.channels_last)
        self.ema = EMA(self.model, training.ema, warmup=training.ema_warmup)
        self.sharding: Any = None
        if training.shard:
            from .sharding import Sharding

            self.task.resumed()  # a frozen encoder is the same in every checkpoint
            self.sharding = Sharding(recipe, self.objective, self.model, self.ema, self.accelerator)
        self.optimizer: Any = optimizers.make_optimizer(self.objective, recipe.optimizer)
        self.schedule_free = optimizers.is_schedule_free(self.optimizer)
        self.adversary = None
        if isinstance(recipe, TokenizerRecipe) and recipe.loss.adversarial:
            from .objectives.adversarial import Adversary

            self.adversary = Adversary(recipe.loss, self.accelerator, recipe.optimizer.clip)
        self.done = self.anew = 0
        self._resume()
        if self.sharding is None:
            self.task.resumed()
        if training.compile:
            self.task.compile()
        if self.sharding is None:
            self.prepared, self.optimizer = self.accelerator.prepare(self.objective, self.optimizer)
        else:
            self.optimizer = self.accelerator.prepare(self.optimizer)
        if self._scaler_state is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)
        self.bad = torch.zeros(3, device=self.device)  # non-finite steps: in a row, most in a row, in all
        self.sums: dict[str, Tensor] = {}

    # ---- the loop -------------------------------------------------------------------------------

    def train(self) -> Path:
        """All steps that are left, with logs, sample grids and checkpoints; returns the folder of the finished model.

        Raises:
            UserError, Interrupted: see `train`.
        """
        training = self.recipe.training
        with self.stopping, Progress(training.steps, self.done, self.folder, enabled=self.main) as progress:
            if self.done == 0:
                self._sample(progress)
            while self.done < training.steps:
                self.step()
                last = self.done == training.steps
                if self.done % training.log_every == 0 or last:
                    self._log(progress)
                if self.done % min(training.log_every, training.max_bad) == 0 or last:
                    self._stop_if_bad()
                progress.advance(training.batch_size)
                if training.sample_every and (self.done % training.sample_every == 0 or last):
                    self._sample(progress)
                stopping = self.told_to_stop()
                if self.done % training.checkpoint_every == 0 or last or stopping:
                    self.save()
                if stopping and not last:
                    where = f"stopped at step {self.done} of {training.steps}"
                    raise Interrupted(f"{where}; saved: the same command goes on")
        return self.finish()

    @cached_property
    def _batches(self) -> Iterator[dict[str, Tensor]]:
        return self.batches()

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches that are left, of this process: the recipe's data, unless a subclass takes them from elsewhere.

        Yields:
            `image`, uint8 `(B, 3, size, size)` on any device, and what else `make_loader` yields.
        """
        loader = make_loader(
            self.dataset,
            batch_size=self.micro,
            num_workers=self.recipe.data.workers,
            seed=self.recipe.training.seed,
            start_sample=self.done * self.recipe.training.batch_size,
            rank=self.rank,
            world_size=self.world,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def step(self) -> None:
        """One optimizer step."""
        training, accumulation = self.recipe.training, self.recipe.training.accumulation
        self.rate = optimizers.learning_rate(self.recipe.optimizer, self.done, training.steps, self.anew)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.zero_grad(set_to_none=True)
        judge = self.adversary.begin_step(self.done, training.steps) if self.adversary is not None else None
        totals: dict[str, Tensor] = {}
        for micro in range(accumulation):
            position = self.done * accumulation + micro
            seed = draw_seed(training.seed, position)
            batch = self.task.batch(next(self._batches), seed, position)
            batch.judge = judge
            torch.manual_seed(seed + self.rank)  # dropout
            syncing = micro == accumulation - 1
            apart = not syncing and self.sharding is None
            with self.accelerator.no_sync(self.prepared) if apart else contextlib.nullcontext():
                losses = self.prepared(batch) if self.sharding is None else self.sharding(batch, syncing=syncing)
                self.accelerator.backward(losses.total / accumulation)
            self.task.learned(batch, losses, position)
            values = losses.named
            if self.adversary is not None:
                values["discriminator"] = self.adversary.learn(losses, accumulation)
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.detach() / accumulation
        self._update(totals)
        self.done += 1

    def _update(self, totals: dict[str, Tensor]) -> None:
        training = self.recipe.training
        self.accelerator.unscale_gradients(self.optimizer)
        if self.adversary is not None:
            self.adversary.end_step()
        clip = self.recipe.optimizer.clip or float("inf")
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        norm = norm if self.sharding is None else norm.full_tensor()  # type: ignore[attr-defined]
        # Gradients are averaged over processes, so all of them see the same norm and decide alike.
        finite = torch.isfinite(norm)
        if self.accelerator.scaler is None and (self.schedule_free or self.sharding is not None):
            if finite:  # waits for the device: this optimizer, or a sharded one, cannot skip by itself
                self.optimizer.step()
        else:
            if self.accelerator.scaler is None:
                # Fused AdamW leaves weights and moments alone when told that infinities were found: no host sync.
                self.optimizer.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        bad = (~finite).float()
        in_a_row = (self.bad[0] + 1) * bad
        self.bad = torch.stack([in_a_row, torch.maximum(self.bad[1], in_a_row), self.bad[2] + bad])
        with optimizers.evaluation_weights(self.optimizer.optimizer):
            if self.done < (training.ema_start_steps or training.ema_start * training.steps):
                self.ema.copy(self.model)
            else:
                self.ema.update(self.model)
        totals["grad_norm"] = norm.detach()
        totals["count"] = torch.ones((), device=self.device)
        for name, value in totals.items():
            kept = torch.where(finite, value.float(), 0.0)
            self.sums[name] = self.sums.get(name, torch.zeros((), device=self.device)) + kept

    # ---- what is written ------------------------------------------------------------------------

    def _log(self, progress: Progress) -> None:
        names = sorted(self.sums)
        values = self.accelerator.reduce(torch.stack([self.sums[n] for n in names]), reduction="sum").tolist()
        sums = dict(zip(names, values, strict=True))
        count = sums.pop("count")
        skipped = int(self.bad[2].item())
        self.sums = {}
        row = {name: total / count for name, total in sums.items()} if count else {}
        progress.log(self.done, {**row, "lr": self.rate, "skipped_steps": skipped})

    def _stop_if_bad(self) -> None:
        """Looked at every few steps only, since it waits for the device; no row of bad steps is missed for that."""
        in_a_row = int(self.bad[1].item())
        if in_a_row >= self.recipe.training.max_bad:
            raise UserError(
                f"losses were not finite for {in_a_row} steps in a row, up to step {self.done}: lower optimizer.lr, "
                "set training.precision to fp32, or start again from an earlier checkpoint"
            )

    def _sample(self, progress: Progress) -> None:
        model = self.averaged()
        if not self.main:
            return
        with self.accelerator.autocast():
            shown = self.task.show(model)
        if shown is None:
            return
        grid, figures = shown
        write_file(self.folder / "samples" / f"step-{self.done:08d}.png", tensor_to_pil(grid).save)
        progress.image(self.done, grid)
        if figures:
            progress.log(self.done, figures)

    def save(self) -> None:
        """Write a checkpoint."""
        if self.sharding is not None:
            self.sharding.save(self.folder, self.done, self.optimizer.optimizer, self._loss_parameters(), self.anew)
        elif self.main:
            scaler, optimizer = self.accelerator.scaler, self.optimizer.optimizer
            # A checkpoint holds the weights to evaluate; where those to train are others, it holds them too.
            weights = [p.cpu() for p in optimizers.training_weights(optimizer)] if self.schedule_free else None
            with optimizers.evaluation_weights(optimizer):
                trainer = {
                    "kind": self.recipe.optimizer.kind,
                    "optimizer": optimizer.state_dict(),
                    "anew": self.anew,
                    "training_weights": weights,
                    "losses": {name: p.detach().cpu() for name, p in self._loss_parameters().items()},
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    "adversary": self.adversary.state() if self.adversary is not None else None,
                }
                checkpoints.save(self.folder, self.done, self.recipe, model=self.model, ema=self.ema, trainer=trainer)
        self.accelerator.wait_for_everyone()

    def finish(self) -> Path:
        """Write the slim averaged model; returns its folder."""
        folder, model = self.folder / "model", self.averaged()
        if self.main:
            checkpoints.prune(self.folder, self.recipe.training.keep)  # a run may have been killed while it did that
            model.save_pretrained(folder, extra={"recipe": self.recipe.to_dict(), "step": self.done})
            if self.dataset.skipped_count:
                log.warning("%d unusable pictures were skipped", self.dataset.skipped_count)
        self.accelerator.wait_for_everyone()
        return folder

    def averaged(self) -> Any:
        """The averaged model; of a sharded run in one piece, on the main process alone, and all must ask for it."""
        return self.ema.model if self.sharding is None else self.sharding.averaged()

    # ---- set-up ---------------------------------------------------------------------------------

    def _resume(self) -> None:
        self._scaler_state = None
        if self.sharding is not None and (newest := checkpoints.latest(self.folder)):
            state = self.sharding.load(newest, self.optimizer, self._loss_parameters())
            self.done, self.anew = state["step"], state["anew"]
            log.info("resuming %s at step %d", self.folder, self.done)
            return
        found = checkpoints.load_latest(self.folder, model=self.model, ema=self.ema)
        if found is None:
            return
        path, state, trainer = found
        # Values of any kind may be in there.
        with explained_as(f"checkpoint {path} does not fit this recipe", "choose another --run"):
            if trainer.get("kind", "adamw") != self.recipe.optimizer.kind:
                raise ValueError(f"its optimizer is {trainer.get('kind', 'adamw')}")
            self.optimizer = optimizers.make_optimizer(self.objective, self.recipe.optimizer, like=trainer["optimizer"])
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
                optimizers.load_state(self.optimizer, trainer["optimizer"])
            if self.schedule_free and trainer["optimizer"] is not None:
                optimizers.restore_training_weights(self.optimizer, trainer["training_weights"])
            self._scaler_state = trainer["scaler"]
        self.done = state["step"]
        if self.main:
            log.info("resuming %s at step %d", self.folder, self.done)

    def _loss_parameters(self) -> dict[str, Tensor]:
        """What trains but is no part of the model, such as REPA's projector: kept in checkpoints only."""
        model = {id(p) for p in self.model.parameters()}
        trained = ((n, p) for n, p in self.objective.named_parameters() if p.requires_grad)
        return {name: p for name, p in trained if id(p) not in model}

    def told_to_stop(self) -> bool:
        """True on every process as soon as one was, or its time is up, so that they leave the loop together."""
        own = self.stopping.asked
        if self.world == 1:
            return own
        flag = torch.tensor(float(own), device=self.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item() > 0)
