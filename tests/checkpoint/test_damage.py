"""Whatever is changed in a checkpoint is noticed by whoever reads it, or holds no data."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvmm.checkpoint.base import BaseCheckpoint
from nvmm.checkpoint.contents import Contents
from nvmm.checkpoint.digests import digest
from nvmm.checkpoint.files import complete, find, latest, read_state
from nvmm.checkpoint.load import load, load_scales, load_weights
from nvmm.checkpoint.record import DamagedError, _sealed, read_record, write_record
from nvmm.convert.adapters import MergedLora
from nvmm.convert.exporting import export, rewrite
from nvmm.convert.models import open_checkpoint
from nvmm.convert.sources import read
from nvmm.convert.verify import verified
from tests.damage import changed, data_byte, flip, parts
from tests.modules.test_fp8_scales import fp8_options
from tests.ranks import run_ranks
from tests.runs import Run
from tests.training.test_trainer import _fit, _losses

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SMALL = (".metadata", "metadata.json", "common.pt", "digests.json", "weights.json", "state.json")
WEIGHT = "decoder.layers.1.mlp.linear_fc2.weight"
KINDS = {
    "weight": WEIGHT,
    "master": f"optimizer.state.param.{WEIGHT}",
    "mean": f"optimizer.state.exp_avg.{WEIGHT}",
    "square": f"optimizer.state.exp_avg_sq.{WEIGHT}",
    "scale": "fp8.decoder.layers.1.mlp.linear_fc2.input",
    "rng": "rng",
}
"""A tensor of each kind that a checkpoint has."""


def bf16_fp8() -> dict[str, Any]:
    options = fp8_options()
    options["precision"]["dtype"] = "bf16"
    return options


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a bf16 run with FP8 scales, after two steps on one rank."""
    run_dir = tmp_path_factory.mktemp("saved")
    run_ranks(_fit, 1, run_dir, 2, {}, bf16_fp8())
    return find(run_dir)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / saved.name)


# -- digests ----------------------------------------------------------------------------------


def test_a_digest_adds_up_over_pieces_and_tells_where_elements_are() -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(6, 5, 71, generator=generator) * 60
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8):
        whole = values.to(dtype)
        total = 0
        for rows in (slice(0, 2), slice(2, 6)):
            for middle in (slice(0, 4), slice(4, 5)):
                for columns in (slice(0, 33), slice(33, 34), slice(34, 71)):
                    offset = [s.start for s in (rows, middle, columns)]
                    total += digest(whole[rows, middle, columns], offset)
        assert total % 2**64 == digest(whole, [0, 0, 0])
        assert digest(whole.flatten()[1:], [1]) != digest(whole.flatten()[1:], [0])
    # A flat piece may begin anywhere, also over the numbers that are kept.
    flat = torch.randn(150_000, generator=generator)
    cuts = (0, 65_535, 65_537, 140_000, 150_000)
    pieces = [digest(flat[a:b], [a]) for a, b in itertools.pairwise(cuts)]
    assert sum(pieces) % 2**64 == digest(flat, [0])
    assert digest(torch.tensor(3.0), []) != digest(torch.tensor(4.0), [])
    assert digest(torch.empty(0, 3), [4, 0]) == 0


def swap_elements(t: torch.Tensor) -> None:
    t[0, 1], t[3, 7] = t[3, 7].clone(), t[0, 1].clone()


def swap_rows(t: torch.Tensor) -> None:
    t[[2, 5]] = t[[5, 2]]


def swap_columns(t: torch.Tensor) -> None:
    t[:, [2, 5]] = t[:, [5, 2]]


def swap_pages(t: torch.Tensor) -> None:
    flat = t.view(-1)
    flat[:4096], flat[4096:8192] = flat[4096:8192].clone(), flat[:4096].clone()


def zero_page(t: torch.Tensor) -> None:
    t.view(-1)[4096:8192] = 0


