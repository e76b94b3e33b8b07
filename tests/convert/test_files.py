"""Folders behind URLs are converted as local ones are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import fsspec
import pytest
import torch
from safetensors.torch import load, load_file

from nvmm.commands.convert import main
from nvmm.convert.files import at, publish
from nvmm.convert.models import open_checkpoint
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from tests.convert import families
from tests.damage import changed, data_byte


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/nvmm"):
        files.rm("/nvmm", recursive=True)


@pytest.mark.usefixtures("world")
def test_from_url_to_url_and_back(
    store: fsspec.AbstractFileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    families.language("qwen2", tmp_path / "theirs")
    special = ["<|endoftext|>", "<|im_end|>"]
    train_byte_level_bpe(
        tmp_path / "theirs",
        ["What is it?"],
        vocab_size=300,
        special_tokens=special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    store.put(str(tmp_path / "theirs"), "/nvmm/theirs", recursive=True)
    ours, back = "memory://nvmm/ours", "memory://nvmm/back"
    assert main(["import", "--from", "memory://nvmm/theirs", "--to", ours]) == 0
    # Every file is known, also behind a URL and in the tokenizer's folder.
    capsys.readouterr()
    assert main(["inspect", ours, "--verify"]) == 0
    assert capsys.readouterr().out.endswith("nvmm/ours: every bit is as it was saved\n")
    small = [path for path in store.find("/nvmm/ours") if not path.endswith(".distcp")]
    assert {"/nvmm/ours/.metadata", "/nvmm/ours/tokenizer/tokenizer.json"} < set(small)
    for path in small:
        content = store.cat_file(path)
        store.pipe_file(path, content[:-1] + bytes([content[-1] ^ 4]))
        assert main(["inspect", ours, "--verify"]) == 1
        assert path.removeprefix("/nvmm/ours/") in capsys.readouterr().out
        assert main(["export", "--from", ours, "--to", back, "--format", "qwen2"]) == 2
        assert path.removeprefix("/nvmm/ours/") in capsys.readouterr().err
        store.pipe_file(path, content)
    assert main(["export", "--from", ours, "--to", back, "--format", "qwen2"]) == 0
    found = load(store.cat_file("/nvmm/back/model.safetensors"))
    original = load_file(tmp_path / "theirs" / "model.safetensors")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], value) for name, value in original.items())
    assert store.exists("/nvmm/back/tokenizer.json") and store.exists("/nvmm/back/config.json")
    # A copy on this machine is the checkpoint that a local import writes.
    assert main(["reshard", "--from", ours, "--to", f"file://{tmp_path}/local"]) == 0
    local = str(tmp_path / "local")
    with changed(*data_byte(tmp_path / "local", "embedding.word_embeddings.weight", Random(1))):
        capsys.readouterr()
        assert main(["inspect", local, "--verify"]) == 1
        assert "the bits of embedding.word_embeddings.weight at" in capsys.readouterr().out
    assert main(["verify", "--a", str(tmp_path / "theirs"), "--b", local]) == 0
    assert main(["verify", "--a", ours, "--b", local, "--no-logits"]) == 0
    assert main(["import", "--from", "memory://nvmm/theirs", "--to", ours]) == 2


def test_what_fails_behind_a_url_leaves_nothing(store: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(OSError, match="full"), publish(at("memory://nvmm/out")) as folder:
        (folder / "weights").write_bytes(b"1")
        raise OSError("disk full")
    assert not store.exists("/nvmm/out")
    store.pipe_file("/nvmm/half/__0_0.distcp", b"1")
    with pytest.raises(ValueError, match=r"half is no complete checkpoint"):
        open_checkpoint(at("memory://nvmm/half"))


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        at("nowhere://folder/x")
