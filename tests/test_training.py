"""Laws of the training loop, on a tiny real model and real (small, generated) pictures."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import losses_of
from PIL import Image
from safetensors.torch import load_file

from monobath import Tokenizer, UserError
from monobath.decoders import KLConfig, UViTConfig
from monobath.losses.perceptual import EffLiteDistance
from monobath.models.encoder import EncoderConfig
from monobath.tokenizer import SamplerConfig, TokenizerConfig
from monobath.training import Interrupted, Recipe, Run, checkpoints, dump_recipe, train
from monobath.training.config import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    TimesConfig,
    TrainingConfig,
)
from monobath.training.ema import EMA
from monobath.training.objectives.base import AutoencoderObjective, Draws, draw_seed
from monobath.training.optimizers import learning_rate, make_optimizer
from monobath.training.recipe import DecoderRecipe, TokenizerRecipe
from monobath.training.recipes import load_recipe


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 small pictures: smooth colours with an edge, no two alike."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(20):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        picture = np.array(Image.fromarray(coarse).resize((44, 36), Image.Resampling.BICUBIC))
        picture[rng.integers(5, 30) :] //= 2
        Image.fromarray(picture).save(folder / f"{i:02d}.png")
    return folder


def tiny_model(factor: int = 8, channels: int = 4) -> TokenizerConfig:
    levels = (factor // 4).bit_length()
    return TokenizerConfig(
        encoder=EncoderConfig(
            factor=factor, latent_channels=channels, base=16, multipliers=[1] * levels, patch=4, blocks=1,
            middle_attention=False, linear_skip=True,
        ),
        decoder=UViTConfig(
            size="custom", factor=factor, latent_channels=channels, prediction="x", patch=4, channels=[16, 16],
            middle_blocks=1, heads=2, down_blocks=1, linear_skip=True,
        ),
    )  # fmt: skip


def tiny_recipe(run: Path, photos: Path, *, loss: dict | None = None, **training: object) -> Recipe:
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "sample_every": 3, "samples": 2, "log_every": 1}
    kind = TokenizerRecipe if training.get("train_encoder", True) else DecoderRecipe
    return kind(
        name="tiny",
        run=str(run),
        model=tiny_model(),
        data=DataConfig(source=[str(photos)], size=32, scale=[32, 40], workers=0),
        times=TimesConfig(ones=0.5, zero_noise=0.5),
        loss=LossConfig(**({"perceptual": 0.0} | (loss or {}))),
        optimizer=OptimizerConfig(lr=1e-3, warmup=2),
        training=TrainingConfig(**(settings | training)),  # type: ignore[arg-type]
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Tokenizer.from_pretrained(folder).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- a run ------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(tmp_path, photos):
    model = train(tiny_recipe(tmp_path / "run", photos, loss={"perceptual": 0.1}))
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["steps"] == 6
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    assert Image.open(run / "samples" / "step-00000006.png").size == (2 * 34 + 2, 2 * 34 + 2)
    assert list(run.glob("events.out.tfevents*"))
    logged = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert all(
        {"loss", "flow", "perceptual", "kl", "lr", "grad_norm", "images_per_second"} <= row.keys() for row in logged
    )
    tokenizer = Tokenizer.from_pretrained(model)
    assert json.loads((model / "config.json").read_text())["training"]["step"] == 6
    picture = Image.open(photos / "00.png")
    assert tokenizer.decode(tokenizer.encode(picture).mode(), size=(36, 44)).shape == (1, 3, 36, 44)


def test_training_learns(tmp_path, photos):
    recipe = tiny_recipe(tmp_path / "run", photos, steps=60, sample_every=0, checkpoint_every=60, ema=0.9)
    recipe.optimizer = OptimizerConfig(lr=3e-3, warmup=5)
    recipe.data.scale = [32, 32]
    train(recipe)
    losses = [row["flow"] for row in rows(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_photos_that_stay_on_the_device_train_alike(tmp_path, photos):
    losses = {}
    for cache in (True, "device"):
        recipe = tiny_recipe(tmp_path / str(cache), photos, steps=4, sample_every=0)
        recipe.data.cache = cache
        train(recipe)
        losses[cache] = [row["flow"] for row in rows(tmp_path / str(cache))]
    assert losses["device"] == pytest.approx(losses[True], rel=0.02)  # pixels differ by rounding
    with pytest.raises(UserError, match="for photos"):
        DataConfig(latents=True, cache="device")


@pytest.mark.parametrize(("factor", "channels"), [(16, 4), (16, 16), (32, 32)])
def test_deeper_tokenizers_train_save_load_and_decode(tmp_path, photos, factor, channels):
    recipe = tiny_recipe(tmp_path / "run", photos, steps=2)
    recipe.model = tiny_model(factor, channels)
    tokenizer = Tokenizer.from_pretrained(train(recipe))
    posterior = tokenizer.encode(torch.zeros(1, 3, 40, 72))
    assert posterior.mode().shape == (1, channels, -(-40 // factor), -(-72 // factor))
    assert tokenizer.decode(posterior.mode(), size=posterior.size).shape == (1, 3, 40, 72)


def test_runs_of_different_seeds_draw_different_noise():
    """Seeds that differ by an even number too: a CPU generator reads 32 bits of its seed."""
    firsts = [
        Draws.make(draw_seed(seed, step), (1, 3, 2, 2), (1, 4, 1, 1), TimesConfig()).noise.flatten().tolist()
        for seed in range(8)
        for step in range(4)
    ]
    assert len({tuple(values) for values in firsts}) == 32
    assert len({draw_seed(seed, step) for seed in range(50) for step in range(2000)}) == 100_000


# ---- resuming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted(tmp_path, photos, monkeypatch, workers):
    straight = tiny_recipe(tmp_path / "straight", photos)
    straight.data.workers = workers
    whole = weights(train(straight))

    class Killed(Exception):
        pass

    step = Run.step

    def die_at_four(self):
        if self.done == 4:
            raise Killed
        step(self)

    monkeypatch.setattr(Run, "step", die_at_four)
    with pytest.raises(Killed):
        train(tiny_recipe(tmp_path / "cut", photos))
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "model").exists()
    assert same(weights(train(tiny_recipe(tmp_path / "cut", photos))), whole)
    strip = [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(tmp_path / "cut")]
    expected = [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows(tmp_path / "straight")]
    assert strip == expected


def test_a_run_in_sittings_equals_one_without_limit(tmp_path, photos, caplog):
    whole = weights(train(tiny_recipe(tmp_path / "whole", photos, steps=3)))
    for done in (1, 2):
        with pytest.raises(Interrupted, match=f"stopped at step {done} of 3"):
            train(tiny_recipe(tmp_path / "sittings", photos, steps=3, minutes=1e-6 * done))
    assert same(weights(train(tiny_recipe(tmp_path / "sittings", photos, steps=3))), whole)
    assert "recipe changed" not in caplog.text


@pytest.mark.parametrize("kind", ["adamw", "radam_schedulefree"])
def test_resumed_equals_uninterrupted_with_a_projector_and_either_optimizer(tmp_path, photos, kind):
    """Also when the interrupted run saved at steps where the other did not: saving moves no weight."""

    def recipe(name, steps, every):
        made = tiny_recipe(tmp_path / name, photos, loss={"repa": 0.25}, steps=steps, checkpoint_every=every, ema=0.9)
        made.optimizer = OptimizerConfig(kind=kind, lr=1e-2, schedule="constant", clip=0.1)
        made.training.ema_start = 0.0
        return made

    whole, cut = train(recipe("whole", 9, 9)), recipe("cut", 7, 7)
    train(cut)
    begun = torch.load(tmp_path / "cut" / "checkpoints" / "step-00000007" / "trainer.pt", weights_only=True)
    assert same(weights(train(recipe("cut", 9, 2))), weights(whole))
    ends = [
        torch.load(tmp_path / name / "checkpoints" / "step-00000009" / "trainer.pt", weights_only=True)
        for name in ("whole", "cut")
    ]
    assert same(ends[0]["losses"], ends[1]["losses"])
    assert not same(begun["losses"], ends[0]["losses"])
    assert {name.split(".")[0] for name in begun["losses"]} == {"repa"}
    assert not [name for name in weights(whole) if "repa" in name or "projector" in name]


def test_schedule_free_saves_and_averages_the_weights_to_evaluate(tmp_path, photos):
    recipe = tiny_recipe(tmp_path / "run", photos, steps=8, ema=0.0)
    recipe.optimizer = OptimizerConfig(kind="radam_schedulefree", lr=1e-2)
    run = Run(recipe)
    begin = [p.detach().clone() for p in run.objective.parameters()]
    model = weights(run.train())
    optimizer = run.optimizer.optimizer
    beta = recipe.optimizer.betas[0]
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    for (name, y), start in zip(run.model.named_parameters(), begin, strict=True):
        x = torch.lerp(y, optimizer.state[y]["z"], 1 - 1 / beta)
        torch.testing.assert_close(saved[name], x.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(model[name], saved[name])
        assert not torch.equal(x, y), name
        assert not torch.equal(y, start), name
    assert {row["lr"] for row in rows(tmp_path / "run") if "lr" in row} == {1e-2}


@pytest.mark.parametrize("change", ["kind", "repa", "features"])
def test_a_run_keeps_its_optimizer_and_what_its_losses_train(tmp_path, photos, change):
    recipe = tiny_recipe(tmp_path / "run", photos, loss={"repa": 0.25}, steps=1)
    train(recipe)
    recipe.training.steps = 2
    if change == "kind":
        recipe.optimizer.kind = "radam_schedulefree"
    elif change == "repa":
        recipe.loss.repa = 0.0
    else:
        recipe.loss.repa_hidden = 16  # a projector of another shape
    with pytest.raises(UserError, match=r"step-00000001 does not fit this recipe \(its .* choose another --run"):
        train(recipe)


def test_without_its_package_schedule_free_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(UserError, match=r"pip install 'monobath\[train\]', or use adamw"):
        make_optimizer(torch.nn.Linear(1, 1), OptimizerConfig(kind="radam_schedulefree"))


def test_the_recipe_that_a_run_states_is_read_again(tmp_path, photos):
    recipe = tiny_recipe(tmp_path / "run", photos)
    write_recipe(tmp_path / "config.yaml", recipe)
    assert load_recipe(str(tmp_path / "config.yaml")) == recipe


def run_command(run: Path, photos: Path, recipe_file: Path, **popen: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "monobath", "train", str(recipe_file), "--data", str(photos), "--run", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **popen)


def write_recipe(file: Path, recipe: Recipe) -> None:
    file.write_text(dump_recipe(recipe))


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_kill_nine_then_the_same_command_gives_the_same_weights(tmp_path, photos):
    recipe = tiny_recipe(Path("unused"), photos, steps=40, sample_every=0, checkpoint_every=5)
    write_recipe(tmp_path / "recipe.yaml", recipe)
    process = run_command(tmp_path / "cut", photos, tmp_path / "recipe.yaml")
    wait_for(tmp_path / "cut" / "checkpoints" / "step-00000010", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut" / "model").exists(), "the run was over before it was killed"
    for name in ("cut", "whole"):
        process = run_command(tmp_path / name, photos, tmp_path / "recipe.yaml")
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert same(weights(tmp_path / "cut" / "model"), weights(tmp_path / "whole" / "model"))


def test_a_run_that_begins_anew_writes_its_first_line_once(tmp_path, photos, monkeypatch):
    def die(self):
        raise MemoryError

    with monkeypatch.context() as context:
        context.setattr(Run, "step", die)
        with pytest.raises(MemoryError):
            train(tiny_recipe(tmp_path / "run", photos, steps=2))
    train(tiny_recipe(tmp_path / "run", photos, steps=2))
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 2]


def test_ctrl_c_saves_first_and_exits_130(tmp_path, photos):
    recipe = tiny_recipe(Path("unused"), photos, steps=100_000, sample_every=0, checkpoint_every=50_000)
    write_recipe(tmp_path / "recipe.yaml", recipe)
    process = run_command(tmp_path / "run", photos, tmp_path / "recipe.yaml")
    end = time.monotonic() + 120
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    saved = checkpoints.latest(tmp_path / "run")
    assert saved is not None
    assert json.loads((saved / "state.json").read_text())["step"] == rows(tmp_path / "run")[-1]["step"]


def test_another_model_in_the_run_folder_is_refused(tmp_path, photos):
    train(tiny_recipe(tmp_path / "run", photos, steps=2))
    other = tiny_recipe(tmp_path / "run", photos, steps=2)
    other.model = tiny_model(16, 4)
    with pytest.raises(UserError, match="another model"):
        train(other)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    for damaged in ("x", [1], None, 3):
        (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config | {"model": damaged}))
        with pytest.raises(UserError, match="another model"):
            train(tiny_recipe(tmp_path / "run", photos, steps=2))


def test_a_corrupt_checkpoint_is_named(tmp_path, photos):
    train(tiny_recipe(tmp_path / "run", photos, steps=2))
    for name in ("model.safetensors", "trainer.pt", "state.json"):
        file = tmp_path / "run" / "checkpoints" / "step-00000002" / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"step-00000002 is corrupt .* delete it"):
            train(tiny_recipe(tmp_path / "run", photos, steps=4))
        file.write_bytes(content)


def test_init_starts_from_a_model_and_refuses_another_shape(tmp_path, photos):
    first = train(tiny_recipe(tmp_path / "first", photos, steps=2))
    second = tiny_recipe(tmp_path / "second", photos, steps=1, ema=0.0)
    second.init, second.optimizer.lr, second.optimizer.weight_decay = str(first), 0.0, 0.0
    assert same(weights(train(second)), weights(first))
    third = tiny_recipe(tmp_path / "third", photos, steps=1)
    third.init, third.model = str(first), tiny_model(16, 4)
    with pytest.raises(UserError, match="init: the encoder"):
        train(third)


# ---- one process and several ------------------------------------------------------------------------

TWO_RANKS = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from test_training import tiny_recipe
from monobath.training import Run
out, photos = Path(sys.argv[2]), Path(sys.argv[3])
recipe = tiny_recipe(out / "run", photos, steps=1, sample_every=0, batch_size=8, loss={"perceptual": 0.1, "repa": 0.25})
recipe.optimizer.clip = 0.0
run = Run(recipe)
run.train()
if run.main:
    kept = {n: p.grad for n, p in run.objective.named_parameters() if p.grad is not None}
    torch.save(kept, out / "gradients.pt")
"""


