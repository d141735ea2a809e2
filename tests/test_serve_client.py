"""What diffusers' own remote VAE client gets from a real server: that which `AutoencoderMonobath` gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import randn
from PIL import Image
from serve_running import picture, running

remote = pytest.importorskip("diffusers.utils.remote_utils", reason="diffusers is missing: monobath[diffusers]")


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def vae(server):
    from monobath.integrations.diffusers import AutoencoderMonobath

    return AutoencoderMonobath.from_tokenizer(server.service.models["plain"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("output", "wanted"),
    [("pt", "pt"), ("pt", "processor"), ("pt", "post"), ("pt", "post pil"), ("pil", "png"), ("pil", "jpg"),
     ("pil", "processor"), ("pil", "processor pt")],
)  # fmt: skip
@pytest.mark.parametrize("scaling", [{"do_scaling": False}, {"scaling_factor": 0.5, "shift_factor": 0.25}])
def test_remote_decode_gives_what_the_autoencoder_gives(server, vae, dtype, output, wanted, scaling):
    from diffusers.image_processor import VaeImageProcessor

    z = randn(1, 4, 3, 5).to(dtype)
    given = z.float() / scaling.get("scaling_factor", 1) + scaling.get("shift_factor", 0)
    expected = vae.decode(given).sample.clamp(-1, 1)
    eight = ((expected[0] + 1) * 127.5).round().permute(1, 2, 0).detach().numpy()
    options = {"output_type": output, "return_type": "pt" if wanted in ("pt", "post", "processor pt") else "pil"}
    options |= {"partial_postprocess": wanted.startswith("post"), "image_format": "jpg" if wanted == "jpg" else "png"}
    processor = VaeImageProcessor() if wanted.startswith("processor") else None
    found = remote.remote_decode(server.url + "/decode", z, processor=processor, **scaling, **options)
    if isinstance(found, Image.Image | list):
        image = found[0] if isinstance(found, list) else found
        gap = np.abs(np.asarray(image, dtype=float) - eight)
        if wanted == "jpg":
            assert gap.mean() < 12  # random colours are hard on a JPEG
        else:  # the client rounds what came in bfloat16 and [-1, 1]
            assert gap.max() <= (1.5 if dtype == torch.bfloat16 and (output, wanted) == ("pt", "processor") else 1)
    elif wanted == "post":
        assert found.dtype == torch.uint8
        assert np.abs(found[0].numpy() - eight).max() <= 1
    elif wanted == "processor pt":
        torch.testing.assert_close(found, expected / 2 + 0.5, atol=1e-5, rtol=0)
    else:
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), atol=1e-5 if dtype == torch.float32 else 8e-3, rtol=0)


def test_remote_decode_scales_by_the_models_own_factors_where_it_is_asked_to(vae):
    z = randn(1, 4, 3, 5)
    with running() as server:
        config = server.service.models["plain"].config
        config.scaling_factor, config.shift_factor = 0.5, 0.25
        with pytest.warns(FutureWarning, match="do_scaling"):
            found = remote.remote_decode(server.url + "/decode", z, output_type="pt", return_type="pt")
    torch.testing.assert_close(found, vae.decode(z / 0.5 + 0.25).sample.clamp(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_latents(server, vae, dtype):
    z = randn(2, 4, 4, 6).to(dtype)
    packed = z.view(2, 4, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 16)  # FluxPipeline._pack_latents
    found = remote.remote_decode(
        server.url + "/decode", packed.contiguous(), do_scaling=False, height=32, width=48, output_type="pt",
        return_type="pt",
    )  # fmt: skip
    torch.testing.assert_close(found, vae.decode(z.float()).sample.clamp(-1, 1).to(dtype), atol=8e-3, rtol=0)


@pytest.mark.parametrize("scaling", [{}, {"scaling_factor": 0.5, "shift_factor": 0.25}])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_remote_encode_gives_what_the_autoencoder_gives(server, vae, scaling, dtype):
    image = picture(21, 37)
    x = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1).contiguous()
    given = image if dtype is None else x.to(dtype)
    found = remote.remote_encode(server.url + "/encode", given, **scaling)
    mode = vae.encode(x if dtype is None else x.to(dtype).float()).latent_dist.mode()
    expected = (mode - scaling.get("shift_factor", 0)) * scaling.get("scaling_factor", 1)
    assert found.dtype == (dtype or torch.float32)
    torch.testing.assert_close(
        found, expected.to(found.dtype), atol=1e-5 if dtype in (None, torch.float32) else 5e-2, rtol=0
    )


def test_a_batch_of_posterior_means_arrives_as_it_is(server, vae):
    tokenizer = server.service.models["plain"]
    z = tokenizer.encode(torch.rand(2, 3, 16, 24) * 2 - 1).mode()
    assert z.is_contiguous()
    found = remote.remote_decode(server.url + "/decode", z, do_scaling=False, output_type="pt", return_type="pt")
    torch.testing.assert_close(found, tokenizer.decode(z, seed=[0, 0]), atol=1e-5, rtol=0)


def test_errors_arrive_with_our_message():
    z = randn(1, 5, 2, 3)
    with running(max_pixels=4000, max_bytes=3000, max_queue=1) as server:
        url = server.url + "/decode"
        with pytest.raises(RuntimeError, match=r"latents are \(1, 5, 2, 3\): this tokenizer \(f8c4\) needs"):
            remote.remote_decode(url, z, do_scaling=False)
        with pytest.raises(RuntimeError, match="above max_pixels=4,000"):
            remote.remote_decode(url, randn(1, 4, 8, 9), do_scaling=False)
        with pytest.raises(RuntimeError, match="above max_bytes=3,000"):
            remote.remote_decode(url, randn(1, 4, 80, 90), do_scaling=False)
        with server.service.place(), pytest.raises(RuntimeError, match="all 1 places are taken"):
            remote.remote_decode(url, randn(1, 4, 2, 3), do_scaling=False)
