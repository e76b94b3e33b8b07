"""Pipelines of synthetic data against a server with faults, killed and gone on with."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import InstantiationException

from nvmm.config.check import config_dir, fill_unset, to_plain
from nvmm.config.compose import composed
from nvmm.config.nested import merged
from nvmm.data.shards.dataset import Dataset
from nvmm.evaluation.instruction_following import follows
from nvmm.jobs.synthesis.endpoint import Endpoint
from nvmm.jobs.synthesis.records import Request, digest
from nvmm.jobs.synthesis.writing import Strings
from nvmm.proof.ranks import _PRELOAD
from tests import reward_run
from tests.jobs import test_job
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


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A rank of this process alone."""
    from nvmm.parallel.setup import Parallel, shutdown

    Parallel().initialize(seed=1, rank=0, world_size=1)
    yield
    shutdown()


def run(config: dict[str, Any], url: str, output: Path) -> dict[str, Any]:
    """Run a pipeline whose endpoints are at `url`."""
    return made(config, url).run({"job": config}, None, output)  # type: ignore[no-any-return]


def run_rank(
    rank: int,
    world: int,
    init: str,
    config: dict[str, Any],
    url: str,
    output: Path,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """The same on a rank of several."""
    import torch.distributed as dist

    from nvmm.inference.restore import restore
    from nvmm.parallel.setup import Parallel

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    if checkpoint is None:
        Parallel().initialize(seed=1)
        return run(config, url, output)
    return made(config, url).run({}, restore(checkpoint), output)  # type: ignore[no-any-return]


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


def parts(folder: Path) -> list[dict[str, Any]]:
    from nvmm.jobs.parts import Parts

    found: list[dict[str, Any]] = Parts(folder).read().to_pylist()
    return found


def rows(output: Path, step: str) -> list[dict[str, Any]]:
    found = parts(output / "steps" / step)
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
    """Most requests fail first, and the second trial works; broken JSON is an answer that stays."""
    fault = (429, 500, "late", "broken", 503, None)[number % 6]
    return fault if trial == 1 or fault == "broken" else None


def test_faults_are_counted_and_retried_and_nothing_is_lost_or_asked_twice(tmp_path: Path) -> None:
    config = small()
    with ChatServer(write) as calm:
        undisturbed = run(config, calm.url, tmp_path / "calm")
    with ChatServer(write, plan) as server:
        summary = run(config, server.url, tmp_path / "faults")
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
        again = run(config, server.url, tmp_path / "faults")
        assert (again["written"], again["rows"]) == (0, summary["rows"])
        shared = config | {"cache": str(tmp_path / "faults" / "cache")}
        other = run(shared, server.url, tmp_path / "other")
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
    run_rank(0, 1, init, config, url, output)


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
        run(config, calm.url, tmp_path / "calm")
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
        summary = run(config, server.url, tmp_path / "killed")
        assert server.answered.total() == summary["metrics"]["answers"] + lost
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")
    assert contents(tmp_path / "killed", "cache") == contents(tmp_path / "calm", "cache")


def prompts(folder: Path, count: int = 6) -> str:
    path = folder / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Tell me of {n} birds."}) + "\n" for n in range(count))
    )
    return str(path)


def built(builder: str, pattern: Path, tokenizer: Any, **options: Any) -> list[Any]:
    """The samples of shards, as training builds them."""
    from nvmm.data.samples.chat import ImageTags
    from nvmm.data.samples.instruct import InstructBuilder
    from nvmm.data.samples.preference import PreferenceBuilder
    from tests.data.conftest import template

    make = {"sft": InstructBuilder, "preference": PreferenceBuilder}[builder]
    dataset = Dataset(
        str(pattern),
        make(template(), ImageTags(), 1, tokenizer=tokenizer, sequence_length=2048),
    )
    return [dataset[number] for number in range(len(dataset))]


