"""The order of samples: it says which make global batch k, for any layout, and resumes anywhere.

The blend's slots are cut into windows. A window becomes an ordered list of packs (without packing
each sample is one), and global batch k is packs [k B, (k + 1) B) of the windows' concatenated
lists; where batches grow, it begins behind those of all batches before it. Ranks and workers appear
nowhere.

A position is the first slot of the open window and how many of its packs are consumed, with the
settings that made them. Where a run goes on with other settings, the consumed samples are found
again from the saved ones and the rest of the window is planned anew: a window may have several
such cuts. A blend that changed takes over with the next window.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nvmm.config.batch_sizes import BatchSizes
from nvmm.data.order import sample_ids
from nvmm.data.order.blend import Blend, Source
from nvmm.data.order.mixture import Component
from nvmm.data.order.packing import Pack, multiples, plan

TILE_COST = 1024**2
"""Cost of a tile where packs are balanced: its 1,024 patches attend to one another."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that decide how a window becomes packs.

    window: samples planned together. capacity: tokens of a pack; None without packing.
    segment_multiple: each text of a pack takes a multiple of this. lengths: for each dataset, the
    digest of the builder whose token counts the plan uses. texts: for datasets whose samples have
    several, the most of them; positions of before they were counted have none.
    """

    window: int
    capacity: int | None = None
    segment_multiple: int = 1
    lengths: dict[str, str] = dataclasses.field(default_factory=dict)
    texts: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Window:
    """The open window: its slots [first, first + size), and the plan of what is left of them.

    cuts: [{settings, without, packs, counts}] of earlier settings. without: numbers of datasets of
    its blend that cannot be read any more. packs: the plan of the rest. counts: what the plan was
    made of, see `Order._plan`. used: how many of these packs are consumed.
    """

    first: int
    size: int
    cuts: list[dict[str, Any]]
    without: list[int]
    packs: list[Pack]
    counts: int | None
    used: int = 0


class Order:
    """The global batches of a run.

    components: the datasets of the blend. global_batch_size: one, or that of each step. position:
    the `position(k)` of an earlier run. changes: the differences from that run, in words.

    Raises ValueError for a position of another seed, and for a dataset that kept its name but not
    its samples.
    """

    def __init__(
        self,
        components: Sequence[Component],
        seed: int,
        settings: Settings,
        global_batch_size: int | BatchSizes,
        position: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 <= seed < 2**63:
            raise ValueError(f"data.seed={seed} must be in [0, 2**63)")
        self.batch_sizes = BatchSizes.of(global_batch_size)
        for key, size in self.batch_sizes.all:
            if size < 1:
                raise ValueError(f"{key}={size} must be at least 1")
        if settings.window < 1:
            raise ValueError(f"data.window={settings.window} must be at least 1")
        self.components = {component.name: component for component in components}
        self.seed = seed
        self.settings = settings
        self.changes: list[str] = []
        self.ordinals = {name: number for number, name in enumerate(self.components)}
        self._position = position
        self._window: _Window
        self._next_sources: list[Source] | None
        self._restart()

    @property
    def size(self) -> int | None:
        """The samples of the whole run, from step 0 on; None where a dataset never ends.

        Of packs, without the samples of datasets that are gone.
        """
        changed = self._next_sources
        blend = self._blend if changed is None else Blend(changed)
        if blend.size is None or self.settings.capacity is not None:
            taken = sum(source.consumed for source in blend.sources)
            return None if blend.size is None else taken + blend.size
        window = self._window
        left = len(window.packs) - window.used
        behind = blend.size - (window.first + window.size if changed is None else 0)
        return self.batch_sizes.before(self._step) + left + behind

    def batch(self, k: int) -> list[Pack]:
        """Return the packs of global batch k, with sample ids (`nvmm.data.order.sample_ids`).

        Raises ValueError for a batch before the position that this order started from, and behind
        the end of a blend whose datasets all have a number of epochs.
        """
        self._seek(k)
        packs: list[Pack] = []
        size = self.batch_sizes.at(k)
        while len(packs) < size:
            missing = size - len(packs)
            used = self._window.used
            taken = self._window.packs[used : used + missing]
            self._window.used += len(taken)
            packs += taken
            if len(packs) < size:
                self._open_next()
        self._step = k + 1
        return packs

    def position(self, k: int) -> dict[str, Any]:
        """Return the position before batch k: JSON, of constant size, independent of the layout."""
        self._seek(k)
        window = self._window
        current = {
            "settings": dataclasses.asdict(self.settings),
            "without": window.without,
            "packs": window.used,
            **({} if window.counts is None else {"counts": window.counts}),
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
            self._use([component.source() for component in self.components.values()])
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
        """Move the cursor to batch k, from the start where it lies behind the cursor."""
        if k < self._start:
            raise ValueError(f"batch {k} lies before batch {self._start}, where this order starts")
        if k < self._step:
            self._restart()
        self._advance(self.batch_sizes.before(k) - self.batch_sizes.before(self._step))
        self._step = k

    def _advance(self, num_packs: int) -> None:
        """Consume packs; whole windows are skipped without a plan where each sample is a pack."""
        while num_packs > len(self._window.packs) - self._window.used:
            num_packs -= len(self._window.packs) - self._window.used
            skipped = 0
            if self.settings.capacity is None and self._next_sources is None:
                skipped = (num_packs - 1) // self.settings.window * self.settings.window
            self._open_next(skip=skipped)
            num_packs -= skipped
        self._window.used += num_packs

    def _open_next(self, skip: int = 0) -> None:
        """Open the next window, `skip` slots later; a changed blend begins with it."""
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
        """Plan the window that begins with slot `first`."""
        samples = self._slots(first, self.settings.window)
        if not samples.size:
            taken = dict(zip(self.components, self._blend.counts(first), strict=True))
            raise ValueError(
                f"data.blend has come to its end after {taken} samples: every dataset has had its"
                " epochs or passes; raise them, or lower trainer.max_steps"
            )
        return _Window(first, len(samples), [], [], *self._plan(samples, self.settings, first))

    # -- slots, packs -----------------------------------------------------------------------

    def _slots(self, first: int, count: int) -> NDArray[np.int64]:
        """Return int64 [n], the sample ids of slots [first, first + count).

        They are fewer at the end of the blend. Samples of a dataset that is gone have their places
        in it instead of numbers: nothing reads them, but they are told apart.
        """
        sources, places = self._blend.locate(first, count)
        samples = np.empty(len(sources), dtype=np.int64)
        for index in np.unique(sources).tolist():
            source = self._blend.sources[index]
            component = self.components.get(source.name)
            slots = np.flatnonzero(sources == index)
            epochs, numbers = np.divmod(places[slots], source.num_samples)
            if component is not None:
                for epoch in np.unique(epochs).tolist():
                    in_epoch = epochs == epoch
                    numbers[in_epoch] = component.numbers(epoch, numbers[in_epoch], self.seed)
            samples[slots] = sample_ids.join(self._description[index]["dataset"], epochs, numbers)
        return samples

    def _plan(
        self, samples: NDArray[np.int64], settings: Settings, seed: int
    ) -> tuple[list[Pack], int | None]:
        """Return the packs of these samples, in order, as sample ids; and a sum of their counts.

        The sum is None without packing, where the order does not depend on counts.
        """
        if settings.capacity is None:
            costs = self._facts(samples, None)[:, 0]
            return [
                Pack((sample,), 0, cost)
                for sample, cost in zip(samples.tolist(), costs.tolist(), strict=True)
            ], None
        facts = self._facts(samples, settings.lengths)
        # A sample that cannot be built is an empty slot of one token, on every layout.
        multiple = settings.segment_multiple
        texts = self._texts(samples, settings.texts)
        taken = multiples(facts[:, 0], multiple, texts)
        good = (facts[:, 0] > 0) & (taken <= settings.capacity // multiple)
        packs = plan(
            np.where(good, facts[:, 0], 1),
            settings.capacity,
            tiles=np.where(good, facts[:, 1], 0),
            tile_cost=TILE_COST,
            segment_multiple=multiple,
            texts=np.where(good, texts, 1),
            seed=seed,
        )
        return [
            dataclasses.replace(pack, samples=tuple(samples[list(pack.samples)].tolist()))
            for pack in packs
        ], zlib.crc32(facts.astype("<i8").tobytes())

    def _texts(self, samples: NDArray[np.int64], most: Mapping[str, int]) -> NDArray[np.int64]:
        """Return int64 [n], the most texts that each sample may have."""
        texts = np.ones(len(samples), dtype=np.int64)
        ordinals = sample_ids.split(samples)[0]
        for name, number in most.items():
            texts[ordinals == self.ordinals.get(name, -1)] = number
        return texts

    def _facts(
        self, samples: NDArray[np.int64], lengths: Mapping[str, str] | None
    ) -> NDArray[np.int64]:
        """Return int64 [n, 2], tokens and tiles of samples: exact with `lengths`, else estimates.

        Raises ValueError when the counts of a dataset are not there any more.
        """
        facts = np.zeros((len(samples), 2), dtype=np.int64)
        ordinals, _, numbers = sample_ids.split(samples)
        gone = set(np.unique(ordinals).tolist()) - set(self.ordinals.values())
        names = [entry["name"] for entry in self._description if entry["dataset"] in gone]
        if lengths is not None and names:
            raise ValueError(
                f"data.blend: {names[0]} is gone, but samples of it are packed in the open window;"
                " set its epochs to 0 instead, and nothing more is taken from it"
            )
        for name, component in self.components.items():
            in_dataset = ordinals == self.ordinals[name]
            if not in_dataset.any():
                continue
            if lengths is None:
                facts[in_dataset, 0] = component.dataset.index.estimates(numbers[in_dataset])
                continue
            column = component.dataset.index.lengths(lengths[name])
            if column is None:
                raise ValueError(
                    f"the token counts that the open window of {name} was planned with are gone"
                    f" (lengths-{lengths[name]} in {component.dataset.index.path}); count them with"
                    " nvmm shard index --config and the config of the checkpoint"
                )
            facts[in_dataset] = column[numbers[in_dataset]]
        return facts

    # -- positions of earlier runs ----------------------------------------------------------

    def _describe(self, source: Source) -> dict[str, Any]:
        """Return a source's entry of a position."""
        component = self.components[source.name]
        return {
            "name": source.name,
            "dataset": self.ordinals[source.name],
            "weight": str(source.weight),
            "epochs": source.epochs,
            "consumed": source.consumed,
            **component.identity(),
        }

    def _resume(self, saved: Mapping[str, Any]) -> None:
        """Go to a saved position, under settings and a blend that may have changed since."""
        # 1. The saved blend's datasets keep their numbers and must have their samples still.
        before = {entry["name"]: entry for entry in saved["blend"]}
        # New datasets get the next numbers, so that no sample id gets another meaning.
        numbers = {name: int(entry["dataset"]) for name, entry in before.items()}
        for name in self.components:
            numbers.setdefault(name, max(numbers.values()) + 1)
        self.ordinals = {name: numbers[name] for name in self.components}
        self.changes = []
        for name in before.keys() & self.components.keys():
            self._refuse_other_samples(name, before[name])
        # 2. The open window stays one of the saved blend, so its slots come from there.
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
        window_size = cuts[0]["settings"]["window"]
        size = len(self._blend.locate(first, window_size)[0])
        without = [int(before[name]["dataset"]) for name in before if name not in self.components]

        # 3. Where settings or readable datasets differ, the last cut is closed and a new one opens
        # with no pack consumed; else the last cut goes on.
        *earlier, last = cuts
        current = dataclasses.asdict(self.settings)
        settings = dataclasses.asdict(Settings(**last["settings"]))
        if settings != current:
            listed = ", ".join(
                name if name in ("lengths", "texts") else f"{name} {settings[name]} -> {value}"
                for name, value in current.items()
                if settings[name] != value
            )
            self.changes.append(f"the rest of the open window is planned anew: {listed}")
        if settings != current or last["without"] != without:
            earlier, last = cuts, {"packs": 0}

        # 4. Each closed cut is planned again as it was, which says which samples it consumed.
        rest = self._slots(first, window_size)
        for number, cut in enumerate(earlier):
            readable = _leave_out(rest, cut["without"])
            planned, counts = self._plan(readable, Settings(**cut["settings"]), first + number)
            self._refuse_other_counts(cut, counts)
            consumed = [sample for pack in planned[: cut["packs"]] for sample in pack.samples]
            rest = rest[~np.isin(rest, consumed)]

        # 5. The rest of the window is planned with the settings of now; a changed blend follows it.
        readable = _leave_out(rest, without)
        packs, counts = self._plan(readable, self.settings, first + len(earlier))
        self._refuse_other_counts(last, counts)
        self._window = _Window(first, size, list(earlier), without, packs, counts, last["packs"])
        self._next_sources = self._changed_blend(before, first + size)
        if self._next_sources is not None:
            left = sum(len(pack.samples) for pack in packs[self._window.used :])
            self.changes.append(f"this holds after the {left} samples left of the open window")

    def _refuse_other_samples(self, name: str, entry: Mapping[str, Any]) -> None:
        """Raise ValueError when a dataset's samples or their order differ from its saved entry."""
        for key, value in self.components[name].identity().items():
            if entry[key] != value:
                raise ValueError(
                    f"cannot continue the data order: dataset {name} has {key}={value}, but the"
                    f" position was saved with {key}={entry[key]}; give it another name to take"
                    " it in as a new dataset"
                )

    def _refuse_other_counts(self, cut: Mapping[str, Any], counts: int | None) -> None:
        """Raise ValueError when a cut was planned from other token counts: of other samples."""
        if cut.get("counts", counts) != counts:
            raise ValueError(
                "cannot continue the data order: samples of the open window have other numbers of"
                f" tokens than when the position was saved (one of {', '.join(self.components)}):"
                " their shards were written anew; restore them, or give the dataset another name"
                " to take it in as a new one"
            )

    def _changed_blend(
        self, before: Mapping[str, Mapping[str, Any]], slots: int
    ) -> list[Source] | None:
        """Return the sources that take over after `slots` slots of the saved blend.

        Return None when the blend is the same, and add the differences to `changes` else.
        """
        taken = dict(zip(before, self._blend.counts(slots), strict=True))
        gone = [name for name in before if name not in self.components]
        changes = [f"{name} is gone from the blend" for name in gone]
        for name, component in self.components.items():
            if name not in before:
                changes.append(f"{name} is new in the blend, weight {float(component.weight):.4g}")
                continue
            for key, value in (("weight", str(component.weight)), ("epochs", component.epochs)):
                if before[name][key] != value:
                    changes.append(f"{key} of {name}: {before[name][key]} -> {value}")
        if not changes and list(before) == list(self.components):
            return None
        self.changes += changes
        return [component.source(taken.get(name, 0)) for name, component in self.components.items()]


def _leave_out(samples: NDArray[np.int64], datasets: Sequence[int]) -> NDArray[np.int64]:
    """Return the samples that are of none of these datasets."""
    return samples[~np.isin(sample_ids.split(samples)[0], datasets)]
