import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nvmm.parallel.setup import Parallel
from nvmm.proof.ranks import run_ranks
from nvmm.training import logger as logger_module
from nvmm.training import metrics
from nvmm.training.logger import Logger
from nvmm.training.metrics import peak_flops, reduce_counters, reduce_metrics
from nvmm.training.summary import update_summary


def record(step, loss=0.1):
    return {"step": step, "loss": loss, "tokens_per_second": 5.0, "model_flops": {"language": 2.0}}


def logger(path, **kwargs):
    options = {"config": {}, "run_name": "test", "enabled": True} | kwargs
    return Logger(run_dir=path, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def reduce_on_rank(rank, world_size, init_method, sizes):
    Parallel(**sizes).initialize(seed=1, rank=rank, world_size=world_size, init_method=init_method)
    from megatron.core import parallel_state

    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    replica = parallel_state.get_data_parallel_rank()
    own = [(1.0, 1), (2.0, 3)] if replica == 0 else [(30.0, 10), (7.0, 0)]
    outputs = [{"loss": torch.tensor(pair), "also": torch.tensor([pair[1], 2.0])} for pair in own]
    counters = {"tokens": 5.0, "samples": replica + 1.0}
    if parallel_state.get_model_parallel_group().rank() != 0:
        counters = dict.fromkeys(counters, 0.0)
    result = reduce_metrics(outputs if last else [], "cpu"), reduce_counters(counters, "cpu")
    dist.barrier()
    return result


@pytest.mark.parametrize(
    ("sizes", "world_size"),
    [
        ({}, 1),
        ({}, 2),
        ({"tensor_model_parallel_size": 2}, 4),
        ({"pipeline_model_parallel_size": 2}, 4),
        ({"pipeline_model_parallel_size": 2}, 2),
    ],
)
def test_metrics_are_divided_once_on_every_layout(sizes, world_size):
    results = run_ranks(reduce_on_rank, world_size, sizes)
    replicas = world_size // math.prod(sizes.values())
    loss = 3.0 / 4 if replicas == 1 else 40.0 / 14
    also = 4.0 / 4 if replicas == 1 else 14.0 / 8
    counters = {"tokens": 5.0 * replicas, "samples": 1.0 if replicas == 1 else 3.0}
    for means, counts in results:
        assert means == pytest.approx({"loss": loss, "also": also}, rel=1e-15)
        assert counts == counters


def reduce_uneven(rank, world_size, init_method, outputs):
    Parallel().initialize(seed=1, rank=rank, world_size=world_size, init_method=init_method)
    return reduce_metrics(outputs, "cpu")


def test_micro_batches_with_other_metrics_are_refused():
    outputs = [{"loss": torch.ones(2)}, {"loss": torch.ones(2), "accuracy": torch.ones(2)}]
    with pytest.raises(RuntimeError, match=r"every micro-batch must return the metrics \['loss'\]"):
        run_ranks(reduce_uneven, 1, outputs)


def test_a_step_without_supervised_tokens_has_loss_zero():
    assert run_ranks(reduce_uneven, 1, [{"loss": torch.zeros(2)}]) == [{"loss": 0.0}]


@pytest.mark.parametrize(
    ("device", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 989),
    ],
)
def test_peak_flops(device, tera):
    assert peak_flops(torch.bfloat16, device) == tera * 1e12
    assert peak_flops(torch.float32, device) is None


def test_peak_flops_of_an_unknown_device_is_unknown():
    assert peak_flops(torch.bfloat16, "NVIDIA GeForce GTX 1080") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the GPU's memory there")
def test_memory_peak_is_the_resident_peak():
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    assert metrics.memory_peak_bytes() == pytest.approx(peak, rel=0.02)


def test_floats_keep_every_digit_and_non_finite_ones_are_null(tmp_path):
    log = logger(tmp_path)
    log.step(record(1, loss=1 / 3), 3)
    log.step(record(2, loss=math.nan), 3)
    log.validation(2, {"loss": 0.1 + 0.2})
    log.close()
    first, second = lines(tmp_path / "metrics.jsonl")
    assert list(first) == list(record(1)) and first["loss"] == 1 / 3
    assert second["loss"] is None
    assert lines(tmp_path / "validation.jsonl") == [{"step": 2, "validation_loss": 0.1 + 0.2}]


