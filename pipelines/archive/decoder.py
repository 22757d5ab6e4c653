"""A process that decodes images one at a time, each within limits of CPU time and memory that the kernel keeps.

A decoder's C code cannot be interrupted from within. Here the kernel ends the process of an image that takes too long,
and one that brings its process down takes nothing else with it.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np

from glad_core.decoding.opened import MAX_MEMORY, TOO_MUCH, ImageError, pages
from glad_core.decoding.picture import Picture, as_framings, decode
from glad_core.errors import GladError
from glad_core.views import Framing

SECONDS = 20  # of CPU time that decoding one image may take
PAGED = (b"II", b"MM", b"GIF8", b"\x89PNG", b"RIFF")  # how files begin that may hold several pages
MULTI_PICTURE = b"MPF\0"  # in the head of a JPEG with further pictures
TRIES = 2  # for an image whose process dies of anything but the limit of time
READY = b"ready\n"
PIPE_BYTES = 2**20
# glibc's: keep up to 128 MiB between images. To take pages from the kernel for each costs half as long as decoding it.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(128 * 2**20)}


class Decoder:
    """The process, started when it is needed. Threads take turns."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes, framings: int | Sequence[Framing], page: int | None = None) -> Picture:
        """As `picture.decode`.

        Raises:
            ImageError: as there; too_slow or deadly if the process did not survive.
            GladError: the process cannot be started.
        """
        views = list(map(asdict, as_framings(framings)))
        return _picture(*self._request({"framings": views, "page": page}, data))

    def pages(self, data: bytes) -> tuple[list[int], int]:
        """As `picture.pages`; raises as `decode`."""
        if not data.startswith(PAGED) and MULTI_PICTURE not in data[: 2**16]:
            return [1], 1
        answer = self._request({}, data)[0]
        return answer["pages"], answer["count"]

    def _request(self, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        request |= {"bytes": len(data), "seconds": self._seconds}
        with self._lock:
            for _ in range(TRIES):
                process = self._process = self._process or _start()
                try:
                    return _ask(process, request, data)
                except ImageError:
                    raise
                # The process died, or this thread is being ended: the next image needs another process.
                except BaseException as error:
                    self._process = None
                    if _end(process, wait=isinstance(error, OSError | EOFError)) == -signal.SIGXCPU:
                        limit = f"decoding took more than {self._seconds} seconds of CPU time"
                        raise ImageError("too_slow", f"{limit}; --decode-seconds allows more") from None
                    if not isinstance(error, OSError | EOFError):
                        raise
        raise ImageError("deadly", f"the process that decoded it died {TRIES} times")


@cache
def decoder(seconds: int) -> Decoder:
    """This process's `Decoder` with that limit."""
    return Decoder(seconds)


def _start() -> subprocess.Popen[bytes]:
    # With this process's search path; -P keeps modules of the current folder out of it.
    words = [sys.executable, "-P", "-c", "from pipelines.archive.decoder import serve; serve()"]
    environment = os.environ | KEEP_MEMORY | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pipesize=PIPE_BYTES,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise GladError(f"cannot start a process to decode images: {error}") from error
    assert process.stdout is not None
    if process.stdout.readline() != READY:
        raise GladError(f"the process to decode images ended with code {process.wait()} before its first image")
    return process


def _end(process: subprocess.Popen[bytes], wait: bool) -> int:
    """The exit code of a process that is ending (``wait``), or is ended here."""
    if not wait:
        process.kill()
    assert process.stdin is not None
    with suppress(OSError):  # what it did not read
        process.stdin.close()
    assert process.stdout is not None
    process.stdout.close()
    return process.wait()


def _ask(process: subprocess.Popen[bytes], request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Raises ImageError as the process answers, OSError or EOFError if it died."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.write(data)
    process.stdin.flush()
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    if "kind" in answer:
        raise ImageError(answer["kind"], answer["message"])
    most = sum(height * width * 3 for height, width in answer["sizes"])
    packed = process.stdout.read(most)
    if len(packed) < most:
        raise EOFError
    return answer, packed


def _picture(answer: dict[str, Any], packed: bytes) -> Picture:
    sizes = [(height, width, 3) for height, width in answer["sizes"]]
    ends = list(accumulate(map(math.prod, sizes), initial=0))
    pixels = np.frombuffer(packed, np.uint8)
    frames = [pixels[start:end].reshape(size) for start, end, size in zip(ends, ends[1:], sizes, strict=False)]
    return Picture(frames, answer["width"], answer["height"], answer["peak"], packed)


def serve() -> None:
    """The process: a line and an image in, a line and the pixels out, until its input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints is no answer
    warnings.simplefilter("ignore")  # a single file can bring on thousands
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers.write(READY)
    answers.flush()
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        data = sys.stdin.buffer.read(request["bytes"])
        answer, frames = _answer(data, request)
        answers.write(json.dumps(answer).encode() + b"\n")
        for frame in frames:
            answers.write(np.ascontiguousarray(frame).data)
        answers.flush()


def _answer(data: bytes, request: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + request["seconds"])
    if (size := _data_size()) is not None:
        _limit(resource.RLIMIT_DATA, size + MAX_MEMORY)
    try:
        if "framings" not in request:
            numbers, count = pages(data)
            return {"pages": numbers, "count": count, "sizes": []}, []
        picture = decode(data, [Framing(**framing) for framing in request["framings"]], request["page"])
    except ImageError as error:
        return {"kind": error.kind, "message": str(error)}, []
    except MemoryError:  # raised by resizing; `decode` handles its own
        return {"kind": "too_large", "message": TOO_MUCH}, []
    sizes = [frame.shape[:2] for frame in picture.frames]
    return {"width": picture.width, "height": picture.height, "peak": picture.peak, "sizes": sizes}, picture.frames


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _data_size() -> int | None:
    """Bytes of this process that RLIMIT_DATA counts; None where the kernel is not Linux."""
    try:
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[5]) * resource.getpagesize()
    except OSError:
        return None
