"""A tar is read as extracting it would: names, links, damage."""

import io
import random
import tarfile

import pytest

from pipelines.archive.tar import read_index


def make(members, form=tarfile.PAX_FORMAT):
    """Bytes of a tar of (name, data, type, link target)."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, data, *link in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if link:
                info.type, info.linkname = link
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def index_of(data):
    return read_index(lambda offset, size: data[offset : offset + size], len(data))


def contents(data):
    return {
        member.name: member.problem or data[member.offset : member.offset + member.size]
        for member in index_of(data).files()
    }


def test_the_last_member_of_a_name_counts_however_it_is_spelled():
    data = make([("x.png", b"1"), ("y.png", b"2"), ("./x.png", b"3"), ("/y.png", b"4"), ("../x.png", b"5")])
    assert contents(data) == {"./x.png": b"3", "/y.png": b"4", "../x.png": b"5"}
    assert index_of(data).repeated == ["x.png", "y.png"]
    assert index_of(data).find("x.png").name == "./x.png"
    assert index_of(data).find("none.png") is None


def test_links_are_the_files_they_lead_to():
    hard, soft = tarfile.LNKTYPE, tarfile.SYMTYPE
    members = [("a/x.png", b"1"), ("h.png", b"", hard, "a/x.png"), ("a/x.png", b"2"), ("a/s.png", b"", soft, "x.png")]
    members += [("early.png", b"", hard, "late"), ("late", b"3"), ("out.png", b"", soft, "../etc/passwd")]
    members += [("l1.png", b"", soft, "l2.png"), ("l2.png", b"", soft, "l1.png"), ("to.png", b"", soft, "none")]
    members += [("p.png", b"", tarfile.FIFOTYPE, ""), ("d.png", b"", tarfile.DIRTYPE, "")]
    assert contents(make(members)) == {
        "h.png": b"1",  # extracting replaces the name, not the file that another name has
        "a/x.png": b"2",
        "a/s.png": b"2",
        "early.png": "a link to no file of this tar before it: late",
        "late": b"3",
        "out.png": "a link that leads out of this tar",
        "l1.png": "a link that leads to itself",
        "l2.png": "a link that leads to itself",
        "to.png": "a link to no file of this tar: none",
        "p.png": "a pipe or device, no file",
    }


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_no_damage_of_headers_raises_or_leads_outside_of_the_file(form):
    generator = random.Random(form)
    name = "L" * 90 if form == tarfile.USTAR_FORMAT else "é" * 200
    whole = make([("a.png", b"x" * 600), (name, b"y"), ("c.png", b"")], form)
    sizes = (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000000010\0", b" " * 12)
    assert index_of(whole).problem is None
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 2, 8))):
            start = generator.randrange(len(whole) // 512) * 512
            if generator.random() < 0.4:
                data[start + 124 : start + 136] = generator.choice(sizes)
            else:
                data[start + generator.choice((156, 257, 482, generator.randrange(512)))] = generator.randrange(256)
            header = bytes(data[start : start + 148]) + b" " * 8 + bytes(data[start + 156 : start + 512])
            data[start + 148 : start + 156] = b"%06o\0 " % sum(header)
        for member in index_of(bytes(data)).files():
            assert member.problem or 0 <= member.offset <= member.offset + member.size <= len(data)


@pytest.mark.parametrize("key", ["GNU.sparse.map", "GNU.sparse.size", "size", "path"])
def test_a_broken_extended_header_is_damage_after_the_members_before_it(key):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, headers in (("a.png", {}), ("b.png", {"GNU.sparse.major": "1", key: "zz"})):
            info = tarfile.TarInfo(name)
            info.pax_headers = headers
            tar.addfile(info)
    index = index_of(stream.getvalue())
    assert next(index.files()).name == "a.png"
    assert len(index.members) == 1 or index.problem is None
    assert (index.problem is None) == (key in ("path", "size"))


def test_a_header_that_claims_gigabytes_is_not_read(monkeypatch):
    data = bytearray(make([("a.png", b"")], tarfile.GNU_FORMAT) + bytes(4 * 2**20))
    data[124:136], data[156] = b"%011o\0" % (2**30), ord("L")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    amount = 0

    def read(offset, size):
        nonlocal amount
        amount += size
        return bytes(data[offset : offset + size])

    assert "no header has more than" in read_index(read, len(data)).problem
    assert amount < 2**20


def test_trouble_of_the_storage_is_no_damage_of_the_tar():
    def fails(offset, size):
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError):
        read_index(fails, 10240)
