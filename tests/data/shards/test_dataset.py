"""Reading and writing shards."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvmm.data.samples.bad_sample import BadSample
from nvmm.data.shards.dataset import Dataset, write_shards
from nvmm.data.shards.tar import split_name
from tests.data.samples.test_instruct import builder


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: Any) -> str:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return str(path)


def raw(pattern: str) -> Dataset:
    return Dataset(pattern, build=lambda members: members)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", ("a", "png")),
        ("dir.d/a.0.PNG", ("dir.d/a", "0.png")),
        ("a", None),
        ("dir.d/a", None),
        (".hidden", None),
    ],
)
def test_names_split_as_webdataset_does(name: str, expected: tuple[str, str] | None) -> None:
    from webdataset.tariterators import base_plus_ext

    assert split_name(name) == expected
    assert base_plus_ext(name)[0] == (expected[0] if expected else None)


@pytest.mark.parametrize("name", ["._000.json", "d/._000.json", "d/.hidden.json", "d/.b/.a.b"])
def test_hidden_files_are_no_members(name: str) -> None:
    """A Mac's `._` files lie between the members of samples: webdataset reads key `d/` there."""
    assert split_name(name) is None


def test_a_macs_hidden_files_leave_samples_whole(tmp_path: Path) -> None:
    members = [("d/._0.json", b"\0"), ("d/0.json", b"1"), ("d/._0.txt", b"\0"), ("d/0.txt", b"2")]
    dataset = raw(write_tar(tmp_path / "m.tar", members))
    assert [dataset.members(n) for n in range(len(dataset))] == [
        {"__url__": dataset.shards[0], "__key__": "d/0", "json": b"1", "txt": b"2"}
    ]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_name_that_is_no_utf8_is_escaped(tmp_path: Path, form: int) -> None:
    """The sample is read, and its key can be printed and written wherever keys are."""
    for length in (1, 150):  # 150: a long name, in a header of its own
        name = "d/" * 20 * (length > 1) + "\xe9" * length
        path = tmp_path / f"{length}.tar"
        if form == tarfile.USTAR_FORMAT and length > 1:
            continue
        write_tar(path, [(f"{name}.json", b"{}"), ("b.json", b"{}")], format=form,
                  encoding="latin-1")  # fmt: skip
        if form == tarfile.PAX_FORMAT:  # It writes UTF-8 by itself; GNU tar did not always.
            data = path.read_bytes()
            path.write_bytes(data.replace("\xe9".encode(), b"\xe9\xe9"))
            length = 2 * length
        dataset = raw(str(path))
        key = "d/" * 20 * (length > 2) + "\\xe9" * length
        assert [dataset.index.key(n) for n in range(2)] == [key, "b"]
        assert dataset.members(0) == {"__url__": str(path), "__key__": key, "json": b"{}"}
        key.encode()


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a right checksum, whatever its fields say."""
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0")
    fields += b"00000000000\0" + b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(247)
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


@pytest.mark.parametrize(
    "size",
    [b"-1000", b"-2000", b"\xff" * 12, b"\xff" * 11 + b"\0"],
    ids=["-512", "-1024", "-1", "-256"],
)
def test_sizes_below_zero_end_a_shard(tmp_path: Path, size: bytes) -> None:
    """Such a size leads back to headers that were read: without an end, where nobody looks."""
    path = tmp_path / "s.tar"
    good = header(b"a.json", b"00000000001") + b"1".ljust(512, b"\0")
    path.write_bytes(good + header(b"b.json", size) + bytes(1024))
    with pytest.raises(ValueError, match=r"s\.tar:b: truncated or damaged here"):
        len(raw(str(path)))


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    good = header(b"b.json", b"00000000000")
    path.write_bytes(header(b"a.json", b"00000000000", b"S") + good + bytes(1024))
    with pytest.raises(
        ValueError, match=r"s\.tar:a: a\.json is a sparse file; .* without --sparse"
    ):
        len(raw(str(path)))
    dataset = Dataset(str(path), dict)
    dataset.skip_damage = True
    assert [dataset.index.key(n) for n in range(len(dataset))] == ["b"]


def test_members_that_do_not_follow_one_another_are_no_samples(tmp_path: Path) -> None:
    """Each part alone would train: a question without its picture."""
    names = ["0.png", "1.png", "2.json", "0.json", "1.json", "3.json", "4.json", "3.json"]
    path = write_tar(tmp_path / "u.tar", [(name, b"") for name in names])
    dataset = raw(path)
    with pytest.raises(ValueError, match=r"u\.tar:0: the members of 2 samples lie apart"):
        len(dataset)
    dataset = Dataset(path, dict)
    dataset.skip_damage = True
    assert [dataset.index.key(n) for n in range(len(dataset))] == ["2", "3", "4", "3"]
    assert dataset.members(0)["json"] == b""


def test_brackets_in_a_name_that_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "set [v1]"
    folder.mkdir()
    assert len(raw(write_tar(folder / "t-{0}.tar", [("0.json", b"{}")]))) == 1


def test_reads_what_webdataset_reads(make_shards: Callable[..., str]) -> None:
    import webdataset

    dataset = raw(make_shards(10))
    urls = [f"file:{path}" for path in dataset.shards]
    reference = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    expected = [
        {name: data for name, data in sample.items() if not name.startswith("__")}
        | {"__key__": sample["__key__"]}
        for sample in reference
    ]
    mine = [dataset.members(i) for i in range(len(dataset))]
    assert len(mine) == 10
    assert [{k: v for k, v in sample.items() if k != "__url__"} for sample in mine] == expected


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_other_files_and_unusual_headers(tmp_path: Path, kind: int) -> None:
    long = "/".join(["folder"] * 12) + "/" + "n" * 60
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in ((f"{long}.txt", b"long"), ("b.txt", b"b" * 600), ("b.json", b"{}")):
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(data), 1.5
            tar.addfile(header, io.BytesIO(data))
    dataset = raw(str(path))
    assert [dataset.members(i) for i in range(len(dataset))] == [
        {"__url__": str(path), "__key__": long, "txt": b"long"},
        {"__url__": str(path), "__key__": "b", "txt": b"b" * 600, "json": b"{}"},
    ]


def test_links_are_neither_followed_nor_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("a.json"))
    with pytest.raises(BadSample, match=r"a\.tar:a: member txt is a link to /etc/passwd"):
        raw(str(path)).members(0)


def test_patterns_are_sorted_and_must_match(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.json", b"{}")])
    both = Dataset([str(tmp_path / "b.tar"), str(tmp_path / "a*")], build=lambda members: members)
    assert [both.members(i)["__key__"] for i in range(2)] == ["b", "a"]
    assert [raw(str(tmp_path / "*")).members(i)["__key__"] for i in range(2)] == ["a", "b"]
    with pytest.raises(ValueError, match=r"pattern .*none\*\.tar matches no file"):
        len(raw(str(tmp_path / "none*.tar")))
    with pytest.raises(ValueError, match="names no file"):
        Dataset([], build=lambda members: members)
    with pytest.raises(IndexError, match="sample 2 of 2"):
        both.members(2)


def test_damage_names_shard_and_key(tmp_path: Path) -> None:
    members = [(f"{key}.json", key.encode() * 700) for key in "abc"]
    path = Path(write_tar(tmp_path / "s.tar", members))
    whole = path.read_bytes()  # each member: 512 header, 1024 data

    path.write_bytes(whole[: 1536 * 2 + 512 + 100])
    with pytest.raises(ValueError, match=r"s\.tar:c: truncated or damaged"):
        len(raw(str(path)))
    path.write_bytes(whole[:1536] + b"x" * 512 + whole[1536 + 512 :])
    with pytest.raises(ValueError, match=r"s\.tar:a: damaged tar header .* at byte 1536"):
        len(raw(str(path)))
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=r"s\.tar:\?: truncated or damaged here, or no uncompr"):
        len(raw(str(path)))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"s\.tar: empty file"):
        len(raw(str(path)))


def test_shard_that_shrinks_after_indexing_is_an_error(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "s.tar", [("a.json", b"x" * 700), ("b.json", b"y" * 700)]))
    dataset = raw(str(path))
    assert len(dataset) == 2
    path.write_bytes(path.read_bytes()[: 1536 + 512 + 10])
    with pytest.raises(ValueError, match=r"s\.tar:b: truncated"):
        dataset.members(1)


def test_two_members_of_one_kind_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.json", b"1"), ("a.JSON", b"2")])
    with pytest.raises(ValueError, match=r"s\.tar:a: two members json"):
        raw(path).members(0)


def test_samples_carry_their_number_and_source(make_shards: Callable[..., str], tiny: Any) -> None:
    pattern = make_shards(6)
    dataset = Dataset(pattern, build=lambda **options: builder(options["tokenizer"]))
    sample = dataset.bind(tokenizer=tiny)[5]
    assert sample.sample_id == 5
    assert sample.source == pattern.replace("*", "00001") + ":0005"


def test_written_shards_are_reproducible(tmp_path: Path) -> None:
    samples = [{"__key__": f"{i}", "json": b"{}", "txt": b"%d" % i} for i in range(5)]
    digests = []
    for folder in ("a", "b"):
        paths = write_shards(tmp_path / folder, "train", samples, samples_per_shard=2)
        assert [path.name for path in paths] == [f"train-0000{i}.tar" for i in range(3)]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
        assert len(list((tmp_path / folder).iterdir())) == 3
    assert digests[0] == digests[1]
    assert [raw(str(tmp_path / "a" / "*.tar")).members(i)["txt"] for i in range(5)] == [
        b"0",
        b"1",
        b"2",
        b"3",
        b"4",
    ]
    assert write_shards(tmp_path, "none", []) == []


def test_patterns_that_count_a_sample_twice_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.json", b"{}")])
    (tmp_path / "link.tar").symlink_to(tmp_path / "a.tar")
    (tmp_path / "hard.tar").hardlink_to(tmp_path / "a.tar")
    for other in ("a.tar", "*a.tar", "../" + tmp_path.name + "/a.tar", "link.tar", "hard.tar"):
        dataset = Dataset([f"{tmp_path}/a*.tar", f"{tmp_path}/{other}"], build=dict)
        with pytest.raises(ValueError, match=r"\.tar of .* its samples would count twice"):
            _ = dataset.shards
    with pytest.raises(ValueError, match="count twice"):
        _ = raw(f"{tmp_path}/*.tar").shards


def test_names_as_other_systems_write_them(tmp_path: Path) -> None:
    folder = tmp_path / "set [v1]"
    folder.mkdir()
    write_tar(folder / "a-0.tar", [("0.json", b"{}")])
    with tarfile.open(
        folder / "b-0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        tar.addfile(tarfile.TarInfo("\xe9t\xe9.json"))
        for name in ("d/._1.json", "d/.hidden.png", "d/1.json", "README"):
            tar.addfile(tarfile.TarInfo(name))
    dataset = Dataset([str(folder / "a-0.tar"), str(folder / "b-0.tar")], build=dict)
    keys = [dataset.members(number)["__key__"] for number in range(3)]
    assert keys == ["0", "\\xe9t\\xe9", "d/1"]
    assert len(dataset) == 3
    assert dataset.index.kinds == {"json": 3, "?": 3}


def test_members_that_are_apart_are_said_so(tmp_path: Path) -> None:
    apart = [("0.png", b""), ("1.png", b""), ("0.json", b"{}"), ("1.json", b"{}")]
    write_tar(tmp_path / "a.tar", apart)
    write_tar(tmp_path / "b.tar", [("0.json", b"{}"), ("1.json", b"{}"), ("0.json", b"{}")])
    with pytest.raises(
        ValueError,
        match=r"a\.tar:0: the members of 2 samples lie apart.* sort the shard",
    ):
        len(raw(str(tmp_path / "a.tar")))
    both = raw(str(tmp_path / "*.tar"))
    both.skip_damage = True
    assert len(both) == 3, "samples of one key are no parts of one"
    assert len(both.index.damage) == 1


def test_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    def write(count: int, per_shard: int, name: str = "train") -> int:
        samples = [{"__key__": f"{i}", "json": b"{}"} for i in range(count)]
        write_shards(tmp_path, name, samples, samples_per_shard=per_shard)
        return len(raw(str(tmp_path / f"{name}-*.tar")))

    assert [write(6, 2), write(6, 3), write(1, 9), write(4, 2)] == [6, 6, 1, 4]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.tar")}

    def failing() -> Any:
        yield {"__key__": "0", "json": b"{}"}
        yield {"__key__": "1", "json": b"{}"}
        raise ValueError("record 2")

    with pytest.raises(ValueError, match="record 2"):
        write_shards(tmp_path, "train", failing(), samples_per_shard=1)
    left = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert left == before, "a call that fails changes nothing, and leaves nothing"
    assert write(2, 1, "validation") == 2
