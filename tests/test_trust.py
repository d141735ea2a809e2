"""The trials of scripts/trust, small: what docs/trust.md reports at full size."""

from __future__ import annotations

import itertools
import json
import shutil
import sys

import agreement
import disks
import half_precision
import hostile
import kills
import long_run
import pytest
import torch
from safetensors.torch import load_file, save_file
from trial import Loss, Trial
from works import make_photos, saving, tiny_tokenizer, training

from monobath import Tokenizer, UserError
from monobath.data.cache import LatentDataset
from monobath.training import checkpoints
from monobath.training.recipes import load_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="trials need fork and /proc")


@pytest.fixture(autouse=True)
def _one_thread():
    """A fork has one thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos"))


def test_kills(tmp_path, capsys):
    command = ["--kills", "6", "--works", "train", "save_pretrained", "--work", str(tmp_path)]
    assert kills.main(command) == 0
    assert "0 losses" in capsys.readouterr().out
    rows = (tmp_path / "kills/journal.jsonl").read_text()
    assert kills.main(command) == 0  # done: nothing is done again
    assert (tmp_path / "kills/journal.jsonl").read_text() == rows


def test_disks(tmp_path, capsys):
    assert disks.main(["--cases", "14", "--works", "cache-latents", "report", "--work", str(tmp_path)]) == 0
    assert "14 of 14 cases" in capsys.readouterr().out


def test_hostile_files(tmp_path, capsys):
    assert hostile.main(["--cases", "70", "--work", str(tmp_path)]) == 0
    assert "0 losses" in capsys.readouterr().out


def test_halves(tmp_path, photos, tiny, capsys):
    command = ["--precisions", "bfloat16", "--models", tiny, "--crops", "4", "--work", str(tmp_path)]
    assert half_precision.main([*command, "--data", str(photos)]) == 0
    assert "4 crops" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["default", "f8c4"])
def test_packaged_decoders_do_not_overflow_in_float16(name):
    tokenizer = Tokenizer.from_pretrained(name, dtype=torch.float16)
    z = torch.full((1, tokenizer.config.encoder.latent_channels, 2, 3), 1e4)
    z[:, ::2] *= -1
    assert tokenizer.decode(z).isfinite().all()


def test_the_layer_that_overflows_is_named():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(1, 1, bias=False), torch.nn.ReLU())
    torch.nn.init.constant_(model[1].weight, float("inf"))
    assert half_precision.first_overflow(model, lambda: model(torch.ones(1, 1))) == "1"


def test_agreement(tmp_path, tiny, capsys):
    pytest.importorskip("onnxruntime")
    command = ["--engines", "onnxruntime", "--models", tiny, "--pictures", "1", "--work", str(tmp_path)]
    assert agreement.main(command) == 0
    assert "1 of 1 cases" in capsys.readouterr().out


def test_a_long_run_is_watched(tmp_path, tiny):
    """Seconds of the real thing prove nothing: this is that it is measured."""
    options = ["--work", str(tmp_path), "--model", tiny, "--minutes", "0.1", "--every", "0.5", "--block", "60"]
    with pytest.raises(Loss, match="too few"):
        long_run.main(["decode", *options])
    samples = [json.loads(line) for line in (tmp_path / "long-run-decode/journal.jsonl").read_text().splitlines()]
    assert samples[-1]["cpu"] > samples[0]["cpu"]
    assert samples[-1]["rss"] > 20e6
    load_recipe(long_run.training_command(tmp_path, 1)[4])


@pytest.mark.parametrize(
    ("growth", "handles", "slower", "lost"), [(0, 0, 1, False), (20, 0, 1, True), (0, 1, 1, True), (0, 0, 1.3, True)]
)
def test_what_grows_in_a_long_run_is_a_loss(growth, handles, slower, lost):
    rng = torch.Generator().manual_seed(0)
    samples = [
        long_run.Sample(
            t=10.0 * i,
            rss=int(5e8 + growth * 1e6 * i / 360 + 2e6 * torch.randn(1, generator=rng).item()),
            handles=7 + handles * (i > 600), threads=2, cpu=8.0 * i * (slower if i > 500 else 1), work=i, yardstick=0.1,
        )
        for i in range(720)
    ]  # fmt: skip
    if slower > 1:  # processor time never falls
        for before, after in itertools.pairwise(samples):
            after.cpu = before.cpu + (8.0 * slower if after.t > 5000 else 8.0)
    if lost:
        with pytest.raises(Loss):
            long_run.judge("decode", samples, 120, 300)
    else:
        assert long_run.judge("decode", samples, 120, 300) == 0


def test_what_is_lost_is_seen(tmp_path, monkeypatch):
    """A writer that is not atomic loses."""
    monkeypatch.setattr("monobath.store.write_folder", lambda path, write: (path.mkdir(exist_ok=True), write(path)))
    killer = kills.Killer(saving(tmp_path), tmp_path / "now")
    with pytest.raises(Loss):
        [killer.case(0, number) for number in range(40)]


def test_a_run_goes_on_from_the_last_good_checkpoint(tmp_path, photos, caplog):
    """The newest one is torn, at any file; the end is that of the uninterrupted run."""
    work = training(photos)
    work.run(tmp_path)
    expected = (tmp_path / "run/model/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/model")
    newest = checkpoints.latest(tmp_path / "run")
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        work.run(tmp_path)
        assert f"{newest} is corrupt" in caplog.text
        assert (tmp_path / "run/model/model.safetensors").read_bytes() == expected
        assert file.read_bytes() == whole
        caplog.clear()


def test_caches_that_claim_more_than_they_hold(tmp_path):
    hostile.targets(tmp_path)
    file = tmp_path / "cache/latents.json"
    facts = json.loads(file.read_text())
    for change in ({"pictures": 10**13}, {"copies": 2**62}, {"factor": 0}, {"encoder": {"factor": 8}}, {"size": "x"}):
        file.write_text(json.dumps(facts | change))
        with pytest.raises(UserError):
            LatentDataset(tmp_path / "cache")


def test_an_optimizer_of_other_weights_is_refused(tmp_path, photos):
    work = training(photos)
    work.run(tmp_path)
    newest = checkpoints.latest(tmp_path / "run")
    whole = (newest / "trainer.pt").read_bytes()
    for change in (
        lambda state: state.update(exp_avg=state["exp_avg"][:1]),
        lambda state: state.pop("exp_avg"),
        lambda state: state.update(step="5"),
        lambda state: state.update(other=torch.zeros(7)),
    ):
        (newest / "trainer.pt").write_bytes(whole)
        trainer = torch.load(newest / "trainer.pt", weights_only=True)
        change(trainer["optimizer"]["state"][0])
        torch.save(trainer, newest / "trainer.pt")
        with pytest.raises(UserError, match="does not fit this recipe"):
            work.run(tmp_path)
    assert load_file(newest / "model.safetensors")
    save_file({}, newest / "model.safetensors")
    with pytest.raises(UserError, match="does not fit the model"):
        work.run(tmp_path)


def test_a_trial_that_is_out_of_time_goes_on_later(tmp_path):
    assert list(Trial("a", tmp_path, minutes=-1).pending(3)) == []
    trial = Trial("a", tmp_path, minutes=1)
    for case in trial.pending(3):
        trial.record(case)
        break
    assert list(Trial("a", tmp_path, minutes=1).pending(3)) == [1, 2]
