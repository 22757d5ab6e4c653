"""A flat prefix on S3 in ranges of keys: together they are one walk, whatever the keys."""

import base64
import random
import uuid
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from conftest import make_bucket
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cluster import s3, s3_listing
from cluster.storage import Storage, UnorderedError
from pipelines.archive import listing, pieces
from pipelines.archive.key_ranges import split_points
from pipelines.archive.listing import write_manifest
from pipelines.archive.manifest import read_manifest
from pipelines.archive.pieces import Archive, split

CHARACTERS = st.sampled_from("aAb09/-. %+~ü中Ａ\ue000\U0001f600\U0010ffff\n") | st.characters(exclude_categories=["Cs"])
KEYS = st.sets(st.text(CHARACTERS, max_size=6), max_size=60)


class Bucket:
    """Stands for S3's client: sorted keys, pages of three; ``order`` sorts them as another server would."""

    def __init__(self, keys, order=str.encode, ignores_start=False):
        self.order, self.keys, self.ignores_start = order, sorted(keys, key=order), ignores_start
        self.requests = 0

    def after(self, start):
        if not start or self.ignores_start:
            return self.keys
        return [key for key in self.keys if self.order(key) > self.order(start)]

    def list_objects_v2(self, Bucket, Prefix, MaxKeys=1000, StartAfter=None):
        self.requests += 1
        found = [key for key in self.after(StartAfter) if key.startswith(Prefix)]
        return {"Contents": [{"Key": key, "Size": 1} for key in found[:MaxKeys]]}

    def get_paginator(self, _):
        return self

    def paginate(self, Bucket, Prefix, Delimiter, StartAfter=None):
        found = self.list_objects_v2(Bucket, Prefix, 10**9, StartAfter)["Contents"]
        return ({"Contents": found[start : start + 3]} for start in range(0, len(found), 3))


def probe_of(keys):
    ordered = sorted(keys, key=str.encode)

    def probe(after):
        place = 0 if after is None else bisect_right(ordered, after.encode(), key=str.encode)
        return ordered[place] if place < len(ordered) else None

    return probe


def listed(connection, points, prefix="flat"):
    bounds = zip([None, *points], [*points, None], strict=True)
    return [[key for key, _, _ in s3_listing.keys(connection, "b", prefix, after=a, last=b)] for a, b in bounds]


@given(keys=KEYS, wanted=st.integers(1, 20))
@hypothesis_settings(max_examples=200, deadline=None)
def test_ranges_together_are_one_walk(keys, wanted):
    points = split_points(probe_of(keys), wanted)
    assert len(points) <= wanted
    assert points == sorted(set(points), key=str.encode)
    assert set(points) <= keys
    with pytest.MonkeyPatch.context() as patched:
        bucket = Bucket({"flat", "flat-", "flat0", *(f"flat/{key}" for key in keys)})
        patched.setattr(s3, "client", lambda _: bucket)
        ranges = listed(s3.Connection(), points)
        whole = [key for key, _, _ in s3_listing.keys(s3.Connection(), "b", "flat")]
        assert [key for keys_of_one in ranges for key in keys_of_one] == whole
        assert all(ranges[:-1])


@given(keys=KEYS, deleted=KEYS, added=KEYS)
@hypothesis_settings(max_examples=100, deadline=None)
def test_what_changes_after_the_cut_is_listed_as_it_is(keys, deleted, added):
    points = split_points(probe_of(keys), 9)
    now = (keys - deleted - set(points[::2])) | added  # also points themselves
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(s3, "client", lambda _: Bucket({f"flat/{key}" for key in now}))
        found = [key for keys_of_one in listed(s3.Connection(), points) for key in keys_of_one]
    assert found == [key for key in sorted(now, key=str.encode) if not key.endswith("/") or key]


