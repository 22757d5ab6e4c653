"""TIFFs of every kind that cameras and programs write: the values that were stored, or an error that names the kind."""

import io
import itertools
import struct

import numpy as np
import pytest
import tifffile
from drawn_pictures import tiff
from PIL import Image

from glad_core.decoding.opened import orientation, pages
from glad_core.decoding.picture import ImageError, decode, decode_image, read_labels
from glad_core.views import Framing

Y, X = np.mgrid[:40, :48]
COLOURS = np.stack([X / 47, Y / 39, (X + Y) / 86], -1)


def stored(share, dtype):
    """Shares of white as values of a type; of floating point and 16 bits the whole range, of other integers 16 bits."""
    if np.dtype(dtype).kind == "f":
        return share.astype(dtype)
    return np.round(share * (255 if np.dtype(dtype).itemsize == 1 else 65535)).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "float16", "float32", "float64"])
def test_the_values_are_those_stored(dtype):
    exact = np.round(COLOURS * 255)
    for order, compression, big in itertools.product("<>", (None, "zlib", "lzma"), (False, True)):
        options = {"byteorder": order, "compression": compression, "bigtiff": big}
        grey = tiff(stored(COLOURS[..., 0], dtype), photometric="minisblack", **options)
        assert np.abs(decode_image(grey) - exact[..., :1]).max() <= 1, options
        for apart, alpha in itertools.product((False, True), (False, True)):
            bands = stored(np.dstack([COLOURS] + [COLOURS[..., :1] * 0] * alpha), dtype)
            options["extrasamples"] = ["unassalpha"] * alpha
            options["planarconfig"] = "separate" if apart else "contig"
            colour = tiff(np.moveaxis(bands, -1, 0) if apart else bands, photometric="rgb", **options)
            assert np.abs(decode_image(colour) - exact).max() <= 1, options
        options.pop("extrasamples")
        options.pop("planarconfig")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_may_be_zero(dtype, order):
    data = tiff(stored(COLOURS[..., 0], dtype), photometric="miniswhite", byteorder=order)
    assert np.abs(decode_image(data) - np.round(255 - COLOURS[..., :1] * 255)).max() <= 1


def retagged(data, old, new, value):
    """The file with an entry, of one short number, made another's."""
    at = data.index(struct.pack("<HHI", old, 3, 1))
    return data[:at] + struct.pack("<HHIHH", new, 3, 1, value, 0) + data[at + 12 :]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_black_is_zero_if_the_file_does_not_say(dtype):
    for values, photometric in ((COLOURS[..., 0], "minisblack"), (COLOURS, "rgb")):
        data = retagged(tiff(stored(values, dtype), photometric=photometric), 262, 263, 1)
        assert np.abs(decode_image(data) - np.round(np.atleast_3d(values) * 255)).max() <= 1
    lzw = io.BytesIO()
    Image.fromarray(stored(COLOURS[..., 0], "uint8")).save(lzw, "TIFF", compression="tiff_lzw")
    assert np.abs(decode_image(retagged(lzw.getvalue(), 262, 263, 1)) - np.round(COLOURS[..., :1] * 255)).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_bits_may_be_stored_in_reverse(dtype):
    data = tiff(stored(COLOURS[..., 0], dtype), photometric="minisblack", extratags=[(274, 3, 1, 1)])
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        start, size = file.pages.first.dataoffsets[0], file.pages.first.databytecounts[0]
    turned = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data[start : start + size])
    data = retagged(data[:start] + turned + data[start + size :], 274, 266, 2)
    assert np.abs(decode_image(data) - np.round(COLOURS[..., :1] * 255)).max() <= 1


def test_12_bits_that_are_packed():
    first, second = np.moveaxis(np.round(COLOURS[..., 0] * 4095).astype(int).reshape(40, 24, 2), -1, 0)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
    data = tiff(np.frombuffer(packed, np.uint8).reshape(40, 72), photometric="minisblack")
    at = data.index(struct.pack("<HHI", 256, 4, 1))
    data = retagged(data[: at + 8] + struct.pack("<I", 48) + data[at + 12 :], 258, 258, 12)
    assert np.abs(decode_image(data) - np.round(COLOURS[..., :1] * 255)).max() <= 1


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("apart", [False, True])
def test_colours_of_few_bits_in_16_are_brought_to_the_white_level(bits, apart):
    values = np.round(COLOURS * (2**bits - 1)).astype(np.uint16)
    options = {"planarconfig": "separate"} if apart else {}
    data = tiff(np.moveaxis(values, -1, 0) if apart else values, photometric="rgb", **options)
    decoded = decode(data, (Framing("tiles", 1, white=2**bits - 1),))
    assert decoded.peak == 2**bits - 1
    assert np.abs(decoded.pixels - np.round(COLOURS * 255)).max() <= 1