def flip_sign(t: torch.Tensor) -> None:
    t[9, 9] = -t[9, 9]


def transpose_corner(t: torch.Tensor) -> None:
    t[:8, :8] = t[:8, :8].t().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        *(swap_elements, swap_rows, swap_columns, swap_pages, zero_page, flip_sign),
        transpose_corner,
    ],
)
def test_a_digest_sees_what_a_sum_does_not(change: Callable[..., None], dtype: Any) -> None:
    tensor = (torch.randn(64, 1024, generator=torch.Generator().manual_seed(2)) * 50 + 99).to(dtype)
    before = digest(tensor, [0, 0])
    change(tensor)
    assert digest(tensor, [0, 0]) != before


# -- every byte -------------------------------------------------------------------------------


def test_a_flipped_byte_is_noticed_or_holds_no_data(copy: Path) -> None:
    """Places of each kind in every file, read as all readers read."""
    generator = random.Random(14)
    for name in SMALL:
        file = copy / name
        for position in (0, generator.randrange(file.stat().st_size), file.stat().st_size - 1):
            with changed(file, position, 1 << generator.randrange(8)):
                with pytest.raises(DamagedError, match=r"step_00000002 is damaged"):
                    Contents.open(copy)
                assert latest(copy.parent) is None
    assert latest(copy.parent) == copy
    for name in KINDS.values():
        look_at_places(copy, name, lambda places: [generator.choice(places) for _ in range(2)])


def look_at_places(
    folder: Path, name: str, choose: Callable[[range], Any], kinds: tuple[str, ...] = ()
) -> None:
    """Flip bytes of a tensor's archive: it is read equal, or not at all; its data never."""
    contents = Contents.open(folder)
    [chunk] = contents.chunks(name)
    expected = contents.read(name, chunk.offsets)
    for kind, (file, places) in parts(folder, name).items():
        if kinds and kind not in kinds:
            continue
        for position in choose(places):
            with changed(file, position, 1 << position % 8):
                try:
                    found = contents.read(name, chunk.offsets)
                except DamagedError as error:
                    assert str(folder) in str(error) and name in str(error)
                else:
                    assert kind != "0", f"{name}: byte {position} of the data"
                    assert torch.equal(found, expected), f"{name}: {kind} at {position}"


@pytest.mark.slow
def test_every_byte_of_an_archive(copy: Path) -> None:
    for name in ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", KINDS["scale"]):
        look_at_places(copy, name, lambda places: places)
    for name in SMALL:
        file = copy / name
        for position in range(0, file.stat().st_size, 97):
            with changed(file, position), pytest.raises(DamagedError):
                Contents.open(copy)


