"""Shards made to do harm: paths that lead out, links, pickles, bombs."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import pytest

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.samples.images import decode_image, read_size
from nvmm.data.shards.dataset import Dataset


class Bomb:
    """Fails the test if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def test_members_neither_lead_out_nor_run(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    files = {
        "../../evil.txt": b"a",
        "../../evil.pyd": pickle.dumps(Bomb()),
        "/etc/evil.txt": b"b",
        "good.txt": b"c",
    }
    shard = tmp_path / "shards" / "s.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "good.json"), (tarfile.LNKTYPE, "good.caption")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
    before = sorted(tmp_path.rglob("*.*"))
    dataset = Dataset(str(shard), dict, index_dir=str(tmp_path / "index"))
    found = [dataset.members(number) for number in range(2)]
    assert [(m["__key__"], m["txt"]) for m in found] == [
        ("../../evil", b"a"),
        ("/etc/evil", b"b"),
    ]
    with pytest.raises(BadSample, match=r"s\.tar:good: member json is a link to"):
        dataset.members(2)
    outside = [path for path in tmp_path.rglob("*.*") if "index" not in path.parts]
    assert sorted(outside) == before
    assert not (tmp_path.parent / "evil.txt").exists()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 0) -> bytes:
    """A PNG of these chunks. colour: its header's type of colour; 0 is grey, 3 a palette."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in (header, *chunks, (b"IEND", b"")):
        parts += [struct.pack(">I", len(body)), kind, body]
        parts.append(struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


@pytest.mark.parametrize("side", [12_000, 60_000, 2_000_000_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_image_bombs_are_not_decompressed(side: int) -> None:
    rows = (b"IDAT", zlib.compress(bytes(10**6)))
    for read in (decode_image, read_size):
        with pytest.raises(BadSample, match=r"^s\.tar:k: "):
            read(png(side, side, rows), source="s.tar:k")


def test_text_bombs_in_images_are_not_decompressed() -> None:
    text = (b"zTXt", b"comment\0\0" + zlib.compress(bytes(8 * 2**20)))
    with pytest.raises(BadSample, match=r"^s\.tar:k: cannot decode image"):
        decode_image(png(8, 8, text, (b"IDAT", zlib.compress(bytes(72)))), source="s.tar:k")
