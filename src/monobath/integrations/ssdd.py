"""Published SSDD checkpoints: names and shapes of their state dicts → our `UViT`, or a whole `Tokenizer`.

The published networks and ours are the same functions under other names. Only names and shapes are used here; the
published weights themselves are licensed for non-commercial use (`NOTICE`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import TokenizerConfig
from ..decoders.uvit import SIZES, UViT, UViTConfig
from ..decoding import SamplerConfig
from ..errors import UserError
from ..models.encoder import EncoderConfig
from ..models.loading import check_fit
from ..tokenizer import Tokenizer

NOTICE = (
    "published SSDD weights are licensed for non-commercial use only; a model made from them stays under that license"
)

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
GROUPS = 32
"""Of every GroupNorm in the published networks: their widths are multiples of it."""

# (our name, published name), applied in order
_DECODER_NAMES: list[tuple[str, str]] = [
    (r"^middle\.blocks\.(\d+)\.context\.", r"mid_block.transformer_blocks.\1.norm1.linear."),
    (r"^middle\.blocks\.(\d+)\.([qkv])\.", r"mid_block.transformer_blocks.\1.attn1.to_\2."),
    (r"^middle\.blocks\.(\d+)\.out\.", r"mid_block.transformer_blocks.\1.attn1.out_proj."),
    (r"^middle\.blocks\.(\d+)\.mlp_in\.", r"mid_block.transformer_blocks.\1.ff.proj_in_act.proj."),
    (r"^middle\.blocks\.(\d+)\.mlp_out\.", r"mid_block.transformer_blocks.\1.ff.proj_out."),
    (r"^middle\.blocks\.(\d+)\.norm2\.", r"mid_block.transformer_blocks.\1.norm2."),
    (r"^middle\.blocks\.(\d+)\.bias$", r"mid_block.transformer_blocks.\1.relative_position_bias.relative_bias_table"),
    (r"^middle\.linear_(in|out)\.", r"mid_block.proj_\1."),
    (r"^middle\.norm\.", "mid_block.norm."),
    (r"^(down|up)\.(\d+)\.resample\.", r"\1_blocks.\2.\1samplers.0.conv."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.context\.", r"\1_blocks.\2.resnets.\3.norm1.ctx_proj."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.time\.", r"\1_blocks.\2.resnets.\3.time_emb_proj."),
    (r"^(down|up)\.(\d+)\.blocks\.(\d+)\.shortcut\.", r"\1_blocks.\2.resnets.\3.conv_shortcut."),
    (r"^(down|up)\.(\d+)\.blocks\.", r"\1_blocks.\2.resnets."),
    (r"^time\.0\.", "time_embedding.linear_1."),
    (r"^time\.2\.", "time_embedding.linear_2."),
    (r"^context\.", "ada_ctx_proj."),
    (r"^norm_out\.", "conv_norm_out."),
]
_ENCODER_NAMES: list[tuple[str, str]] = [
    (r"^levels\.(\d+)\.blocks\.", r"down.\1.block."),
    (r"^levels\.(\d+)\.down\.", r"down.\1.downsample."),
    (r"^middle_in\.", "mid.block_1."),
    (r"^middle_out\.", "mid.block_2."),
    (r"^middle_attention\.out\.", "mid.attn_1.proj_out."),
    (r"^middle_attention\.", "mid.attn_1."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"^moments\.", "out_proj."),
]


def published_name(name: str) -> str:
    """The published name of an entry of a tokenizer's state dict, such as `encoder.moments.weight`."""
    part, _, rest = name.partition(".")
    return f"{part}.{_renamed(rest, _ENCODER_NAMES if part == 'encoder' else _DECODER_NAMES)}"


def decoder_from_ssdd(state: Mapping[str, Tensor], *, prefix: str = "", factor: int = 8) -> UViT:
    """Build a decoder from a published-style state dict; every size is read from the shapes.

    Args:
        state: names and tensors of the published decoder, any float type.
        prefix: what precedes the decoder's names, such as `decoder.`; other entries are left out.
        factor: side of the pixel square behind one latent position, which the weights do not tell.

    Returns:
        A float32 v-predicting `UViT` in evaluation mode.

    Raises:
        UserError: entries are missing, unexpected or misshapen (all are named).
    """
    what = "not a published SSDD decoder"
    own = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    decoder = UViT(_decoder_config(_Shapes(own, "", what), factor))
    _load(decoder, own, lambda name: _renamed(name, _DECODER_NAMES), f"{what}: the state dict")
    return decoder.eval()


