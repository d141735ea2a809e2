"""Laws of tiles: one is the whole, bounded reach is exact to the pixel, all share one noise, no seam is seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import rand_images, randn, sample, tiny_decoder, tiny_tokenizer
from PIL import Image

from monobath import Tokenizer, UserError, resources
from monobath.cli import main
from monobath.decoders import PixelDecoder
from monobath.images import to_uint8
from monobath.sampling import draw_noise
from monobath.tiles import Layout, plan

LOCAL = {"norm": "local", "modulation": True}
BARE = {"norm": "local", "modulation": False, "middle_blocks": 0, "heads": 0, "down": [0, 1], "up": [1, 1]}


# ---- where tiles are --------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 8, 16])
def test_tiles_cover_the_picture_and_share_what_was_asked(unit):
    for length, side, overlap in itertools.product((2, 3, 5, 8, 9, 31, 64), (2, 3, 5, 8), (0, 1, 2, 7)):
        if overlap >= side:
            continue
        layout = plan((length * unit, unit), side * unit, overlap * unit, unit, None)
        if length <= side:
            assert layout is None
            continue
        rows = layout.rows
        assert (rows[0].start, rows[-1].stop) == (0, length * unit)
        assert {r.stop - r.start for r in rows} == {side * unit}
        assert all(r.start % unit == 0 for r in rows)
        shared = [a.stop - b.start for a, b in itertools.pairwise(rows)]
        assert min(shared) >= overlap * unit
        assert layout.cols == [slice(0, unit)]
        needed = -(-(length - side) // (side - overlap)) + 1
        assert len(rows) == needed


def test_sizes_are_rounded_to_whole_tokens():
    assert plan((64, 64), 39, 3, 8, None) == plan((64, 64), 32, 8, 8, None)


def test_the_default_overlap():
    def shared(tile, reach):
        layout = plan((4096, 8), tile, None, 8, reach)
        return layout.rows[0].stop - layout.rows[1].start, layout.cut

    assert shared(128, None)[0] >= 32
    assert 64 <= shared(512, None)[0] < 96
    assert shared(512, None)[1] == 0
    assert shared(512, 100)[0] >= 208
    assert shared(512, 100)[1] == 8
    assert shared(256, 100)[1] == 0  # half a tile does not cover the reach on both sides: blended


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": 8}, ["tile=8", "at least 16"]),
        ({"tile": -64}, ["tile=-64"]),
        ({"tile": 64.0}, ["tile=64.0", "whole number"]),
        ({"tile": 32, "overlap": 32}, ["overlap=32", "tile=32", "at most 24"]),
        ({"tile": 32, "overlap": -1}, ["overlap=-1"]),
        ({"tile": 32, "overlap": "8"}, ["overlap='8'"]),
    ],
)
def test_tiles_that_cannot_be(options, words):
    tok = tiny_tokenizer()
    for call in (
        lambda: tok.decode(randn(1, 4, 6, 6), **options),
        lambda: tok.encode(rand_images(1, 3, 48, 48), **options),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert all(word in str(error.value) for word in words)


# ---- one tile is the whole --------------------------------------------------------------------------

FORMS = {
    "group": {},
    "local": {"decoder": LOCAL},
    "three steps": {"steps": 3},
    "zero noise": {"noise": "zero"},
    # a token of 8 pixels over latents of 4: odd sides are padded
    "f4": {"encoder": {"factor": 4, "patch": 1}, "decoder": {"factor": 4}},
}


@pytest.mark.parametrize("form", FORMS)
def test_one_covering_tile_is_the_whole(form):
    tok = tiny_tokenizer(**FORMS[form])
    x = rand_images(2, 3, 37, 52)
    posterior = tok.encode(x)
    z = posterior.mode()
    assert torch.equal(tok.encode(x, tile=56).mode(), z)
    for output in ("tensor", "uint8"):
        whole = tok.decode(z, size=posterior.size, seed=3, output=output)
        assert torch.equal(tok.decode(z, size=posterior.size, seed=3, tile=56, output=output), whole)


@pytest.mark.parametrize("form", FORMS)
def test_tiles_of_any_form_give_a_picture_of_the_size(form):
    tok = tiny_tokenizer(**FORMS[form])
    x = rand_images(2, 3, 37, 52)
    posterior = tok.encode(x, tile=24)
    assert posterior.size == (37, 52)
    z = posterior.mode()
    assert z.shape == tok.encode(x).mode().shape
    out = tok.decode(z, size=(37, 52), tile=24)
    assert out.shape == (2, 3, 37, 52)
    assert out.dtype == torch.float32
    pixels = tok.decode(z, size=(37, 52), tile=24, output="uint8")
    assert torch.equal(pixels, to_uint8(out))
    assert np.array_equal(np.asarray(tok.decode(z, tile=24, output="pil")[1])[:37, :52], pixels[1].permute(1, 2, 0))
    for i in range(2):  # a sample does not depend on its batch
        assert torch.equal(tok.decode(z[i : i + 1], size=(37, 52), seed=i, tile=24), out[i : i + 1])


def test_half_precision():
    tok = tiny_tokenizer().bfloat16()
    z = tok.encode(rand_images(1, 3, 40, 56), tile=24).mode()
    assert z.dtype == torch.float32
    out = tok.decode(z, tile=24)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


# ---- one noise field, and nothing out of place ------------------------------------------------------


class Echo(PixelDecoder):
    """Returns what it is given: its noise plus its latent."""

    fixed = "gaussian"

    def output(self, x_t, t, features, stage):
        return x_t + features.z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


@pytest.mark.parametrize("overlap", [0, 8, 16, 40, None])
@pytest.mark.parametrize("tile", [16, 24, 48, 64])
def test_the_noise_of_a_pixel_does_not_depend_on_the_tiles(tile, overlap):
    if overlap is not None and overlap >= tile:
        overlap = 0
    echo = Echo(tiny_tokenizer().config.decoder)
    z = randn(2, 4, 9, 14)
    expected = draw_noise((3, 72, 112), [4, 9]) + z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
    out = sample(echo, z, [4, 9], tile=tile, overlap=overlap, size=(70, 111))
    assert torch.allclose(out, expected[:, :, :70, :111], atol=1e-6)


# ---- decoders that see only so far ------------------------------------------------------------------

SHAPES = {
    "transformer": LOCAL,
    "bare": BARE,
    "one level": {**LOCAL, "patch": 8, "channels": [24], "middle_blocks": 1, "reach": 1},
    "patch 1": {**LOCAL, "patch": 1, "channels": [16, 16, 16, 24], "middle_blocks": 1},
    "wide tokens": {**LOCAL, "factor": 4, "middle_blocks": 1},
    "linear skip": {**BARE, "linear_skip": True, "factor": 16},
    "replicate": {**BARE, "padding": "replicate"},
    "shuffled up": {
        **BARE,
        "upsampling": "shuffle",
        "channels": [16, 16, 24],
        "down": [0, 1, 1],
        "up": [1, 1, 2],
        "patch": 2,
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_receptive_field_is_exact(name):
    """What the formula says is what has a gradient: not a pixel more, not one less."""
    decoder = tiny_decoder(**SHAPES[name])
    config = decoder.config
    unit = max(config.factor, config.token_side)
    width, middle = 60 * unit, 30 * unit
    z = randn(1, 4, unit // config.factor, width // config.factor).requires_grad_()
    x_t = randn(1, 3, unit, width, seed=1).requires_grad_()
    out = decoder(x_t, torch.ones(1), z)[..., middle : middle + unit]
    (out * randn(*out.shape, seed=2)).sum().backward()
    noise, latents = decoder.receptive_field((middle, middle + unit - 1))
    seen = x_t.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    assert (seen.min(), seen.max()) == noise
    seen = z.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    assert (seen.min() * config.factor, (seen.max() + 1) * config.factor - 1) == latents
    outermost = max(middle - min(noise[0], latents[0]), max(noise[1], latents[1]) + 1 - middle - unit)
    assert decoder.reach() == outermost


def test_statistics_over_the_picture_reach_everywhere():
    assert tiny_decoder().reach() is None


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "steps"),
    [("transformer", 1), ("bare", 1), ("bare", 2), ("wide tokens", 1), ("replicate", 1), ("replicate", 2)],
)
def test_tiles_of_bounded_reach_are_the_whole(name, steps):
    tok = tiny_tokenizer(
        decoder=SHAPES[name], encoder={"factor": 4, "patch": 1} if name == "wide tokens" else {}, steps=steps
    )
    reach = tok.decoder.reach()  # of one step: each is taken in tiles of its own
    overlap = 2 * (-(-reach // 8) * 8)
    tile = overlap + 48
    z = randn(1, 4, (tile + 96) // tok.factor, (tile + 40) // tok.factor).double()
    decoder = tok.decoder.double()  # activations of random networks without norms grow: rounding with them

    whole = sample(decoder, z, [0], steps=steps)

    def error(**tiles):
        return (sample(decoder, z, [0], steps=steps, **tiles) - whole).abs().max() / whole.abs().max()

    assert error(tile=tile, overlap=overlap) < 1e-6
    assert error(tile=tile, overlap=overlap - 16) > 1e-6  # blended


@torch.no_grad()
@pytest.mark.parametrize("noise", ["zero", "gaussian"])
@pytest.mark.parametrize("name", ["bare", "replicate"])
def test_the_optimized_form_too(name, noise):
    tok = tiny_tokenizer(decoder=SHAPES[name], noise=noise).optimize()
    tile = 4 * (-(-tok.decoder.reach() // 8) * 8)  # the default overlap is then exact
    z = randn(2, 4, tile // 8 + 3, tile // 8 + 9)
    whole, tiled = (sample(tok.decoder, z, [0, 1], noise=noise, tile=t) for t in (None, tile))
    assert (tiled - whole).abs().max() < 1e-5 * whole.abs().max()


# ---- seams ------------------------------------------------------------------------------------------


def mosaic(side: int) -> Image.Image:
    picture = Image.new("RGB", (side, side))
    for i, path in enumerate(resources.sample_paths()):
        photo = Image.open(path).convert("RGB").crop((0, 0, 251, 251))  # off the grid of tiles
        picture.paste(photo, (i % 3 * 251, i // 3 * 251))
    return picture


def seams(tiled: torch.Tensor, whole: torch.Tensor, layout: Layout) -> torch.Tensor:
    """For each line where tiles begin, change over or end: how much stronger the picture changes across it than the
    untiled one does, which has the same content there, relative to the same figure for all other lines."""
    ratios = []
    for dim, spans in ((2, layout.rows), (3, layout.cols)):
        steps, expected = (x.diff(dim=dim).abs().mean(dim=(0, 1, 5 - dim)) for x in (tiled, whole))
        lines = torch.zeros(len(steps), dtype=torch.bool)
        for a, b in itertools.pairwise(spans):
            for line in (b.start, (b.start + a.stop) // 2, a.stop):
                lines[line - 1] = True
        ratios.append(steps[lines] / expected[lines] / (steps[~lines].mean() / expected[~lines].mean()))
    return torch.cat(ratios)


@pytest.fixture(scope="module")
def photos():
    tok = Tokenizer.from_pretrained("f8c4")
    picture = mosaic(640)
    return tok, picture, tok.encode(picture).mode()


@pytest.mark.parametrize("noise", ["zero", "gaussian"])
def test_no_seam(photos, noise):
    tok, _, z = photos
    layout = plan((640, 640), 256, None, 8, None)
    assert len(layout.rows) == len(layout.cols) == 3
    tiled, whole = tok.decode(z, noise=noise, tile=256), tok.decode(z, noise=noise)
    assert seams(tiled, whole, layout).max() < 1.1
    assert (tiled - whole).square().mean() < 4 * 10**-3.8  # 38 dB
    if noise == "zero":  # the measure does see seams
        hard = tok.decode(z, noise=noise, tile=320, overlap=0)
        assert seams(hard, whole, plan((640, 640), 320, 0, 8, None)).min() > 1.5


def test_encoding_in_tiles_is_close(photos):
    tok, picture, z = photos
    tiled = tok.encode(picture, tile=256).mode()
    assert (tiled - z).norm() / z.norm() < 0.03
    assert not torch.equal(tiled, z)


# ---- command line -----------------------------------------------------------------------------------


def test_the_verbs_take_a_tile(tmp_path):
    model = str(tmp_path / "model")
    tok = tiny_tokenizer()
    tok.save_pretrained(model)
    pixels = to_uint8(rand_images(1, 3, 37, 52))
    source = tmp_path / "photo.png"
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(source)
    options = ["--model", model, "--tile", "24"]
    assert main(["reconstruct", str(source), "--out", str(tmp_path / "direct"), *options]) == 0
    assert main(["encode", str(source), "--out", str(tmp_path / "latents"), *options]) == 0
    latent = str(tmp_path / "latents" / "photo.safetensors")
    assert main(["decode", latent, "--out", str(tmp_path / "out"), *options]) == 0
    expected = tok.decode(tok.encode(pixels, tile=24).mode(), size=(37, 52), tile=24, output="uint8")
    for folder in ("direct", "out"):
        written = np.asarray(Image.open(tmp_path / folder / "photo.png"))
        assert np.array_equal(written, expected[0].permute(1, 2, 0))
    assert main(["reconstruct", str(source), "--out", str(tmp_path / "bad"), "--model", model, "--tile", "8"]) == 2