def test_two_processes_give_the_gradients_of_one(tmp_path, photos):
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    gradients = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += ["--main_process_port", "0"]
        command = [*launch, str(script), str(Path(__file__).parent), str(out), str(photos)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        gradients[processes] = torch.load(out / "gradients.pt", weights_only=True)
        config = json.loads((out / "run" / "checkpoints" / "step-00000001" / "state.json").read_text())
        assert config["step"] == 1
    assert gradients[1].keys() == gradients[2].keys()
    for name, one in gradients[1].items():
        torch.testing.assert_close(gradients[2][name], one, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_accumulation_gives_the_gradients_of_the_whole_batch(tmp_path, photos):
    trained = []
    for accumulation in (1, 4):
        recipe = tiny_recipe(tmp_path / str(accumulation), photos, steps=2, accumulation=accumulation, ema=0.0)
        recipe.times = TimesConfig()
        run = Run(recipe)
        # The noise of a micro-batch depends on its number: give every sample the same noise and time instead.
        original = Draws.make

        def constant(seed, images, latents, times, original=original, **kwargs):
            draws = original(0, (1, *images[1:]), (1, *latents[1:]), times)
            return Draws(
                draws.t.expand(images[0]),
                draws.noise.expand(images[0], -1, -1, -1),
                draws.latent_noise.expand(images[0], -1, -1, -1),
            )

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Draws, "make", constant)
            run.train()
        trained.append({n: p.grad for n, p in run.objective.named_parameters() if p.grad is not None})
    for name, one in trained[0].items():
        torch.testing.assert_close(trained[1][name], one, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_batch_that_does_not_divide_is_refused(tmp_path, photos):
    with pytest.raises(UserError, match=r"batch_size=4 must be divisible by 3"):
        train(tiny_recipe(tmp_path / "run", photos, accumulation=3))


# ---- faults -----------------------------------------------------------------------------------------


def spoil(monkeypatch, bad_steps):
    """Make the loss NaN at the given steps."""
    forward, counter = AutoencoderObjective.forward, iter(range(10_000))

    def spoiled(self, batch):
        losses = forward(self, batch)
        factor = float("nan") if next(counter) in bad_steps else 1.0
        losses.total, losses.parts = losses.total * factor, {k: v * factor for k, v in losses.parts.items()}
        return losses

    monkeypatch.setattr(AutoencoderObjective, "forward", spoiled)


@pytest.mark.parametrize(("kind", "bad"), [("adamw", 1), ("radam_schedulefree", 5)])  # RAdam begins with its 5th step
def test_a_non_finite_step_is_skipped_and_counted(tmp_path, photos, monkeypatch, kind, bad):
    recipe = tiny_recipe(tmp_path / "run", photos, steps=bad + 3, sample_every=0, ema=0.0)
    recipe.optimizer.kind = kind
    run = Run(recipe)
    before = {}
    step = Run.step

    def spy(self):
        before[self.done] = {k: v.clone() for k, v in self.model.state_dict().items()}
        moments = self.optimizer.optimizer.state.values()
        before[self.done] |= {f"{i}.{k}": v.clone() for i, m in enumerate(moments) for k, v in m.items()}
        step(self)

    spoil(monkeypatch, {bad})
    monkeypatch.setattr(Run, "step", spy)
    run.train()
    assert same(before[bad], before[bad + 1])
    assert not same(before[bad - 1], before[bad])
    assert not same(before[bad + 1], before[bad + 2])
    logged = rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in logged] == [0] * bad + [1] * 3
    assert "loss" not in logged[bad]
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run" / "model").values())


def test_ten_in_a_row_is_fatal_with_a_remedy(tmp_path, photos, monkeypatch):
    spoil(monkeypatch, set(range(3, 100)))
    with pytest.raises(UserError, match=r"not finite for 10 steps in a row, up to step 13: lower optimizer.lr"):
        train(tiny_recipe(tmp_path / "run", photos, steps=60, sample_every=0))


def test_a_row_of_bad_steps_is_fatal_even_if_it_ends_between_two_log_lines(tmp_path, photos, monkeypatch):
    spoil(monkeypatch, set(range(3, 13)))
    recipe = tiny_recipe(tmp_path / "run", photos, steps=60, sample_every=0, log_every=40)
    with pytest.raises(UserError, match=r"not finite for 10 steps in a row, up to step 20"):
        train(recipe)


def test_broken_files_are_counted_and_the_run_goes_on(tmp_path, photos, caplog):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in photos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "broken.jpg").write_bytes(b"not a picture")
    with caplog.at_level(logging.WARNING):
        train(tiny_recipe(tmp_path / "run", folder, steps=12, sample_every=0, checkpoint_every=12))
    assert "broken.jpg" in caplog.text
    assert "1 unusable pictures were skipped" in caplog.text


