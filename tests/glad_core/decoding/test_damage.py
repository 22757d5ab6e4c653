"""Pictures that are cut or hollow although a decoder takes them, and whole ones that look as if they were."""

import struct
import zlib

import numpy as np
import pytest
from conftest import encode
from PIL import Image

from glad_core.decoding import damage
from glad_core.decoding.picture import ImageError, decode_image

RNG = np.random.default_rng(5)
END = b"\xff\xd9"


def photo(width=160, height=120, mode="RGB"):
    small = Image.fromarray(RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def png(width, height, rows, interlaced=0):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def claims(data, width, height):
    """A JPEG whose header names another size."""
    at = next(data.index(bytes((0xFF, marker))) for marker in (0xC0, 0xC2) if bytes((0xFF, marker)) in data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def kind(data):
    with pytest.raises(ImageError) as error:
        decode_image(data)
    return error.value.kind


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "progressive restarts": {"progressive": True, "restart_marker_blocks": 3},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_every_cut_of_a_jpeg_is_noticed(mode, options):
    whole = encode(photo(mode=mode), "JPEG", quality=90, **options)
    assert decode_image(whole + bytes(1000)).shape == (120, 160, 3)  # what follows the end does no harm
    scans = damage.Jpeg.read(whole).scans
    # In the last scan of a progressive JPEG is the last bit of its detail: without it the picture is all there.
    end = scans[-1][0] if "progressive" in options else len(whole)
    for share in (0.5, 0.75, 0.95):
        cut = whole[: max(scans[0][0] + 9, int(end * share))]
        for data in (cut, cut + END, cut + bytes(10 * len(whole))):
            assert kind(data) == "damaged"
    if "progressive" not in options:
        assert kind(whole[: len(whole) // 2] + whole[len(whole) * 3 // 4 :]) == "damaged"
    assert kind(whole[:-2]) == "damaged"
    assert kind(whole[:-2] + b"a text of the camera's") == "damaged"


@pytest.mark.parametrize(
    ("marker", "bits", "name"),
    [
        (0xC0, 12, "a JPEG of 12 bits"),
        (0xC1, 12, "a JPEG of 12 bits"),
        (0xC2, 12, "a JPEG of 12 bits"),
        (0xC9, 12, "a JPEG of 12 bits"),
        (0xC3, 12, "a lossless JPEG of 12 bits"),
        (0xC3, 16, "a lossless JPEG of 16 bits"),
        (0xC6, 8, "a hierarchical JPEG"),
        (0xF7, 8, "JPEG-LS"),
        (0xF7, 12, "JPEG-LS"),
    ],
)
def test_a_jpeg_of_a_kind_that_is_not_read_is_called_by_its_name(marker, bits, name):
    whole = bytearray(encode(photo(), "JPEG", exif=b"Exif\0\0" + encode(photo(8, 8), "JPEG")))
    start = whole.rindex(b"\xff\xc0")  # of the picture, not of the thumbnail before it
    whole[start + 1], whole[start + 4] = marker, bits
    with pytest.raises(ImageError, match=f"^{name} is not read; write it as PNG or TIFF of 8 or 16 bits$") as error:
        decode_image(bytes(whole))
    assert error.value.kind == "unsupported"
    assert kind(bytes(whole[: start + 6])) in ("damaged", "unsupported")
    whole[start + 1], whole[start + 4] = 0xC0, 77  # nor is every wrong number of bits a kind
    assert kind(bytes(whole)) == "damaged"


def test_a_bmp_of_a_rare_kind_is_unsupported():
    bmp = bytearray(encode(photo(), "BMP"))
    bmp[30] = 5  # its compression: PNG inside
    with pytest.raises(ImageError, match=r"^a BMP of a rare kind \(Unsupported BMP compression") as error:
        decode_image(bytes(bmp))
    assert error.value.kind == "unsupported"


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_small_jpeg_that_claims_to_be_large(options):
    small = encode(photo(24, 24), "JPEG", **options)
    for side in (64, 300, 9000):
        assert kind(claims(small, side, side)) == "damaged"


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize(("mode", "grey"), [("RGB", (128,) * 3), ("L", 128), ("CMYK", (127,) * 4), ("RGB", (127,) * 3)])
def test_a_whole_jpeg_that_ends_in_grey_is_good(mode, grey, options):
    picture = photo(mode=mode)
    picture.paste(grey, (0, 60, 160, 120))
    assert decode_image(encode(picture, "JPEG", quality=95, **options)).shape == (120, 160, 3)
    assert decode_image(encode(Image.new(mode, (70, 30), grey), "JPEG", **options)).shape == (30, 70, 3)


def test_a_png_is_whole_or_damaged():
    whole = encode(photo(), "PNG")
    for cut in (*range(1, 40), len(whole) // 2, len(whole) // 4):
        assert kind(whole[:-cut]) == "damaged"
    assert kind(whole[: len(whole) // 2] + whole[-12:]) == "damaged"
    for at in (len(whole) // 2, whole.index(b"IDAT") + 5, len(whole) - 14, 20):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        assert kind(bytes(flipped)) == "damaged"
    assert decode_image(whole + b"what a camera adds").shape == (120, 160, 3)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("height", [1, 2, 31, 32])
def test_rows_that_a_png_lacks(interlaced, height):
    width = 33
    passes = damage.PASSES if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    rows = b"".join((b"\0" + bytes(columns)) * count for columns, count in sizes if columns > 0 and count > 0)
    assert not decode_image(png(width, height, rows, interlaced)).any()  # black is a colour
    last = (sizes[-1] if sizes[-1][1] > 0 else sizes[-2])[0] + 1
    assert kind(png(width, height, rows[:-last], interlaced)) == "damaged"
    assert kind(png(width, height, rows[: len(rows) // 2], interlaced)) == "damaged"
    assert kind(png(9000, 9000, rows, interlaced)) == "damaged"


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_tiff_is_whole_or_damaged(compression):
    whole = encode(photo(), "TIFF", **({"compression": compression} if compression else {}))
    for share in (0.1, 0.5, 0.9):
        assert kind(whole[: int(len(whole) * share)]) == "damaged"


def test_strips_that_a_tiff_does_not_name():
    whole = bytearray(encode(photo(), "TIFF", strip_size=160 * 3 * 40))
    (directory,) = struct.unpack_from("<I", whole, 4)
    for entry in range(struct.unpack_from("<H", whole, directory)[0]):
        at = directory + 2 + 12 * entry
        if struct.unpack_from("<H", whole, at)[0] in (273, 279):  # where strips are, and their sizes
            struct.pack_into("<I", whole, at + 4, 2)
    assert kind(bytes(whole)) == "damaged"


@pytest.mark.parametrize(
    ("format", "options"), [("WEBP", {"lossless": True}), ("WEBP", {}), ("BMP", {}), ("GIF", {}), ("PPM", {})]
)
def test_other_formats_are_whole_or_damaged(format, options):
    whole = encode(photo(), format, **options)
    for share in (0.5, 0.9):
        assert kind(whole[: int(len(whole) * share)]) == "damaged"
