"""Sources of tensors, and tables applied to them, with every key accounted for beforehand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nvmm.convert.mapping import Constant, GatedMLP, PadVocabulary, Rename, Row, Tied, Unused
from nvmm.convert.sources import Source, read, refuse


class _Lazy(Sequence[Tensor]):
    """Tensors of a source, each read when it is asked for."""

    def __init__(self, names: Sequence[str], get: Callable[[str], Tensor]) -> None:
        self.names = names
        self.get = get

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.get(self.names[index])


class ToOurs:
    """A foreign source under our names.

    Raises ValueError listing every key that is unmapped, missing, named by two rows, or whose
    shape does not fit its mapping.
    """

    def __init__(self, source: Source, rows: Sequence[Row]) -> None:
        self.source = source
        self.rows = {row.ours: row for row in rows if row.ours is not None}
        self.dropped = [
            name for row in rows if row.ours is None for name in row.theirs if name in source.spec
        ]
        self.tied = [
            (row.theirs[0], row.mapping.source)
            for row in rows
            if isinstance(row.mapping, Tied) and row.theirs[0] in source.spec
        ]
        required = [name for row in rows if row.ours is not None for name in row.theirs]
        optional = [name for row in rows if row.ours is None for name in row.theirs]
        problems = _repeated(rows)
        problems += _missing(required, source.spec, "missing")
        problems += _missing(source.spec, {*required, *optional}, "unmapped")
        self.spec: dict[str, Tensor] = {}
        for name, row in self.rows.items():
            if not all(key in source.spec for key in row.theirs):
                continue
            try:
                tensor = torch.cat(list(row.mapping.to_ours([source.spec[k] for k in row.theirs])))
            except (ValueError, RuntimeError, IndexError) as error:
                problems.append(f"wrong shape: {', '.join(row.theirs)}: {error}")
                continue
            self.spec[name] = tensor
        refuse(problems)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield our tensor, reading only as much of theirs at a time as the mapping asks for."""
        row = self.rows[name]
        if isinstance(row.mapping, PadVocabulary):
            yield from self.source.blocks(row.theirs[0])
            rows, *rest = self.spec[name].shape
            if missing := rows - row.mapping.their_rows:
                yield torch.zeros(missing, *rest, dtype=self.spec[name].dtype)
            return
        if type(row.mapping) in (Rename, GatedMLP):
            # Parts of several dtypes have one together, which holds the values of each.
            for key in row.theirs:
                for block in self.source.blocks(key):
                    yield block.to(self.spec[name].dtype)
            return
        try:
            yield from row.mapping.to_ours(_Lazy(row.theirs, lambda key: read(self.source, key)))
        except ValueError as error:
            raise ValueError(f"{', '.join(row.theirs)}: {error}") from error

    def check_tied(self) -> None:
        """Compare the copies of tied tensors; raise ValueError naming those that differ."""
        different = [
            f"{copy} differs from {original}, which the config says it is tied to"
            for copy, original in self.tied
            if not torch.equal(read(self.source, copy), read(self.source, original))
        ]
        refuse(different)


class ToTheirs:
    """A source under our names in a foreign layout.

    Raises ValueError as ToOurs does. Their tensors that come from one of ours follow each other in
    `spec`, and reading them in that order reads ours once.
    """

    def __init__(self, source: Source, rows: Sequence[Row]) -> None:
        unused = {row.theirs[0]: row.mapping for row in rows if isinstance(row.mapping, Unused)}
        constants = {r.theirs[0]: r.mapping.make for r in rows if isinstance(r.mapping, Constant)}
        rows = [row for row in rows if row.ours is not None]
        self.source = source
        self.unused = unused
        self.constants = constants
        self.rows = {name: (row, i) for row in rows for i, name in enumerate(row.theirs)}
        self._last: tuple[str | None, list[Tensor]] = (None, [])
        ours = [row.ours for row in rows if row.ours is not None]
        problems = _repeated(rows)
        problems += _missing(ours, source.spec, "missing")
        problems += _missing(source.spec, set(ours), "unmapped")
        self.spec: dict[str, Tensor] = {}
        for row in rows:
            if row.ours is None or row.ours not in source.spec:
                continue
            tensor = source.spec[row.ours]
            try:
                parts = row.mapping.to_theirs(tensor)
                back = torch.cat(list(row.mapping.to_ours(parts)))
                if back.shape != tensor.shape:
                    raise ValueError(f"{list(tensor.shape)} does not come back")
            except (ValueError, RuntimeError, IndexError) as error:
                problems.append(f"wrong shape: {row.ours}: {error}")
                continue
            self.spec |= dict(zip(row.theirs, parts, strict=True))
        refuse(problems)
        dtype = next(iter(self.spec.values())).dtype
        for name, mapping in unused.items():
            self.spec[name] = torch.empty(mapping.shape, dtype=dtype, device="meta")
        self.spec |= {name: make().to("meta") for name, make in constants.items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield one tensor of theirs."""
        if name in self.constants:
            yield self.constants[name]()
            return
        if name in self.unused:
            mapping = self.unused[name]
            yield torch.full(mapping.shape, mapping.value, dtype=self.spec[name].dtype)
            return
        row, index = self.rows[name]
        assert row.ours is not None
        if type(row.mapping) in (Rename, PadVocabulary):
            missing = self.spec[name].shape[0] if self.spec[name].dim() else 1
            for block in self.source.blocks(row.ours):
                yield block[:missing] if block.dim() else block
                missing -= len(block) if block.dim() else 1
                if missing <= 0:
                    return
            return
        if self._last[0] != row.ours:
            self._last = (None, [])
            self._last = (row.ours, row.mapping.to_theirs(read(self.source, row.ours)))
        yield self._last[1][index]


def _repeated(rows: Sequence[Row]) -> list[str]:
    ours = [row.ours for row in rows if row.ours is not None]
    theirs = [name for row in rows for name in row.theirs]
    counts = Counter(ours), Counter(theirs)
    return [f"written twice: {n}" for count in counts for n, times in count.items() if times > 1]


def _missing(names: Sequence[str] | Mapping[str, Tensor], known: object, word: str) -> list[str]:
    return [f"{word}: {name}" for name in names if name not in known]  # type: ignore[operator]