RANDOM = random.Random(1)
MANY = 20_000
FORMS = {
    "numbers": [f"{n:08d}.png" for n in range(MANY)],
    "unpadded": [f"image{n}.png" for n in range(MANY)],
    "uuid": [f"{uuid.UUID(int=RANDOM.getrandbits(128))}.jpg" for _ in range(MANY)],
    "base64": [base64.urlsafe_b64encode(RANDOM.randbytes(9)).decode() for _ in range(MANY)],
    "times": [f"IMG_2026-{1 + n // 1700:02d}-{n % 28:02d}T{n % 24:02d}:{n % 60:02d}.{n}.png" for n in range(MANY)],
    "cameras": [f"line-{n % 3}/camera_{n % 2}/2026_{n:07d}.png" for n in range(MANY)],
    "chinese": [chr(0x4E00 + n % 5000) + chr(0x4E00 + n // 5000) for n in range(MANY)],
    "one outlier": ["README", *(f"very/long/common/prefix/{n:09d}" for n in range(MANY))],
    "long": ["x" * 900 + f"{n}" for n in range(MANY)],
}


@pytest.mark.parametrize("form", FORMS)
def test_usual_keys_are_cut_evenly_enough_by_few_requests(form):
    keys, requests = sorted(FORMS[form], key=str.encode), []
    inner = probe_of(keys)
    points = split_points(lambda after: requests.append(after) or inner(after), 63)
    places = [-1, *(keys.index(point) for point in points), len(keys) - 1]
    largest = max(end - begin for begin, end in pairwise(places))
    print(form, len(points), "points", len(requests), "requests, largest", largest / len(keys))
    assert len(points) >= 30
    assert largest < len(keys) / 8
    assert len(requests) < 1500


def utf16(key):
    return key.encode("utf-16-be")


@pytest.mark.parametrize(
    ("keys", "server"),
    [
        (["a", "\U0001f600", "Ａ"], {"order": utf16}),
        (["B", "a", "C", "b", "c"], {"order": str.casefold}),
        ([f"{n:03d}" for n in range(20)], {"ignores_start": True}),
        ([f"{n:03d}" for n in range(20)], {"order": lambda key: -int(key.rpartition("/")[2] or 0)}),
    ],
)
def test_a_server_of_another_order_is_noticed(keys, server, monkeypatch):
    """Wherever it is cut, either all keys are listed, or the listing refuses."""
    refused = 0
    monkeypatch.setattr(s3, "client", lambda _: Bucket([f"flat/{key}" for key in keys], **server))
    for point in keys:
        try:
            found = [key for keys_of_one in listed(s3.Connection(), [point]) for key in keys_of_one]
        except UnorderedError:
            refused += 1
        else:
            assert sorted(found) == sorted(keys)
    assert refused


def test_a_server_of_another_order_is_listed_in_one_piece(monkeypatch):
    calls = []

    def list_pieces(archive, folder, earlier, in_ranges=True):
        calls.append(in_ranges)
        if in_ranges:
            raise UnorderedError("out of order")
        return "all"

    monkeypatch.setattr(listing, "_list_pieces", list_pieces)
    assert listing.list_remotely("s3://b/flat", None, Storage(), "/nowhere", False) == "all"
    assert calls == [True, False]


def test_a_flat_prefix_on_a_server_is_many_pieces_with_the_rows_of_one(s3_server, tmp_path, monkeypatch):
    make_bucket(s3_server, "flat")
    storage = Storage(s3_server["AWS_ENDPOINT_URL"], "glad-test", "glad-test-secret", region="us-east-1")
    names = [f"{n:03d}.png" for n in range(150)] + ["a b%20+.png", "ü.png", "中.png", "😀.png", "z.png"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write(f"s3://flat/all/{name}", b"x"), names))
    for name, value in (("LOOSE_FILES", 20), ("PAGES", 2), ("FOLDERS", 12)):
        monkeypatch.setattr(pieces, name, value)
    archive = Archive("s3://flat/all", None, storage, False)
    many = split(archive)
    assert 8 <= len(many) <= 12
    (one,) = split(archive, in_ranges=False)
    rows = []
    for folder, parts in (("many", many), ("one", [one])):
        counts = [write_manifest(archive, part, n, str(tmp_path / folder))[0].rows for n, part in enumerate(parts)]
        rows.append(read_manifest(str(tmp_path / folder), counts, 0, sum(counts), storage))
    assert len(rows[0]) == len(names)
    assert rows[0].equals(rows[1])

    storage.write("s3://flat/all/z/a.png", b"x")  # this server lists it before z.png, S3 after it
    with pytest.raises(UnorderedError):
        write_manifest(archive, [(*one[0][:3], "a b%20+.png", "z.png")], 0, str(tmp_path / "lost"))
    assert len(split(archive)) == 1
