import errno
import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch

from nvmm.checkpoint import save as save_module
from nvmm.checkpoint.files import read_state
from nvmm.checkpoint.index import read_metadata
from nvmm.checkpoint.load import load, load_weights
from nvmm.checkpoint.save import Checkpoint
from nvmm.convert.verify import verified
from tests.ranks import run_ranks
from tests.runs import Run

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def straight_and_resumed(rank, world_size, init_method, layout, dtype, directory, arguments, optim):
    """Ten steps in one go, then five from the checkpoint made on the way."""
    run = Run(rank, world_size, init_method, layout, optim, DROPOUT, dtype)
    run.train(0, 5)
    run.save(5, directory, **arguments)
    expected = run.train(5, 10)
    weights = run.weights()
    other = Run(rank, world_size, init_method, layout, optim, DROPOUT, dtype, seed=8)
    checkpoint = other.checkpoint(directory)
    state = load(checkpoint.latest(), other.chunks, other.optimizer)
    norms = other.train(5, 10)
    same = all(torch.equal(weights[name], value) for name, value in other.weights().items())
    return state, norms == expected, same, moments(run), moments(other)


def moments(run):
    """Dtypes and values of the running means, in order."""
    states = run.optimizer.adam.state.values()
    return [(str(t.dtype), t.float()) for state in states for t in state.values()]


BF16_MOMENTS = {"moments_dtype": "bf16"}


