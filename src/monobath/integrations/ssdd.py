"""Published SSDD decoders: names and shapes of their state dicts → our `Decoder`.

The published network and ours are the same function under other names. Only names and shapes are used here; the
published weights themselves are licensed for non-commercial use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..errors import UserError
from ..models.decoder import Decoder, DecoderConfig
from ..models.loading import load_strictly

# (published name, our name), applied in order
_DECODER_NAMES: list[tuple[str, str]] = [
    (r"^time_embedding\.linear_1\.", "time.0."),
    (r"^time_embedding\.linear_2\.", "time.2."),
    (r"^ada_ctx_proj\.", "context."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.blocks."),
    (r"^(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv\.", r"\1.\2.resample."),
    (r"\.norm1\.ctx_proj\.", ".context."),
    (r"\.time_emb_proj\.", ".time."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (r"^mid_block\.transformer_blocks\.", "middle.blocks."),
    (r"^mid_block\.proj_in\.", "middle.linear_in."),
    (r"^mid_block\.proj_out\.", "middle.linear_out."),
    (r"^mid_block\.", "middle."),
    (r"\.norm1\.linear\.", ".context."),
    (r"\.attn1\.to_([qkv])\.", r".\1."),
    (r"\.attn1\.out_proj\.", ".out."),
    (r"\.ff\.proj_in_act\.proj\.", ".mlp_in."),
    (r"\.ff\.proj_out\.", ".mlp_out."),
    (r"\.relative_position_bias\.relative_bias_table$", ".bias"),
]


def _rename(name: str) -> str:
    for pattern, replacement in _DECODER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def decoder_from_ssdd(state: Mapping[str, Tensor], *, prefix: str = "") -> Decoder:
    """Build a decoder from a published-style state dict; every size is read from the shapes.

    Args:
        state: names and tensors of the published decoder, any float type.
        prefix: what precedes the decoder's names, such as `decoder.`; other entries are left out.

    Returns:
        A float32 v-predicting `Decoder` in evaluation mode.

    Raises:
        UserError: entries are missing, unexpected or misshapen (all are named).
    """
    renamed = {_rename(k[len(prefix) :]): v.float() for k, v in state.items() if k.startswith(prefix)}
    try:
        levels = 1 + max(int(k.split(".")[1]) for k in renamed if k.startswith("down."))
        channels = [renamed[f"down.{i}.blocks.0.conv1.weight"].shape[0] for i in range(levels)]
        table = renamed["middle.blocks.0.bias"]
        config = DecoderConfig(
            size="custom",
            patch=1,
            prediction="v",
            channels=channels,
            latent_channels=renamed["context.0.weight"].shape[1],
            middle_blocks=1 + max(int(k.split(".")[2]) for k in renamed if k.startswith("middle.blocks.")),
            heads=table.shape[2],
            reach=table.shape[0] // 2,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"not a published SSDD decoder: {error} is missing from the state dict") from None
    decoder = Decoder(config)
    load_strictly(decoder, renamed, "not a published SSDD decoder: the state dict")
    return decoder.eval()
