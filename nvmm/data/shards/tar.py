"""Tar shards of webdataset: the members that a tar holds, and those that are one sample.

Nothing is extracted to disk. Folders and devices are passed over; a link is a member without
content, which makes its sample bad.
"""

from __future__ import annotations

import io
import mmap
import re
import tarfile
from typing import Any, NamedTuple

from nvmm.data.samples.bad_sample import BadSample

_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
_BLOCK = 512


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and extension as webdataset does, at the first dot.

    Return None where the file name has none or begins with it, as the `._` files of a Mac do, which
    webdataset takes for samples when they lie in a folder.
    """
    match = _NAME.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else None


class Member(NamedTuple):
    """A file of a tar: in bytes, the start of its first header, and its data's place.

    target: the name that a link leads to, empty for a regular file.
    """

    name: str
    start: int
    offset: int
    size: int
    target: str = ""

    @property
    def stop(self) -> int:
        """The end of its last block."""
        return self.offset + -(-self.size // _BLOCK) * _BLOCK


def list_members(data: bytes | mmap.mmap, shard: str) -> tuple[list[Member], BadSample | None]:
    """Return the complete files and links of a tar, in order, and its damage, or None.

    A file that is no tar, compressed, truncated or has a damaged header gives the members before
    the damage; the problem names the key near it. Bytes of a name that are no UTF-8 are escaped
    (`M\\xfcller`).
    """
    if not data:
        return [], BadSample(shard, "empty file, no tar shard")
    plain = _list_plain(data)
    if plain is not None:
        return plain, None
    members: list[Member] = []
    key, end = "?", 0
    problem: BadSample | None = None
    try:
        file = io.BytesIO(data) if isinstance(data, bytes) else data
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
        ) as tar:
            for header in tar:
                # tarfile would keep every header.
                tar.members.clear()  # type: ignore[attr-defined]
                key = (split_name(header.name) or (header.name,))[0]
                # A size below 0 would lead back to headers that were read, without an end.
                if header.size < 0 or tar.offset <= header.offset:
                    raise tarfile.ReadError(f"size {header.size}")
                if header.issparse():
                    reason = f"{header.name} is a sparse file; write the shard without --sparse"
                    problem = problem or BadSample(f"{shard}:{key}", reason)
                elif header.issym() or header.islnk():
                    place = header.offset, header.offset_data, 0
                    members.append(Member(header.name, *place, header.linkname or "?"))
                elif header.isreg():
                    place = header.offset, header.offset_data, header.size
                    member = Member(header.name, *place)
                    if member.stop <= len(data):
                        members.append(member)
            end = tar.offset
    except Exception as error:  # tarfile's own, and what odd headers lead it to
        reason = f"truncated or damaged here, or no uncompressed tar ({error})"
        return members, BadSample(f"{shard}:{key}", reason)
    # tarfile takes a damaged header for the end of the archive, so the end must be empty blocks.
    if data[end : end + _BLOCK].strip(b"\0"):
        reason = f"damaged tar header after this sample, at byte {end}"
        problem = BadSample(f"{shard}:{key}", reason)
    return members, problem


def _list_plain(data: bytes | mmap.mmap) -> list[Member] | None:
    """Return the members that tarfile would list, six times faster.

    Return None where a tar holds more than plain files, which tarfile knows better.
    """
    members: list[Member] = []
    start = at = 0
    while at < len(data):
        header = data[at : at + _BLOCK]
        if not header.strip(b"\0"):
            break
        # 1. Leave long names, links, sparse files and base-256 sizes to tarfile.
        if len(header) < _BLOCK or header[156] not in b"0\0x" or header[124] & 128:
            return None
        try:
            size = int(header[124:136].strip(b" \0"), 8)
            checksum = int(header[148:156].strip(b" \0"), 8)
            name = header[:100].partition(b"\0")[0].decode("ascii")
            prefix = header[345:500].partition(b"\0")[0].decode("ascii")
        except ValueError:
            return None
        # 2. Leave damage to tarfile too: a wrong checksum or size, or data that end early.
        body = at + _BLOCK
        at = body + -(-size // _BLOCK) * _BLOCK
        if size < 0 or sum(header) - sum(header[148:156]) + 8 * 32 != checksum or at > len(data):
            return None
        if header[156] in b"x":
            # 3. webdataset writes such a header before every member, for fractions of mtime. It
            # is skipped unless it changes the name or the size.
            if any(key in data[body : body + size] for key in (b"path=", b"size=", b"GNU.")):
                return None
            continue
        if prefix:
            if header[257:263] != b"ustar\0":
                return None
            name = f"{prefix}/{name}"
        members.append(Member(name, start, body, size))
        start = at
    # An extended header without its file is where a tar was cut off.
    return members if start == at else None


def parse(data: bytes, shard: str) -> dict[str, Any]:
    """Return the members in one sample's bytes: extension -> bytes, `__url__` and `__key__`.

    Raises BadSample for damage, a link, two members of one kind, and more than one sample.
    """
    listed, problem = list_members(data, shard)
    if problem is not None:
        raise problem
    members: dict[str, Any] = {"__url__": shard}
    for member in listed:
        name = split_name(member.name)
        if name is None:
            continue
        key, extension = name
        if members.setdefault("__key__", key) != key:
            raise BadSample(f"{shard}:{key}", "the file changed after it was indexed")
        if member.target:
            raise BadSample(
                f"{shard}:{key}",
                f"member {extension} is a link to {member.target}, which is not followed; pack the"
                " files themselves (tar --dereference --hard-dereference)",
            )
        if extension in members:
            raise BadSample(f"{shard}:{key}", f"two members {extension}")
        members[extension] = data[member.offset : member.offset + member.size]
    return members
