"""What a tar file holds, read from its headers alone."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

WINDOW = 2**16  # bytes that are read at a time
LONGEST_HEADER = 2**20  # bytes of one member's header, its long names included
LONGEST_CHAIN = 40  # links that lead to links


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        name: as the tar spells it.
        offset: of its first byte in the tar.
        size: bytes.
        link: the member that a symbolic link leads to, else None.
        problem: why it cannot be read, None if nothing is known against it.
    """

    name: str
    offset: int
    size: int
    link: str | None = None
    problem: str | None = None


@dataclass
class Index:
    """The files of a tar by the path they would have once extracted, in its order.

    Attributes:
        repeated: names of members that a later one replaces, as extracting would.
        problem: why the rest of the tar could not be read; None if it was read to its end.
    """

    members: dict[str, Member] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    problem: str | None = None

    def find(self, name: str) -> Member | None:
        """The member that ``name`` means; a link is the file that it leads to."""
        member = self.members.get(extracted_path(name))
        return member and self._resolved(member)

    def files(self) -> Iterator[Member]:
        """Every member, links resolved."""
        return map(self._resolved, self.members.values())

    def _resolved(self, member: Member) -> Member:
        end = member
        for _ in range(LONGEST_CHAIN):
            if end.link is None:
                return end._replace(name=member.name)
            target = self.members.get(end.link)
            if target is None:
                return member._replace(problem=f"a link to no file of this tar: {end.link}")
            end = target
        return member._replace(problem="a link that leads to itself")


def extracted_path(name: str) -> str:
    """Where a member is extracted to: x.png, ./x.png and /x.png are one file."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def read_index(read: Callable[[int, int], bytes], end: int) -> Index:
    """Read the headers of a tar of ``end`` bytes.

    Args:
        read: (offset, size) to the bytes there.

    Raises:
        OSError, StorageError: as ``read`` does. Whatever is wrong with the tar itself becomes the index's problem.
    """
    index, headers = Index(), _Headers(read, end)
    try:
        with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            for member in _members(tar, headers):
                if member.isfile() and not member.issparse() and member.offset_data + member.size > end:
                    index.problem = f"cut off inside {member.name}"
                    return index
                if not member.isdir():
                    _enter(index, member)
            # tarfile stops at a damaged header as at the end; only a whole tar has its block of zeros there.
            headers.seek(tar.offset)
            if headers.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                index.problem = f"damaged or cut off at byte {tar.offset}"
    except Exception as error:  # tarfile raises whatever its parsing of a damaged header meets
        if headers.failure is not None:
            raise headers.failure from None
        index.problem = " ".join(f"damaged header: {type(error).__name__}: {error}".split())[:300]
    return index


def _members(tar: tarfile.TarFile, headers: _Headers) -> Iterator[tarfile.TarInfo]:
    while True:
        headers.budget = LONGEST_HEADER
        before = tar.offset
        member = tar.next()
        if member is None:
            return
        if member.size < 0 or tar.offset < max(before, member.offset_data):  # a loop otherwise
            raise tarfile.HeaderError(f"negative size at byte {member.offset}")
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
        yield member


def _enter(index: Index, header: tarfile.TarInfo) -> None:
    key, link, problem = extracted_path(header.name), None, None
    member = Member(header.name, header.offset_data, header.size)
    if header.islnk():  # to what the name means at this point
        target = index.members.get(extracted_path(header.linkname))
        if target is None:
            problem = f"a link to no file of this tar before it: {header.linkname}"
        else:
            member = target._replace(name=header.name)
    elif header.issym():
        above, absolute = posixpath.dirname(key), header.linkname.startswith("/")
        link = posixpath.normpath(posixpath.join(above, header.linkname)).lstrip("/")
        problem = "a link that leads out of this tar" if absolute or link.startswith("..") else None
        member = member._replace(link=None if problem else link)
    elif header.issparse():
        problem = "sparse; make the tar without --sparse"
    elif not header.isfile():
        problem = "a pipe or device, no file"
    if key in index.members:
        index.repeated.append(index.members.pop(key).name)
    index.members[key] = member if problem is None else member._replace(problem=problem)


class _Headers:
    """The file that `tarfile` reads: in windows, and only as much as a header may hold."""

    def __init__(self, read: Callable[[int, int], bytes], end: int) -> None:
        self._read, self._end = read, end
        self._position, self._start, self._window = 0, 0, b""
        self.budget = LONGEST_HEADER
        self.failure: Exception | None = None

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        self._position = position
        return position

    def read(self, size: int) -> bytes:
        self.budget -= size
        if size < 0 or self.budget < 0:
            raise tarfile.HeaderError(f"no header has more than {LONGEST_HEADER} bytes")
        data = b""
        while len(data) < size and self._position < self._end:
            at = self._position - self._start
            if not 0 <= at < len(self._window):
                self._fill()
                at = 0
            piece = self._window[at : at + size - len(data)]
            data += piece
            self._position += len(piece)
        return data

    def _fill(self) -> None:
        try:
            self._window = self._read(self._position, min(WINDOW, self._end - self._position))
        except Exception as error:
            self.failure = error
            raise
        self._start = self._position
        if not self._window:
            self._end = self._position
