import io
import struct
import zlib

import numpy as np
import pytest
from conftest import encode, picture
from PIL import Image

from glad_core.decoding.opened import orientation, pages
from glad_core.decoding.picture import ImageError, decode, decode_image, is_image
from glad_core.images import resize, to_tensor
from glad_core.views import Framing


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


def associated(tiff):
    """The TIFF with its ExtraSamples saying that colours are multiplied by alpha already."""
    entry = struct.pack("<HHLH", 338, 3, 1, 2)
    assert entry in tiff
    return tiff.replace(entry, struct.pack("<HHLH", 338, 3, 1, 1))


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_transparency_is_ignored(alpha):
    rgba = Image.fromarray(np.dstack([picture(), np.full((24, 40), alpha, np.uint8)]))
    files = [encode(rgba), encode(rgba, "WEBP", lossless=True, exact=True), encode(rgba, "TIFF")]
    files += [associated(encode(rgba, "TIFF", compression=name)) for name in ("raw", "tiff_lzw")]
    assert all((decode_image(data) == picture()).all() for data in files)
    grey = Image.fromarray(np.dstack([picture()[..., 0], np.full((24, 40), alpha, np.uint8)]))
    assert (decode_image(encode(grey)) == picture()[..., :1]).all()
    assert (decode_image(associated(encode(grey, "TIFF"))) == picture()[..., :1]).all()


def test_a_transparent_colour_is_a_colour():
    palette = Image.fromarray(picture()).quantize(16)
    as_rgb = np.asarray(palette.convert("RGB"))
    files = [encode(palette, "GIF", transparency=3), encode(palette, transparency=3)]
    files.append(encode(palette, transparency=bytes(16)))
    assert all((decode_image(data) == as_rgb).all() for data in files)
    whole = encode(Image.fromarray(picture()), transparency=tuple(map(int, picture()[0, 0])))
    assert (decode_image(whole) == picture()).all()


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.dib", "a.pnm", "a.HEIC", "a.jp2"])
def test_a_picture_of_any_kind_is_an_image_by_its_name(name):
    assert is_image(name)
    assert not is_image(name + ".txt")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x0cjP  \r\n", "JPEG 2000"),
        (b"\0\0\0\x18ftypheix\0", "HEIC"),
        (b"\0\0\0 ftypavif\0", "AVIF"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "the pointer to a file in Git LFS"),
        (b"<!doctype html>", "HTML or XML"),
    ],
)
def test_a_format_that_is_not_read_is_named(data, name):
    with pytest.raises(ImageError, match=f"GIF or PPM but {name}$"):
        decode_image(data)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    decoded = decode_image(encode(Image.fromarray(picture()), "PNG", exif=exif))
    assert decoded.shape == (40, 24, 3)
    assert (decoded == np.rot90(picture(), 3)).all()


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_exif_data_that_cannot_be_read_turn_nothing(format, options):
    data = encode(Image.fromarray(picture()), format, exif=b"Exif\0\0garbage!", **options)
    assert (decode_image(data) == picture()).all()
    assert orientation(data) == 1