def test_fp16_without_a_gpu_says_what_to_do(tmp_path, photos):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="use bf16 or fp32"):
        train(tiny_recipe(tmp_path / "run", photos, precision="fp16"))


# ---- switches ---------------------------------------------------------------------------------------


def test_bf16_trains_to_finite_float32_weights(tmp_path, photos):
    state = weights(train(tiny_recipe(tmp_path / "run", photos, precision="bf16", loss={"perceptual": 0.1})))
    assert all(v.dtype == torch.float32 and torch.isfinite(v).all() for v in state.values())


def test_checkpointing_and_memory_format_change_nothing(tmp_path, photos):
    plain = weights(train(tiny_recipe(tmp_path / "a", photos, steps=2, channels_last=False)))
    checkpointed = weights(train(tiny_recipe(tmp_path / "b", photos, steps=2, channels_last=False, checkpointing=True)))
    last = weights(train(tiny_recipe(tmp_path / "c", photos, steps=2, channels_last=True)))
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(last[name], value, rtol=1e-2, atol=1e-4)


def test_a_frozen_encoder_keeps_its_bytes(tmp_path, photos):
    recipe = tiny_recipe(tmp_path / "run", photos, train_encoder=False)
    run = Run(recipe)
    before = {k: v.clone() for k, v in run.model.encoder.state_dict().items()}
    decoder = {k: v.clone() for k, v in run.model.decoder.state_dict().items()}
    run.train()
    assert same(before, run.model.encoder.state_dict())
    assert not same(decoder, run.model.decoder.state_dict())
    assert all("kl" not in row for row in rows(tmp_path / "run"))


