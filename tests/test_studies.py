"""Variants of a comparison: run once, shared, resumed, refused, measured, printed."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from nvmm import studies
from nvmm.data.prepare import digits

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"


def write(folder: Path, text: str) -> studies.Command:
    """A command that appends `text` to a file beside its folder: running it twice shows."""
    arguments = ("-c", APPEND, str(folder.parent / "written"), text)
    return studies.Command(folder, arguments)


def written(folder: Path) -> str:
    return (folder / "written").read_text()


def test_commands_run_in_order_and_once(tmp_path: Path) -> None:
    variant = studies.Variant(
        "variant", 1, tuple(write(tmp_path / name, name) for name in ("b", "a", "c"))
    )
    studies.run([variant], jobs=1)
    studies.run([variant], jobs=1)
    assert written(tmp_path) == "bac"
    record = json.loads((tmp_path / "a" / "command.json").read_text())
    assert record["done"] is True
    assert len(record["attempts"]) == 1
    assert record["attempts"][0]["cpu_seconds"] > 0
    assert record["attempts"][0]["peak_memory_bytes"] > 2**20


def test_the_time_of_all_commands(tmp_path: Path) -> None:
    variant = studies.Variant("v", 1, (write(tmp_path / "a/b", "b"), write(tmp_path / "a/c", "c")))
    assert studies.spent(tmp_path) == {"seconds": 0, "cpu_seconds": 0}
    studies.run([variant], jobs=1)
    attempts = [
        attempt
        for name in ("b", "c")
        for attempt in json.loads((tmp_path / f"a/{name}/command.json").read_text())["attempts"]
    ]
    spent = studies.spent(tmp_path)
    assert spent["cpu_seconds"] == sum(attempt["cpu_seconds"] for attempt in attempts) > 0
    assert spent["seconds"] == sum(attempt["seconds"] for attempt in attempts)


def test_a_shared_command_runs_once(tmp_path: Path) -> None:
    start = write(tmp_path / "start", "s")
    made = [studies.Variant(n, 1, (start, write(tmp_path / n, n))) for n in ("1", "2", "3")]
    studies.run(made, jobs=3)
    text = written(tmp_path)
    assert text[0] == "s"
    assert sorted(text[1:]) == ["1", "2", "3"]


def test_a_failed_command_says_why_and_is_tried_again(tmp_path: Path) -> None:
    mend = tmp_path / "mended"
    code = f"import os; assert os.path.exists({str(mend)!r}), 'it is broken'"
    before = write(tmp_path / "before", "b")
    after = write(tmp_path / "after", "a")
    variant = studies.Variant(
        "variant", 7, (before, studies.Command(tmp_path / "broken", ("-c", code)), after)
    )
    with pytest.raises(RuntimeError, match=r"(?s)variant, seed 7: exit status 1.*it is broken"):
        studies.run([variant], jobs=1)
    assert written(tmp_path) == "b"
    mend.touch()
    studies.run([variant], jobs=1)
    assert written(tmp_path) == "ba"
    record = json.loads((tmp_path / "broken" / "command.json").read_text())
    assert [record["done"], len(record["attempts"])] == [True, 2]


def test_a_clean_exit_before_the_end_is_not_done(tmp_path: Path) -> None:
    file = tmp_path / "written"
    command = studies.Command(
        tmp_path / "part",
        ("-c", APPEND, str(file), "x"),
        complete=lambda: file.read_text() == "xx",
    )
    with pytest.raises(RuntimeError, match="it was told to stop"):
        studies.run([studies.Variant("variant", 1, (command,))], jobs=1)
    studies.run([studies.Variant("variant", 1, (command,))], jobs=1)
    assert file.read_text() == "xx"


def test_other_arguments_in_a_used_folder_are_refused(tmp_path: Path) -> None:
    studies.run([studies.Variant("variant", 1, (write(tmp_path / "a", "1"),))], jobs=1)
    with pytest.raises(ValueError, match=r"holds a command of other arguments.* name another"):
        studies.run([studies.Variant("variant", 1, (write(tmp_path / "a", "2"),))], jobs=1)
    assert written(tmp_path) == "1"


def test_a_failure_stops_the_others(tmp_path: Path) -> None:
    started = tmp_path / "started"
    wait = f"import time, pathlib; pathlib.Path({str(started)!r}).touch(); time.sleep(600)"
    fail = (
        "import sys, time, pathlib\n"
        f"while not pathlib.Path({str(started)!r}).exists(): time.sleep(0.05)\n"
        "sys.exit(3)"
    )
    planned = [
        studies.Variant("long", 1, (studies.Command(tmp_path / "long", ("-c", wait)),)),
        studies.Variant("bad", 1, (studies.Command(tmp_path / "bad", ("-c", fail)),)),
        studies.Variant("later", 1, (write(tmp_path / "later", "l"),)),
    ]
    with pytest.raises(RuntimeError, match="bad, seed 1: exit status 3"):
        studies.run(planned, jobs=2)
    record = json.loads((tmp_path / "long" / "command.json").read_text())
    assert not record["done"]
    assert not (tmp_path / "written").exists()


def test_two_callers_take_turns_in_a_folder(tmp_path: Path) -> None:
    variant = studies.Variant("variant", 1, (write(tmp_path / "a", "1"),))
    threads = [threading.Thread(target=studies.run, args=([variant], 1)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written(tmp_path) == "1"


def test_spread_and_table() -> None:
    assert studies.spread([0.25], 2) == "0.25"
    assert studies.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert studies.table(
        ("variant", "score"), [["none", "1"], ["a longer one", "0.5"]]
    ).splitlines() == [
        "| variant      | score |",
        "| ------------ | ----- |",
        "| none         | 1     |",
        "| a longer one | 0.5   |",
    ]


def fake_run(folder: Path, max_steps: int, steps: int) -> None:
    """The files of a run of `steps` steps of 4 samples."""
    (folder / "evaluation/heldout/last").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"trainer:\n  max_steps: {max_steps}\n")
    summary = {"steps": steps, "samples_seen": 4 * steps, "num_parameters": 9}
    (folder / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"step": s, "samples_per_second": 1.0 if s == 1 else 8.0, "num_samples": 4}
        | {"num_tokens": 40, "media": {"image": {"tiles": 6}}}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {"score": 0.5, "num_samples": 2, "kinds": {"read": {"score": 0.25, "num_samples": 1}}}
    (folder / "evaluation/heldout/last/metrics.json").write_text(json.dumps(scores))
    attempts = [
        {"seconds": 3.0, "cpu_seconds": 2.0, "peak_memory_bytes": 7},
        {"seconds": 1.0, "cpu_seconds": 1.0, "peak_memory_bytes": 5},
    ]
    (folder / "command.json").write_text(json.dumps({"attempts": attempts}))


def test_measure(tmp_path: Path) -> None:
    fake_run(tmp_path / "run", 10, 10)
    assert studies.measure(tmp_path / "run") == {
        "exact_match": 0.5,
        "exact_match_read": 0.25,
        "questions": 2,
        "samples": 40,
        "steps": 10,
        "num_parameters": 9,
        "samples_per_second": 8.0,
        "tokens_per_sample": 10.0,
        "tiles_per_sample": 1.5,
        "cpu_seconds": 3.0,
        "seconds": 4.0,
        "peak_memory_bytes": 7,
    }


@pytest.mark.parametrize(("steps", "whole"), [(9, False), (10, True)])
def test_a_training_is_done_at_its_last_step(tmp_path: Path, steps: int, whole: bool) -> None:
    fake_run(tmp_path / "run", 10, steps)
    assert studies.train(tmp_path / "run", "experiment=x").complete() is whole


def test_commands_of_a_stage(tmp_path: Path) -> None:
    command = studies.train(tmp_path / "a", "experiment=nvlm_d/quickstart", "seed=3")
    assert command.arguments[2:] == (
        "-m",
        "nvmm.train",
        "experiment=nvlm_d/quickstart",
        "seed=3",
        f"run.dir={tmp_path / 'a'}",
    )
    score = studies.evaluate(tmp_path / "a", "batch_size=2")
    assert score.folder == tmp_path / "a" / "evaluation/heldout/last"
    assert f"checkpoint={tmp_path / 'a'}" in score.arguments
    assert f"output={score.folder}" in score.arguments


def test_saved_results_name_their_settings(tmp_path: Path) -> None:
    studies.save(tmp_path / "results.json", {"a": [1.0]}, steps=5)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["results"] == {"a": [1.0]}
    assert saved["settings"] == {"steps": 5}
    assert saved["machine"]["cpu_cores"] == os.cpu_count()
    assert saved["date"][:2] == "20"


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on(tmp_path: Path) -> None:
    """Every attempt is stopped by its time limit after one step; the third ends the training."""
    data = tmp_path / "data"
    digits.build(data, digits.Amounts(text=2, single=2, strings=16, validation=2, test=4))
    run = tmp_path / "run"
    training = studies.train(
        run,
        "experiment=nvlm_d/quickstart",
        "parallel=single",
        "init_from=null",
        f"tokenizer.path={data / 'tokenizer'}",
        f"data.train.shards=[{data}/strings/train-*.tar]",
        "data.validation=null",
        "optim.warmup_steps=0",
        "trainer.validation_interval=null",
        "trainer.max_steps=3",
        "trainer.global_batch_size=4",
        "trainer.micro_batch_size=4",
        "trainer.max_minutes=0",
    )
    scoring = studies.evaluate(
        run,
        f"benchmark.shards={data}/strings/test-*.tar",
        "max_new_tokens=2",
    )
    variant = studies.Variant("nvlm_d", 1, (training, scoring))
    for step in (1, 2):
        with pytest.raises(RuntimeError, match=f"(?s)told to stop.*stopped at step {step} of 3"):
            studies.run([variant], jobs=1)
    studies.run([variant], jobs=1)
    numbers = studies.measure(run)
    assert [numbers["steps"], numbers["samples"], numbers["questions"]] == [3, 12, 4]
    assert 0 <= numbers["exact_match"] <= 1
    assert numbers["cpu_seconds"] > 3
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_options_of_a_study_are_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True)
    class Steps:
        text: int | None = None
        few_shot: int | None = None

    made = studies.parser("A study.", Steps, Path("runs/x"), seeds=3)
    options = made.parse_args(["--few-shot-steps", "7", "--jobs=1"])
    assert studies.steps_given(Steps, options) == Steps(None, 7)
    assert (options.seeds, options.jobs, options.to) == (3, 1, Path("runs/x"))
    with pytest.raises(SystemExit):
        made.parse_args(["--seeds", "0"])
    assert "--seeds: 0 must be at least 1" in capsys.readouterr().err