@pytest.mark.parametrize(
    ("world_size", "layout", "dtype", "arguments", "optim"),
    [
        pytest.param(1, {}, "fp32", {}, {}, marks=pytest.mark.slow),
        (2, TP2 | {"sequence_parallel": True}, "bf16", {}, {}),
        (2, {}, "bf16", {"optimizer": "dp_reshardable", "async_save": True}, {}),
        (2, VPP2, "fp32", {"async_save": True}, {}),
        pytest.param(2, {}, "bf16", {}, BF16_MOMENTS, marks=pytest.mark.slow),
        pytest.param(2, PP2, "fp32", {}, BF16_MOMENTS, marks=pytest.mark.slow),
        pytest.param(
            *(2, {}, "bf16", {"optimizer": "dp_reshardable", "async_save": True}, BF16_MOMENTS),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resuming_is_bit_equal(tmp_path, world_size, layout, dtype, arguments, optim):
    for state, norms, weights, expected, found in run_ranks(
        straight_and_resumed, world_size, layout, dtype, tmp_path, arguments, optim
    ):
        assert state == {"step": 5}
        assert norms
        assert weights
        of = "torch.bfloat16" if optim else "torch.float32"
        assert {dtype for dtype, _ in expected + found} == {of}
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(expected, found, strict=True))


def advance(rank, world_size, init_method, layout, directory, first, last, arguments=None):
    """Load step `first` (from the seed when 0), train to `last`, save."""
    arguments = dict(arguments or {})
    run = Run(rank, world_size, init_method, layout, **arguments)
    if first:
        checkpoint = run.checkpoint(directory)
        path = checkpoint.latest()
        load(path, run.chunks, run.optimizer)
        assert path.name == f"step_{first:08d}"
    norms = run.train(first, last)
    run.save(last, directory)
    return norms, run.rates(), run.optimizer.num_steps


@pytest.mark.slow
def test_resuming_at_other_layouts(tmp_path):
    """One rank -> TP2 -> PP2 -> PP2 x VPP2 -> DP2 equals one rank; both learning rates survive."""
    expected, rates, _ = run_ranks(advance, 1, {}, tmp_path / "whole", 0, 10)[0]
    norms = []
    for world_size, layout, first in (
        (1, {}, 0),
        (2, TP2, 2),
        (2, PP2, 4),
        (2, VPP2, 6),
        (2, {}, 8),
    ):
        found = run_ranks(advance, world_size, layout, tmp_path / "parts", first, first + 2)
        norms += found[0][0]
        assert all(rank[0] == pytest.approx(found[0][0], rel=1e-6) for rank in found)
    assert norms == pytest.approx(expected, rel=1e-6)
    assert found[1][1:] == (rates, 10)


def test_bf16_masters_survive_another_data_parallel_size(tmp_path):
    bf16 = {"dtype": "bf16"}
    expected = run_ranks(advance, 2, {}, tmp_path / "whole", 0, 6, bf16)[0][0]
    run_ranks(advance, 2, {}, tmp_path / "parts", 0, 3, bf16)
    norms = run_ranks(advance, 1, {}, tmp_path / "parts", 3, 6, bf16)[0][0]
    assert norms == pytest.approx(expected[3:], rel=1e-3)


def save_both_ways(rank, world_size, init_method, directory, dtype):
    run = Run(rank, world_size, init_method, {}, {"moments_dtype": dtype})
    run.train(0, 2)
    for kind in ("fully_reshardable", "dp_reshardable"):
        run.save(2, directory / kind, optimizer=kind)


def save_again(rank, world_size, init_method, layout, source, target, dtype):
    run = Run(rank, world_size, init_method, layout, {"moments_dtype": dtype})
    load(source / "step_00000002", run.chunks, run.optimizer)
    run.save(2, target)


def optimizer_state(rank, world_size, init_method, directory):
    """The tensors of step 2's `optimizer.state`, by name."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    torch.distributed.init_process_group("gloo", init_method, rank=rank, world_size=world_size)
    tensors = load_plain_tensors(str(directory / "step_00000002"))
    return {name: t for name, t in tensors.items() if name.startswith("optimizer.state.")}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        pytest.param("bf16", "bf16", marks=pytest.mark.slow),
        ("fp32", "bf16"),
        pytest.param("bf16", "fp32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("kind", "world_size", "layout"),
    [("fully_reshardable", 2, TP2), ("fully_reshardable", 1, {}), ("dp_reshardable", 1, {})],
)
def test_running_means_at_other_layouts_and_dtypes(
    tmp_path, kind, world_size, layout, saved, loaded
):
    """Equal bits, or rounded once where bf16 is asked of fp32."""
    run_ranks(save_both_ways, 2, tmp_path, saved)
    run_ranks(save_again, world_size, layout, tmp_path / kind, tmp_path / "again", loaded)
    expected = run_ranks(optimizer_state, 1, tmp_path / "fully_reshardable")[0]
    found = run_ranks(optimizer_state, 1, tmp_path / "again")[0]
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        rounds = loaded == "bf16" and ".exp_avg" in name
        assert torch.equal(found[name], value.bfloat16().float() if rounds else value), name


def only_one_end(rank, world_size, init_method, layout, directory, first, last):
    optim = {"freeze": ["decoder.*", "embedding.*"], "groups": []}
    return advance(rank, world_size, init_method, layout, directory, first, last, {"optim": optim})[
        0
    ]


def test_a_stage_without_trainable_parameters_saves_and_loads(tmp_path):
    expected = run_ranks(only_one_end, 1, {}, tmp_path / "whole", 0, 6)[0]
    run_ranks(only_one_end, 2, PP2, tmp_path / "parts", 0, 2)
    norms = run_ranks(only_one_end, 1, {}, tmp_path / "parts", 2, 4)[0]
    norms += run_ranks(only_one_end, 2, PP2, tmp_path / "parts", 4, 6)[0]
    assert norms == pytest.approx(expected[2:], rel=1e-5)


def keeping(rank, world_size, init_method, directory, async_save):
    run = Run(rank, world_size, init_method)
    checkpoint = Checkpoint(directory=directory, keep_last=2, async_save=async_save)
    seen = [checkpoint.latest()]
    for step in (1, 2, 3):
        run.train(step - 1, step)
        state = {"counters": {"steps": step}}
        checkpoint.save(step, run.chunks, run.optimizer, state)
        state["counters"]["steps"] = -1
        checkpoint.finalize()
    checkpoint.finalize(blocking=True)
    seen.append(checkpoint.latest().name)
    # Back to step 2 and on from there: what was saved last counts, not the highest step.
    load(directory / "step_00000002", run.chunks, run.optimizer)
    checkpoint.save(2, run.chunks, run.optimizer, {"step": 2, "again": True})
    checkpoint.finalize(blocking=True)
    seen.append(checkpoint.latest().name)
    return seen


@pytest.mark.parametrize("async_save", [False, True])
def test_keep_last_and_latest(tmp_path, async_save):
    seen = run_ranks(keeping, 2, tmp_path, async_save)
    assert seen == [[None, "step_00000003", "step_00000002"]] * 2
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000003"]
    assert read_state(tmp_path / "step_00000002") == {"step": 2, "again": True}
    assert read_state(tmp_path / "step_00000003") == {"counters": {"steps": 3}}
    # The bits are those of the moment of the save, though training went on.
    assert [verified(path)[0] for path in sorted(tmp_path.iterdir())] == [True, True]


def interrupted(rank, world_size, init_method, directory):
    run = Run(rank, world_size, init_method)
    checkpoint = run.checkpoint(directory)
    publish, checkpoint._publish = checkpoint._publish, lambda *a: (_ for _ in ()).throw(OSError())
    try:
        checkpoint.save(1, run.chunks, run.optimizer, {})
    except OSError:
        left = os.listdir(directory)
    found = checkpoint.latest()
    checkpoint._publish = publish
    checkpoint.save(2, run.chunks, run.optimizer, {})
    return left, found, os.listdir(directory)


def test_an_interrupted_save_leaves_nothing_loadable(tmp_path):
    left, found, after = run_ranks(interrupted, 1, tmp_path)[0]
    assert left == [".tmp_step_00000001"]
    assert found is None
    assert after == ["step_00000002"]
    (tmp_path / "step_00000002" / "state.json").unlink()
    assert Checkpoint(directory=tmp_path).latest() is None
    with pytest.raises(ValueError, match=r"no state\.json"):
        read_state(tmp_path / "step_00000002")


def without_room(rank, world_size, init_method, directory, where, async_save):
    """Save with a disk that is full: for rank 1's tensors, or for rank 0's JSON."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    run = Run(rank, world_size, init_method)
    checkpoint = run.checkpoint(directory, async_save=async_save)
    checkpoint.save(1, run.chunks, run.optimizer, {})
    checkpoint.finalize(blocking=True)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **kwargs):
        raise full

    if where == "tensors" and rank == 1:
        filesystem_async._write_item = fail
    if where == "json":
        save_module.sync = fail
    try:
        checkpoint.save(2, run.chunks, run.optimizer, {})
        checkpoint.finalize(blocking=True)
    except OSError as error:
        return str(error), sorted(os.listdir(directory)), checkpoint.latest().name
    return "saved"


@pytest.mark.parametrize(
    ("where", "async_save"), [("tensors", False), ("tensors", True), ("json", False)]
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, where, async_save):
    results = run_ranks(without_room, 2, tmp_path, where, async_save)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.distcp"))
    for rank, (message, left, latest) in enumerate(results):
        assert latest == "step_00000001"
        assert message.startswith(f"{tmp_path}/.tmp_step_00000002 cannot be written")
        needed, free = map(int, re.findall(r"(\d+) bytes", message))
        assert 0.5 * size < needed < size and free > 0
        if rank == 0:  # it removes the folder, and tells the reason
            assert left == ["step_00000001"]
            assert os.strerror(errno.ENOSPC) in message
            assert "make room or name another folder" in message


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of one rank after one step."""
    directory = tmp_path_factory.mktemp("saved")
    run_ranks(advance, 1, {}, directory, 0, 1)
    return directory / "step_00000001"


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / saved.name)


def test_holds_tensors_and_json_only(saved):
    metadata = read_metadata(saved)
    assert "optimizer.state.exp_avg.output_layer.weight" in metadata.state_dict_metadata
    assert "rng" in metadata.state_dict_metadata
    with zipfile.ZipFile(saved / "common.pt") as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        assert len(archive.read(name)) < 20, "common.pt holds an empty dict"


def weights_of(rank, world_size, init_method, layout, path, dtype, model):
    run = Run(rank, world_size, init_method, layout, dtype=dtype, model=model, seed=9)
    missing = load_weights(path, run.chunks)
    run.optimizer.reload_parameters()
    output = run.chunks[-1].output_layer.weight if run.chunks[-1].post_process else None
    return missing, None if output is None else output.detach().float().clone(), run.train(0, 1)


def test_load_weights(saved):
    """Weights only, at another layout and format; what the checkpoint lacks is returned."""
    missing, expected, norms = run_ranks(weights_of, 1, {}, saved, "fp32", {})[0]
    assert missing == []
    first, last = run_ranks(weights_of, 2, PP2, saved, "bf16", {})
    assert last[1].equal(expected.bfloat16().float())
    assert first[2] == pytest.approx(norms, rel=2e-2)
    more = {"num_layers": 6}
    for missing, _, _ in run_ranks(weights_of, 2, PP2, saved, "fp32", more):
        assert {name.split(".")[2] for name in missing} == {"4", "5"}
        assert "decoder.layers.4.self_attention.linear_qkv.bias" in missing


@pytest.mark.parametrize(
    ("function", "model", "message"),
    [
        (weights_of, {"ffn_hidden_size": 64}, r"\[96, 32\] in the checkpoint, \[128, 32\] in the"),
        ("load", {"num_layers": 6}, "not of this model: missing in it .*layers.5"),
        ("load", {"num_layers": 2}, "only in it .*layers.3"),
    ],
)
def test_other_models_are_refused(saved, function, model, message):
    job = load_into if function == "load" else function
    arguments = ({}, saved, "fp32", model) if job is weights_of else (saved, model, {})
    with pytest.raises(RuntimeError, match=message):
        run_ranks(job, 1, *arguments)


def load_into(rank, world_size, init_method, path, model, optim):
    run = Run(rank, world_size, init_method, model=model, optim=optim)
    load(path, run.chunks, run.optimizer)


def test_thawed_parameters_are_refused(tmp_path):
    run_ranks(only_one_end, 1, {}, tmp_path, 0, 1)
    with pytest.raises(RuntimeError, match=r"optim.freeze another.*exp_avg.decoder"):
        run_ranks(load_into, 1, tmp_path / "step_00000001", {}, {})


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("where", [".metadata", "common.pt", "entry"])
def test_planted_code_is_refused_and_not_run(copy, tmp_path, where):
    target = tmp_path / "ran"
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    if where == "common.pt":
        torch.save({"step": Payload(target)}, copy / where)
    elif where == ".metadata":
        metadata.planner_data = Payload(target)
    else:
        entry = "decoder.final_layernorm.weight"
        index = next(i for i in metadata.storage_data if i.fqn == entry)
        name = metadata.storage_data[index].relative_path
        data = (copy / name).read_bytes()
        with (copy / name).open("ab") as stream:
            torch.save(Payload(target), stream)
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        metadata.state_dict_metadata[entry] = BytesStorageMetadata()
        metadata.storage_data[index].offset = len(data)
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    expected = "BytesStorageMetadata.*refused" if where == "entry" else "posix.mkdir.*refused"
    with pytest.raises(ValueError, match=expected):
        read_metadata(copy)
    with pytest.raises(RuntimeError, match=expected):
        run_ranks(load_into, 1, copy, {}, {})
    if where == ".metadata":
        with pytest.raises(RuntimeError, match=expected):
            run_ranks(weights_of, 1, {}, copy, "fp32", {})
    assert not target.exists()
    if where == ".metadata":
        pickle.loads((copy / where).read_bytes())
        assert target.exists(), "the payload works"


class Attribute:
    """Pickled as some Pythons pickle a member of an enum."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_members_of_enums_are_read_and_other_attributes_refused(copy):
    from torch.distributed.checkpoint.planner import WriteItemType

    metadata = pickle.loads((copy / ".metadata").read_bytes())
    metadata.planner_data = Attribute(WriteItemType, "TENSOR")
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    assert read_metadata(copy).planner_data is WriteItemType.TENSOR
    for owner, name in ((WriteItemType, "__class__"), (torch.Size, "numel")):
        metadata.planner_data = Attribute(owner, name)
        (copy / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match=f"asks for '{name}' of .*refused"):
            read_metadata(copy)


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/hostname", ".."])
def test_data_outside_the_directory_is_refused(copy, name):
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = name
    (copy / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="outside its directory"):
        read_metadata(copy)


def test_other_formats_are_refused(copy):
    (copy / "metadata.json").write_text('{"sharded_backend": "zarr", "common_backend": "torch"}')
    with pytest.raises(ValueError, match="sharded_backend must be torch_dist"):
        read_metadata(copy)
    (copy / "metadata.json").unlink()
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        read_metadata(copy)


def test_dp_reshardable_names_the_layouts_it_cannot_load_at(tmp_path):
    run_ranks(save_dp_reshardable, 1, tmp_path)
    with pytest.raises(RuntimeError, match=r"dp_reshardable at .*another data parallel size only"):
        run_ranks(advance, 2, TP2, tmp_path, 1, 2)
    run_ranks(advance, 2, {}, tmp_path, 1, 2)


def save_dp_reshardable(rank, world_size, init_method, directory):
    Run(rank, world_size, init_method).save(1, directory, optimizer="dp_reshardable")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"save_interval": 0}, "checkpoint.save_interval=0"),
        ({"keep_last": 0}, "checkpoint.keep_last=0"),
        ({"optimizer": "zero"}, "checkpoint.optimizer=zero must be one of fully_reshardable"),
    ],
)
def test_bad_values_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        Checkpoint(directory=tmp_path, **arguments)
