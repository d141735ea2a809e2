"""Decoders: types behind one contract (`base`), told apart by the `kind` of their configuration.

decoder = make_decoder(decoder_config({"size": "CM/4", "latent_channels": 16}))
prediction = decoder(x_t, t, z)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .base import Features, PixelDecoder
from .conv import SIZES as _CONV_SIZES
from .conv import ConvConfig, ConvDecoder
from .kl import KLConfig, KLDecoder
from .taef2 import Taef2Config, Taef2Decoder
from .uvit import UViT, UViTConfig

__all__ = ["ConvConfig", "DecoderConfig", "Features", "KLConfig", "PixelDecoder", "Taef2Config", "UViTConfig",
           "decoder_config", "make_decoder"]  # fmt: skip

DecoderConfig = UViTConfig | ConvConfig | Taef2Config | KLConfig

_KINDS: dict[str, tuple[type[Any], type[PixelDecoder]]] = {
    "uvit": (UViTConfig, UViT),
    "conv": (ConvConfig, ConvDecoder),
    "taef2": (Taef2Config, Taef2Decoder),
    "kl": (KLConfig, KLDecoder),
}
KINDS = tuple(_KINDS)

_WITHOUT: dict[str, dict[str, tuple[Any, ...]]] = {
    "uvit": {"slim": (0,)},
    "conv": {"norm": ("local",), "modulation": (False,), "upsampling": ("shuffle",), "prediction": ("", "x"),
             "middle_blocks": (-1, 0), "heads": (0,), "down_blocks": (2,), "reach": (7,), "attention": ("auto",),
             "slim": (0,)},
    "taef2": {"stages": (1,), "null_latent": (False,)},
    "kl": {},
}  # fmt: skip
"""What configurations stored before there were kinds say of fields that a kind does not have: what changes nothing. All
other fields of a TAEF2 decoder were decided by `slim`."""


def make_decoder(config: DecoderConfig) -> PixelDecoder:
    """A decoder of that shape, with random weights."""
    return _KINDS[config.kind][1](config)


def decoder_config(values: Mapping[str, Any]) -> DecoderConfig:
    """The configuration that plain values describe.

    Args:
        values: fields; `kind` may be left out where the others tell it. Configurations stored before there were kinds
            have the fields of all of them.

    Raises:
        UserError: a kind or a value that cannot be, or a field that the kind does not have.
    """
    given = dict(values)
    kind = given.pop("kind", None) or _kind_of(given)
    if kind not in _KINDS:
        raise UserError(f"decoder.kind is {kind!r}: choose {', '.join(_KINDS)}")
    shape = _KINDS[kind][0]
    known = {field.name for field in dataclasses.fields(shape)}
    if kind == "taef2" and "kind" not in values:
        given = {name: value for name, value in given.items() if name in known or name in _WITHOUT[kind]}
    for name in sorted(given.keys() - known):
        if name not in FIELDS and name not in _WITHOUT[kind]:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if given.pop(name) not in _WITHOUT[kind].get(name, ()):
            raise UserError(f"decoder.{name} is {values[name]!r}: {kind} decoders have no such field; leave it out")
    return shape(**given)


def _kind_of(given: Mapping[str, Any]) -> str:
    """The kind of a decoder whose values do not name it."""
    if given.get("slim"):
        return "taef2"
    return "conv" if given.get("size") in _CONV_SIZES else "uvit"


FIELDS = {field.name for shape, _ in _KINDS.values() for field in dataclasses.fields(shape)}
"""Names of the fields of all kinds."""