# ---- pieces -----------------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    tokenizer = Tokenizer(tiny_model())
    for parameter in tokenizer.parameters():  # zero-initialised branches would hide what lies behind them
        torch.nn.init.normal_(parameter, std=0.1)
    objective = AutoencoderObjective(tokenizer, LossConfig(), train_encoder=True)
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    draws = Draws.make(0, (2, 3, 32, 48), (2, 4, 4, 6), TimesConfig())
    losses_of(objective, x, draws.t, draws.noise, draws.latent_noise).total.backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert isinstance(objective.perceptual, EffLiteDistance)
    assert all(p.grad is None for p in objective.perceptual.parameters())


def test_small_times_can_count_more():
    x, tokenizer = torch.rand(2, 3, 32, 48), Tokenizer(tiny_model())
    draws = Draws.make(0, (2, 3, 32, 48), (2, 4, 4, 6), TimesConfig())
    t = torch.full((2,), 0.25)
    plain, weighted = (
        losses_of(
            AutoencoderObjective(tokenizer, LossConfig(perceptual=0, time_power=power), train_encoder=False),
            x,
            t,
            draws.noise,
            draws.latent_noise,
        ).total
        for power in (0.0, 1.5)
    )
    torch.testing.assert_close(weighted, plain * 0.25**-1.5)
    with pytest.raises(UserError, match=r"time_power is -1"):
        LossConfig(time_power=-1)
    model = TokenizerConfig(decoder=KLConfig(channels=[8, 8, 8, 8]), sampler=SamplerConfig(noise="zero"))
    with pytest.raises(UserError, match="KL-VAE decoder, which has no times"):
        TokenizerRecipe(name="x", model=model, loss=LossConfig(time_power=1))


