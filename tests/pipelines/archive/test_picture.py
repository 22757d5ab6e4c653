import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from glad_core.images import resize, to_tensor
from pipelines.archive.picture import ImageError, decode_image


def encode(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(height=24, width=40):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 2], -1).astype(np.uint8)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_come_back_exactly(format):
    assert (decode_image(encode(Image.fromarray(picture()), format)) == picture()).all()


@pytest.mark.parametrize(("format", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})])
def test_other_formats_come_back_closely(format, options):
    decoded = decode_image(encode(Image.fromarray(picture()), format, **options))
    assert np.abs(decoded.astype(int) - picture()).mean() < 3


def test_grey_palette_and_bilevel():
    grey = Image.fromarray(picture()[..., 0])
    assert (decode_image(encode(grey)) == picture()[..., :1]).all()
    palette = Image.fromarray(picture()).quantize(16)
    assert (decode_image(encode(palette)) == np.asarray(palette.convert("RGB"))).all()
    assert set(np.unique(decode_image(encode(grey.point(lambda v: 255 * (v > 99)).convert("1"))))) == {0, 255}


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    values = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    decoded = decode_image(encode(Image.fromarray(values), format))
    assert (decoded == np.round(values / 257)[..., None]).all()


def test_16_bit_colour_png_is_scaled():
    values = (np.random.default_rng(0).integers(0, 65536, (5, 7, 3))).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(decode_image(png).astype(float) - values / 257).max() <= 1


def test_transparency_is_composited_on_black():
    rgba = np.dstack([picture(), np.full((24, 40), 255, np.uint8)])
    rgba[:, :20, 3] = 0
    rgba[:, 20:30, 3] = 128
    decoded = decode_image(encode(Image.fromarray(rgba)))
    assert (decoded[:, :20] == 0).all()
    assert (decoded[:, 30:] == picture()[:, 30:]).all()
    assert np.abs(decoded[:, 20:30].astype(int) - picture()[:, 20:30] / 2).max() <= 2


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    decoded = decode_image(encode(Image.fromarray(picture()), "PNG", exif=exif))
    assert decoded.shape == (40, 24, 3)
    assert (decoded == np.rot90(picture(), 3)).all()


def test_cmyk_and_float():
    cmyk = decode_image(encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - picture()).mean() < 4
    grey = np.linspace(0, 1, 24 * 40, dtype=np.float32).reshape(24, 40)
    assert (decode_image(encode(Image.fromarray(grey), "TIFF")) == np.round(grey * 255)[..., None]).all()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"hello, I am a text file", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (encode(Image.fromarray(picture(200, 200)), "PNG")[:200], "damaged"),
        (encode(Image.fromarray(picture(200, 200)), "JPEG")[:900], "damaged"),
        (encode(Image.fromarray(picture()), "TIFF")[:500], "damaged"),
        (encode(Image.fromarray(np.full((4, 4), 7.5, np.float32)), "TIFF"), "damaged"),
    ],
)
def test_bad_bytes_name_their_kind(data, kind):
    with pytest.raises(ImageError) as error:
        decode_image(data)
    assert error.value.kind == kind
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("side", [10_000, 40_000])
def test_a_decompression_bomb_is_refused_from_its_header(side):
    bomb = bytearray(encode(Image.new("1", (8, 8))))
    bomb[16:24] = struct.pack(">II", side, side)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    with pytest.raises(ImageError, match="bomb") as error:
        decode_image(bytes(bomb))
    assert error.value.kind == "too_large"


def test_resize_antialiases_and_keeps_an_image_of_the_right_size():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = resize(stripes, 8)[:, 1:-1]
    assert np.abs(inner.astype(int) - 127).max() < 20  # sampling without a filter would give 0 or 255
    assert resize(stripes, 64) is stripes


def test_to_tensor_range_and_layout():
    black_white = [np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)]
    tensor = to_tensor(black_white)
    assert tensor.shape == (2, 3, 4, 4)
    assert tensor[0].unique().tolist() == [-1]
    assert tensor[1].unique().tolist() == [1]