def test_shards_train_as_they_are_and_records_tell_where_they_come_from(tmp_path: Path) -> None:
    words = reward_run.tokenizer(tmp_path / "tokenizer")
    config = pipeline("preference", generators="judged")
    config["steps"]["prompts"]["files"] = prompts(tmp_path)
    with ChatServer(write, plan) as server:
        [summary] = run_ranks(run_rank, 2, config, server.url, tmp_path / "out")[:1]
        assert max(server.answered.values()) == 1  # two ranks, one of them asks
    assert summary["bad"] == 0
    samples = built("preference", tmp_path / "out" / "shards" / "preference-*.tar", words)
    pairs = records(tmp_path / "out", "preference")
    assert len(samples) == len(pairs) == summary["metrics"]["preference records"] > 2
    for sample, pair in zip(samples, pairs, strict=True):
        assert [float(text.extras["reward"]) for text in sample.texts] == [1.0, 0.0]
        assert [turn["role"] for turn in pair["prompt"]] == ["user", "assistant", "user"]
        # The user who was played neither thanks nor asks politely.
        assert "hank" not in pair["prompt"][2]["content"]
        assert pair["chosen"] != pair["rejected"] and len(pair["chosen"]) >= len(pair["rejected"])
        # Every answer that it depends on is named, and is in the cache under that name.
        entries = {entry["step"]: entry for entry in pair["lineage"]}
        assert list(entries) == ["prompts", "second_turn", "answered", "compared", "pairs"]
        said = [*entries["second_turn"]["said"], *entries["answered"]["said"]]
        for answer in [*said, *entries["compared"]["judged"]]:
            path = tmp_path / "out" / "cache" / answer["answer"][:2] / f"{answer['answer']}.json"
            kept = json.loads(path.read_text())
            assert kept["request"]["model"] == f"model-{answer['generator']}"
            assert digest(kept["request"]["messages"]) == answer["prompt"]
        assert {one["generator"] for one in entries["answered"]["said"]} == {"writer", "second"}
        assert entries["compared"]["judged"][0]["template"] == "compare"


def test_instructions_are_verified(tmp_path: Path) -> None:
    """SFT gets answers that follow, preferences one that does and one that does not; the shares
    have no prompt in common."""
    words = reward_run.tokenizer(tmp_path / "tokenizer")
    config = pipeline("instructions")
    config["steps"]["prompts"]["files"] = prompts(tmp_path, 24)
    config["steps"]["answered"]["samples"] = 3

    def varied(body: dict[str, Any]) -> str:
        seed = body["seed"] % 4
        return ["A word, <<title>>. That is all.", "no", "NO", "Therefore [name] *it* is light."][
            seed
        ]

    with ChatServer(varied) as server:
        summary = run(config, server.url, tmp_path / "out")
    shards = tmp_path / "out" / "shards"
    assert len(built("sft", shards / "sft-*.tar", words)) == len(records(tmp_path / "out", "sft"))
    assert built("preference", shards / "preference-*.tar", words)
    good, pairs = (records(tmp_path / "out", name) for name in ("sft", "preference"))
    for record in [*good, *pairs]:
        rules = list(zip(record["instruction_id_list"], record["kwargs"], strict=True))
        answer = record.get("chosen") or record["messages"][-1]["content"]
        assert all(follows(answer, *rule) for rule in rules)
        if "rejected" in record:
            assert not all(follows(record["rejected"], *rule) for rule in rules)
    asked = [
        {(record.get("prompt") or record["messages"])[0]["content"] for record in part}
        for part in (good, pairs)
    ]
    assert not asked[0] & asked[1]
    assert summary["bad"] == 0


