import errno

import pytest

from cluster.storage_errors import ChangedError, explain, is_disk_full, is_trouble


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2", "no bucket 'b' at http://e;"),
        ("AWS Error ACCESS_DENIED during PutObject", "http://e refused the credentials"),
        ("AWS Error NETWORK_CONNECTION: curlCode: 7, Couldn't connect", "cannot reach http://e;"),
        ("AWS Error SLOW_DOWN", "http://e is overloaded or down"),
        ("An error occurred (ExpiredToken) when calling", "http://e refused the credentials"),
        ("An error occurred (403) when calling", "http://e refused the credentials"),
        ("An error occurred (RequestTimeTooSkewed) when", "http://e refused the time of the request; set the clock"),
        ("An error occurred (502) when calling", "http://e is overloaded or down"),
        ("An error occurred (InternalError) when calling", "http://e is overloaded or down"),
        ('Read timeout on endpoint URL: "None"', "cannot reach http://e"),
        ("400 read, but total bytes expected is 1000.", "cannot reach http://e"),
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
        (errno.ESTALE, "give the same command again when that disk or this machine works"),
    ],
)
def test_errors_of_a_disk(number, words):
    error = OSError(number, "x")
    assert words in explain("/a/b", None, error)
    assert is_disk_full(error) == (words == "no space left")


def test_trouble_is_what_may_not_be_the_files_fault():
    for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.EMFILE, errno.ECONNRESET):
        assert is_trouble(OSError(number, "x"))
    for number in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EFBIG):
        assert not is_trouble(OSError(number, "x"))
    assert not is_trouble(ChangedError("x"))
    assert not is_trouble(ValueError("x"))
