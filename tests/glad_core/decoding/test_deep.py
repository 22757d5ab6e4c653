import io
import resource

import numpy as np
import pytest
from drawn_pictures import png_of_16_bits
from PIL import Image

from glad_core.decoding.picture import ImageError, decode, decode_image
from glad_core.views import Framing

VALUES = np.random.default_rng(0).integers(0, 65536, (13, 17, 4)).astype(np.uint16)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_all_bits_of_a_png_count(channels, bits):
    values = VALUES[..., :channels] >> (16 - bits)
    decoded = decode(png_of_16_bits(values), (Framing("tiles", 1, white=2**bits - 1),))
    colours = values[..., : 3 if channels > 2 else 1]
    assert decoded.peak == colours.max()
    assert (decoded.pixels == np.rint(colours * (255 / (2**bits - 1)))).all()


def test_the_full_range_is_the_full_range_without_a_white_level():
    assert (decode_image(png_of_16_bits(VALUES[..., :3])) == np.rint(VALUES[..., :3] / 257)).all()


def test_the_frames_of_an_animation_are_refused():
    data = png_of_16_bits(VALUES, animated=True)
    assert decode(data, 4, 1).peak == VALUES[..., :3].max()
    with pytest.raises(ImageError, match="an animation of 16-bit colours") as error:
        decode(data, 4, 2)
    assert error.value.kind == "unsupported"


def test_a_large_picture_takes_little_more_than_its_values():
    values = np.zeros((6000, 6000), np.uint16)
    values[0, 0] = 4095
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/statm") as numbers:
        used = int(numbers.read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + 8 * values.size, before[1]))
    try:
        assert decode(stream.getvalue(), (Framing("squash", 64, white=4095),)).peak == 4095
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
