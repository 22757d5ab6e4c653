"""The process that decodes: its limits, its deaths, and that no image ever gets another's pixels."""

import os
import signal
import threading

import numpy as np
import pytest
from conftest import encode, picture
from PIL import Image

from glad_core.decoding import damage
from glad_core.decoding.picture import ImageError, decode
from glad_core.errors import GladError
from pipelines.archive import decoder
from pipelines.archive.decoder import Decoder

GOOD = encode(Image.fromarray(picture()))


@pytest.fixture
def process():
    process = Decoder(1)
    yield process
    if process._process is not None:
        decoder._end(process._process, wait=True)


def endless():
    """A JPEG of half a megabyte that takes minutes: one more scan is 120 bytes and a pass over all its pixels."""
    data = encode(Image.new("L", (9000, 9000), 77), "JPEG", progressive=True)
    start, end = damage.Jpeg.read(data).scans[-1]
    scan = data[data.rindex(b"\xff\xda", 0, start) : end]
    return data[:-2] + scan * 3000 + data[-2:]


def test_the_same_pixels_and_errors_as_here(process):
    for data in (GOOD, encode(Image.fromarray(picture(300, 200)), "JPEG"), GOOD):
        there, here = process.decode(data, 16), decode(data, 16)
        assert (there.width, there.height) == (here.width, here.height)
        assert (there.pixels == here.pixels).all()
    with pytest.raises(ImageError, match="not PNG") as error:
        process.decode(b"no image", 16)
    assert error.value.kind == "not_an_image"
    assert process.decode(GOOD, 8).pixels.shape == (8, 8, 3)


def test_an_image_that_takes_too_long_is_ended_and_the_next_one_decoded(process):
    with pytest.raises(ImageError, match="more than 1 seconds of CPU time; --decode-seconds allows more") as error:
        process.decode(endless(), 16)
    assert error.value.kind == "too_slow"
    assert (process.decode(GOOD, 16).pixels == decode(GOOD, 16).pixels).all()


def test_the_limit_is_for_each_image(process):
    large = encode(Image.fromarray(np.tile(picture(200, 200), (14, 14, 1))), "PNG", compress_level=1)
    for _ in range(12):  # seconds of CPU time together
        process.decode(large, 16)


def test_an_image_that_kills_its_process_twice_is_deadly(process, monkeypatch):
    ask, pids = decoder._ask, []

    def killed(child, request, data):
        pids.append(child.pid)
        if request["bytes"] == len(GOOD):
            os.kill(child.pid, signal.SIGKILL)
        return ask(child, request, data)

    monkeypatch.setattr(decoder, "_ask", killed)
    with pytest.raises(ImageError, match="died 2 times") as error:
        process.decode(GOOD, 16)
    assert error.value.kind == "deadly"
    assert len(set(pids)) == 2
    monkeypatch.setattr(decoder, "_ask", ask)
    assert process.decode(GOOD, 16).width == 40


def test_an_interrupted_image_leaves_nothing_to_the_next(process, monkeypatch):
    read = decoder.json.loads

    def interrupted(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(decoder.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.decode(encode(Image.new("RGB", (99, 99), "red")), 16)
    monkeypatch.setattr(decoder.json, "loads", read)
    assert process.decode(GOOD, 16).width == 40


def test_threads_take_turns(process):
    colours = [(value, 0, 255 - value) for value in range(0, 250, 10)]
    seen = {}

    def one(colour):
        seen[colour] = process.decode(encode(Image.new("RGB", (30, 30), colour)), 16).pixels[5, 5].tolist()

    threads = [threading.Thread(target=one, args=(colour,)) for colour in colours]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {colour: list(colour) for colour in colours}


def test_a_process_that_cannot_start_is_no_verdict(process, monkeypatch):
    for program, words in (("/no/such/python", "cannot start a process"), ("/bin/false", "ended with code 1")):
        monkeypatch.setattr(decoder.sys, "executable", program)
        with pytest.raises(GladError, match=words):
            process.decode(GOOD, 16)


def test_it_starts_without_the_large_libraries():
    code = "import sys; import pipelines.archive.decoder; print({'torch', 'ray', 'pyarrow'} & set(sys.modules))"
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
