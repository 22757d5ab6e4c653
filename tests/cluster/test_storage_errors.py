import errno

import pytest

from cluster.storage_errors import explain, is_disk_full, is_outage


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2", "no bucket 'b' at http://e;"),
        ("AWS Error ACCESS_DENIED during PutObject", "http://e refused the credentials"),
        ("AWS Error NETWORK_CONNECTION: curlCode: 7, Couldn't connect", "cannot reach http://e;"),
        ("AWS Error SLOW_DOWN", "http://e is overloaded or down"),
        ("something\n else", "something else"),
    ],
)
def test_the_words_of_s3_become_a_way_out(text, words):
    assert explain("s3://b/k", "http://e", OSError(text)).startswith(f"s3://b/k: {words}")
    assert explain("/b/k", "http://e", OSError(text)) == f"/b/k: {' '.join(text.split())}"


def test_without_an_endpoint_the_server_is_aws():
    assert "no bucket 'b' at AWS" in explain("s3://b/k", None, OSError("NoSuchBucket"))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.ENOENT, "no such file or folder"),
        (errno.EACCES, "permission denied"),
        (errno.ENOTDIR, "a file is in the way"),
    ],
)
def test_errors_of_a_disk(number, words):
    error = OSError(number, "x")
    assert words in explain("/a/b", None, error)
    assert is_disk_full(error) == (words == "no space left")


def test_only_a_silent_or_overloaded_server_is_an_outage():
    assert is_outage(OSError("curlCode: 28, Timeout was reached"))
    assert is_outage(OSError("HTTP status 503"))
    assert not is_outage(OSError("curlCode: 56, Failure when receiving data"))  # may concern one object
    assert not is_outage(OSError("AWS Error ACCESS_DENIED"))
