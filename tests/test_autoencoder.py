"""`AutoencoderMonobath` in the place of `AutoencoderKL`: in pipelines built from tiny random parts, and by itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import rand_images, randn, randomise, tiny_tokenizer
from huggingface_hub import ModelCard
from PIL import Image

from monobath import Tokenizer, UserError, resources

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")  # the text encoders of diffusers' pipelines

from monobath.integrations.diffusers import AutoencoderMonobath  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def ours(*, scaling_factor=1.0, shift_factor=0.0, **tokenizer) -> AutoencoderMonobath:
    model = AutoencoderMonobath.from_tokenizer(tiny_tokenizer(**tokenizer))
    model.register_to_config(scaling_factor=scaling_factor, shift_factor=shift_factor)
    return model


def theirs(channels=4):
    return randomise(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=channels,
            norm_num_groups=2,
        )
    ).eval()


@pytest.fixture(params=["AutoencoderKL", "AutoencoderMonobath"])
def vae(request):
    return theirs() if request.param == "AutoencoderKL" else ours()


@pytest.fixture(scope="module")
def model():
    return ours()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- pipelines --------------------------------------------------------------------------------------


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=6, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip


def text_parts():
    """A CLIP text encoder, and a tokenizer that knows single letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    config = transformers.CLIPTextConfig(
        vocab_size=len(names), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(names) - 2, eos_token_id=len(names) - 1,
    )  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    return {"tokenizer": tokenizer, "text_encoder": transformers.CLIPTextModel(config).eval()}


def close(a, b):
    """Equal up to the order of additions: other kernels, other alignment."""
    return a.shape == b.shape and bool((a - b).norm() < 1e-4 * b.norm())


def scheduler_of(**changes):
    return diffusers.DDIMScheduler(**({"steps_offset": 1, "clip_sample": False} | changes))


def pipe_of(kind, vae, **scheduler):
    parts = {"vae": vae, "unet": unet(), "scheduler": scheduler_of(**scheduler)}
    pipe = kind(**parts, **text_parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_pictures(images, size, count=1):
    assert len(images) == count
    for image in images:
        assert isinstance(image, Image.Image)
        assert image.size == size
        assert np.asarray(image).std() > 1  # neither black nor flat


def test_stable_diffusion(vae):
    pipe = pipe_of(diffusers.StableDiffusionPipeline, vae)
    assert pipe.vae_scale_factor == 8
    options = {"height": 40, "width": 56, "num_inference_steps": 2}
    one = pipe("a", **options, generator=generator()).images
    assert_pictures(one, (56, 40))
    again = pipe("a", **options, generator=[generator()]).images
    assert np.array_equal(np.asarray(one[0]), np.asarray(again[0]))
    both = pipe(["a", "b"], **options, generator=[generator(), generator(1)]).images
    assert_pictures(both, (56, 40), 2)
    pipe.vae.enable_slicing()
    if isinstance(vae, AutoencoderMonobath):
        vae.enable_tiling()  # one tile covers the picture
    sliced = pipe(["a", "b"], **options, generator=[generator(), generator(1)]).images
    for a, b in zip(both, sliced, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b)).max() <= 1


def test_stable_diffusion_image_to_image(vae):
    pipe = pipe_of(diffusers.StableDiffusionImg2ImgPipeline, vae)
    image = Image.open(resources.sample_paths()[0]).convert("RGB").resize((56, 40))
    options = {"image": image, "strength": 0.7, "num_inference_steps": 3}
    assert_pictures(pipe("a", **options, generator=generator()).images, (56, 40))
    options["image"] = [image, image]
    assert_pictures(pipe(["a", "b"], **options, generator=[generator(), generator(1)]).images, (56, 40), 2)


def test_dit(vae):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=6,
        norm_num_groups=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, vae, scheduler_of())
    pipe.set_progress_bar_config(disable=True)
    assert_pictures(pipe([1, 2], num_inference_steps=2, generator=generator()).images, (48, 48), 2)


