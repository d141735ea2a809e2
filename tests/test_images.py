"""The edge between pictures and tensors: every kind of file comes out as upright 8-bit RGB, or says no."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from monobath.errors import UserError
from monobath.images import open_image, pil_to_tensor, tensor_to_pil, to_float, to_rgb, to_uint8


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def png_header(width, height):
    """A PNG that claims a size and has next to no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_float_and_back_is_the_identity():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).min() == -1
    assert to_float(values).max() == 1
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_pil_and_back_is_the_identity():
    image = picture(7, 5)
    tensor = pil_to_tensor(image)
    assert tensor.shape == (3, 5, 7)
    assert np.array_equal(np.asarray(tensor_to_pil(tensor)), np.asarray(image))
    assert np.array_equal(np.asarray(tensor_to_pil(to_float(tensor))), np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, tmp_path):
    upright = picture(9, 6)
    inverse = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in inverse.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(upright))


def test_damaged_exif_is_ignored(monkeypatch):
    def fail(image):
        raise struct.error("bad EXIF")

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    image = picture(4, 3)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))


def test_palette():
    image = picture(8, 6).quantize(16)
    assert np.array_equal(np.asarray(open_image(saved(image, "PNG"))), np.asarray(image.convert("RGB")))


def test_transparent_palette_is_composited_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    result = np.asarray(open_image(saved(image, "PNG", transparency=1)))
    assert result.tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_greyscale_and_one_bit():
    grey = picture(5, 4).convert("L")
    result = np.asarray(open_image(saved(grey, "PNG")))
    assert np.array_equal(result, np.asarray(grey)[..., None].repeat(3, -1))
    bits = grey.point(lambda value: 255 * (value > 128)).convert("1")
    result = np.asarray(open_image(saved(bits, "PNG")))
    assert np.array_equal(result[..., 0], 255 * np.asarray(bits).astype(np.uint8))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_composited_over_white(mode):
    channels = 2 if mode == "LA" else 4
    values = np.full((1, 3, channels), 100, dtype=np.uint8)
    values[0, :, -1] = [0, 128, 255]
    image = Image.fromarray(values, mode=mode)
    result = np.asarray(open_image(saved(image, "PNG")))[0, :, 0]
    assert result.tolist() == pytest.approx([255, 255 - 155 * 128 / 255, 100], abs=1)
    assert result[0] == 255
    assert result[2] == 100


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "YCbCr", "HSV"])
def test_rare_modes_convert(mode):
    source = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")
    assert to_rgb(picture(4, 3).convert(source).convert(mode)).mode == "RGB"


def test_cmyk():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    result = np.asarray(open_image(saved(image, "JPEG", quality=100))).astype(int)
    assert np.abs(result - [255, 0, 0]).max() <= 4


def test_16_bit_is_scaled_not_clipped():
    values = np.array([[0, 257, 33_000, 65_535]], dtype=np.uint16)
    result = np.asarray(open_image(saved(Image.fromarray(values), "PNG")))[0, :, 0]
    assert result.tolist() == [0, 1, round(33_000 / 257), 255]


def test_float_greyscale():
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert np.asarray(to_rgb(unit))[0, :, 0].tolist() == [0, 128, 255]
    wide = Image.fromarray(np.array([[0.0, 100.0, 300.0]], dtype=np.float32))
    assert np.asarray(to_rgb(wide))[0, :, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(format):
    first, second = Image.new("RGB", (6, 4), (255, 0, 0)), Image.new("RGB", (6, 4), (0, 0, 255))
    file = saved(first, format, save_all=True, append_images=[second], duration=100)
    result = np.asarray(open_image(file)).astype(int)
    assert result.shape == (4, 6, 3)
    assert np.abs(result - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (20_000, 30)])
def test_extreme_sizes(size):
    assert pil_to_tensor(open_image(saved(Image.new("RGB", size, (1, 2, 3)), "PNG"))).shape == (
        3,
        *size[::-1],
    )


def test_cut_short_jpeg(tmp_path):
    data = saved(picture(64, 48), "JPEG").getvalue()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.jpg cannot be read as a picture"):
        open_image(tmp_path / "cut.jpg")


@pytest.mark.parametrize("content", [b"", b"not a picture at all\n"])
def test_not_a_picture(content, tmp_path):
    (tmp_path / "text.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"text\.jpg is not a picture"):
        open_image(tmp_path / "text.jpg")
    with pytest.raises(UserError, match=r"^shard:text is not a picture"):
        open_image(io.BytesIO(content), name="shard:text")


def test_missing_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"none\.jpg does not exist"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(UserError, match="is a folder"):
        open_image(tmp_path)


@pytest.mark.parametrize("side", [8_100, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_refused_from_the_header(side):
    start = time.perf_counter()
    with pytest.raises(UserError, match="max_pixels=64,000,000"):
        open_image(io.BytesIO(png_header(side, side)))
    assert time.perf_counter() - start < 0.5


def test_pillows_own_limit_is_named_when_it_is_the_lower_one():
    with pytest.raises(UserError, match=r"raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        open_image(io.BytesIO(png_header(60_000, 60_000)), max_pixels=10**10)


def test_max_pixels_is_named_and_exact():
    file = saved(picture(20, 10), "PNG")
    with pytest.raises(UserError, match=r"20x10 = 200 pixels, above max_pixels=199"):
        open_image(file, max_pixels=199)
    file.seek(0)
    assert open_image(file, max_pixels=200).size == (20, 10)
