"""Which samples make global batch k, for any layout, and how to go on from there.

The blend's slots are cut into windows. A window becomes an ordered list of packs (without packing
each sample is one), and global batch k is packs [k B, (k + 1) B) of the windows' concatenated
lists. Ranks and workers appear nowhere.

A position is the first slot of the open window and how many of its packs are consumed, with the
settings that made them. Where a run goes on with other settings, the consumed samples are found
again from the saved ones and the rest of the window is planned anew: a window may have several
such cuts. A blend that changed takes over with the next window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvmm.data.order import sample_ids
from nvmm.data.order.blend import Blend, Source
from nvmm.data.order.mixture import Part
from nvmm.data.order.packing import Pack, plan

TILE_COST = 1024**2
"""Cost of a tile where packs are balanced: its 1,024 patches attend to one another."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides how a window becomes packs.

    window: samples planned together. capacity: tokens of a pack; None without packing.
    segment_multiple: each sample of a pack takes a multiple of this. lengths: digest of the
    builder whose token counts are planned with, for each dataset.
    """

    window: int
    capacity: int | None = None
    segment_multiple: int = 1
    lengths: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Window:
    """The open window: its slots [first, first + size), and the plan of what is left of them.

    cuts: [{settings, without, packs}] of earlier settings. without: numbers of datasets of its
    blend that cannot be read any more. packs: the plan of the rest; used: how many are consumed.
    """

    first: int
    size: int
    cuts: list[dict[str, Any]]
    without: list[int]
    packs: list[Pack]
    used: int = 0


class Order:
    """The global batches of a run.

    parts: the datasets of the blend. position: of an earlier run's `position(k)`. changes: what
    differs from that run, in words.

    Raises ValueError for a position of another seed, and for a dataset that kept its name but not
    its samples.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        seed: int,
        settings: Settings,
        global_batch_size: int,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"data.seed={seed} must be in [0, 2**63)")
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size={global_batch_size} must be at least 1")
        if settings.window < 1:
            raise ValueError(f"data.window={settings.window} must be at least 1")
        self.parts = {part.name: part for part in parts}
        self.seed = seed
        self.settings = settings
        self.global_batch_size = global_batch_size
        self.changes: list[str] = []
        self.ordinals = {name: number for number, name in enumerate(self.parts)}
        self._position = position
        self._window: _Window
        self._next_sources: list[Source] | None
        self._restart()

    def batch(self, k: int) -> list[Pack]:
        """The packs of global batch k, their `samples` being ids (`nvmm.data.order.sample_ids`).

        Raises ValueError for a batch before the position that this order started from, and behind
        the end of a blend whose datasets all have a number of epochs.
        """
        self._seek(k)
        packs: list[Pack] = []
        while len(packs) < self.global_batch_size:
            missing = self.global_batch_size - len(packs)
            used = self._window.used
            taken = self._window.packs[used : used + missing]
            self._window.used += len(taken)
            packs += taken
            if len(packs) < self.global_batch_size:
                self._open_next()
        self._step = k + 1
        return packs

    def position(self, k: int) -> dict[str, Any]:
        """The place before batch k: JSON, of constant size, without a word of any layout."""
        self._seek(k)
        window = self._window
        current = {
            "settings": dataclasses.asdict(self.settings),
            "without": window.without,
            "packs": window.used,
        }
        return {
            "step": k,
            "seed": self.seed,
            "first": window.first,
            "cuts": [*window.cuts, current],
            "blend": self._description,
        }

    # -- the cursor -------------------------------------------------------------------------

    def _restart(self) -> None:
        """Go to where this order starts: step 0, or the given position."""
        if self._position is None:
            self._step = self._start = 0
            self._use([part.source() for part in self.parts.values()])
            self._window = self._planned(0)
            return
        saved = self._position
        if saved["seed"] != self.seed:
            raise ValueError(
                f"cannot continue the data order: seed is {self.seed}, but the position was saved"
                f" with seed={saved['seed']}"
            )
        self._step = self._start = int(saved["step"])
        self._resume(saved)

    def _seek(self, k: int) -> None:
        if k < self._start:
            raise ValueError(f"batch {k} lies before batch {self._start}, where this order starts")
        if k < self._step:
            self._restart()
        self._advance((k - self._step) * self.global_batch_size)
        self._step = k

    def _advance(self, num_packs: int) -> None:
        """Consume packs; whole windows of one pack a sample are passed over unseen."""
        while num_packs > len(self._window.packs) - self._window.used:
            num_packs -= len(self._window.packs) - self._window.used
            whole = 0
            if self.settings.capacity is None and self._next_sources is None:
                whole = (num_packs - 1) // self.settings.window * self.settings.window
            self._open_next(skip=whole)
            num_packs -= whole
        self._window.used += num_packs

    def _open_next(self, skip: int = 0) -> None:
        if self._next_sources is not None:
            self._use(self._next_sources)
            self._window = self._planned(0)
        else:
            self._window = self._planned(self._window.first + self._window.size + skip)

    def _use(self, sources: Sequence[Source]) -> None:
        """Let these sources take turns from slot 0 on; no others are to follow."""
        self._blend = Blend(sources)
        self._description = [self._describe(source) for source in sources]
        self._next_sources = None

    def _planned(self, first: int) -> _Window:
        found = self._slots(first, self.settings.window)
        if not found.size:
            taken = dict(zip(self.parts, self._blend.counts(first), strict=True))
            raise ValueError(
                f"data.blend has come to its end after {taken} samples: every dataset has had its"
                " epochs; raise them, or lower trainer.max_steps"
            )
        return _Window(first, len(found), [], [], self._plan(found, self.settings, first))

    # -- slots, packs -----------------------------------------------------------------------

    def _slots(self, first: int, count: int) -> NDArray[np.int64]:
        """int64 [n]: sample ids of slots [first, first + count); fewer at the end of the blend.

        The samples of a dataset that is gone have their places in it for numbers.
        """
        sources, places = self._blend.locate(first, count)
        found = np.empty(len(sources), dtype=np.int64)
        for index in np.unique(sources).tolist():
            source = self._blend.sources[index]
            part = self.parts.get(source.name)
            here = np.flatnonzero(sources == index)
            epochs, numbers = np.divmod(places[here], source.num_samples)
            if part is not None:
                for epoch in np.unique(epochs).tolist():
                    at = epochs == epoch
                    numbers[at] = part.numbers(epoch, numbers[at], self.seed)
            found[here] = sample_ids.join(self._description[index]["dataset"], epochs, numbers)
        return found

    def _plan(self, samples: NDArray[np.int64], settings: Settings, seed: int) -> list[Pack]:
        """The packs of these samples, in order, as sample ids."""
        if settings.capacity is None:
            costs = self._facts(samples, None)[:, 0]
            return [
                Pack((sample,), 0, cost)
                for sample, cost in zip(samples.tolist(), costs.tolist(), strict=True)
            ]
        facts = self._facts(samples, settings.lengths)
        # A sample that cannot be built is a hole of one token, on every layout.
        room = settings.capacity // settings.segment_multiple * settings.segment_multiple
        good = (facts[:, 0] > 0) & (facts[:, 0] <= room)
        packs = plan(
            np.where(good, facts[:, 0], 1),
            settings.capacity,
            tiles=np.where(good, facts[:, 1], 0),
            tile_cost=TILE_COST,
            segment_multiple=settings.segment_multiple,
            seed=seed,
        )
        return [
            dataclasses.replace(pack, samples=tuple(samples[list(pack.samples)].tolist()))
            for pack in packs
        ]

    def _facts(
        self, samples: NDArray[np.int64], lengths: Mapping[str, str] | None
    ) -> NDArray[np.int64]:
        """int64 [n, 2]: tokens and tiles of samples, exact with `lengths`, else rough costs."""
        facts = np.zeros((len(samples), 2), dtype=np.int64)
        ordinals, _, numbers = sample_ids.split(samples)
        for name in self._gone(ordinals) if lengths is not None else ():
            raise ValueError(
                f"data.blend: {name} is gone, but samples of it are packed in the open window;"
                " set its epochs to 0 instead, and nothing more is taken from it"
            )
        for name, part in self.parts.items():
            here = ordinals == self.ordinals[name]
            if not here.any():
                continue
            if lengths is None:
                facts[here, 0] = part.dataset.index.estimates(numbers[here])
                continue
            column = part.dataset.index.lengths(lengths[name])
            if column is None:
                raise ValueError(
                    f"the token counts that the open window of {name} was planned with are gone"
                    f" (lengths-{lengths[name]} in {part.dataset.index.path}); count them with"
                    " tools/shard.py index --config and the config of the checkpoint"
                )
            facts[here] = column[numbers[here]]
        return facts

    def _gone(self, ordinals: NDArray[np.int64]) -> list[str]:
        """Names of the blend's datasets that have some of these numbers but cannot be read."""
        present = set(np.unique(ordinals).tolist()) - set(self.ordinals.values())
        return [entry["name"] for entry in self._description if entry["dataset"] in present]

    # -- positions of earlier runs ----------------------------------------------------------

    def _describe(self, source: Source) -> dict[str, Any]:
        part = self.parts[source.name]
        return {
            "name": source.name,
            "dataset": self.ordinals[source.name],
            "weight": str(source.weight),
            "epochs": source.epochs,
            "consumed": source.consumed,
            **part.identity(),
        }

    def _resume(self, saved: Mapping[str, Any]) -> None:
        before = {entry["name"]: entry for entry in saved["blend"]}
        self._number(before)
        self.changes = []
        for name in before.keys() & self.parts.keys():
            self._refuse_other_samples(name, before[name])
        sources = [
            Source(
                entry["name"],
                entry["samples"],
                Fraction(entry["weight"]),
                entry["epochs"],
                entry["consumed"],
            )
            for entry in saved["blend"]
        ]
        self._blend, self._description = Blend(sources), list(saved["blend"])
        cuts, first = saved["cuts"], int(saved["first"])
        asked = cuts[0]["settings"]["window"]
        size = len(self._blend.locate(first, asked)[0])
        without = [int(before[name]["dataset"]) for name in before if name not in self.parts]
        *earlier, last = cuts
        current = dataclasses.asdict(self.settings)
        if last["settings"] != current:
            self.changes += _settings_changes(last["settings"], current)
        if last["settings"] != current or last["without"] != without:
            earlier, last = cuts, {"packs": 0}
        rest = self._slots(first, asked)
        for number, cut in enumerate(earlier):
            readable = _leave_out(rest, cut["without"])
            planned = self._plan(readable, Settings(**cut["settings"]), first + number)
            consumed = [sample for pack in planned[: cut["packs"]] for sample in pack.samples]
            rest = rest[~np.isin(rest, consumed)]
        packs = self._plan(_leave_out(rest, without), self.settings, first + len(earlier))
        self._window = _Window(first, size, list(earlier), without, packs, last["packs"])
        self._next_sources = self._changed_blend(before, first + size)
        if self._next_sources is not None:
            left = sum(len(pack.samples) for pack in packs[self._window.used :])
            self.changes.append(f"this holds after the {left} samples left of the open window")

    def _number(self, before: Mapping[str, Mapping[str, Any]]) -> None:
        """Datasets keep the numbers that their sample ids have; new ones get the next."""
        known = {name: int(entry["dataset"]) for name, entry in before.items()}
        following = max(known.values()) + 1
        for name in self.parts:
            if name not in known:
                known[name] = following
                following += 1
        self.ordinals = {name: known[name] for name in self.parts}

    def _refuse_other_samples(self, name: str, entry: Mapping[str, Any]) -> None:
        for key, mine in self.parts[name].identity().items():
            if entry[key] != mine:
                raise ValueError(
                    f"cannot continue the data order: dataset {name} has {key}={mine}, but the"
                    f" position was saved with {key}={entry[key]}; give it another name to take"
                    " it in as a new dataset"
                )

    def _changed_blend(
        self, before: Mapping[str, Mapping[str, Any]], slots: int
    ) -> list[Source] | None:
        """The sources that take over after `slots` slots of the saved blend; None: they go on."""
        taken = dict(zip(before, self._blend.counts(slots), strict=True))
        changes = [f"{name} is gone from the blend" for name in before if name not in self.parts]
        for name, part in self.parts.items():
            if name not in before:
                changes.append(f"{name} is new in the blend, weight {float(part.weight):.4g}")
                continue
            for key, mine in (("weight", str(part.weight)), ("epochs", part.epochs)):
                if before[name][key] != mine:
                    changes.append(f"{key} of {name}: {before[name][key]} -> {mine}")
        if not changes and list(before) == list(self.parts):
            return None
        self.changes += changes
        return [part.source(taken.get(name, 0)) for name, part in self.parts.items()]


def _leave_out(samples: NDArray[np.int64], datasets: Sequence[int]) -> NDArray[np.int64]:
    return samples[~np.isin(sample_ids.split(samples)[0], datasets)]


def _settings_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    changed = [name for name in current if saved[name] != current[name]]
    listed = ", ".join(
        name if name == "lengths" else f"{name} {saved[name]} -> {current[name]}"
        for name in changed
    )
    return [f"the rest of the open window is planned anew: {listed}"]
