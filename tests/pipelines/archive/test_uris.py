"""Two images never share an id or a URI, and a URI leads back to its image."""

import itertools
import os

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cluster.locations import absolute, spelled
from pipelines.archive.uris import image_id, one_line, path_of, split_tar_uri, tar_uri

BYTES = st.lists(st.sampled_from([b"a", b":", b"::", b"/", b"\xff", b"\\xff", b"%FF", b"\n", b" ", b"\xc3", b"\xa4"]))
NAMES = BYTES.map(b"".join).filter(bool).map(os.fsdecode)


def test_ids_of_ordinary_images_stay_as_they_were():
    """Users join on them: a hash of the path, in a tar of TAR::MEMBER."""
    assert image_id("line/0001.png") == "7f0799cdf5b665ee8919b894d1ab2a43"
    assert image_id("a.tar", "x.png") == "083949cfae79eabf84666774156bfc90"
    assert image_id("ü\udcff.png") == "0dca71fc17215eef13d91aaeaa6cca31"


@given(st.lists(st.tuples(NAMES, st.none() | NAMES), min_size=2, max_size=6, unique=True))
@hypothesis_settings(max_examples=300, deadline=None)
def test_different_images_have_different_ids(images):
    assert len({image_id(path, member) for path, member in images}) == len(images)


def test_paths_that_look_like_a_member_of_a_tar_have_ids_of_their_own():
    parts = ["a.tar", "a.tar:", "x.png", ":x.png", "a.tar::x.png", "::", "::file:a", "::tar:5:a.tarx.png", "b::c"]
    images = [(path, None) for path in parts] + list(itertools.product(parts, parts))
    assert len({image_id(path, member) for path, member in images}) == len(images)


@given(NAMES)
@hypothesis_settings(max_examples=300, deadline=None)
def test_a_spelled_location_is_a_line_and_leads_back(name):
    location = absolute(f"/data/{name}")
    uri = spelled(location)
    assert uri.encode().decode().splitlines() == [uri.strip()]
    assert absolute(uri) == location
    assert path_of(uri) == location


@given(NAMES, NAMES)
@hypothesis_settings(max_examples=300, deadline=None)
def test_the_uri_of_a_member_is_a_line_and_leads_back(member, name):
    file = spelled(absolute(f"/data/{name}"))
    uri = tar_uri(member, file)
    assert uri.encode().decode().splitlines() == [uri]
    assert split_tar_uri(uri) == (member, file)
    assert path_of(uri) == member


def test_keys_on_s3_that_are_no_line_are_quoted():
    for key in ("a\nb.png", "end.png ", "nul\x01.png"):
        uri = spelled(f"s3://bucket/{key}")
        assert uri.startswith("s3+url://bucket/")
        assert absolute(uri) == f"s3://bucket/{key}"
    for key in ("a+b c.png", "100%.png", "a//b.png", "ü?#.png"):
        assert spelled(f"s3://bucket/{key}") == f"s3://bucket/{key}"


def test_what_is_no_location_is_shown_in_one_short_line():
    assert one_line("http://x/a\n\udcff.png") == "http://x/a%0A%FF.png"
    assert len(one_line("x" * 10**6)) < 2000
