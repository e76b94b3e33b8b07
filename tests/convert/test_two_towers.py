"""Two BERT folders -> a checkpoint of two towers -> each folder again; who embeds what."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvmm.batch import POSITIVE, QUERY
from nvmm.commands.convert import main
from nvmm.convert import models
from nvmm.data.prepare.layouts import BeirFolder
from nvmm.evaluation.beir import Retrieval
from nvmm.evaluation.benchmark import Settings
from nvmm.jobs.encode import Encode
from tests.convert.test_bert import TEXTS, folder_of, opened, vectors
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders query and context of sentence-transformers, of other weights, and ours of both."""
    folder = tmp_path_factory.mktemp("towers")
    for number, name in enumerate(models.TOWERS):
        model = folder_of(folder / name, "plain", "cls")
        # The towers share a vocabulary, which each folder's training orders anew.
        for file in ("tokenizer.json", "vocab.txt") if number else ():
            shutil.copy(folder / "query" / file, folder / name / file)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.3 * number)
        model.save_pretrained(folder / name)
        torch.save(vectors(model, folder / name, "cls", 20), folder / f"{name}.pt")
    sources = [f"--from={name}={folder / name}" for name in models.TOWERS]
    assert main(["import", *sources, "--to", str(folder / "ours")]) == 0
    return folder


def embed(
    rank: int, world: int, init: str, folder: Path, parallel: dict[str, int]
) -> tuple[Tensor, Tensor]:
    import torch.distributed as dist

    from nvmm.inference.restore import restore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    encode = restore(folder / "ours", parallel=parallel).encoder(2)
    return encode(TEXTS, role=QUERY), encode(TEXTS, role=POSITIVE)


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"pipeline_model_parallel_size": 2},
    ],
    ids=str,
)
def test_each_tower_gives_the_vectors_of_its_folder(
    parallel: dict[str, int], folders: Path
) -> None:
    world = max(parallel.values(), default=1)
    for found in run_ranks(embed, world, folders, parallel):
        for name, mine in zip(models.TOWERS, found, strict=True):
            expected = torch.load(folders / f"{name}.pt")
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(*found, atol=0.1)


def test_each_tower_is_exported_as_its_folder_was(folders: Path, tmp_path: Path) -> None:
    for name in models.TOWERS:
        arguments = ["--from", str(folders / "ours"), "--to", str(tmp_path / name)]
        assert main(["export", *arguments, "--format", "bert", "--part", name]) == 0
        before, after = (
            load_file(path / name / "model.safetensors") for path in (folders, tmp_path)
        )
        kept = {key for key in after if not key.startswith("pooler.")}
        assert kept and all(torch.equal(after[key], before[key]) for key in kept)
        about = json.loads((tmp_path / name / "config_sentence_transformers.json").read_text())
        assert about["similarity_fn_name"] == "dot"
    names = list(models.open_checkpoint(folders / "ours").source.spec)
    assert {name.partition(".")[0] for name in names} == set(models.TOWERS)


def test_jobs_and_evaluation_send_each_side_to_its_tower(folders: Path, tmp_path: Path) -> None:
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    for file in ("corpus", "queries"):
        rows = [json.dumps({"_id": f"{i}", "text": text or "it"}) for i, text in enumerate(TEXTS)]
        (beir / f"{file}.jsonl").write_text("\n".join(rows))
    qrels = [f"{i}\t{i}\t1" for i in range(len(TEXTS))]
    (beir / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *qrels]))
    texts = [text or "it" for text in TEXTS]
    with opened(folders / "ours") as restored:
        encode = restored.encoder(2)
        sides = {"queries": encode(texts, role=QUERY), "corpus": encode(texts, role=POSITIVE)}
        for side, expected in sides.items():
            work = Encode(BeirFolder(str(beir)), side).prepare(restored)  # type: ignore[arg-type]
            found = torch.tensor(work.rows(range(len(texts)))["vector"].to_pylist())
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # in other batches
        benchmark = Retrieval(folder=str(beir), cutoffs=[1, 2])
        journal: Any = None
        scores = benchmark.run(restored, Settings(batch_size=2), journal).summary
    assert not torch.allclose(sides["queries"], sides["corpus"], atol=0.1)
    best = (sides["queries"] @ sides["corpus"].t()).argmax(1)
    right = (best == torch.arange(len(texts))).float().mean().item()
    assert scores["hit_rate_at_1"] == pytest.approx(right)
    assert {name for name in scores if name.startswith("mrr")} == {"mrr_at_1", "mrr_at_2"}


def test_what_is_no_pair_of_towers_is_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query, context, to = f"query={folders / 'query'}", f"context={folders / 'context'}", "--to"
    folder_of(tmp_path / "mean", "plain", "mean")
    shutil.copytree(folders / "context", tmp_path / "words")
    words = tmp_path / "words" / "tokenizer_config.json"
    words.write_text(words.read_text().replace('"do_lower_case": true', '"do_lower_case": false'))
    one, ours = str(folders / "query"), str(folders / "ours")
    assert main(["import", "--from", one, to, str(tmp_path / "one")]) == 0
    refused = [
        (["import", "--from", query], "gives query; without model="),
        (["import", f"--from={query}", f"--from=context={tmp_path / 'mean'}"], "be one model"),
        (["import", f"--from={query}", f"--from=context={tmp_path / 'words'}"], "two tokenizers"),
        (["import", f"--from={query}", f"--from={context}", "model=bert_tiny"], "has no query"),
        (["export", "--from", ours, "--format", "bert"], "has two towers: export each"),
        (["export", "--from", ours, "--format", "bert", "--part", "vision"], "has no vision"),
        (
            ["export", "--from", str(tmp_path / "one"), "--format", "bert", "--part", "query"],
            "has no query",
        ),
    ]
    capsys.readouterr()
    for arguments, says in refused:
        [command, *rest] = arguments
        assert main([command, to, str(tmp_path / "never"), *rest]) == 2, arguments
        assert says in capsys.readouterr().err
    assert main(["verify", "--a", one, "--b", ours]) == 2
    assert "has no language" in capsys.readouterr().err
