"""Rules of sounds: what the data cut must be what the model's audio encoder takes. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nvmm.config.problem import MISSING, Problem, View
from nvmm.config.signatures import class_attribute, value_of

_AUDIO = "model.encoders.audio"
_ENCODER, _CONNECTOR = f"{_AUDIO}.encoder", f"{_AUDIO}.connector"


def sounds(view: View) -> Iterator[Problem]:
    """Check every builder that cuts sounds to windows against encoder, connector and decoder."""
    if not isinstance(view.get("model"), Mapping):
        return
    for key, build in _builders(view):
        front_end = _value(build, "front_end")
        if not isinstance(front_end, Mapping):
            continue
        if not isinstance(view.get(_ENCODER), Mapping):
            yield Problem(f"{key}.front_end", "{...}", f"needs an encoder, {_ENCODER}")
            continue
        frames = _frames(front_end)
        yield from _windows(view, f"{key}.front_end", front_end, frames)
        yield from _features(view, key, build, frames)
        yield from _placement(view, key, build, front_end)


def _windows(
    view: View, key: str, front_end: Mapping[str, Any], frames: int | None
) -> Iterator[Problem]:
    """Bins and frames of a window."""
    bins, wanted = _integer(front_end, "bins"), view.integer(f"{_ENCODER}.num_mel_bins")
    if bins is not None and wanted is not None and bins != wanted:
        yield Problem(f"{key}.bins", bins, f"must be {_ENCODER}.num_mel_bins={wanted}")
    name, most = _most_frames(view)
    if frames is not None and most is not None and frames > most:
        allowed = f"gives {frames} frames, and {_ENCODER}.{name} takes at most {most}"
        yield Problem(f"{key}.window", _value(front_end, "window"), allowed)


def _features(
    view: View, key: str, build: Mapping[str, Any], frames: int | None
) -> Iterator[Problem]:
    """Features of a window, and the windows that lose their silent end."""
    features, given = _num_features(view, frames), _integer(build, "tokens_per_window")
    if features is not None and given is not None and features != given:
        allowed = f"must be {features}, what {_ENCODER} makes of a window"
        yield Problem(f"{key}.tokens_per_window", given, allowed)
    connector = str(view.get(f"{_CONNECTOR}._target_"))
    if features not in (None, 1) and class_attribute(connector, "reads_items"):
        half = -(-(frames or 0) // 2)
        allowed = f"must be {half}: {_CONNECTOR} takes one feature a window, not {features}"
        yield Problem(f"{_ENCODER}.pool", view.get(f"{_ENCODER}.pool"), allowed)
    if _value(build, "mask_padding") is True:
        target = str(view.get(f"{_ENCODER}._target_"))
        if class_attribute(target, "reads_extents") is False:
            allowed = f"must be false: {_ENCODER}._target_={target} takes windows whole"
            yield Problem(f"{key}.mask_padding", True, allowed)


def _placement(
    view: View, key: str, build: Mapping[str, Any], front_end: Mapping[str, Any]
) -> Iterator[Problem]:
    """Whether the decoder reads the windows where they are placed, and a sound fits into a row."""
    target = str(build.get("_target_"))
    placement = _value(build, "placement") or class_attribute(target, "placement")
    model = view.get("model._target_")
    attends = view.get("model.cross_attention") is not None
    name, value = (
        (f"{key}.placement", placement)
        if _value(build, "placement") is not None
        else (f"{key}._target_", target)
    )
    if placement == "attended" and not attends:
        yield Problem(name, value, f"must be sequence: model._target_={model} attends to no media")
    if placement != "sequence":
        return
    if attends and (width := view.get("model.cross_attention.kv_size")) is not None:
        allowed = f"must be attended: model.cross_attention.kv_size={width} is no width of words"
        yield Problem(name, value, allowed)
    length, windows = view.integer("data.sequence_length"), _integer(front_end, "most_windows")
    tokens = _integer(build, "tokens_per_window")
    if length and windows and tokens and length <= windows * tokens:
        yield Problem(
            f"{key}.front_end.most_windows",
            windows,
            f"x tokens_per_window={tokens} must be below data.sequence_length={length}",
        )


def _builders(view: View) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the key and config of every builder: of train, validation and a blend's own."""
    for split in ("train", "validation"):
        build = view.get(f"data.{split}.build")
        if isinstance(build, Mapping):
            yield f"data.{split}.build", build
    blend = view.get("data.blend")
    for number, entry in enumerate(blend if isinstance(blend, list) else []):
        build = entry.get("build") if isinstance(entry, Mapping) else None
        if isinstance(build, Mapping):
            yield f"data.blend[{number}].build", build


def _most_frames(view: View) -> tuple[str, int | None]:
    """Return the key that limits an encoder's frames, and the limit."""
    positions = view.integer(f"{_ENCODER}.max_source_positions")
    if positions is not None:
        return "max_source_positions", 2 * positions
    picture, bins = view.integer(f"{_ENCODER}.picture"), view.integer(f"{_ENCODER}.num_mel_bins")
    return "picture", picture**2 // bins if picture and bins else None


def _num_features(view: View, frames: int | None) -> int | None:
    """Return an encoder's features of a whole window: an encoder with pictures has one."""
    if view.integer(f"{_ENCODER}.picture") is not None:
        return 1
    pool = view.integer(f"{_ENCODER}.pool")
    return -(-frames // 2) // pool if frames and pool and pool > 0 else None


def _frames(front_end: Mapping[str, Any]) -> int | None:
    """Return the frames of a window (`FrontEnd.frames`)."""
    rate, hop = _integer(front_end, "rate"), _integer(front_end, "frame_hop")
    window = _value(front_end, "window")
    if not rate or not hop or hop < 0 or not isinstance(window, int | float):
        return None
    return round(window * rate) // hop + (_value(front_end, "compression") != "whisper")


def _value(node: Mapping[str, Any], name: str) -> Any:
    value = value_of(node, name)
    return None if value == MISSING else value


def _integer(node: Mapping[str, Any], name: str) -> int | None:
    value = _value(node, name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


RULES = (sounds,)
