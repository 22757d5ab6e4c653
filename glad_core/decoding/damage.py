"""Damage that decoders pass over in silence: what is missing of a picture they leave grey or black.

Each function says in a few words what is wrong, or returns None.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

CUT = "cut off"
JPEG = b"\xff\xd8\xff"
SIGNATURES = (b"\x89PNG\r\n\x1a\n", JPEG, b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# The next marker after a scan's data, in which FF 00 is a byte and FF D0 to FF D7 are marks for restarting.
MARKER, RESTART = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL), re.compile(rb"\xff[\xd0-\xd7]")
START, END, SCAN, INTERVAL = 0xD8, 0xD9, 0xDA, 0xDD
LS = 0xF7  # JPEG-LS
# Markers of a JPEG's size and components.
FRAMES = frozenset({*range(0xC0, 0xD0), LS}) - {0xC4, 0xC8, 0xCC}
LOSSLESS, HIERARCHICAL = frozenset({0xC3, 0xC7, 0xCB, 0xCF}), frozenset({0xC5, 0xC6, 0xCD, 0xCE})
ARITHMETIC = 0xC9  # the first of those whose scans may end early
FILLING = bytes(range(17, 251, 4))
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column and row, and steps between them, of the seven passes of an interlaced PNG.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def looks_like_an_image(data: bytes) -> bool:
    """Whether the first bytes are those of a format that is read."""
    return data.startswith(SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def unread_kind(data: bytes, error: str = "") -> str | None:
    """What an image is that a decoder refused with this error: of a kind that is not read, if it is known to be one."""
    if error.startswith("Unsupported BMP"):
        return f"a BMP of a rare kind ({error})"
    if not data.startswith(JPEG):
        return None
    try:
        return Jpeg.read(data).unread()
    except (struct.error, IndexError, KeyError, ValueError):
        return None  # damaged, then


def of_structure(data: bytes, image: Image.Image) -> str | None:
    """What is wrong with an opened image, before it is decoded: an end or parts missing, a checksum that is wrong."""
    if image.format in ("JPEG", "MPO"):
        jpeg = Jpeg.read(data)
        if not jpeg.ended or jpeg.lacks_data(data):
            return CUT
        return "parts of its detail are missing" if jpeg.lacks_detail() else None
    if image.format == "PNG":
        return _chunk_damage(data)
    if image.format == "TIFF":
        tiles = getattr(image, "tile", [])
        right, bottom = (max((tile[1][side] for tile in tiles), default=0) for side in (2, 3))
        return "rows are missing" if right * bottom < image.width * image.height else None
    return None


def of_pixels(data: bytes, image: Image.Image) -> str | None:
    """Whether the end of a decoded image was made up. Only a picture that ends in the colour for it takes any time."""
    if image.format in ("JPEG", "MPO") and _ends_grey(image):
        # What stands behind complete data is not read: a picture that depends on it was incomplete.
        again = Image.open(io.BytesIO(Jpeg.read(data).filled(data)), formats=("JPEG",))
        return None if np.array_equal(np.asarray(again), np.asarray(image)) else CUT
    if image.format == "PNG":
        last_rows = image.crop((0, max(0, image.height - 2), *image.size))
        return "rows are missing" if last_rows.getbbox(alpha_only=False) is None and _lacks_rows(data) else None
    return None


def _ends_grey(image: Image.Image) -> bool:
    """Whether the last pixel is the grey that libjpeg puts for missing data (127 if inverted, as in CMYK)."""
    pixel = image.getpixel((image.width - 1, image.height - 1))
    return set(pixel if isinstance(pixel, tuple) else (pixel,)) <= {127, 128}


@dataclass
class Jpeg:
    """The structure of a JPEG.

    Attributes:
        frame: marker that its size came with; says how it is coded.
        precision: bits of a value.
        size: width and height in pixels.
        sampling: by component, blocks of 8 x 8 pixels across and down in a group of blocks.
        interval: groups between two marks for restarting; 0 without marks.
        bits: by component, how many low bits are still missing of each of the 64 coefficients of a block; 99 for all.
        scans: first byte and end of each scan's data.
        first_scan: components of the first.
        ended: whether its end marker is there.
    """

    frame: int = 0
    precision: int = 8
    size: tuple[int, int] = (0, 0)
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    interval: int = 0
    bits: dict[int, list[int]] = field(default_factory=dict)
    scans: list[tuple[int, int]] = field(default_factory=list)
    first_scan: bytes = b""
    ended: bool = False

    @classmethod
    def read(cls, data: bytes) -> Jpeg:
        jpeg, position = cls(), 2
        while found := MARKER.search(data, position):
            marker, position = data[found.start() + 1], found.end()
            if marker == END:
                jpeg.ended = bool(jpeg.scans)
                break
            if marker in (START, 0x01) or position + 2 > len(data):
                continue
            (length,) = struct.unpack_from(">H", data, position)
            segment = data[position + 2 : position + length]
            position += length
            if marker in FRAMES:
                jpeg._set_frame(marker, segment)
            elif marker == INTERVAL:
                (jpeg.interval,) = struct.unpack_from(">H", segment)
            elif marker == SCAN:
                position = jpeg._add_scan(data, position, segment)
        return jpeg

    def _set_frame(self, marker: int, segment: bytes) -> None:
        precision, height, width = struct.unpack_from(">BHH", segment)
        self.frame, self.precision, self.size = marker, precision, (width, height)
        self.sampling = {segment[at]: (segment[at + 1] >> 4, segment[at + 1] & 15) for at in range(6, len(segment), 3)}
        self.bits = {component: [99] * 64 for component in self.sampling}

    def _add_scan(self, data: bytes, start: int, segment: bytes) -> int:
        """Take up a scan; returns the end of its data."""
        following = MARKER.search(data, start)
        end = following.start() if following else len(data)
        self.scans.append((start, end))
        count = segment[0]
        self.first_scan = self.first_scan or segment[1 : 1 + 2 * count : 2]
        first, last, shifts = segment[1 + 2 * count : 4 + 2 * count]
        if self.frame & 3 != 2:  # not progressive: a scan holds all there is of its components
            first, last, shifts = 0, 63, 0
        for component in segment[1 : 1 + 2 * count : 2]:
            for number in range(first, min(last, 63) + 1):
                self.bits[component][number] = shifts & 15
        return end

    def unread(self) -> str | None:
        """What kind it is, if it is none that decoders read here."""
        if self.frame == LS:
            return "JPEG-LS"
        if self.frame in HIERARCHICAL:
            return "a hierarchical JPEG"
        if self.frame in LOSSLESS and self.precision in range(2, 17) and self.precision != 8:
            return f"a lossless JPEG of {self.precision} bits"
        return "a JPEG of 12 bits" if self.precision == 12 else None

    def groups(self) -> int:
        """Groups of blocks in the first scan; those of a single component are single blocks."""
        across, down = (max(factors) for factors in zip(*self.sampling.values(), strict=True))
        width, height = self.size
        if len(self.first_scan) == 1:
            own_across, own_down = self.sampling[self.first_scan[0]]
            width, height = -(-width * own_across // across), -(-height * own_down // down)
            across = down = 1
        return -(-width // (8 * across)) * -(-height // (8 * down))

    def lacks_data(self, data: bytes) -> bool:
        """Whether the first scan has less than a bit for a group of blocks, or too few marks for restarting."""
        start, end = self.scans[0]
        if self.frame >= ARITHMETIC:
            return False
        marks = len(RESTART.findall(data, start, end)) if self.interval else 0
        return 8 * (end - start) < self.groups() or (
            self.interval > 0 and marks < -(-self.groups() // self.interval) - 1
        )

    def lacks_detail(self) -> bool:
        """Whether scans are missing. (The standard allows it; no encoder that we know of makes such files.)"""
        return any(any(bits) for bits in self.bits.values())

    def filled(self, data: bytes) -> bytes:
        """The file with `FILLING` after the data of every scan and before every restart."""
        if self.frame >= ARITHMETIC:
            return data
        pieces, position = [], 0
        for start, end in self.scans:
            scan = RESTART.sub(lambda mark: FILLING + mark[0], data[start:end])
            pieces += [data[position:start], scan, FILLING]
            position = end
        return b"".join([*pieces, data[position:]])


def _chunk_damage(data: bytes) -> str | None:
    """Of a PNG: its end is missing, or the checksum of a chunk that the picture needs is wrong (Pillow checks few)."""
    view, position = memoryview(data), 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            return CUT
        if (
            kind[:1].isupper()
            and zlib.crc32(view[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]
        ):
            return "a checksum is wrong"
        if kind == b"IEND":
            return None
        position = end
    return CUT


def _lacks_rows(data: bytes) -> bool:
    """Whether a PNG's compressed data end before its last row."""
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    sizes = [(width, height)]
    if interlaced:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in PASSES]
    bits = depth * PNG_CHANNELS[colour]
    missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    stream, position = zlib.decompressobj(), 8
    while position + 12 <= len(data) and missing > 0 and not stream.eof:
        length, kind = struct.unpack_from(">I4s", data, position)
        rest = data[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        while rest and not stream.eof:
            missing -= len(stream.decompress(rest, 2**20))
            rest = stream.unconsumed_tail
        position += 12 + length
    return missing > 0