def test_lzw_of_16_bit_colours():
    values, stream = stored(COLOURS, "uint16"), io.BytesIO()
    Image.fromarray(values.reshape(40, 144)).save(stream, "TIFF", compression="tiff_lzw", tiffinfo={274: 1})
    data = bytearray(stream.getvalue())
    for old, new, value in ((256, 256, 48), (262, 262, 2), (274, 277, 3)):  # the same bytes as three values a pixel
        at = min(at for kind in (3, 4) if (at := data.find(struct.pack("<HHI", old, kind, 1))) > 0)
        struct.pack_into("<H", data, at, new)
        struct.pack_into("<I", data, at + 8, value)
    assert (decode_image(bytes(data)) == np.round(values / 257)).all()


@pytest.mark.parametrize(
    ("values", "options", "named"),
    [
        (COLOURS[..., 0], {"photometric": "miniswhite"}, "1 x 64-bit float (MINISWHITE)"),
        (np.ones((9, 9), np.float32), {"photometric": "miniswhite"}, "1 x 32-bit float (MINISWHITE)"),
        (-np.ones((9, 9), np.int8), {"photometric": "miniswhite"}, "1 x 8-bit signed integer (MINISWHITE)"),
        (np.ones((9, 9), complex), {}, "1 x 128-bit complex (MINISBLACK)"),
        (np.ones((9, 9, 5), np.uint16), {"photometric": "minisblack", "planarconfig": "contig"}, "5 x 16-bit integer"),
    ],
)
def test_other_kinds_are_named(values, options, named):
    with pytest.raises(ImageError) as error:
        decode_image(tiff(values, **options))
    assert error.value.kind == "unsupported"
    assert str(error.value).startswith(f"a TIFF of {named}")


def test_negative_bytes_are_not_bright():
    with pytest.raises(ImageError, match=r"grey values outside 0\.\.255"):
        decode_image(tiff(-np.ones((9, 9), np.int8), photometric="minisblack"))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_what_is_cut_off_is_damaged(compression):
    data = tiff(COLOURS, photometric="rgb", compression=compression, rowsperstrip=8)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        last = file.pages.first.dataoffsets[-1]
        sizes = file.pages.first.tags[279].valueoffset
    for broken in (data[: last + 10], data[:-1], data[:sizes] + bytes(4) + data[sizes + 4 :]):
        with pytest.raises(ImageError) as error:
            decode_image(broken)
        assert error.value.kind == "damaged"


def test_every_page_of_values_that_pillow_does_not_read():
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for level, kind in ((0.2, 0), (0.4, 0), (0.4, 1), (0.8, 0)):
            writer.write(np.full((8, 8), level), photometric="minisblack", subfiletype=kind)
    data = stream.getvalue()
    assert pages(data) == ([1, 2, 4], 4)
    assert [int(decode(data, 8, page).pixels[0, 0, 0]) for page in (1, 2, 4)] == [51, 102, 204]


@pytest.mark.parametrize("way", range(1, 9))
def test_it_is_turned_as_others_are(way):
    for big in (False, True):
        options = {"photometric": "rgb", "extratags": [(274, 3, 1, way)], "bigtiff": big}
        turned = [tiff(stored(COLOURS, dtype), **options) for dtype in ("uint8", "float64")]
        assert [orientation(data) for data in turned] == [way, way]
        assert (decode_image(turned[0]) == decode_image(turned[1])).all()


def test_labels_of_any_type_stay():
    labels = np.zeros((8, 8))
    labels[2:4] = 3_000_000_000  # more than a signed integer holds
    for dtype in ("uint32", "float64"):
        assert (read_labels(tiff(labels.astype(dtype), photometric="minisblack"))[0] == labels).all()