@pytest.mark.parametrize("name", [*SMALL, "__0_0.distcp"])
def test_a_file_that_is_gone_empty_or_short(copy: Path, name: str) -> None:
    file = copy / name
    content = file.read_bytes()
    for left in (None, b"", content[: len(content) // 2], content[:-1]):
        file.unlink()
        if left is not None:
            file.write_bytes(left)
        with pytest.raises(DamagedError, match="step_00000002"):
            Contents.open(copy)
        with pytest.raises(ValueError, match="step_00000002"):
            open_checkpoint(copy)
        assert latest(copy.parent) is None
        file.write_bytes(content)
    assert verified(copy)[0]


def test_values_of_the_json_are_covered(copy: Path) -> None:
    """Adam's step, the data position, a counter, the config: JSON as good as before, but other."""
    text = (copy / "state.json").read_text()
    record = json.loads(text)
    record["optimizer"]["steps"] += 1
    edits = [json.dumps(record, indent=1)]
    for key in ("position", "counters", "config", "step", "tokenizer_digest"):
        record = json.loads(text)
        record["state"][key] = {"value": record["state"][key]}
        edits.append(json.dumps(record, indent=1))
    edits.append(text.replace('"number": 1', '"number": 2'))
    assert len(set(edits) - {text}) == 7
    for edited in edits:
        (copy / "state.json").write_text(edited)
        with pytest.raises(DamagedError, match=r"state\.json is not what was saved"):
            read_state(copy)
    (copy / "state.json").write_text(text)
    assert read_state(copy)["step"] == 2


def test_what_makes_a_checkpoint_look_like_one_of_before(copy: Path) -> None:
    """A lost format does not turn the digests off, nor does an emptied table."""
    text = (copy / "state.json").read_text()
    record = json.loads(text)
    for key in ("format", "files", "seal"):
        (copy / "state.json").write_text(json.dumps({**record, "x": record[key]} | {key: None}))
        with pytest.raises(DamagedError):
            read_record(copy)
        (copy / "state.json").write_text(text.replace(f'"{key}"', f'"{key[:-1]}_"'))
        with pytest.raises(DamagedError):
            read_record(copy)
    new = ("format", "files", "seal", "skipped")
    bare = {k: v for k, v in record.items() if k not in new}
    (copy / "state.json").write_text(json.dumps(bare))
    with pytest.raises(DamagedError, match="lost its format"):
        Contents.open(copy)
    (copy / "state.json").write_text(text)
    # Sealed anew without digests, as a bug of a writer would: they are still missed.
    (copy / "digests.json").write_text("{}")
    write_record(copy, read_record(copy))
    with pytest.raises(DamagedError, match="has no digest"):
        read(open_checkpoint(copy).source, WEIGHT)
    # One of a later nvmm is not damaged, and says so.
    (copy / "state.json").write_text(_sealed(record | {"format": 9}))
    with pytest.raises(ValueError, match="written by a newer nvmm"):
        read_record(copy)


# -- every reader -----------------------------------------------------------------------------


def notices(rank: int, read_it: Callable[[], Any], file: Path, position: int) -> str:
    """What every rank is told when it reads with a byte of a file flipped."""
    import torch.distributed as dist

    for state in ("damaged", "mended"):
        dist.barrier()
        if rank == 0:
            flip(file, position)
        dist.barrier()
        if state == "damaged":
            try:
                read_it()
            except DamagedError as error:
                message = str(error)
            else:
                message = ""
    return message


def read_damaged(
    rank: int, world: int, init: str, folder: Path, again: Path, layout: dict[str, Any], seed: int
) -> dict[str, str]:
    """Resume from and start from a checkpoint with each kind of place flipped; save it anew."""
    messages: dict[str, str] = {}

    def hook(trainer: Any, rank: int) -> None:
        generator = random.Random(seed)
        places = {kind: data_byte(folder, name, generator) for kind, name in KINDS.items()}
        places |= {
            name: (folder / name, generator.randrange((folder / name).stat().st_size))
            for name in SMALL
        }

        def resume() -> None:
            load(folder, trainer.chunks, trainer.optimizer)
            load_scales(folder, trainer.scaling)

        for kind, place in places.items():
            messages[f"resume {kind}"] = notices(rank, resume, *place)
        start = lambda: load_weights(folder, trainer.chunks)  # noqa: E731
        for kind in ("weight", *SMALL):
            messages[f"init_from {kind}"] = notices(rank, start, *places[kind])
        resume()
        trainer.save(2)

    _fit(rank, world, init, again, 0, layout, bf16_fp8() | {"hook": hook})
    return messages


def digests(folder: Path) -> dict[str, int]:
    content = json.loads((folder / "digests.json").read_text())
    return {name: entry["digest"] for name, entry in content.items() if name != "rng"}


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, TP2),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(2, PP2, marks=pytest.mark.slow),
        pytest.param(2, CP2, marks=pytest.mark.slow),
        pytest.param(
            *(2, PP2 | {"virtual_pipeline_model_parallel_size": 2}), marks=pytest.mark.slow
        ),
        pytest.param(4, TP2 | PP2, marks=pytest.mark.slow),
    ],
)
def test_every_rank_of_every_layout_notices(
    copy: Path, tmp_path: Path, world: int, layout: dict[str, Any]
) -> None:
    """What one rank saved, damaged and read at another layout; then saved there: equal digests."""
    again = tmp_path / "again"
    for messages in run_ranks(read_damaged, world, copy, again, layout, world):
        assert {key for key, text in messages.items() if str(copy) not in text} == set()
        assert len(messages) == len(KINDS) + 2 * len(SMALL) + 1
        for kind, name in KINDS.items():
            assert name in messages[f"resume {kind}"]
    assert digests(find(again)) == digests(copy)
    weights = [json.loads((path / "weights.json").read_text()) for path in (find(again), copy)]
    assert weights[0] == weights[1]


