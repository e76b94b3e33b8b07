"""A SentencePiece model without any other file becomes a fast tokenizer with the same ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)
"""SentencePiece's numbers of its models and of the kinds of pieces."""
_SPACE = "\u2581"
_HARD = (
    *(" ", "  a", "a  ", " a b ", "   three   spaces   ", "\n", "a\n\n b", "\ttab\t", "\r\n"),
    *("12345 6.70", "x" * 70, "The model's answer", "if x:\n    return  1\n", f"{_SPACE}a{_SPACE}"),
    *(
        "h\u00e9llo w\u00f6rld",
        "\u65e5\u672c\u8a9e \U0001f600",
        "e\u0301 \ufb01\u0301 \u2167 \u00bd",
    ),
    *("\u00a0no\u3000break", "\u0000\u0001\u007f", "\u0627\u0644\u0639 \u05d0\u05d1", "\u200b"),
)
"""Texts that conversions get wrong: white space, digits, bytes, composed and compatible letters."""


def find(folder: Path) -> Path | None:
    """Return the SentencePiece model of a folder that has no other tokenizer; None without one.

    Raises ValueError where several models differ.
    """
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tekken.json")):
        return None
    paths = sorted(folder.glob("*.model"))
    if len({path.read_bytes() for path in paths}) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"tokenizer.path={folder} has several SentencePiece models: {names}")
    return paths[0] if paths else None


def read(path: Path) -> tuple[Backend, dict[str, str | None]]:
    """Return a SentencePiece model as a fast tokenizer, and its bos, eos and pad tokens.

    Ids are SentencePiece's for any text without special tokens. Control and user-defined pieces
    that are written in a text become their one id. A model that puts a space in front of a text
    (`add_dummy_prefix`) puts it behind such a piece too, as Llama 2's tokenizer.json does.

    Raises ValueError for a file that is no such model, for a kind of model that has no fast form,
    and where the ids of texts that are hard to get right differ.
    """
    where = f"tokenizer.path={path.parent}: {path.name}"
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise ValueError(
            f"{where} needs pip install 'nvmm[sentencepiece]' ({error}); or name a folder with"
            " tokenizer.json"
        ) from error
    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        reference = SentencePieceProcessor(model_proto=path.read_bytes())
    except Exception as error:  # Each of the two raises what it likes.
        raise ValueError(f"{where} is no SentencePiece model ({error})") from error
    problem = _unsupported(proto)
    if problem is None:
        backend = _backend(proto)
        problem = _difference(backend, reference)
    if problem is not None:
        raise ValueError(
            f"{where} {problem}; name a folder with tokenizer.json, or with a tokenizer_config.json"
            " that names the class for Transformers"
        )
    ids = {"bos": reference.bos_id(), "eos": reference.eos_id(), "pad": reference.pad_id()}
    return backend, {
        f"{name}_token": reference.id_to_piece(i) if i >= 0 else None for name, i in ids.items()
    }


def _unsupported(proto: Any) -> str | None:
    """Return what of a model has no fast form; None where all has."""
    if proto.trainer_spec.model_type != _BPE:
        return "is no BPE model; others break ties between pieces in another way"
    if proto.trainer_spec.treat_whitespace_as_suffix:
        return "puts white space behind words (treat_whitespace_as_suffix)"
    if any(piece.type == _UNUSED for piece in proto.pieces):
        return "has unused pieces"
    return None


def _backend(proto: Any) -> Backend:
    """Return the fast tokenizer of a model's pieces and of what it does to a text before them."""
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    # 1. Pieces. Their order is their ids.
    backend = Backend(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(proto.pieces)},
            merges=_merges(proto),
            unk_token=next(piece.piece for piece in proto.pieces if piece.type == _UNKNOWN),
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    )
    # 2. The text before it is cut: SentencePiece's map of characters, white space, prefix.
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    # 3. And back.
    ends = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    whole = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
    backend.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=whole[piece.type])
            for piece in proto.pieces
            if piece.type in whole
        ]
    )
    return backend


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Return the merges of a BPE model: the pair whose joint piece has the best score goes first.

    A piece of n characters has up to n - 1 pairs; pairs of one piece are in no order that matters,
    as a text holds one of them at a place.
    """
    known = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    ordered = sorted(
        (piece for piece in proto.pieces if piece.type == _NORMAL and len(piece.piece) > 1),
        key=lambda piece: -piece.score,
    )
    merges = []
    for piece in ordered:
        text = piece.piece
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        there = [pair for pair in pairs if pair[0] in known and pair[1] in known]
        merges += sorted(there, key=lambda pair: (known[pair[0]], known[pair[1]]))
    return merges


def _difference(backend: Backend, reference: Any) -> str | None:
    """Return a text whose ids differ from SentencePiece's, in words; None where none does."""
    for text in _HARD:
        expected, found = reference.encode(text), backend.encode(text, add_special_tokens=False).ids
        if found != expected:
            return f"reads {text!r} as {expected}, and its fast form as {found}"
    return None