def test_losses_are_the_sum_of_their_parts():
    torch.manual_seed(0)
    config = LossConfig(flow=2.0, perceptual=0.3, pooled=0.02, kl=1e-3)
    objective = AutoencoderObjective(Tokenizer(tiny_model()), config, train_encoder=True)
    draws = Draws.make(0, (2, 3, 32, 48), (2, 4, 4, 6), TimesConfig())
    found = losses_of(objective, torch.rand(2, 3, 32, 48), draws.t, draws.noise, draws.latent_noise)
    losses = found.named
    assert objective.pooled is not None
    pooled = objective.pooled(found.clean, found.target).mean()
    assert 0 < losses["pooled"] == pooled
    expected = 2 * losses["flow"] + 0.3 * losses["perceptual"] + 0.02 * losses["pooled"] + 1e-3 * losses["kl"]
    torch.testing.assert_close(losses["loss"], expected)


def test_draws_of_two_ranks_are_those_of_one():
    times = TimesConfig(ones=0.5, zero_noise=0.5)
    whole = Draws.make(3, (8, 3, 8, 8), (8, 4, 1, 1), times)
    for rank in (0, 1):
        part = Draws.make(3, (4, 3, 8, 8), (4, 4, 1, 1), times, rank=rank, world=2)
        for name in ("t", "noise", "latent_noise"):
            torch.testing.assert_close(
                getattr(part, name), getattr(whole, name)[4 * rank : 4 * rank + 4], rtol=0, atol=0
            )
    assert not torch.equal(whole.noise, Draws.make(4, (8, 3, 8, 8), (8, 4, 1, 1), times).noise)