def tokenizer_from_ssdd(state: Mapping[str, Tensor], *, steps: int = 1, power: float = 2.0) -> Tokenizer:
    """Build a tokenizer from a whole published-style checkpoint; every size and the scale are read from the shapes.

    Args:
        state: entries `encoder.…` and `decoder.…`, any float type: see `read_ssdd`.
        steps: sampler steps. The weights do not tell: 1 for a distilled decoder, such as 8 for another.
        power: exponent of the sampler's time grid; 2 in the published recipe.

    Returns:
        A float32 tokenizer in evaluation mode.

    Raises:
        UserError: entries are missing, unexpected or misshapen (all are named), or widths that the published networks
            cannot have.
    """
    what = "not a published SSDD checkpoint"
    encoder = _encoder_config(_Shapes(state, "encoder.", what))
    decoder = _decoder_config(_Shapes(state, "decoder.", what), encoder.factor)
    for width in (*(encoder.base * m for m in encoder.multipliers), *decoder.channels):
        if width % GROUPS:
            # Group counts are not in the weights: another width would load, and compute something else.
            raise UserError(f"{what}: a width of {width} channels, where all are multiples of {GROUPS}")
    if encoder.latent_channels != decoder.latent_channels:
        c, d = encoder.latent_channels, decoder.latent_channels
        raise UserError(f"{what}: encoder.out_proj.weight is for {c} latent channels, decoder.ada_ctx_proj for {d}")
    sampler = SamplerConfig(steps=steps, power=power)
    tokenizer = Tokenizer(TokenizerConfig(encoder=encoder, decoder=decoder, sampler=sampler))
    _load(tokenizer, state, published_name, f"{what}: it")
    return tokenizer.eval()


def save_imported(tokenizer: Tokenizer, source: Path, folder: Path) -> None:
    """Write a tokenizer made from the file `source`; its config keeps that file's name and hash, and the licence.

    Raises:
        UserError: the folder cannot be written.
    """
    with open(source, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    # The name of the recipe is what `monobath info` shows.
    recipe = {"name": "published SSDD checkpoint, for non-commercial use only"}
    extra = {"recipe": recipe, "imported_from": source.name, "sha256": digest, "license": NOTICE}
    tokenizer.save_pretrained(folder, extra=extra)


def read_ssdd(path: Path) -> dict[str, Tensor]:
    """The entries `encoder.…` and `decoder.…` of a checkpoint file, and whatever lies beside them.

    Nested dictionaries (`state_dict`, `model`, `ema`) and prefixes of names (`module.`, `_orig_mod.`) are seen
    through; of several copies of the networks the averaged one is taken (`ema` in its name), else the largest.
    Pickles are read with `weights_only=True`: tensors and plain values, no code.

    Raises:
        UserError: no such file, another kind of file, one that cannot be read, or one that holds no such entries.
    """
    if not path.is_file():
        raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give the checkpoint file")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is not a checkpoint by its name: expected one of {', '.join(SUFFIXES)}")
    try:
        pickled = path.suffix.lower() != ".safetensors"
        content: Any = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
    except Exception as error:  # broken and foreign pickles make torch.load raise nearly anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read ({reason}): fetch it again; a pickle must hold tensors and plain values only"
        ) from None
    entries = list(_entries(content))
    prefixes = Counter(found[1] for name, _, _ in entries if (found := _NETWORK.match(name)))
    if not prefixes:
        shown = ", ".join(name for name, _, _ in entries[:4]) or "nothing"
        raise UserError(
            f"{path} is not a published SSDD checkpoint: no entry encoder.… or decoder.… among its {len(entries)} "
            f"tensors ({shown} …)"
        )
    prefix = max(prefixes, key=lambda p: ("ema" in re.split(r"[._]", p), prefixes[p], -len(p)))
    # Optimizer states and the like lie in dictionaries of their own; what lies among the weights belongs to them.
    homes = {home for name, home, _ in entries if (found := _NETWORK.match(name)) and found[1] == prefix}
    return {name.removeprefix(prefix): tensor for name, home, tensor in entries
            if name.startswith(prefix) and home in homes}  # fmt: skip


