"""The folder of a job: whole parts, one owner, no mixture."""

from pathlib import Path

import pyarrow as pa
import pytest

from nvmm.jobs.parts import Parts

IDENTITY = {"job": {"name": "n", "seed": 1}, "inputs": "abc"}


def rows(numbers: range) -> pa.Table:
    return pa.table({"number": list(numbers), "text": [f"row {n}" for n in numbers]})


def begin(folder: Path, size: int = 10, part_size: int = 4, **identity: object) -> Parts:
    return Parts.begin(folder, size, part_size, IDENTITY | identity)


def test_parts_are_read_as_one_table(tmp_path: Path) -> None:
    parts = begin(tmp_path / "out")
    assert parts.missing() == [0, 1, 2]
    for part in (2, 0, 1):
        parts.write(part, rows(parts.numbers(part)))
    with pytest.raises(ValueError, match="out is not whole: run its job again"):
        parts.read()
    parts.finish()
    table = Parts(tmp_path / "out").read()
    assert table["number"].to_pylist() == list(range(10))
    assert [len(chunk) for chunk in table["text"].chunks] == [4, 4, 2]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "part-00000.arrow",
        "part-00001.arrow",
        "part-00002.arrow",
    ]


def test_a_part_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    parts = begin(tmp_path)
    for part in range(3):
        parts.write(part, rows(parts.numbers(part)))
    data = bytearray(parts.path(1).read_bytes())
    data[len(data) // 2] ^= 1
    parts.path(1).write_bytes(data)
    parts.path(2).with_suffix(".digest").unlink()  # the crash came between file and digest
    again = begin(tmp_path)
    assert again.missing() == [1, 2]
    with pytest.raises(ValueError, match=r"part-00002.arrow is missing"):
        again.finish()


def test_a_whole_output_with_a_changed_byte_is_not_read(tmp_path: Path) -> None:
    parts = begin(tmp_path)
    for part in range(3):
        parts.write(part, rows(parts.numbers(part)))
    parts.finish()
    parts.path(0).write_bytes(parts.path(0).read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"part-00000.arrow is missing or damaged"):
        Parts(tmp_path).read()
    assert begin(tmp_path).missing() == [0]


def test_a_damaged_part_of_a_whole_output_may_get_other_bits(tmp_path: Path) -> None:
    """Another layout adds up otherwise: what it makes again has a digest of its own."""
    parts = begin(tmp_path)
    for part in range(3):
        parts.write(part, rows(parts.numbers(part)))
    parts.finish()
    parts.path(1).write_bytes(b"")
    begin(tmp_path).reopen([1])
    again = begin(tmp_path)
    assert again.missing() == [1]
    with pytest.raises(ValueError, match="is not whole"):
        again.read()
    again.write(1, pa.table({"number": [9] * 4, "text": ["other"] * 4}))
    again.finish()
    assert Parts(tmp_path).read()["number"].to_pylist() == [0, 1, 2, 3, 9, 9, 9, 9, 8, 9]


def test_another_job_is_refused_by_what_changed(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(ValueError, match=r"job\.seed was 1, is 2") as error:
        begin(tmp_path, job={"name": "n", "seed": 2})
    assert "inputs" not in str(error.value)
    with pytest.raises(ValueError, match=r"weights was None, is 'w'"):
        begin(tmp_path, weights="w")
    with pytest.raises(ValueError, match="part_size was 4, is 5"):
        begin(tmp_path, part_size=5)
    with pytest.raises(ValueError, match="size was 10, is 11"):
        begin(tmp_path, size=11)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"other files \(thesis.tex\)"):
        begin(tmp_path)
    with pytest.raises(ValueError, match="no output of a job"):
        Parts(tmp_path).read()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"size": 3}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: str) -> None:
    begin(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        begin(tmp_path)


def test_a_part_of_another_length_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="part 2 has 4 rows, not 2"):
        begin(tmp_path).write(2, rows(range(4)))