@pytest.mark.parametrize("image_to_image", [False, True])
def test_flux_which_shifts_and_scales(vae, image_to_image):
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    kind = diffusers.FluxImg2ImgPipeline if image_to_image else diffusers.FluxPipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = kind(scheduler=scheduler, vae=vae, transformer=transformer, **parts)
    pipe.set_progress_bar_config(disable=True)
    options = {"image": Image.new("RGB", (64, 48), "teal"), "strength": 0.8} if image_to_image else {}
    embeds = {"prompt_embeds": randn(1, 5, 16), "pooled_prompt_embeds": randn(1, 8)}
    out = pipe(**embeds, **options, height=48, width=64, num_inference_steps=2, generator=generator()).images
    assert_pictures(out, (64, 48))


@pytest.mark.parametrize("scaling_factor", [1.0, 0.3])
def test_image_to_image_at_minimal_strength_is_the_reconstruction(scaling_factor):
    vae = AutoencoderMonobath.from_monobath("f8c4")
    vae.register_to_config(scaling_factor=scaling_factor)
    schedule = {"beta_start": 1e-7, "beta_end": 1e-7}  # next to no noise at the last step
    pipe = pipe_of(diffusers.StableDiffusionImg2ImgPipeline, vae, **schedule)
    photo = Image.open(resources.sample_paths()[0]).convert("RGB").crop((40, 40, 168, 136))
    (out,) = pipe("a", image=photo, strength=0.001, num_inference_steps=1000, generator=generator()).images
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    z = vae.encode(pixels).latent_dist.sample(generator())
    expected = ((vae.decode(z).sample + 1) * 127.5).round().clamp(0, 255)[0].permute(1, 2, 0)
    error = (torch.from_numpy(np.array(out)) - expected).abs()
    assert error.mean() < 0.5
    assert error.max() <= 4


def test_a_whole_pipeline_is_saved_and_loaded(model, tmp_path):
    pipe = pipe_of(diffusers.StableDiffusionPipeline, model)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["vae"] == ["monobath.integrations.autoencoder", "AutoencoderMonobath"]
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.vae, AutoencoderMonobath)
    options = {"height": 16, "width": 24, "num_inference_steps": 1}
    before, after = (p("a", **options, generator=generator()).images[0] for p in (pipe, loaded))
    assert np.array_equal(np.asarray(before), np.asarray(after))


# ---- what it computes -------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_the_tokenizer(model):
    tok = tiny_tokenizer()
    x = rand_images(2, 3, 40, 56)
    posterior, distribution = tok.encode(x), model.encode(x).latent_dist
    assert torch.equal(distribution.mode(), posterior.mode())
    assert torch.equal(distribution.mean, posterior.mean)
    assert torch.equal(distribution.std, posterior.std)
    assert torch.equal(distribution.sample(generator()), posterior.sample(generator()))
    assert torch.allclose(distribution.kl(), posterior.kl())
    z = posterior.mode()
    assert torch.equal(model.decode(z).sample.clamp(-1, 1), tok.decode(z, seed=[0, 0]))
    assert torch.equal(model.encode(x, return_dict=False)[0].mode(), z)
    assert torch.equal(model.decode(z, return_dict=False)[0], model.decode(z).sample)


