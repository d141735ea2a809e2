"""Published SSDD checkpoints become models: every name and shape, every scale, every way of packing them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randn, randomise
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from monobath import Tokenizer, UserError
from monobath.cli import main
from monobath.decoders import UViTConfig, decoder_config
from monobath.integrations.ssdd import NOTICE, published_name, read_ssdd, tokenizer_from_ssdd
from monobath.models.encoder import EncoderConfig
from monobath.tokenizer import TokenizerConfig

GOLDEN = Path(__file__).parent / "golden" / "ssdd_f8c4_S.json"
"""Names and shapes of a published f8c4 S checkpoint as a tree; "0-3" stands for four equal parts."""


def golden_shapes(tree: dict | None = None, name: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, inside in (json.loads(GOLDEN.read_text()) if tree is None else tree).items():
        if isinstance(inside, str):
            yield name + key, tuple(map(int, inside.split("x")))
            continue
        first, _, last = key.partition("-")
        for part in [key] if not last else map(str, range(int(first), int(last) + 1)):
            yield from golden_shapes(inside, f"{name}{part}.")


def to_ssdd(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """A published-style state dict of a tokenizer: the attention's linear maps as 1×1 convolutions."""
    state = {published_name(name): tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    return {k: v[:, :, None, None] if ".mid.attn_1." in k and v.ndim == 2 else v for k, v in state.items()}


def small(factor: int = 8, latent_channels: int = 4) -> Tokenizer:
    """As narrow as the published form allows: 32 groups everywhere."""
    levels = factor.bit_length()
    config = TokenizerConfig(
        encoder=EncoderConfig(
            factor=factor, latent_channels=latent_channels, base=32, multipliers=[1, 2, 2, 2, 3][:levels], blocks=1
        ),
        decoder=UViTConfig(
            size="custom", patch=1, channels=[32, 32, 64, 64], middle_blocks=2, heads=4, reach=3, prediction="v",
            factor=factor, latent_channels=latent_channels,
        ),
    )  # fmt: skip
    return randomise(Tokenizer(config)).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def source() -> Tokenizer:
    torch.manual_seed(0)
    return small()


@pytest.fixture
def file(source, tmp_path) -> Path:
    path = tmp_path / "published.safetensors"
    save_file({k: v.contiguous() for k, v in to_ssdd(source).items()}, path)
    return path


def photo(path: Path) -> str:
    values = np.random.default_rng(0).integers(0, 256, (21, 37, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


# ---- names and shapes -------------------------------------------------------------------------------------------


def test_the_published_s_has_our_shapes_under_its_names():
    with torch.device("meta"):
        ours = Tokenizer(TokenizerConfig(decoder=decoder_config({"size": "S/1"})))
    assert {k: tuple(v.shape) for k, v in to_ssdd(ours).items()} == dict(golden_shapes())


def test_the_published_s_imports_and_reconstructs():
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in golden_shapes():
        fan_in = np.prod(shape[1:]) if len(shape) > 1 else 25
        ones = "norm" in name and name.endswith("weight") and len(shape) == 1
        state[name] = (torch.randn(shape, generator=generator) / float(fan_in) ** 0.5 + ones).half()
    tokenizer = tokenizer_from_ssdd(state)
    config = tokenizer.config
    assert (config.encoder, config.decoder) == (EncoderConfig(), decoder_config({"size": "S/1"}))
    assert (config.sampler.steps, config.sampler.power, config.sampler.noise) == (1, 2.0, "gaussian")
    assert sum(p.numel() for p in tokenizer.decoder.parameters()) == 14_057_059
    assert (tokenizer.dtype, tokenizer.training) == (torch.float32, False)
    posterior = tokenizer.encode(torch.zeros(1, 3, 16, 24))
    assert torch.isfinite(tokenizer.decode(posterior.mode())).all()


@pytest.mark.parametrize(("factor", "channels"), [(8, 4), (16, 4), (16, 16), (4, 3)])
def test_every_scale_is_read_and_computes_the_same(factor, channels):
    source = small(factor, channels)
    tokenizer = tokenizer_from_ssdd(to_ssdd(source), steps=3)
    assert (tokenizer.config.encoder, tokenizer.config.decoder) == (source.config.encoder, source.config.decoder)
    x = randn(1, 3, 32, 48).tanh()
    z = source.encode(x).mode()
    assert torch.equal(tokenizer.encode(x).mode(), z)
    assert torch.equal(tokenizer.decode(z), source.decode(z, steps=3))


# ---- files ------------------------------------------------------------------------------------------------------


def packings(state: dict[str, Tensor]) -> Iterator[tuple[str, object]]:
    other = {k: v + 1 for k, v in state.items()}
    under = {p: {f"{p}.{k}": v for k, v in state.items()} for p in ("module", "_orig_mod", "ema_model.module")}
    halves = {p: {k.removeprefix(f"{p}."): v for k, v in state.items() if k.startswith(p)}
              for p in ("encoder", "decoder")}  # fmt: skip
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    yield "bare", state
    yield "state_dict", {"state_dict": state, "optimizer": optimizer, "epoch": 3}
    yield "model", {"model": under["module"], "optimizer": optimizer}
    yield "compiled", under["_orig_mod"]
    yield "averaged beside trained", {"model": other, "ema": state}
    yield "averaged by prefix", {**{f"net.{k}": v for k, v in other.items()}, **under["ema_model.module"]}
    yield "counting average", {"ema": {"n_averaged": torch.tensor(3), **under["module"]}}
    yield "halves", {**halves, "optimizer": optimizer, "step": torch.tensor(5)}


@pytest.mark.parametrize("number", range(8))
def test_nested_dictionaries_and_prefixes_are_seen_through(source, tmp_path, number):
    expected = to_ssdd(source)
    name, content = list(packings(expected))[number]
    torch.save(content, tmp_path / "checkpoint.pt")
    state = read_ssdd(tmp_path / "checkpoint.pt")
    assert state.keys() == expected.keys(), name
    assert all(torch.equal(state[k], v) for k, v in expected.items()), name


class Payload:
    """What a malicious pickle does when it is loaded as code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickles_are_read_without_running_code(source, tmp_path):
    torch.save({"model": to_ssdd(source), "config": Payload(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt cannot be read"):
        read_ssdd(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"expected one of \.safetensors, \.pt"):
        read_ssdd(tmp_path / "a.txt")
    with pytest.raises(UserError, match="does not exist"):
        read_ssdd(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is a folder"):
        read_ssdd(tmp_path)
    for suffix in (".pt", ".safetensors", ".ckpt"):
        (tmp_path / f"noise{suffix}").write_bytes(bytes(range(256)))
        with pytest.raises(UserError, match="cannot be read"):
            read_ssdd(tmp_path / f"noise{suffix}")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"no entry encoder.… or decoder.… among its 1 tensors \(weights"):
        read_ssdd(tmp_path / "other.pt")


# ---- what does not fit ------------------------------------------------------------------------------------------


def test_a_wrong_checkpoint_is_refused_with_every_entry_named(source):
    state = to_ssdd(source)
    state["decoder.surprise"] = state["adapter.weight"] = torch.zeros(1)
    del state["encoder.mid.attn_1.q.weight"], state["decoder.mid_block.transformer_blocks.1.ff.proj_out.bias"]
    state["decoder.conv_out.weight"] = torch.zeros(1, 32, 3, 3)
    state["encoder.mid.attn_1.k.weight"] = torch.zeros(64, 64, 2, 1)
    with pytest.raises(UserError) as caught:
        tokenizer_from_ssdd(state)
    message = str(caught.value)
    assert message.startswith("not a published SSDD checkpoint")
    missing, unexpected, misshapen = message.split("; ")
    assert "missing: decoder.mid_block.transformer_blocks.1.ff.proj_out.bias, encoder.mid.attn_1.q.weight" in missing
    assert unexpected == "unexpected: adapter.weight, decoder.surprise"
    assert "decoder.conv_out.weight (1, 32, 3, 3) instead of (3, 32, 3, 3)" in misshapen
    assert "encoder.mid.attn_1.k.weight (64, 64, 2, 1) instead of (64, 64, 1, 1)" in misshapen


@pytest.mark.parametrize(
    ("entry", "shape", "words"),
    [
        ("encoder.out_proj.weight", None, r"encoder\.out_proj\.weight is missing"),
        ("encoder.out_proj.weight", (8,), r"misshapen: encoder\.out_proj\.weight is \(8,\), expected 4 dimensions"),
        ("encoder.down.", None, r"encoder\.down\.0\.… is missing"),
        ("encoder.down.2.block.0.conv1.weight", (48, 64, 3, 3), "a width of .* multiples of 32"),
        ("decoder.", None, r"decoder\.down_blocks\.0\.… is missing"),
        ("decoder.ada_ctx_proj.0.weight", (32, 5, 3, 3), "for 4 latent channels, decoder.ada_ctx_proj for 5"),
    ],
)
def test_what_the_sizes_are_read_from_is_named_too(source, entry, shape, words):
    state = {k: v for k, v in to_ssdd(source).items() if not k.startswith(entry)}
    if shape:
        state[entry] = torch.zeros(shape)
    with pytest.raises(UserError, match=words):
        tokenizer_from_ssdd(state)


# ---- the command ------------------------------------------------------------------------------------------------


def test_import_writes_a_model_that_stays_what_it_is(source, file, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["import-ssdd", str(file), "--out", str(out), "--steps", "2"]) == 0
    written = capsys.readouterr().out
    assert NOTICE in written
    assert "non-commercial" in written
    config = json.loads((out / "config.json").read_text())
    facts = config["training"]
    assert facts["license"] == NOTICE
    assert facts["imported_from"] == file.name
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (config["sampler"]["steps"], config["sampler"]["power"]) == (2, 2.0)
    tokenizer = Tokenizer.from_pretrained(out)
    x = randn(1, 3, 16, 24).tanh()
    assert torch.equal(tokenizer(x), source.decode(source.encode(x).mode(), steps=2))
    again = tmp_path / "again"
    tokenizer.save_pretrained(again)
    assert torch.equal(Tokenizer.from_pretrained(again)(x), tokenizer(x))
    picture = photo(tmp_path / "a.png")
    assert main(["reconstruct", picture, "--model", str(out), "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out/a.png").size == (37, 21)
    assert main(["info", str(out)]) == 0
    assert "non-commercial" in capsys.readouterr().out


def test_the_command_refuses_in_one_line(source, file, tmp_path, capsys):
    state = to_ssdd(source)
    del state["decoder.conv_in.bias"]
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "wrong.safetensors")
    out = tmp_path / "model"
    (tmp_path / "a-file").touch()
    cases = [
        ([str(tmp_path / "wrong.safetensors"), "--out", str(out)], "missing: decoder.conv_in.bias"),
        ([str(tmp_path / "none.pt"), "--out", str(out)], "none.pt does not exist"),
        ([str(file), "--out", str(out), "--power", "0"], "power=0.0 above 0"),
        ([str(file), "--out", str(out), "--steps", "0"], "steps=0 must be at least 1"),
        ([str(file), "--out", str(tmp_path / "a-file")], "a-file is a file"),
        ([str(file)], "out"),
    ]
    for arguments, words in cases:
        assert main(["import-ssdd", *arguments]) == 2
        written = capsys.readouterr().err
        assert written.startswith("monobath import-ssdd: ")
        assert words in written
        assert written.count("\n") == 1
        assert not out.exists()
