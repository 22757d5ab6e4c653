"""One and the same picture in every writing of cameras and programs, from 8 bits to 64."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import tifffile
from PIL import Image

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of a PNG, by channels


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(values: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_of_16_bits(values: np.ndarray, animated: bool = False) -> bytes:
    """A PNG of [H, W, C]; Pillow writes only grey ones."""
    height, width, channels = values.shape
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0))]
    frame = struct.pack(">IIIIHHBB", width, height, 0, 0, 1, 1, 0, 0)
    parts += [chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", bytes(4) + frame)] * animated
    parts += [chunk(b"IDAT", data)]
    if animated:
        parts += [chunk(b"fcTL", struct.pack(">I", 1) + frame), chunk(b"fdAT", struct.pack(">I", 2) + data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def one_picture(pixels: np.ndarray, white: int) -> dict[str, bytes]:
    """Files, by name, of the same uint8 [H, W, 3]; those of more than 8 bits have it from 0 to ``white``."""
    image, clear = Image.fromarray(pixels), np.zeros_like(pixels[..., :1])
    files = {f"plain.{kind.lower()}": encoded(image, kind) for kind in ("PNG", "BMP", "TIFF", "PPM")}
    files["plain.webp"] = encoded(image, "WEBP", lossless=True)
    files["clear.png"] = encoded(Image.fromarray(np.dstack([pixels, clear])), "PNG")
    files["pages.tif"] = encoded(image, "TIFF", save_all=True, append_images=[image], compression="tiff_lzw")
    turned, exif = Image.fromarray(np.rot90(pixels)), Image.Exif()
    exif[0x0112] = 6
    files |= {f"turned.{kind.lower()}": encoded(turned, kind, exif=exif) for kind in ("PNG", "TIFF")}
    deep = np.round(pixels * (white / 255))
    files["deep.png"] = png_of_16_bits(deep.astype(np.uint16))
    files["deep_clear.png"] = png_of_16_bits(np.dstack([deep, clear]).astype(np.uint16))
    for dtype, order, apart in itertools.product(
        ("uint16", "int32", "uint32", "float16", "float32", "float64"), "<>", (False, True)
    ):
        values = np.moveaxis(deep, -1, 0) if apart else deep
        options = {"planarconfig": "separate"} if apart else {}
        options["compression"] = "zlib" if order == ">" else None
        name = f"{dtype}{'_big' * (order == '>')}{'_apart' * apart}.tif"
        files[name] = tiff(values.astype(dtype), photometric="rgb", byteorder=order, **options)
    return files


def one_grey_picture(pixels: np.ndarray, white: int) -> dict[str, bytes]:
    """As `one_picture`, of the same uint8 [H, W]."""
    image, deep = Image.fromarray(pixels), np.round(pixels * (white / 255))
    files = {"plain.png": encoded(image, "PNG"), "plain.tif": encoded(image, "TIFF", compression="tiff_lzw")}
    files["inverted.tif"] = tiff(255 - pixels, photometric="miniswhite")
    files["inverted_deep.tif"] = tiff((65535 - deep).astype(np.uint16), photometric="miniswhite")
    files["deep.png"] = encoded(Image.fromarray(deep.astype(np.uint16)), "PNG")
    files["deep_clear.png"] = png_of_16_bits(np.dstack([deep, deep * 0]).astype(np.uint16))
    for dtype, order in itertools.product(
        ("uint16", "int16", "int32", "uint32", "float16", "float32", "float64"), "<>"
    ):
        for compression in (None, "zlib"):
            name = f"{dtype}{'_big' * (order == '>')}{f'_{compression}' * bool(compression)}.tif"
            options = {"byteorder": order, "compression": compression}
            files[name] = tiff(deep.astype(dtype), photometric="minisblack", **options)
    return files