def load_as(rank: int, world: int, init: str, path: Path, dtype: str) -> list[str]:
    return load_weights(path, Run(rank, world, init, dtype=dtype).chunks)


def save_fp32(rank: int, world: int, init: str, path: Path) -> None:
    Run(rank, world, init).save(1, path)


def test_a_weight_is_compared_before_it_is_cast(tmp_path: Path) -> None:
    """The lowest bit of an fp32 weight, which bf16 does not have."""
    run_ranks(save_fp32, 1, tmp_path)
    path = tmp_path / "step_00000001"
    name = "decoder.final_layernorm.weight"
    [(file, places)] = [place for kind, place in parts(path, name).items() if kind == "0"]
    assert run_ranks(load_as, 1, path, "bf16") == [[]]
    flip(file, places.start)
    with pytest.raises(RuntimeError, match=rf"bits of {name} at \[0\] are not those"):
        run_ranks(load_as, 1, path, "bf16")


def test_conversions_read_verified_bits(copy: Path, tmp_path: Path) -> None:
    good = shutil.copytree(copy, tmp_path / "good" / copy.name)
    file, position = data_byte(copy, WEIGHT, random.Random(3))
    flip(file, position)
    commands: dict[str, Callable[[Path], Any]] = {
        "export": lambda to: export(open_checkpoint(copy), to, "qwen2"),
        "reshard": lambda to: rewrite([open_checkpoint(copy)], to),
        "average": lambda to: rewrite([open_checkpoint(good), open_checkpoint(copy)], to),
        "cast": lambda to: rewrite([open_checkpoint(copy)], to, dtype=torch.float32),
    }
    for name, command in commands.items():
        with pytest.raises(DamagedError, match=f"bits of {WEIGHT}"):
            command(tmp_path / name)
        assert not (tmp_path / name).exists()
    whole, text = verified(copy)
    assert not whole and WEIGHT in text and text.count("\n") == 0
    flip(file, position)
    file, position = data_byte(copy, KINDS["mean"], random.Random(4))
    flip(file, position)
    whole, text = verified(copy)
    assert not whole and KINDS["mean"] in text
    # What has the optimizer's damage alone has whole weights.
    rewrite([open_checkpoint(copy)], tmp_path / "copied")
    assert verified(tmp_path / "copied") == (
        True,
        f"{tmp_path / 'copied'}: every bit is as it was saved",
    )
    flip(*data_byte(tmp_path / "copied", WEIGHT, random.Random(5)))
    assert not verified(tmp_path / "copied")[0]


def test_a_base_is_known_by_whole_files(copy: Path) -> None:
    base = BaseCheckpoint.of(copy)
    assert base.located() == base
    flip(copy / "weights.json", 40)
    with pytest.raises(ValueError, match=r"weights of digest .* is not at .*weights\.json is not"):
        base.located()
    with pytest.raises(DamagedError, match=r"weights\.json"):
        BaseCheckpoint.of(copy)


