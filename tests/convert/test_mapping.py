"""Each mapping by hand-worked numbers, both ways; tables that do not fit name every key."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from nvmm.convert.mapping import (
    QKV,
    Drop,
    DummyHeads,
    FusedQKV,
    GatedMLP,
    PadVocabulary,
    Rename,
    Reshape,
    Row,
    Tied,
    expand,
    prefixed,
)
from nvmm.convert.sources import Average, Cast, Merged, read
from nvmm.convert.table import ToOurs, ToTheirs


class Tensors:
    """A source of tensors at hand."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = {name.replace("__", "."): value for name, value in tensors.items()}
        self.spec = {name: value.to("meta") for name, value in self.tensors.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        yield self.tensors[name]


def rows(*numbers: int) -> Tensor:
    return torch.tensor(numbers).view(-1, 1)


CASES = [
    (Rename(), [rows(1, 2)], rows(1, 2)),
    (Reshape((-1, 1), (1, -1, 1)), [rows(1, 2)[None]], rows(1, 2)),
    # two groups of two query heads, heads of two rows: q0 q1 k0 v0, q2 q3 k1 v1
    (
        QKV(4, 2, 2),
        [rows(*range(8)), rows(10, 11, 12, 13), rows(20, 21, 22, 23)],
        rows(0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23),
    ),
    (FusedQKV(2, 1), [rows(1, 2, 11, 12, 21, 22)], rows(1, 11, 21, 2, 12, 22)),
    (FusedQKV(2, 1, 1), [rows(1, 2, 0, 11, 12, 0, 21, 22, 0)], rows(1, 11, 21, 2, 12, 22)),
    (DummyHeads(0, 1, 2, 1), [rows(5, 6, 0, 0)], rows(5, 6)),
    (DummyHeads(1, 1, 2, 1), [torch.tensor([[5, 6, 0, 0]])], torch.tensor([[5, 6]])),
    (GatedMLP(), [rows(1, 2), rows(3, 4)], rows(1, 2, 3, 4)),
    (PadVocabulary(5, 3), [rows(7, 8, 9)], rows(7, 8, 9, 0, 0)),
    (PadVocabulary(3, 3), [rows(7, 8, 9)], rows(7, 8, 9)),
]


@pytest.mark.parametrize(("mapping", "theirs", "ours"), CASES)
def test_both_ways(mapping, theirs, ours) -> None:
    assert torch.equal(torch.cat(list(mapping.to_ours(theirs))), ours)
    back = mapping.to_theirs(ours)
    assert len(back) == len(theirs)
    for mine, other in zip(back, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("mapping", "theirs"),
    [
        (QKV(4, 2, 2), [rows(*range(8)), rows(1, 2), rows(3, 4)]),
        (FusedQKV(2, 1), [rows(1, 2, 3)]),
        (FusedQKV(1, 1, 1), [rows(1, 9, 2, 0, 3, 0)]),  # a dummy head that is not zero
        (DummyHeads(0, 1, 1, 1), [rows(1, 2)]),
        (GatedMLP(), [rows(1, 2), rows(3)]),
        (PadVocabulary(2, 3), [rows(1, 2, 3)]),
        (Reshape((-1, 1), (1, -1, 1)), [rows(1, 2)]),
    ],
)
def test_sizes_that_do_not_fit(mapping, theirs) -> None:
    with pytest.raises(ValueError, match=r"must|zero|fit"):
        list(mapping.to_ours(theirs))


TABLE = expand(
    [
        Row("layers.*.w", ("l.*.gate", "l.*.up"), GatedMLP()),
        Row("e", ("embed",), PadVocabulary(4, 3)),
        Row(None, ("head",), Tied("embed")),
        Row(None, ("buffer.*",), Drop()),
    ],
    2,
)


def theirs(**changes: Tensor) -> Tensors:
    layers = {f"l__{i}__{x}": rows(i, i + 1) for i in (0, 1) for x in ("gate", "up")}
    tensors = layers | {"embed": rows(1, 2, 3), "buffer__1": rows(9)} | changes
    return Tensors(**{name: value for name, value in tensors.items() if value is not None})


def test_a_table_both_ways() -> None:
    ours = ToOurs(theirs(head=rows(1, 2, 3)), TABLE)
    ours.check_tied()
    assert ours.dropped == ["head", "buffer.1"]
    assert torch.equal(read(ours, "layers.1.w"), rows(1, 2, 1, 2))
    back = ToTheirs(ours, TABLE)
    assert list(back.spec) == ["l.0.gate", "l.0.up", "l.1.gate", "l.1.up", "embed"]
    for name in back.spec:
        assert torch.equal(read(back, name), theirs().tensors[name])


def test_every_problem_is_listed() -> None:
    source = theirs(l__0__up=None, l__1__gate=rows(1), embed=rows(1), other=rows(1))
    with pytest.raises(ValueError) as error:
        ToOurs(source, [*TABLE, Row("e", ("embed",))])
    lines = str(error.value).splitlines()[1:]
    assert [line.strip().split(": ")[0] for line in lines] == [
        "written twice",
        "written twice",
        "missing",
        "unmapped",
        "wrong shape",
    ]
    for name in ("e", "embed", "l.0.up", "other", "l.1.gate, l.1.up"):
        assert any(name in line for line in lines)
    with pytest.raises(ValueError, match=r"unmapped: y") as error:
        ToTheirs(Tensors(e=rows(1), y=rows(2)), TABLE)
    assert "missing: layers.0.w" in str(error.value) and "wrong shape: e" in str(error.value)


def test_a_tied_copy_must_be_equal() -> None:
    with pytest.raises(ValueError, match="head differs from embed"):
        ToOurs(theirs(head=rows(1, 2, 4)), TABLE).check_tied()
    [tied] = [r for r in prefixed(TABLE, "o.", "t.") if isinstance(r.mapping, Tied)]
    assert (tied.theirs, tied.mapping) == (("t.head",), Tied("t.embed"))


def test_sources_combine() -> None:
    first, second = Tensors(a=torch.tensor([1.0, 2.0])), Tensors(a=torch.tensor([2.0, 4.0]))
    assert read(Average([first, second]), "a").tolist() == [1.5, 3.0]
    half = Cast(first, torch.bfloat16)
    assert half.spec["a"].dtype == read(half, "a").dtype == torch.bfloat16
    assert Cast(Tensors(i=rows(1)), torch.bfloat16).spec["i"].dtype == torch.int64
    with pytest.raises(ValueError, match="given twice: a"):
        Merged([first, second])
    with pytest.raises(ValueError, match=r"a is \[1\] in source 2, \[2\] in source 1"):
        Average([first, Tensors(a=torch.zeros(1))])