def test_answers_are_scored_by_a_job_and_ranked_by_another_pipeline(tmp_path: Path) -> None:
    """A reward model of pairs scores what `verified` has written; `ranked` pairs by its rewards."""
    config = reward_run.config_of(
        tmp_path / "tokenizer", _target_="nvmm.data.samples.preference.PreferenceBuilder"
    )
    for key in ("attributes", "end"):
        del config["data"]["train"]["build"][key]
    run_ranks(reward_run.save, 1, {}, config, tmp_path / "model", reward_run.TURNS)
    files = tmp_path / "prompts.jsonl"
    rules = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    files.write_text("\n".join(json.dumps({"prompt": f"Say {n}.", **rules}) for n in range(5)))
    first = pipeline("verified")
    first["steps"]["prompts"]["files"] = str(files)
    texts = ["a, b", "it is a bird", "small, it sings", "what"]
    with ChatServer(lambda body: texts[body["seed"] % 4]) as server:
        run(first, server.url, tmp_path / "out")
    words = reward_run.tokenizer(tmp_path / "tokenizer")
    assert built("preference", tmp_path / "out/shards/preference-*.tar", words)
    # 1. Every answer is a sample, under its record's id and its number.
    options = {"_target_": "nvmm.jobs.reward.Reward", "weights": [1.0, -2.0]}
    options["shards"] = str(tmp_path / "out/shards/answers-*.tar")
    run_ranks(test_job.job, 1, tmp_path / "model", options, tmp_path / "scores", {}, test_job.WHOLE)
    rewards = {row["key"]: row["rewards"][0] for row in parts(tmp_path / "scores")}
    answered = records(tmp_path / "out", "verified")
    names = [f"{one['id']}-{n}" for one in answered for n in range(len(one["answers"]))]
    assert sorted(rewards) == sorted(names) and len(names) == 20
    assert [one["parents"] for one in records(tmp_path / "out", "answers")] == [
        [one["id"]] for one in answered for _ in one["answers"]
    ]
    # 2. The pairs are the best and the worst by those rewards.
    second = pipeline("ranked", generators="none")
    second["steps"]["records"]["folder"] = str(tmp_path / "out/steps/verified")
    second["steps"]["rewarded"]["scores"] = str(tmp_path / "scores")
    run(second, "", tmp_path / "ranked")
    pairs = records(tmp_path / "ranked", "pairs")
    scored = {one["id"]: [rewards[f"{one['id']}-{n}"] for n in range(4)] for one in answered}
    assert [(one["chosen_reward"], one["rejected_reward"]) for one in pairs] == [
        (max(found), min(found)) for found in scored.values() if max(found) > min(found)
    ]
    steps = [entry["step"] for entry in pairs[0]["lineage"]]
    assert steps == ["prompts", "answered", "verified", "rewarded", "pairs"]
    assert len(pairs[0]["lineage"][3]["judged"]["checkpoint"]) == 64
    # 3. Scores of other answers leave every record with an error, and other outputs are refused.
    path = tmp_path / "out/steps/verified"
    for scores, message in ((path, "no output of job=reward"), (tmp_path, "no output of a job")):
        second["steps"]["rewarded"]["scores"] = str(scores)
        with pytest.raises(ValueError, match=message):
            run(second, "", tmp_path / f"refused{scores.name}")
    second["steps"]["rewarded"]["scores"] = str(tmp_path / "scores")
    second["steps"]["records"]["folder"] = str(tmp_path / "out/steps/answered")
    with pytest.raises(ValueError, match=r"steps\.pairs has nothing to work on"):
        run(second, "", tmp_path / "others")
    assert "has no scores of it" in rows(tmp_path / "others", "rewarded")[0]["error"]
    second["steps"]["records"]["folder"] = str(tmp_path / "scores")
    with pytest.raises(ValueError, match="no step of a pipeline"):
        run(second, "", tmp_path / "no_step")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": {"best": {"by": "verifier"}}}, "has no score 'verifier'"),
        ({"steps": {"refined": {"prompt": "nothing"}}}, "no prompt 'nothing'"),
        ({"steps": {"refined": {"generator": "nobody"}}}, "no generator 'nobody'"),
        ({"steps": {"refined": {"after": ["sft"]}}}, "no after 'sft'"),
        ({"steps": {"topics": {"values": []}}}, "job.steps.topics has nothing to work on"),
        ({"prompts": {"refine": "{{ prom }}"}}, "'prom' is undefined"),
        ({"prompts": {"refine": "{{ prompt"}}, "job.prompts.refine is no jinja2 template"),
        ({"generators": {"writer": {"structured": "xml"}}}, "structured"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = merged(small(), change)
    with ChatServer(write) as server, pytest.raises(ValueError, match=message):
        try:
            run(config, server.url, tmp_path / "out")
        except InstantiationException as error:  # of a constructor, by Hydra
            raise error.__cause__ or error from error


def test_a_checkpoint_that_nobody_asks_is_refused(tmp_path: Path) -> None:
    model: Any = object()
    with pytest.raises(ValueError, match="leave checkpoint= out"):
        made(small(), "").run({}, model, tmp_path)
    config = pipeline("dialogues", generators="checkpoint")
    with pytest.raises(ValueError, match=r"generators\.writer is Checkpoint: give check"):
        run(config, "", tmp_path)


def test_another_step_in_the_folder_is_refused(tmp_path: Path) -> None:
    config = small()
    with ChatServer(write) as server:
        run(config, server.url, tmp_path / "out")
        changed = merged(config, {"prompts": {"refine": "Say it anew: {{ prompt }}"}})
        with pytest.raises(ValueError, match=r"steps/refined holds the output of another job"):
            run(changed, server.url, tmp_path / "out")
        # What changes no answer is no other pipeline.
        faster = merged(config, {"generators": {"writer": {"concurrency": 1, "input_price": 2.0}}})
        summary = run(faster, server.url, tmp_path / "out")
    assert summary["written"] == 0
    assert summary["metrics"]["cost"] == summary["metrics"]["input_tokens"] * 2 / 1e6


def test_a_refusal_is_of_its_record_and_an_outage_stops_the_job(tmp_path: Path) -> None:
    config = small(endpoint={"max_retries": 1})
    down = [True]

    def faults(trial: int, number: int) -> Any:
        return 500 if down[0] and number % 5 == 0 else 400 if number % 5 == 1 else None

    with ChatServer(write, faults) as server:
        with pytest.raises(OSError, match="fails 2 times; the last time: 500"):
            run(config, server.url, tmp_path / "out")
        down[0] = False
        answered = dict(server.answered)
        summary = run(config, server.url, tmp_path / "out")
        assert all(server.answered[key] == count for key, count in answered.items())
        assert max(server.answered.values()) == 1
        errors = [row["error"] for name in config["steps"] for row in rows(tmp_path / "out", name)]
        refused = [error for error in errors if error and "refuses (400): " in error]
        assert len(refused) == summary["bad"] > 0
        # The broken word of an endpoint that has no such model stops at once.
        with ChatServer(write, lambda trial, number: 401) as closed:
            with pytest.raises(OSError, match="the endpoint answers 401"):
                run(config, closed.url, tmp_path / "closed")
            assert closed.asked.total() <= 4


def save(rank: int, world: int, init: str, folder: Path) -> None:
    from tests.test_evaluate import save

    save(rank, world, init, folder, text_only=True, favourites=30)


def test_a_checkpoint_writes_whatever_the_ranks(tmp_path: Path) -> None:
    """One rank, and two that share the prompts and were stopped: the same bytes."""
    run_ranks(save, 1, tmp_path)
    config = pipeline("dialogues", generators="checkpoint")
    config["prompts"]["user_turn"] = "{{ messages | length }}"
    config["generators"]["writer"] |= {"max_new_tokens": 60, "batch_size": 2, "temperature": 1.0}
    steps = config["steps"]
    steps["prompts"] |= {"files": prompts(tmp_path, 5), "part_size": 2}
    steps["played"] |= {"part_size": 2, "turns": 2}
    [alone] = run_ranks(run_rank, 1, config, "", tmp_path / "one", tmp_path / "run")
    [both, _] = run_ranks(run_rank, 2, config, "", tmp_path / "two", tmp_path / "run")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert alone["requests"]["requests"] == both["requests"]["requests"]
    texts = [record["messages"] for record in records(tmp_path / "one", "sft")]
    assert len({str(text) for text in texts}) == len(texts) == 5 - alone["bad"] > 0
    # What is cut is no answer, as of an endpoint.
    config["generators"]["writer"] |= {"max_new_tokens": 1}
    with pytest.raises(RuntimeError, match="no record is left"):
        run_ranks(run_rank, 1, config, "", tmp_path / "cut", tmp_path / "run")
    errors = [row["error"] for row in rows(tmp_path / "cut", "played")]
    assert errors.count("writer: the answer was cut at max_new_tokens=1") > 0 == errors.count(None)
    config["generators"]["writer"] |= {"max_new_tokens": 60}
    # A part that is lost comes back from the cache, and nothing is asked.
    (tmp_path / "two" / "steps" / "played" / "part-00001.arrow").unlink()
    [again] = run_ranks(run_rank, 1, config, "", tmp_path / "two", tmp_path / "run")
    assert again["written"] == 2 and list(again["requests"]) == ["answers of the cache"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


PIPELINES = sorted(path.stem for path in (config_dir() / "job" / "steps").glob("*.yaml"))


def shipped(name: str, files: str) -> dict[str, Any]:
    generators = {"preference": "judged", "ranked": "none"}
    config = pipeline(name, generators=generators.get(name, "endpoint"))
    for step in config["steps"].values():
        if "values" in step:
            step["values"] = step["values"][:2]
        step |= {"count": 2} if "count" in step else {}
        step |= {"files": files} if "files" in step else {}
    return config


OTHERS = ("instructions", "verified", "ranked")
"""Pipelines of verified answers, which have tests of their own."""


@pytest.mark.parametrize("name", [name for name in PIPELINES if name not in OTHERS])
def test_every_shipped_pipeline_runs_and_writes(name: str, tmp_path: Path) -> None:
    """With its own prompts, which use fields that are there."""
    (tmp_path / "files.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"Do {n}.", "text": f"Text {n}."}) for n in range(8))
    )
    with ChatServer(write) as server:
        summary = run(shipped(name, str(tmp_path / "files.jsonl")), server.url, tmp_path / "out")
        assert max(server.answered.values()) == 1
    assert summary["bad"] == 0
    form = "preference" if name == "preference" else "sft"
    words = reward_run.tokenizer(tmp_path / "tokenizer")
    assert built(form, tmp_path / "out" / "shards" / f"{form}-*.tar", words)


def test_every_shipped_prompt_is_used() -> None:
    used = {"extract"}  # by listing=extract
    for name in PIPELINES:
        steps = made(shipped(name, "x"), "").steps.values()
        used |= {prompt for step in steps for prompt in step.asks}
    assert used == set(pipeline("open_qa")["prompts"])


def ask(server: ChatServer, schema: Any = None, count: int = 1, **options: Any) -> Any:
    """Ask an endpoint; return its replies and the counts."""
    kept: list[Any] = []
    endpoint = Endpoint("m", server.url, **{**ENDPOINT, "max_retries": 2, **options})
    requests = [
        (f"{number:064x}", Request("g", (("user", f"say {number} x"),), None, schema))
        for number in range(count)
    ]
    counts: Counter[str] = Counter()
    replies = endpoint.replies(requests, lambda *pair: kept.append(pair), counts, None)
    return replies, counts, kept


def test_parameters_of_an_endpoint_are_sent(tmp_path: Path) -> None:
    with ChatServer(write) as server:
        (tmp_path / "key").write_text("secret\n")
        ask(server, api_key_file=str(tmp_path / "key"), temperature=0.1, top_p=0.2, max_tokens=3)
        [body] = server.bodies.values()
        assert {k: body[k] for k in ("model", "temperature", "top_p", "max_tokens", "seed")} == {
            **{"model": "m", "temperature": 0.1, "top_p": 0.2, "max_tokens": 3, "seed": 0}
        }
        assert server.keys == {"Bearer secret"}
    with ChatServer(write) as server:
        ask(server, send_seed=False, extra={"top_k": 5})
        [body] = server.bodies.values()
        assert "seed" not in body and body["top_k"] == 5 and "response_format" not in body
    forms = {"json_schema": "json_schema", "json_object": "json_object", "prompt": None}
    for structured, form in forms.items():
        with ChatServer(lambda body: "{}") as server:
            ask(server, Strings, structured=structured)
            [body] = server.bodies.values()
            assert body.get("response_format", {}).get("type") == form
    with pytest.raises(ValueError, match="api_key_file=gone cannot be read"):
        ask(server, api_key_file="gone")


def _error_of(action: Any) -> str:
    with pytest.raises(OSError) as error:
        action()
    return str(error.value)


def test_what_an_endpoint_may_do_wrong() -> None:
    with ChatServer(write, lambda trial, number: "words" if trial < 3 else None) as server:
        [reply], counts, kept = ask(server)
        assert reply.error is None and counts["retries after no chat completion"] == 2
        assert len(kept) == 1
    with ChatServer(write, lambda trial, number: "length") as server:
        [reply], _, kept = ask(server, max_tokens=7)
        assert (reply.text, reply.error) == ("", "the answer was cut at max_tokens=7")
        assert len(kept) == 1  # it is an answer, and was paid for
    with ChatServer(write, lambda trial, number: 503) as server:
        [reply], counts, kept = ask(server, skip_failing=True)
        assert "fails 3 times; the last time: 503" in str(reply.error)
        assert (kept, counts["retries after 503"], server.asked.total()) == ([], 2, 3)
    with ChatServer(lambda body: time.sleep(0.5) or "late") as server:
        error = _error_of(lambda: ask(server, timeout=0.05, max_retries=1))
        assert "no answer in time" in error
    assert "no connection" in _error_of(lambda: ask(server, max_retries=0))  # it is closed


def test_the_rate_is_kept() -> None:
    with ChatServer(write) as server:
        begun = time.monotonic()
        ask(server, count=4, requests_per_minute=600)
        assert time.monotonic() - begun >= 0.3  # three gaps of a tenth of a second
    with ChatServer(write, lambda trial, number: 429 if trial == 1 else None, pause=0.4) as server:
        begun = time.monotonic()
        ask(server, concurrency=1)
        assert time.monotonic() - begun >= 0.4 > ENDPOINT["backoff"]


def test_a_reward_model_of_ours_judges_the_answers_of_an_endpoint(tmp_path: Path) -> None:
    """Its scores are those that the model gives to the conversations."""
    config = reward_run.config_of(tmp_path / "tokenizer")
    [expected] = run_ranks(reward_run.save, 1, {}, config, tmp_path / "run", reward_run.TURNS)
    said = {turns[0].text: turns[1].text for turns in reward_run.TURNS}
    files = tmp_path / "prompts.jsonl"
    files.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in said))
    steps = "nvmm.jobs.synthesis"
    job = pipeline("dialogues")
    job["generators"]["judge"] = {
        "_target_": f"{steps}.checkpoint.RewardCheckpoint",
        "weights": [1.0, -2.0],
    }
    job["steps"] = {
        "prompts": job["steps"]["prompts"] | {"files": str(files)},
        "answered": {"_target_": f"{steps}.answering.Respond", "by": ["writer"]},
        "scored": {"_target_": f"{steps}.judging.Reward", "judge": "judge"},
        "best": {"_target_": f"{steps}.judging.Best", "by": "reward", "at_least": -1e9},
    }
    with ChatServer(lambda body: said[body["messages"][-1]["content"]]) as server:
        run_ranks(run_rank, 1, job, server.url, tmp_path / "out", tmp_path / "run")
    found = [
        record["lineage"][-1]["best"]["scores"] for record in records(tmp_path / "out", "best")
    ]
    rewards = [scores[0] - 2 * scores[1] for scores in expected.tolist()]
    assert [one["reward"] for one in found] == pytest.approx(rewards, abs=1e-5)
    assert len(set(rewards)) == len(said) > 1
