"""Encoders of diffusers' AutoencoderKL, under all their names, give the same moments as ours."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import rand_images, randomise

from monobath.errors import UserError
from monobath.integrations.diffusers import encoder_from_diffusers, load_encoder
from monobath.models.encoder import Encoder, EncoderConfig

diffusers = pytest.importorskip("diffusers")

# diffusers' attention names before version 0.14
OLD = [
    (r"attentions\.0\.to_q\.", "attentions.0.query."),
    (r"attentions\.0\.to_k\.", "attentions.0.key."),
    (r"attentions\.0\.to_v\.", "attentions.0.value."),
    (r"attentions\.0\.to_out\.0\.", "attentions.0.proj_attn."),
]
# latent diffusion's
LDM = [
    (r"down_blocks\.(\d)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
]


def vae(widths=(32, 64), **changes):
    shape = {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
    }
    return randomise(diffusers.AutoencoderKL(**(shape | changes))).eval()


def renamed(state, rules):
    for pattern, replacement in rules:
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state


@torch.no_grad()
def assert_same(encoder, autoencoder):
    f = encoder.config.factor
    x = rand_images(2, 3, 4 * f, 6 * f)
    expected = autoencoder.encode(x).latent_dist
    mean, logvar = encoder(x).chunk(2, dim=1)
    assert torch.allclose(mean, expected.mean, atol=1e-5)
    assert torch.allclose(logvar.clamp(-30, 20), expected.logvar, atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "changes"),
    [
        ((32, 64), {}),
        ((32, 64, 64, 96), {"latent_channels": 16}),
        ((64, 96, 160), {"layers_per_block": 1}),
        ((32, 64), {"use_quant_conv": False}),
        ((32, 64), {"mid_block_add_attention": False}),
    ],
)
def test_same_moments(widths, changes):
    autoencoder = vae(widths, **changes)
    for source in (autoencoder, autoencoder.state_dict()):
        encoder = encoder_from_diffusers(source)
        assert encoder.config.factor == 2 ** (len(widths) - 1)
        assert encoder.config.middle_attention == changes.get("mid_block_add_attention", True)
        assert not encoder.training
        assert_same(encoder, autoencoder)


def test_older_names():
    autoencoder = vae()
    state = autoencoder.state_dict()
    assert_same(encoder_from_diffusers(renamed(state, OLD)), autoencoder)
    ldm = renamed(state, LDM)
    for name in list(ldm):
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            ldm[name] = ldm[name][:, :, None, None]  # 1×1 convolutions there
    assert_same(encoder_from_diffusers(ldm), autoencoder)
    ssdd = {re.sub(r"^quant_conv\.", "encoder.out_proj.", name): tensor for name, tensor in ldm.items()}
    assert_same(encoder_from_diffusers(ssdd), autoencoder)


def test_half_precision_sources_become_float32():
    encoder = encoder_from_diffusers({k: v.bfloat16() for k, v in vae().state_dict().items()})
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_into_an_existing_encoder():
    autoencoder = vae()
    encoder = Encoder(EncoderConfig(factor=2, base=32)).eval()
    load_encoder(encoder, autoencoder)
    assert_same(encoder, autoencoder)
    with pytest.raises(UserError, match=r"missing: .*levels\.2"):
        load_encoder(Encoder(EncoderConfig(factor=4, base=32)), autoencoder)


def test_the_paper_size_is_the_same_network():
    with torch.device("meta"):
        autoencoder = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        ours = Encoder(EncoderConfig())
    theirs = [*autoencoder.encoder.parameters(), *autoencoder.quant_conv.parameters()]
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs) == 34_163_664


def test_other_architectures_are_refused():
    state = vae().state_dict()
    with pytest.raises(UserError, match="not an AutoencoderKL encoder"):
        encoder_from_diffusers({"weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"unexpected: down_blocks\.0\.surprise"):
        encoder_from_diffusers(state | {"encoder.down_blocks.0.surprise": torch.zeros(1)})
    with pytest.raises(UserError, match="misshapen"):
        encoder_from_diffusers(state | {"encoder.conv_in.weight": torch.zeros(32, 4, 3, 3)})
    missing = {k: v for k, v in state.items() if k != "encoder.conv_in.bias"}
    with pytest.raises(UserError, match=r"missing: conv_in\.bias"):
        encoder_from_diffusers(missing)
    with pytest.raises(UserError, match="16 groups"):
        encoder_from_diffusers(vae(norm_num_groups=16))
    with pytest.raises(UserError, match="act_fn is 'relu'"):
        encoder_from_diffusers(vae(act_fn="relu"))