def test_what_pipelines_ask_of_the_configuration():
    config = ours(scaling_factor=0.18).config
    assert (config.scaling_factor, config.shift_factor, config.latent_channels) == (0.18, 0.0, 4)
    assert (config.in_channels, config.out_channels, config.force_upcast) == (3, 3, False)
    for factor, patch in ((8, 2), (8, 1), (16, 4), (8, 8)):
        levels = (factor // patch).bit_length()
        encoder = {"factor": factor, "patch": patch, "multipliers": [2] * levels}
        config = ours(encoder=encoder, decoder={"factor": factor}).config
        assert 2 ** (len(config.block_out_channels) - 1) == factor


def test_the_factors_change_nothing(model):
    other = ours(scaling_factor=0.18, shift_factor=0.3)
    x = rand_images(1, 3, 24, 32)
    assert torch.equal(other.encode(x).latent_dist.mode(), model.encode(x).latent_dist.mode())
    assert torch.equal(other(x).sample, model(x).sample)


@torch.no_grad()
def test_noise_is_drawn_per_sample(model):
    z = randn(1, 4, 3, 4).expand(3, -1, -1, -1)
    out = model.decode(z).sample
    assert close(out[1:], out[:1].expand(2, -1, -1, -1))  # the same latent, the same image
    assert close(model.decode(z[:1]).sample, out[:1])
    drawn = model.decode(z, generator=generator()).sample
    assert (drawn[1] - drawn[0]).abs().max() > 1e-3
    assert torch.equal(model.decode(z, generator=generator()).sample, drawn)
    assert close(model.decode(z[:1], generator=generator()).sample, drawn[:1])
    listed = model.decode(z, generator=[generator(i) for i in (5, 0, 5)]).sample
    assert close(listed[0], listed[2])
    assert close(listed[1], drawn[0])
    with pytest.raises(UserError, match="2 generators for a batch of 3"):
        model.decode(z, generator=[generator(), generator()])


def test_zero_noise_is_deterministic():
    model, z, used = ours(noise="zero"), randn(2, 4, 3, 4), generator()
    state = used.get_state()
    assert torch.equal(model.decode(z, generator=used).sample, model.decode(z).sample)
    assert torch.equal(used.get_state(), state)


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2])
def test_slicing_and_tiling(steps):
    model = ours(steps=steps)
    x = rand_images(3, 3, 40, 56)
    generators = lambda: [generator(i) for i in range(3)]  # noqa: E731
    z = model.encode(x).latent_dist.mode()
    out = model.decode(z, generator=generators()).sample
    model.enable_slicing()
    assert close(model.encode(x).latent_dist.mode(), z)
    assert close(model.decode(z, generator=generators()).sample, out)
    assert close(model.decode(z, generator=generator()).sample[:1], out[:1])
    model.disable_slicing()
    model.enable_tiling()  # one tile covers the picture
    assert torch.equal(model.encode(x).latent_dist.mode(), z)
    assert torch.equal(model.decode(z, generator=generators()).sample, out)
    model.enable_tiling(tile=32, overlap=16)
    tiled = model.decode(z, generator=generators()).sample
    assert tiled.shape == out.shape
    assert not torch.equal(tiled, out)
    assert not torch.equal(model.encode(x).latent_dist.mode(), z)
    model.disable_tiling()
    assert torch.equal(model.decode(z, generator=generators()).sample, out)
    model.enable_tiling(False)
    assert torch.equal(model.decode(z, generator=generators()).sample, out)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(dtype):
    model = AutoencoderMonobath.from_monobath("f8c4")
    photo = Image.open(resources.sample_paths()[0]).convert("RGB").crop((0, 0, 96, 64))
    x = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    whole = model(x).sample
    model.to(dtype)
    assert model.dtype == dtype
    distribution = model.encode(x).latent_dist
    for latent in (distribution.mode(), distribution.sample(generator())):
        assert latent.dtype == dtype
        out = model.decode(latent).sample
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
    assert (model(x).sample - whole).abs().mean() < 0.02
    assert distribution.kl().dtype == torch.float32
    large = type(distribution)(torch.full((1, 8, 64, 64), 20.0, dtype=dtype))
    assert torch.isfinite(large.kl()).all()


def test_any_size_and_forward(model):
    x = rand_images(2, 3, 37, 52)
    assert model.encode(x).latent_dist.mode().shape == (2, 4, 5, 7)
    assert model(x).sample.shape == x.shape
    (drawn,) = model(x, sample_posterior=True, generator=generator(), return_dict=False)
    assert (drawn - model(x).sample).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"\(1, 3, 4, 4\).*\(B, 4, h, w\)"):
        model.decode(randn(1, 3, 4, 4))


def test_latents_of_another_model_name_a_packaged_one(packaged):
    words = r"\(1, 4, 2, 3\): this model needs \(B, 16, h, w\); f8c4 is packaged for 4 channels"
    with pytest.raises(UserError, match=words):
        AutoencoderMonobath.from_monobath("default").decode(randn(1, 4, 2, 3))


def test_gradients_reach_pixels_and_latents(model):
    x, z = rand_images(1, 3, 16, 24).requires_grad_(), randn(1, 4, 2, 3).requires_grad_()
    model.encode(x).latent_dist.mode().sum().backward()
    model.decode(z).sample.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert z.grad.abs().sum() > 0


# ---- files ------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = AutoencoderMonobath.from_pretrained(tmp_path)
    assert not loaded.training
    x = rand_images(1, 3, 24, 32)
    assert close(loaded(x).sample, model(x).sample)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert AutoencoderMonobath.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    (tmp_path / "pipeline").mkdir()
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = AutoencoderMonobath.from_pretrained(tmp_path / "pipeline", subfolder="vae")
    assert close(loaded(x).sample, model(x).sample)