@pytest.mark.parametrize(("format", "options"), [("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 98})])
@pytest.mark.parametrize("way", range(1, 9))
def test_every_format_is_turned_the_same_way(format, options, way):
    exif = Image.Exif()
    exif[0x0112] = way
    upright, other = (
        decode_image(encode(Image.fromarray(picture()), kind, exif=exif, **more)).astype(int)
        for kind, more in (("PNG", {}), (format, options))
    )
    assert upright.shape == other.shape
    assert np.abs(upright - other).mean() < 3


def bmp(bits, pixels, masks=(), top_down=False):
    """A Windows bitmap of 40 x 24 pixels; with masks of its colours' bits, if there are any."""
    extra = struct.pack(f"<{len(masks)}I", *masks)
    size = struct.pack("<Iii", 40, 40, -24 if top_down else 24)
    header = size + struct.pack("<HHIIiiII", 1, bits, 3 if masks else 0, len(pixels), 0, 0, 0, 0) + extra
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels


@pytest.mark.parametrize(
    ("widths", "masks"), [((5, 5, 5), ()), ((5, 5, 5), (0x7C00, 0x3E0, 0x1F)), ((5, 6, 5), (0xF800, 0x7E0, 0x1F))]
)
def test_bitmaps_of_16_bits(widths, masks):
    red, green, blue = (
        np.moveaxis(picture().astype(np.uint16), -1, 0) >> np.array([8 - w for w in widths])[:, None, None]
    )
    packed = (red << (widths[1] + 5)) | (green << 5) | blue
    decoded = decode_image(bmp(16, packed[::-1].astype("<u2").tobytes(), masks))
    assert np.abs(decoded.astype(int) - picture()).max() <= 7


@pytest.mark.parametrize("top_down", [False, True])
def test_the_fourth_byte_of_a_bitmap_is_ignored(top_down):
    pixels = np.dstack([picture()[..., ::-1], np.zeros((24, 40), np.uint8)])
    data = bmp(32, (pixels if top_down else pixels[::-1]).tobytes(), top_down=top_down)
    assert (decode_image(data) == picture()).all()


@pytest.mark.parametrize(
    "options", [{"compression": "group4"}, {"compression": "tiff_ccitt"}, {"compression": "lzma"}, {}]
)
def test_bilevel_and_cmyk_tiffs(options):
    bilevel = Image.fromarray(picture()).convert("1")
    assert (decode_image(encode(bilevel, "TIFF", **options)) == np.asarray(bilevel.convert("RGB"))).all()
    compression = "tiff_lzw" if options else "raw"
    cmyk = encode(Image.fromarray(picture()).convert("CMYK"), "TIFF", compression=compression)
    assert (decode_image(cmyk) == picture()).all()


@pytest.mark.parametrize("most", [255, 1023, 4095, 65535])
def test_the_largest_value_of_a_ppm_is_white(most):
    values = np.round(picture() * (most / 255)).astype("u1" if most == 255 else ">u2")
    for head, pixels in ((b"P6", values), (b"P5", values[..., 0])):
        data = head + b" 40 24 %d\n" % most + pixels.tobytes()
        assert np.abs(decode_image(data).astype(int) - picture()[..., : 3 if head == b"P6" else 1]).max() <= 1


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


@pytest.mark.parametrize("side", [16_000, 40_000])
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


@pytest.mark.parametrize(
    ("values", "suffix", "white", "expected"),
    [
        ((np.arange(4096).reshape(64, 64)).astype(np.uint16), "PNG", 4095, 255),
        ((np.arange(4096).reshape(64, 64)).astype(np.uint16), "TIFF", None, 16),  # nearly black, as before
        ((np.arange(4096).reshape(64, 64)).astype(np.uint16), "TIFF", 0, 255),
        ((np.arange(4096).reshape(64, 64) * 40).astype(np.int32), "TIFF", 2**18 - 1, 159),
        ((np.arange(4096).reshape(64, 64) / 40).astype(np.float32), "TIFF", 204.75, 128),
        ((np.arange(4096).reshape(64, 64)).astype(np.uint16), "PNG", 1023, 255),
    ],
)
def test_the_white_level_is_white(values, suffix, white, expected):
    decoded = decode(encode(Image.fromarray(values), suffix), (Framing("squash", 64, white=white),))
    assert decoded.peak == values.max()
    assert decoded.pixels.max() == pytest.approx(expected, abs=1)
    if white == 1023:
        assert (decoded.pixels == 255).mean() > 0.7  # clipped, and counted by its peak


def test_pictures_of_8_bits_have_no_peak():
    assert decode(encode(Image.fromarray(picture())), 16).peak is None


def test_every_page_is_a_picture_but_copies():
    frames = [Image.fromarray(np.full((24, 40, 3), value, np.uint8)) for value in (10, 90, 170)]
    for kind, options in (("TIFF", {}), ("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pages(data) == ([1, 2, 3], 3)
        values = [int(decode(data, 8, page).pixels[0, 0, 0]) for page in (None, 1, 2, 3)]
        assert np.allclose(values, [10, 10, 90, 170], atol=2), kind
    thumbnail = frames[1].resize((8, 8))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    assert pages(encode(frames[0], "TIFF", save_all=True, append_images=[thumbnail, frames[2]])) == ([1, 3], 3)
    frames[2].encoderinfo = {"tiffinfo": {254: 0}}
    first = encode(frames[0], "TIFF", save_all=True, append_images=frames[2:], tiffinfo={254: 1})
    assert pages(first) == ([2], 2)
    assert pages(encode(frames[0], "JPEG")) == ([1], 1)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_frames_in_a_row_are_decoded_once_each(kind, options, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (8, 9, 3)).astype(np.uint8)) for _ in range(6)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], exif=exif, **options)
    alone = [decode(data, 8, page).pixels for page in (6, 5, 4, 3, 2, 1)][::-1]
    opened, opens = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(1) or opens(*args, **options))
    in_a_row = [decode(data, 8, page).pixels for page in range(1, 7)]
    assert len(opened) == 2
    assert (np.array(in_a_row) == np.array(alone)).all()
    assert len({frame.tobytes() for frame in in_a_row}) == 6


def test_a_chain_of_pages_that_breaks_off_keeps_those_before(monkeypatch):
    frames = [Image.fromarray(picture()) for _ in range(4)]
    data = bytearray(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    with Image.open(io.BytesIO(data)) as opened:
        opened.seek(2)
        start = opened._frame_pos[2]
    data[start:] = b""
    found, count = pages(bytes(data))
    assert count == len(found)
    assert found[:2] == [1, 2]
    assert len(found) > 2  # and what is broken is an error, not nothing
    with pytest.raises(ImageError):
        decode(bytes(data), 8, found[2])
    monkeypatch.setattr("glad_core.decoding.opened.MAX_PAGES", 3)
    with pytest.raises(ImageError, match="more than 3 pages"):
        pages(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
