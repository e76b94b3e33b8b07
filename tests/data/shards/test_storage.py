"""Reading from disks, an S3 server, and an HTTP server that fails, stalls and truncates."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from nvmm.data.shards.cache import Cache
from nvmm.data.shards.dataset import Dataset
from nvmm.data.shards.storage import Storage, expand, read, size
from tests.data.shards.servers import FaultyServer, serving

DATA = random.Random(0).randbytes(300_000)
QUICK = Storage(backoff=0.001, retries=3, timeout=20.0)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with serving({"a.tar": DATA}) as server:
        yield server


def test_local_files(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "c.tar"):
        (tmp_path / name).write_bytes(DATA)
    path = str(tmp_path / "c.tar")
    assert read(path, 10, 20) == DATA[10:20]
    assert read(f"file://{path}", 299_990, 300_000) == DATA[-10:]
    assert size(path) == 300_000
    assert expand(str(tmp_path / "b-*.tar")) == [str(tmp_path / f"b-{i}.tar") for i in (0, 1)]
    assert expand(str(tmp_path / "{c,b-{0..7}}.tar")) == [
        str(tmp_path / name) for name in ("b-0.tar", "b-1.tar", "c.tar")
    ]
    assert expand(str(tmp_path / "none-*.tar")) == []
    assert read(path, 299_999, 300_001) == DATA[-1:]


@pytest.mark.parametrize("fault", [500, 503, 429, "truncate", "short"])
def test_a_failing_server_is_asked_again(server: FaultyServer, fault: int | str) -> None:
    server.faults["a.tar"] = [fault, fault]
    assert read(server.url("a.tar"), 1000, 5000, QUICK) == DATA[1000:5000]
    assert server.ranges == [("a.tar", 1000, 5000)] * 3


def test_a_stalled_answer_is_given_up_and_asked_again(server: FaultyServer) -> None:
    server.faults["a.tar"] = ["stall"]
    options = Storage(backoff=0.001, timeout=1.0)
    assert read(server.url("a.tar"), 1000, 5000, options) == DATA[1000:5000]


def test_tries_end_with_file_and_range(server: FaultyServer) -> None:
    server.faults["a.tar"] = ["truncate"] * 9
    with pytest.raises(OSError, match=r"a\.tar: bytes 1000-5000: .*gave up after 4 tries"):
        read(server.url("a.tar"), 1000, 5000, QUICK)
    assert len(server.ranges) == 4


@pytest.mark.parametrize("status", [403, 410])
def test_what_cannot_get_better_is_not_tried_again(server: FaultyServer, status: int) -> None:
    server.faults["a.tar"] = [status]
    with pytest.raises(OSError, match=r"a\.tar: bytes 1-2: "):
        read(server.url("a.tar"), 1, 2, QUICK)
    assert len(server.ranges) == 1
    with pytest.raises(OSError, match=r"missing\.tar"):
        read(server.url("missing.tar"), 1, 2, QUICK)
    with pytest.raises(OSError, match=r"missing\.tar"):
        size(server.url("missing.tar"), QUICK)


def test_a_server_without_ranges_is_refused(server: FaultyServer) -> None:
    server.faults["a.tar"] = ["whole"]
    with pytest.raises(OSError, match="bytes 1000-5000: the server ignores byte ranges"):
        read(server.url("a.tar"), 1000, 5000, QUICK)


def test_reads_in_a_row_are_few_requests(server: FaultyServer) -> None:
    options = Storage(read_ahead_bytes=100_000)
    url = server.url("a.tar")
    for start in range(0, 300_000, 3000):  # headers, as an index is built
        assert read(url, start, start + 512, options) == DATA[start : start + 512]
    assert len(server.ranges) == 3
    server.ranges.clear()
    for start in (200_000, 50_000, 180_000):  # samples in a shuffled order
        assert read(url, start, start + 1000, options) == DATA[start : start + 1000]
    assert [stop - start for _, start, stop in server.ranges] == [1000] * 3


def test_cached_blocks_are_not_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    options = Storage(str(tmp_path), cache_bytes=10**6, read_ahead_bytes=50_000)
    url = server.url("a.tar")
    assert read(url, 49_000, 151_000, options) == DATA[49_000:151_000]
    assert [start for _, start, _ in server.ranges] == [0, 50_000, 100_000, 150_000]
    assert read(url, 140_000, 160_000, options) == DATA[140_000:160_000]
    assert len(server.ranges) == 4
    assert read(url, 299_000, 300_000, options) == DATA[299_000:]
    damaged = next(path for path in tmp_path.rglob("*-0"))
    damaged.write_bytes(b"cut short")
    assert read(url, 10, 20, options) == DATA[10:20]
    assert len(server.ranges) == 6
    with pytest.raises(OSError, match="bytes 299999-300001: the file ends at 300000"):
        read(url, 299_999, 300_001, options)


def test_cache_keeps_its_limit_and_what_was_read_last(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), limit=10_000)
    for number in range(40):
        cache.put(f"block-{number}", bytes([number]) * 1000)
        assert cache.get("block-0", 1000, 0, 3) == b"\0\0\0"
        assert used(tmp_path) <= 10_000
    assert cache.get("block-39", 1000, 998, 1000) == b"\x27\x27"
    assert cache.get("block-20", 1000, 0, 1) is None


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_at_random(url: str, folder: str, seed: int) -> bool:
    """Read 60 ranges through a cache that is too small for them."""
    options = Storage(folder, cache_bytes=160_000, read_ahead_bytes=10_000, backoff=0.001)
    draw = random.Random(seed)
    for _ in range(60):
        start = draw.randrange(290_000)
        stop = start + draw.randrange(10_000)
        if read(url, start, stop, options) != DATA[start:stop]:
            return False
    return True


def test_processes_share_a_cache(server: FaultyServer, tmp_path: Path) -> None:
    server.faults["a.tar"] = [503, "truncate", "short"] * 2
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(4, mp_context=context) as pool:
        url = server.url("a.tar")
        right = list(pool.map(read_at_random, [url] * 4, [str(tmp_path)] * 4, range(4)))
    assert right == [True] * 4
    # a block of each process may lie on top
    assert used(tmp_path) <= 160_000 + 4 * 10_000
    assert not list(tmp_path.rglob(".tmp_*"))


def test_a_remote_dataset_equals_the_local_one(
    make_shards: Callable[..., str], tmp_path: Path
) -> None:
    local = Dataset(make_shards(10), dict)
    files = {Path(path).name: Path(path).read_bytes() for path in local.shards}
    assert sorted(files) == [f"train-{i:05d}.tar" for i in range(3)]
    options = Storage(str(tmp_path / "cache"), 10**6, 20_000, backoff=0.001)
    with serving(files) as server:
        server.faults["train-00001.tar"] = [503, "truncate", "short", 500]
        pattern = server.url("train-{00000..00002}.tar")
        remote = Dataset(pattern, dict, index_dir=str(tmp_path / "index"), storage=options)
        assert len(remote) == 10
        for _ in range(2):
            asked = len(server.ranges)
            for number in (7, 0, 3, 9, 1, 8, 2, 6, 5, 4):
                ours, theirs = remote.members(number), local.members(number)
                assert ours.pop("__url__").startswith("http://127.0.0.1")
                assert Path(theirs.pop("__url__")).name in files
                assert ours == theirs
        assert len(server.ranges) == asked, "the second pass must come from the cache"


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name in ("train-0.tar", "train-1.tar", "other.tar"):
            client.put_object(Bucket="bucket", Key=f"data/{name}", Body=DATA)
        found = expand("s3://bucket/data/train-*.tar", QUICK)
        assert found == [f"s3://bucket/data/train-{i}.tar" for i in (0, 1)]
        assert size(found[0], QUICK) == 300_000
        assert read(found[1], 1000, 200_000, QUICK) == DATA[1000:200_000]
        cached = Storage(str(tmp_path), cache_bytes=10**6, read_ahead_bytes=50_000)
        for _ in range(2):
            assert read(found[0], 120_000, 280_000, cached) == DATA[120_000:280_000]
        client.delete_object(Bucket="bucket", Key="data/train-0.tar")
        assert read(found[0], 130_000, 270_000, cached) == DATA[130_000:270_000]
        with pytest.raises(OSError, match=r"s3://bucket/data/train-0\.tar: bytes 5-9: "):
            read(found[0], 5, 9, QUICK)
    finally:
        moto.stop()
        S3FileSystem.clear_instance_cache()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="bytes 5-3 are no range"):
        read("a.tar", 5, 3)
    with pytest.raises(ValueError, match=r"storage\.cache_bytes=100 must hold"):
        Storage("cache", cache_bytes=100)
    with pytest.raises(ValueError, match=r"storage\.retries=-1"):
        Storage(retries=-1)
    with pytest.raises(ValueError, match="pipe"):
        read("pipe://rm -rf .", 0, 1, QUICK)