def test_monobaths_own_forms_load(tmp_path):
    tok = tiny_tokenizer()
    tok.config.scaling_factor, tok.config.shift_factor = 0.7, 0.2
    tok.save_pretrained(tmp_path / "model")
    x = rand_images(1, 3, 24, 32)
    for source in (tmp_path / "model", str(tmp_path / "model"), tmp_path / "model" / "model.safetensors"):
        model = AutoencoderMonobath.from_pretrained(source)
        assert (model.config.scaling_factor, model.config.shift_factor) == (0.7, 0.2)
        assert close(model(x).sample.clamp(-1, 1), tok(x))
    half = AutoencoderMonobath.from_pretrained(tmp_path / "model", torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    packaged = AutoencoderMonobath.from_pretrained("default")
    assert close(packaged(x).sample.clamp(-1, 1), Tokenizer.from_pretrained("default")(x))
    with pytest.raises(UserError, match="variant"):
        AutoencoderMonobath.from_pretrained("default", variant="fp16")


def test_it_shares_nothing_with_the_tokenizer():
    tok = tiny_tokenizer()
    model = AutoencoderMonobath.from_tokenizer(tok)
    model.half()
    assert tok.dtype == torch.float32
    assert {p.data_ptr() for p in tok.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    with pytest.raises(UserError, match="optimized"):
        AutoencoderMonobath.from_tokenizer(tok.optimize())


def test_configurations_that_do_not_fit(model):
    parts = {k: model.config[k] for k in ("encoder_config", "decoder_config", "sampler_config")}
    for change, named in [
        ({"latent_channels": 16}, "latent_channels=16"),
        ({"block_out_channels": [8, 8]}, "block_out_channels"),
        ({"decoder_config": parts["decoder_config"] | {"factor": 16}}, r"decoder\.factor=16"),
        ({"sampler_config": {"colour": 1}}, "colour"),
    ]:
        with pytest.raises(UserError, match=named):
            AutoencoderMonobath(**(parts | change))


def test_push_to_hub_uploads_the_saved_folder(model, monkeypatch):
    uploaded = {}

    def upload(self, working_dir, repo_id, **_):
        uploaded[repo_id] = sorted(p.name for p in Path(working_dir).iterdir())

    hub = "diffusers.utils.hub_utils."
    monkeypatch.setattr(hub + "create_repo", lambda name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub + "load_or_create_model_card", lambda *_, **__: ModelCard("card"))
    monkeypatch.setattr(AutoencoderMonobath, "_upload_folder", upload)
    model.push_to_hub("somebody/vae")
    (files,) = uploaded.values()
    assert list(uploaded) == ["somebody/vae"]
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= set(files)


# ---- without diffusers, and the page ----------------------------------------------------------------


def test_without_diffusers_the_message_names_the_extra():
    code = (
        "import sys\n"
        "sys.modules['diffusers'] = None\n"
        "import monobath\n"
        "from monobath.integrations.diffusers import encoder_from_diffusers\n"
        "try:\n"
        "    from monobath.integrations.diffusers import AutoencoderMonobath\n"
        "except monobath.UserError as error:\n"
        "    sys.exit(\"pip install 'monobath[diffusers]'\" not in str(error))\n"
        "sys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    from monobath.integrations import diffusers as bridge

    with pytest.raises(AttributeError, match="AutoencoderOther"):
        _ = bridge.AutoencoderOther


def test_the_pages_code_runs(tmp_path, monkeypatch):
    """Its blocks, in order, in one namespace, on a tiny pipeline under the name that the page loads."""
    monkeypatch.chdir(tmp_path)
    pipe_of(diffusers.StableDiffusionPipeline, theirs()).save_pretrained("stable-diffusion")
    tiny_tokenizer().save_pretrained("runs/mine/model")
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    code = re.findall(r"^```py\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(code) >= 3
    names = {"photo": Image.new("RGB", (40, 32), "teal")}
    for block in code:
        exec(compile(block, "docs/diffusers.md", "exec"), names)
    assert_pictures(names["pictures"], (48, 48))
