"""Cuts a flat prefix on S3 into ranges of keys, so that several tasks list it side by side.

S3 lists keys in order, from any key on. A request for one key thus answers "which key comes after this text?". From
such answers the keys are cut where their characters differ: first after what all have in common, then one place deeper
in every range, until there are enough. Keys of any form are cut (dates, hashes, numbers, words), without knowing it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

from cluster.storage import Storage, StorageError

PROBERS = 16  # requests at a time
SCAN = 64  # characters that are asked for one after the other
DEPTH = 8  # times that every range is cut again; odd keys could otherwise ask for a round per character
HIGHEST = chr(0x10FFFF)
SCRIPTS = (0x7F, 0x2FFF)  # last characters of ASCII, and before Chinese, Japanese and Korean: guessed first
UNREADABLE = "\ufffd"  # in place of bytes that are no text; what the server sorts is not what we see

# The first key after a text (None: of all); None if there is none. In the order of UTF-8, which is that of code points.
Probe = Callable[[str | None], str | None]
Range = tuple[str | None, str | None]  # keys after the first and up to the second; None: no bound


def cut(location: str, storage: Storage, ranges: int, smallest: int) -> list[Range]:
    """The keys below a location on S3 in at most ``ranges`` ranges, in order; one without bounds if they are few.

    Args:
        smallest: number of keys up to which it is one range.
    """
    try:
        if ranges < 2 or not any(islice(storage.entries(location), smallest, None)):
            return [(None, None)]
        points = split_points(lambda after: storage.next_key(location, after), ranges - 1)
    except StorageError:  # one task lists it all, and says why if it cannot
        points = []
    return list(zip([None, *points], [*points, None], strict=True))


def split_points(probe: Probe, wanted: int) -> list[str]:
    """At most ``wanted`` existing keys, ascending, that cut all keys into ranges of keys that differ early."""
    first = probe(None)
    if first is None:
        return []
    nodes, points = [("", first)], set[str]()  # a node: the keys that begin with its text, and the first of them
    with ThreadPoolExecutor(PROBERS) as pool:
        for _ in range(DEPTH):
            most = 2 * -(-(wanted - len(points)) // len(nodes)) + 1
            nodes = [child for found in pool.map(partial(_children, probe, most), nodes) for child in found]
            points |= {key for _, key in nodes if key != first and UNREADABLE not in key}
            if not nodes or 4 * len(points) >= 3 * wanted:
                break
    ordered = sorted(points)
    return [ordered[number * len(ordered) // wanted] for number in range(wanted)] if len(points) > wanted else ordered


def _children(probe: Probe, most: int, node: tuple[str, str]) -> list[tuple[str, str]]:
    """A node's keys by the first character that is not the same in all; at most ``most`` nodes."""
    text, first = node

    def inside(after: str | None) -> str | None:
        key = probe(after)
        return key if key is not None and key.startswith(text) else None

    low, high = len(text), len(first) + 1  # all keys share the first ``low`` characters, and not the first ``high``
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if inside(first[:middle] + HIGHEST) is None else (low, middle)
    common = first[:low]
    start = first if len(first) > low else inside(first)
    if start is None or len(start) <= low:  # a single key; or one was deleted just now
        return []
    keys = {start[low]: start}
    character = start[low]
    while len(keys) < SCAN:  # one request for each next character: most keys have few, and none is tried in vain
        key = inside(common + character + HIGHEST)
        if key is None or len(key) <= low or key[low] in keys:
            break
        character = key[low]
        keys[character] = key
    else:
        _spread(keys, common, inside, max(most, SCAN))
    return [(common + character, key) for character, key in sorted(keys.items())]


def _spread(keys: dict[str, str], common: str, inside: Probe, most: int) -> None:
    """Add keys by their character after ``common``, beyond those known and far from each other, up to ``most``."""
    low = len(common)
    gaps = [(ord(max(keys)), ord(HIGHEST))]
    while gaps and len(keys) < most:
        begin, end = gaps.pop(0)
        if begin >= end:
            continue
        guess = _between(begin, end)
        key = inside(common + chr(guess) + HIGHEST)
        if key is None or len(key) <= low or ord(key[low]) > end or key[low] in keys:
            gaps.append((begin, guess))
        else:
            keys[key[low]] = key
            gaps += [(begin, guess), (ord(key[low]), end)]


def _between(begin: int, end: int) -> int:
    """A code point from ``begin`` to before ``end``."""
    script = next((last for last in SCRIPTS if begin < last < end), (begin + end) // 2)
    return script if not 0xD800 <= script <= 0xDFFF else max(begin, 0xD7FF)