@pytest.mark.parametrize(("ones", "zero_noise"), [(0.0, 0.0), (0.5, 0.5), (0.75, 0.667), (1.0, 1.0), (1.0, 0.0)])
def test_fractions_of_times_and_noises(ones, zero_noise):
    draws = Draws.make(0, (240, 3, 2, 2), (240, 4, 1, 1), TimesConfig(ones=ones, zero_noise=zero_noise))
    at_one = draws.t == 1
    zero = (draws.noise == 0).all(dim=(1, 2, 3))
    assert at_one.sum() == pytest.approx(240 * ones, abs=1)
    assert (zero & ~at_one).sum() == 0
    assert zero.sum() == pytest.approx(240 * ones * zero_noise, abs=1)


def test_learning_rate_warms_up_then_falls_to_zero():
    config = OptimizerConfig(lr=1.0, warmup=10)
    rates = [learning_rate(config, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[110] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="constant"), 10_000, 20_000) == 1.0
    assert learning_rate(OptimizerConfig(lr=1.0, kind="radam_schedulefree"), 0, 20_000) == 1.0


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_follows_the_formula_and_copies_buffers(warmup):
    model = torch.nn.BatchNorm1d(3)
    ema = EMA(model, 0.9, warmup=warmup)
    expected = torch.ones(3)
    for n in range(30):
        with torch.no_grad():
            model.weight.fill_(float(n))
        model.running_mean.fill_(float(n))
        decay = min(0.9, (1 + n) / (10 + n)) if warmup else 0.9
        expected = decay * expected + (1 - decay) * n
        ema.update(model)
    torch.testing.assert_close(ema.model.weight, expected)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert ema.model.weight.requires_grad is False
    ema.copy(model)
    assert torch.equal(ema.model.weight, model.weight)


