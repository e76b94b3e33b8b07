"""Pipelines of synthetic data against a server with faults, killed and gone on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.config.check import fill_unset, to_plain
from nvmm.config.compose import composed
from nvmm.data.prepare import digits
from nvmm.data.samples.tokenizer import Tokenizer
from nvmm.data.shards.dataset import Dataset
from nvmm.jobs.synthesise import Synthesise
from nvmm.proof.ranks import _PRELOAD
from tests.jobs.chat_server import ChatServer, write
from tests.ranks import run_ranks

ENDPOINT = {"timeout": 5.0, "backoff": 0.01, "concurrency": 4}


def pipeline(
    steps: str, *overrides: str, generators: str = "endpoint", endpoint: Any = None
) -> dict[str, Any]:
    """The `job` of a composed command."""
    chosen = ["job=synthesise", f"job/steps={steps}", f"job/generators={generators}", "output=x"]
    config = composed("job", [*chosen, *overrides])
    fill_unset(config)
    job: dict[str, Any] = to_plain(config)["job"]
    for name, generator in job["generators"].items():
        if generator["_target_"].endswith("Endpoint"):
            generator |= {"model": f"model-{name}", **ENDPOINT, **(endpoint or {})}
    return job


def run(
    rank: int, world: int, init: str, config: dict[str, Any], url: str, output: Path
) -> dict[str, Any]:
    """Run a pipeline on this rank; the endpoints are at `url`."""
    import torch.distributed as dist
    from hydra.utils import instantiate

    from nvmm.parallel.setup import Parallel

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    Parallel().initialize(seed=1)
    return made(config, url).run({"job": config}, None, output)  # type: ignore[no-any-return]


def made(config: dict[str, Any], url: str) -> Any:
    from hydra.utils import instantiate

    generators = {
        name: one | ({"base_url": url} if one["_target_"].endswith("Endpoint") else {})
        for name, one in config["generators"].items()
    }
    return instantiate(config | {"generators": generators}, _convert_="all")


def contents(folder: Path, *parts: str) -> dict[str, bytes]:
    """Every file of an output's parts and shards, but for hidden ones and indices."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in parts or ("steps", "shards", "summary.json")
        for path in sorted([*(folder / part).rglob("*"), folder / part])
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".index"
    }


def rows(output: Path, step: str) -> list[dict[str, Any]]:
    from nvmm.jobs.parts import Parts

    found: list[dict[str, Any]] = Parts(output / "steps" / step).read().to_pylist()
    return found


def records(output: Path, step: str) -> list[dict[str, Any]]:
    return [json.loads(text) for row in rows(output, step) for text in row["records"]]


def small(steps: str = "open_qa", **options: Any) -> dict[str, Any]:
    config = pipeline(steps, **options)
    config["steps"]["topics"]["values"] = ["birds", "rivers", "bread"]
    for name in ("subtopics", "questions"):
        config["steps"][name] |= {"count": 3, "part_size": 2}
    return config


def plan(trial: int, number: int) -> Any:
    """Two of three requests fail first, in one of several ways; the second trial works."""
    faults = (429, 500, "late", "broken", 503, None)
    return faults[number % len(faults)] if trial == 1 else None


def test_faults_are_counted_and_retried_and_nothing_is_lost_or_asked_twice(tmp_path: Path) -> None:
    config = small()
    with ChatServer(write) as calm:
        [undisturbed] = run_ranks(run, 1, config, calm.url, tmp_path / "calm")
    with ChatServer(write, plan) as server:
        [summary] = run_ranks(run, 1, config, server.url, tmp_path / "faults")
        kinds, requests = dict(server.kinds), summary["requests"]
        # 1. Everything that went wrong was seen and counted, and tried again.
        assert all(kinds[str(kind)] > 0 for kind in (429, 500, "late", "broken", 503))
        assert requests["requests"] == server.asked.total()
        for status in ("429", "500", "503"):
            assert requests[f"retries after {status}"] == kinds[status]
        # 2. No answer was asked for twice, and a broken one is another attempt of its own.
        assert max(server.answered.values()) == 1
        assert 1 < server.most <= ENDPOINT["concurrency"]
        # 3. The same command asks nothing more; nor does another output with the same cache.
        before = server.asked.total()
        again = run_ranks(run, 1, config, server.url, tmp_path / "faults")[0]
        assert (again["written"], again["rows"]) == (0, summary["rows"])
        shared = config | {"cache": str(tmp_path / "faults" / "cache")}
        [other] = run_ranks(run, 1, shared, server.url, tmp_path / "other")
        assert server.asked.total() == before
        assert other["requests"].get("requests", 0) == 0
    assert contents(tmp_path / "other") == contents(tmp_path / "faults")
    # 4. In the end there is all that there is without a fault.
    assert summary["bad"] == undisturbed["bad"] == 0
    assert {name: len(rows(tmp_path / "faults", name)) for name in config["steps"]} == {
        name: len(rows(tmp_path / "calm", name)) for name in config["steps"]
    }
    assert (
        summary["metrics"]["answers"]
        == undisturbed["metrics"]["answers"] + requests["invalid answers"]
    )
    assert summary["metrics"]["subtopics dropped"] == 3  # a duplicate in every list
    assert summary["metrics"]["input_tokens"] == 10 * summary["metrics"]["answers"]


def killed(init: str, config: dict[str, Any], url: str, output: Path) -> None:
    run(0, 1, init, config, url, output)


@pytest.mark.parametrize("count", [9, 26])
def test_a_killed_pipeline_goes_on_and_asks_for_no_answer_that_it_has(
    count: int, tmp_path: Path
) -> None:
    config = small()
    reached = threading.Event()

    def on_request(number: int) -> None:
        if number >= count and not reached.is_set():
            reached.set()

    with ChatServer(write, plan) as calm:
        run_ranks(run, 1, config, calm.url, tmp_path / "calm")
    with ChatServer(write, plan, on_request) as server:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        init = f"file://{tmp_path}/rendezvous"
        process = context.Process(
            target=killed, args=(init, config, server.url, tmp_path / "killed")
        )
        process.start()
        assert reached.wait(60)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kept = len(list((tmp_path / "killed" / "cache").rglob("[!.]*.json")))
        lost = server.answered.total() - kept
        assert 0 <= lost <= ENDPOINT["concurrency"]  # only what was on its way
        [summary] = run_ranks(run, 1, config, server.url, tmp_path / "killed")
        assert server.answered.total() == summary["metrics"]["answers"] + lost
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")
    assert contents(tmp_path / "killed", "cache") == contents(tmp_path / "calm", "cache")