_NETWORK = re.compile(r"((?:[^.]+\.)*?)(?:encoder|decoder)\.")


def _entries(content: Any, name: str = "", home: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """(dotted name, name of the dictionary that holds it, tensor) of nested dictionaries."""
    if isinstance(content, Tensor):
        yield name, home, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _entries(value, f"{name}.{key}" if name else str(key), name)


def _renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _load(network: nn.Module, state: Mapping[str, Tensor], rename: Callable[[str], str], what: str) -> None:
    """Strictly, under the published names; messages show those, and the published shapes."""
    own = network.state_dict()
    names = {rename(name): name for name in own}
    # The attention's linear maps are 1×1 convolutions there.
    expected = {
        theirs: own[ours][:, :, None, None] if ".mid.attn_1." in theirs and own[ours].ndim == 2 else own[ours]
        for theirs, ours in names.items()
    }
    check_fit(expected, state, what)
    network.load_state_dict({ours: state[theirs].float().reshape(own[ours].shape) for theirs, ours in names.items()})


class _Shapes:
    """What the entries of one network say about its sizes; an entry that is needed and absent is a `UserError`."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str, what: str) -> None:
        self.state, self.prefix, self.what = state, prefix, what

    def count(self, stem: str) -> int:
        """How many numbered parts there are: 1 + the largest number after `stem`."""
        pattern = re.compile(re.escape(f"{self.prefix}{stem}.") + r"(\d+)\.")
        numbers = [int(found[1]) for name in self.state if (found := pattern.match(name))]
        if not numbers:
            raise UserError(f"{self.what}: {self.prefix}{stem}.0.… is missing from the state dict")
        return 1 + max(numbers)

    def size(self, name: str, dim: int, dims: int) -> int:
        """Length of a dimension of an entry that has `dims` of them."""
        name = self.prefix + name
        if name not in self.state:
            raise UserError(f"{self.what}: {name} is missing from the state dict")
        shape = tuple(self.state[name].shape)
        if len(shape) != dims or 0 in shape:
            raise UserError(f"{self.what}: misshapen: {name} is {shape}, expected {dims} dimensions")
        return shape[dim]


def _decoder_config(shapes: _Shapes, factor: int) -> UViTConfig:
    levels, table = shapes.count("down_blocks"), "relative_position_bias.relative_bias_table"
    table = f"mid_block.transformer_blocks.0.{table}"
    read: dict[str, Any] = {
        "channels": [shapes.size(f"down_blocks.{i}.resnets.0.conv1.weight", 0, 4) for i in range(levels)],
        "latent_channels": shapes.size("ada_ctx_proj.0.weight", 1, 4),
        "middle_blocks": shapes.count("mid_block.transformer_blocks"),
        "heads": shapes.size(table, 2, 3),
        "reach": shapes.size(table, 0, 3) // 2,
        "factor": factor,
    }
    for size in SIZES:  # a size by its name, if it is one of the paper's
        config = UViTConfig(size=f"{size}/1", latent_channels=read["latent_channels"], factor=factor)
        if all(getattr(config, name) == value for name, value in read.items()):
            return config
    try:
        return UViTConfig(size="custom", patch=1, prediction="v", **read)
    except UserError as error:
        raise UserError(f"{shapes.what}: {error}") from None


def _encoder_config(shapes: _Shapes) -> EncoderConfig:
    levels = shapes.count("down")
    widths = [shapes.size(f"down.{i}.block.0.conv1.weight", 0, 4) for i in range(levels)]
    base = math.gcd(*widths)
    return EncoderConfig(
        factor=2 ** (levels - 1),
        latent_channels=max(1, shapes.size("out_proj.weight", 0, 4) // 2),
        base=base,
        multipliers=[width // base for width in widths],
        blocks=shapes.count("down.0.block"),
    )