def test_an_average_can_hold_on_to_the_weights_a_run_starts_from(tmp_path, photos):
    settings = {"steps": 3, "ema": 0.5, "ema_start": 0.0}
    begun = train(tiny_recipe(tmp_path / "start", photos, steps=1))
    found = {}
    for warmup in (True, False):
        recipe = tiny_recipe(tmp_path / f"run-{warmup}", photos, ema_warmup=warmup, **settings)
        recipe.init = str(begun)
        found[warmup] = weights(train(recipe))
    start = weights(begun)
    moved = {warmup: sum((state[k] - start[k]).square().sum() for k in start) for warmup, state in found.items()}
    assert 0 < moved[False] < 0.7 * moved[True]


def test_checkpoints_keep_the_newest(tmp_path, photos):
    train(tiny_recipe(tmp_path / "run", photos, steps=5, checkpoint_every=1, keep=3, sample_every=0))
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000004", "step-00000005"]


def test_the_docs_train_step_by_step(tmp_path, photos, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(dump_recipe(tiny_recipe(tmp_path / "run", photos, steps=3)))
    page = Path(__file__).parent.parent / "docs" / "training.md"
    names: dict = {}
    exec(compile(page.read_text().split("```py\n")[1].split("```")[0], page.name, "exec"), names)
    assert names["run"].done == 3
    assert names["folder"] == tmp_path / "run" / "model"
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003"]


# ---- what a run imports -----------------------------------------------------------------------------

ONE_STEP = """
import sys
from monobath import resources
from monobath.training import Run, load_recipe
settings = ["training.batch_size=2", "training.sample_every=0", "data.cache=false", f"run={sys.argv[1]}"]
recipe = load_recipe("cpu-default", settings)
recipe.data.source = [str(path) for path in resources.sample_paths()]
Run(recipe).step()
print(*(name for name in sys.modules if name.startswith("monobath")))
"""
NOT_FOR_DEFAULT = [
    "monobath.generation", "monobath.models.dit", "monobath.losses.adversarial", "monobath.losses.alignment",
    "monobath.training.generation", "monobath.training.objectives.adversarial",
    "monobath.training.objectives.distilled", "monobath.training.objectives.generator",
    "monobath.training.objectives.staged",
]  # fmt: skip


def test_the_default_imports_no_other_kind_of_training(tmp_path):
    command = [sys.executable, "-c", ONE_STEP, str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    assert "monobath.training.run" in found
    assert [name for name in NOT_FOR_DEFAULT if name in found] == []