def test_merged_adapters_come_from_verified_bits(copy: Path) -> None:
    """The linear with the adapter, and its factors, all read through the digests."""
    source = open_checkpoint(copy).source
    flip(*data_byte(copy, WEIGHT, random.Random(6)))
    merged = MergedLora(source, {}, 1.0)
    with pytest.raises(DamagedError, match=WEIGHT):
        read(merged, WEIGHT)


# -- going on with the one before -------------------------------------------------------------


def every_two_steps(trainer: Any, rank: int) -> None:
    trainer.checkpoint.save_interval, trainer.checkpoint.keep_last = 2, None


def test_resume_goes_on_from_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    """Of four: one with an empty state.json, one without a data file, one with a flipped mean."""
    options = {"hook": every_two_steps}
    run_ranks(_fit, 1, tmp_path, 8, {}, options)
    expected = _losses(tmp_path)
    folder = tmp_path / "checkpoints"
    paths = [folder / f"step_{step:08d}" for step in (2, 4, 6, 8)]
    assert complete(folder) == paths
    (paths[1] / "state.json").write_text("")
    (paths[2] / "__0_0.distcp").unlink()
    flip(*data_byte(paths[3], KINDS["mean"], random.Random(7)))
    # This one saves at its end alone, where the damaged one of that step is replaced.
    [result] = run_ranks(_fit, 1, tmp_path, 8, {})
    text = "\n".join(result["messages"])
    assert f"{paths[1]} is damaged or incomplete: state.json is empty" in text
    assert f"{paths[2]} is left aside: " in text and "__0_0.distcp: 0 bytes" in text
    assert f"going on from {paths[0]} instead" in text and KINDS["mean"] in text
    assert _losses(tmp_path) == expected
    assert complete(folder)[-1] == paths[3] and read_state(paths[3])["step"] == 8
    assert verified(paths[3])[0]


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(copy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    shutil.move(copy, folder)
    (folder / copy.name / "state.json").unlink()
    with pytest.raises(RuntimeError, match=r"no checkpoint in .* is whole .* move step_00000002"):
        run_ranks(_fit, 1, tmp_path / "run", 3, {}, bf16_fp8())
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find(tmp_path / "run")


# -- what mcore leaves unwritten --------------------------------------------------------------


def save_over_garbage(rank: int, world: int, init: str, folder: Path) -> None:
    """Save dp_reshardable where fresh memory is full of NaN."""
    run = Run(rank, world, init)
    run.train(0, 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    run.save(1, folder, optimizer="dp_reshardable")


def test_gaps_between_parameters_are_zeros(tmp_path: Path) -> None:
    run_ranks(save_over_garbage, 2, tmp_path)
    contents = Contents.open(tmp_path / "step_00000001")
    gaps = 0
    for name in contents.metadata.state_dict_metadata:
        for chunk in contents.chunks(name):
            tensor = contents.read(name, chunk.offsets)
            assert not tensor.isnan().any(), name
            gaps += name.endswith(".param") and not tensor.any()
    assert gaps > 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fully_reshardable", "dp_reshardable"])
def test_sharded_optimizer_state_is_covered(tmp_path: Path, kind: str) -> None:
    run_ranks(save_kind, 2, tmp_path, kind)
    path = tmp_path / "step_00000001"
    generator = random.Random(8)
    contents = Contents.open(path)
    for name in contents.metadata.state_dict_metadata:
        if ".padding" in name:
            continue
        file, position = data_byte(path, name, generator)
        with changed(file, position), pytest.raises(DamagedError, match="bits of"):
            contents.check(name)
    for world in (1, 2):
        run_ranks(load_kind, world, path)


def save_kind(rank: int, world: int, init: str, folder: Path, kind: str) -> None:
    run = Run(rank, world, init)
    run.train(0, 1)
    run.save(1, folder, optimizer=kind)


def load_kind(rank: int, world: int, init: str, path: Path) -> None:
    run = Run(rank, world, init)
    load(path, run.chunks, run.optimizer)