def test_a_line_is_on_disk_at_once(tmp_path):
    log = logger(tmp_path)
    log.step(record(1), 3)
    assert lines(tmp_path / "metrics.jsonl") == [record(1)]
    log.close()


def test_resume_drops_later_and_torn_lines(tmp_path):
    log = logger(tmp_path)
    for step in range(1, 6):
        log.step(record(step), 9)
        log.validation(step, {"loss": 1.0})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    log = logger(tmp_path)
    log.resume(3)
    log.step(record(4, loss=7.0), 9)
    log.close()
    assert [(x["step"], x["loss"]) for x in lines(tmp_path / "metrics.jsonl")] == [
        (1, 0.1),
        (2, 0.1),
        (3, 0.1),
        (4, 7.0),
    ]
    assert [x["step"] for x in lines(tmp_path / "validation.jsonl")] == [1, 2, 3]


def test_a_run_from_the_start_begins_its_files_anew(tmp_path):
    for loss in (1.0, 2.0):
        log = logger(tmp_path)
        log.step(record(1, loss=loss), 3)
        log.close()
    assert lines(tmp_path / "metrics.jsonl") == [record(1, loss=2.0)]


def test_nothing_is_written_where_it_is_not_enabled(tmp_path):
    log = logger(tmp_path, enabled=False, tensorboard=True)
    log.step(record(1), 3)
    log.validation(1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_is_one_line_every_ten_seconds_without_a_terminal(tmp_path, monkeypatch):
    now = [1000.0]
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    log = logger(tmp_path)
    for step in range(1, 101):
        log.step(record(step, loss=0.25), 200)
        now[0] += 1
    written = stderr.getvalue().splitlines()
    log.close()
    assert len(written) == 10
    assert written[-1].startswith("test: step 91/200 (46%), 01:30 gone, 01:49 left")
    assert all("loss=0.25" in line for line in written)
    assert "\r" not in stderr.getvalue()


def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = logger(tmp_path, tensorboard=True)
    log.step(record(1), 3)
    log.validation(1, {"loss": 0.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss",
        "tokens_per_second",
        "model_flops/language",
        "validation_loss",
    }
    assert events.Scalars("validation_loss")[0].step == 1


@pytest.mark.parametrize(("logged_in", "mode"), [(False, "offline"), (True, None)])
def test_wandb_is_offline_unless_logged_in(tmp_path, monkeypatch, logged_in, mode):
    import wandb

    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((scalars["loss"], step))

        def finish(self):
            calls.append("finished")

    def init(**kwargs):
        calls.append(kwargs)
        return Run()

    monkeypatch.setattr(wandb, "login", lambda prompt: logged_in)
    monkeypatch.setattr(wandb, "init", init)
    log = logger(tmp_path, wandb=True, wandb_project="mine", run_name="nvlm_d/sft")
    log.step(record(1), 3)
    log.close()
    assert calls[0]["mode"] == mode and calls[0]["project"] == "mine"
    assert "/" not in calls[0]["id"]
    assert calls[1:] == [(0.1, 1), "finished"]


def test_a_wandb_run_belongs_to_a_directory(tmp_path, monkeypatch):
    """Runs of one name are several, and a resume goes on with its own."""
    import wandb

    ids = []

    class Run:
        def log(self, scalars, step):
            pass

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    monkeypatch.setattr(wandb, "init", lambda **kwargs: ids.append(kwargs["id"]) or Run())
    for name, resumed in (("alice", 0), ("bob", 0), ("alice", 1)):
        (tmp_path / name).mkdir(exist_ok=True)
        log = logger(tmp_path / name, wandb=True, run_name="nvlm_d/sft_7b/first")
        if resumed:
            log.resume(resumed)
        log.step(record(resumed + 1), 3)
        log.close()
    assert ids[0] == ids[2] != ids[1]


def test_a_missing_package_is_named_with_its_key_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(logger_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"logger\.wandb=true needs a package: pip install wandb"):
        logger(tmp_path, wandb=True, enabled=False)


def test_summary_is_merged(tmp_path):
    update_summary(tmp_path, steps=3, world_size=2)
    update_summary(tmp_path, steps=4, heldout_exact_match={"overall": 0.5, "read": math.inf})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {
        "steps": 4,
        "world_size": 2,
        "heldout_exact_match": {"overall": 0.5, "read": None},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
