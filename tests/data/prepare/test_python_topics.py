"""The text of nemotron4/tiny: whole, apart, and a tokenizer of the size that its model has."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import pytest
import yaml

from nvmm.config.check import config_dir
from nvmm.data.prepare import python_topics
from nvmm.data.samples.tokenizer import Tokenizer


def texts(folder: Path, split: str) -> dict[str, str]:
    """Key -> passage."""
    found = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                file = tar.extractfile(member)
                assert file is not None
                found[member.name.removesuffix(".txt")] = file.read().decode()
    return found


def test_shards_hold_every_topic_once_and_the_model_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    python_topics.build(tmp_path)
    split = python_topics.topics()
    read = {name: texts(tmp_path, name) for name in split}
    for name, topics in split.items():
        joined: dict[str, list[str]] = {}
        for key, passage in read[name].items():
            joined.setdefault(re.sub(r"-\d+$", "", key), []).append(passage)
        for topic, text in topics:
            assert "\n\n".join(joined[topic.replace(".", "_")]) == text.strip()
        assert len(joined) == len(topics)
    assert not read["train"].keys() & read["validation"].keys()
    tokenizer = Tokenizer(
        str(tmp_path / "tokenizer"), image_token="<unk>", end_of_turn="<extra_id_1>"
    )
    model = yaml.safe_load((config_dir() / "language/nemotron4_tiny.yaml").read_text())
    assert tokenizer.vocab_size == model["vocab_size"] == model["padded_vocab_size"]
    encoded = {passage: tokenizer.encode(passage) for passage in read["validation"].values()}
    assert all(tokenizer.decode(ids) == passage for passage, ids in encoded.items())
    assert sum(map(len, encoded.values())) < 0.5 * sum(map(len, encoded))
