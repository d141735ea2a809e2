"""Laws of sharded training: several processes hold parts of one network, and learn what one process would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_training import photos, tiny_recipe  # noqa: F401

from monobath import Tokenizer, UserError
from monobath.training import Run, train

COMMON = """
import json, os, socket, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_training import tiny_recipe
from monobath.training import Run, sharding
sharding.UNIT = 1000
torch.set_num_threads(1)
out, photos = Path(sys.argv[2]), Path(sys.argv[3])

def recipe_of(run):
    recipe = tiny_recipe(run, photos, steps=4, batch_size=8, sample_every=2, checkpoint_every=100, shard=True, ema=0.5,
                         ema_start=0.0, loss={"perceptual": 0.1, "repa": 0.25})
    recipe.optimizer.clip, recipe.optimizer.schedule = 0.0, "constant"
    return recipe

def seen_by(run, found):
    # Keeps in `found` the pictures of every step from now on, of all processes, in their order.
    batches = run.batches
    def kept():
        for batch in batches():
            found.append(run.accelerator.gather(batch["index"]).tolist())
            yield batch
    run.batches = kept
"""
RANKS = (
    COMMON
    + """
from torch.distributed.tensor import DTensor

def everything(run):
    state = run.sharding._state(run.optimizer.optimizer, run._loss_parameters())
    flat = {}
    def walk(name, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif torch.is_tensor(value):
            flat[name] = sharding.whole(value).clone()
    walk("", state)
    return flat

def worker(index, world, port, last):
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    run = Run(recipe_of(out / "run"))
    found = {"before": everything(run) if run.done else {}, "losses": [], "pictures": []}
    seen_by(run, found["pictures"])
    trained = [p for p in run.objective.parameters()]
    assert all(isinstance(p, DTensor) for p in (*trained, *run.ema.model.parameters()))
    while run.done < last:
        run.step()
        total = run.accelerator.reduce(run.sums.pop("loss"), reduction="mean")
        run.sums = {}
        found["losses"].append(total.item())
        if run.done == 1:
            grads = {n: p.grad for n, p in run.objective.named_parameters() if p.grad is not None}
            found["gradients"] = {name: sharding.whole(grad) for name, grad in grads.items()}
    run.save()
    found["after"] = everything(run)
    local = [p for p in trained] + list(run.ema.model.parameters())
    local += [v for s in run.optimizer.optimizer.state.values() for k, v in s.items() if k != "step"]
    found["bytes"] = sum(t.to_local().nbytes for t in local)
    if last == 4:
        run.finish()
    if run.main:
        torch.save(found, out / f"{last}.pt")
    torch.distributed.destroy_process_group()

for world, last in ((2, 2), (1, 3), (4, 4)):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(worker, (world, port, last), nprocs=world, start_method="fork")
"""
)


def in_a_process(script: str, tmp_path: Path, photos: Path, *launch: str) -> None:  # noqa: F811
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, *launch, str(tmp_path / "script.py"), str(Path(__file__).parent), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(photos)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_then_one_then_four_processes_learn_what_one_does(tmp_path, photos):  # noqa: F811
    in_a_process(RANKS, tmp_path, photos)
    two, one, four = (torch.load(tmp_path / f"{last}.pt", weights_only=True) for last in (2, 3, 4))

    recipe = tiny_recipe(
        tmp_path / "plain", photos, steps=4, batch_size=8, sample_every=0, checkpoint_every=100, ema=0.5, ema_start=0.0,
        loss={"perceptual": 0.1, "repa": 0.25},
    )  # fmt: skip
    recipe.optimizer.clip, recipe.optimizer.schedule = 0.0, "constant"
    run, losses = Run(recipe), []
    pictures = [batch["index"].tolist() for batch in islice(run.batches(), 4)]
    while run.done < 4:
        run.step()
        losses.append(run.sums.pop("loss").item())
        run.sums = {}
        if run.done == 1:
            plain = {n: p.grad.clone() for n, p in run.objective.named_parameters() if p.grad is not None}
    assert plain.keys() == two["gradients"].keys()
    for name, expected in plain.items():
        found = two["gradients"][name]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert two["losses"] + one["losses"] + four["losses"] == pytest.approx(losses, rel=1e-4)
    assert two["pictures"] + one["pictures"] + four["pictures"] == pictures
    # Sums of gradients are taken in another order: 6e-6 here, after three steps of AdamW at 1e-3.
    for part, module in (("model", run.model), ("ema", run.ema.model)):
        for name, expected in module.state_dict().items():
            found = four["after"][f"/{part}/{name}"]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

    for before, after in ((two, one), (one, four)):  # what one writes, another number of processes reads, to the bit
        assert before["after"].keys() == after["before"].keys()
        assert all(after["before"][name].equal(value) for name, value in before["after"].items())
    assert two["bytes"] <= 0.55 * one["bytes"]
    assert four["bytes"] <= 0.3 * one["bytes"]

    model = Tokenizer.from_pretrained(tmp_path / "run/model")  # one file, as always
    for name, value in model.state_dict().items():
        assert value.equal(four["after"][f"/ema/{name}"])
    recipe.run = str(tmp_path / "run")
    with pytest.raises(UserError, match="is sharded: set training"):
        Run(recipe)


ELASTIC = (
    COMMON
    + """
from monobath.training import train
step = Run.step
def fall(self):
    if self.done == 3 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and self.rank == 1:
        os._exit(9)
    step(self)
Run.step = fall
recipe = recipe_of(out / "run")
recipe.training.checkpoint_every, recipe.training.sample_every, recipe.training.shard = 3, 0, True
train(recipe)
"""
)


def test_torchrun_restarts_a_run_that_lost_a_process(tmp_path, photos):  # noqa: F811
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    in_a_process(ELASTIC, tmp_path, photos, *launch)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert Tokenizer.from_pretrained(tmp_path / "run/model").config.decoder.kind == "uvit"


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "radam_schedulefree"}, "optimizer.kind radam_schedulefree"), ({"adversarial": 0.5}, "loss.adversarial"),
])  # fmt: skip
def test_what_cannot_be_sharded_says_so(tmp_path, photos, change, message):  # noqa: F811
    recipe = tiny_recipe(tmp_path / "run", photos, shard=True)
    for name, value in change.items():
        setattr(recipe.optimizer if name == "kind" else recipe.loss, name, value)
    with pytest.raises(UserError, match=f"training.shard does not go with {message}"):
        train(recipe)
