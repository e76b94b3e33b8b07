"""M-BEIR's metrics against their definitions, and a checkpoint that embeds texts and pictures."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image

from nvmm.data.prepare.mbeir import judged
from nvmm.data.samples.tokenizer import train_byte_level_bpe
from nvmm.evaluation.benchmark import Settings
from nvmm.evaluation.mbeir import UniversalRetrieval, evaluate
from tests import tiny
from tests.ranks import run_ranks


def test_metrics_equal_their_definitions_on_random_runs() -> None:
    torch.manual_seed(0)
    queries, documents = torch.randn(300, 6), torch.randn(40, 6)
    ids = [f"d{n}" for n in range(40)]
    modalities = ["text" if n % 3 else "image" for n in range(40)]
    relevant = [{f"d{n % 40}": 1, f"d{(7 * n) % 40}": 1} for n in range(300)]
    targets = ["image" if n % 2 else "text" for n in range(300)]
    scores = evaluate(queries, documents, relevant, ids, modalities, targets, [1, 5, 10])
    hits = dict.fromkeys((1, 5, 10), 0)
    right = dict.fromkeys((1, 5), 0.0)
    ndcg = 0.0
    for number in range(300):
        order = sorted(range(40), key=lambda d: -float(queries[number] @ documents[d]))
        for k in hits:
            hits[k] += any(ids[d] in relevant[number] for d in order[:k])
        for k in right:
            right[k] += sum(modalities[d] == targets[number] for d in order[:k]) / k
        places = [place for place, d in enumerate(order[:10]) if ids[d] in relevant[number]]
        ideal = range(len(relevant[number]))
        ndcg += sum(1 / math.log2(p + 2) for p in places) / sum(1 / math.log2(p + 2) for p in ideal)
    assert scores == pytest.approx(
        {f"hit_rate_at_{k}": hits[k] / 300 for k in hits}
        | {f"modality_accuracy_at_{k}": right[k] / 300 for k in right}
        | {"ndcg_at_10": ndcg / 300}
    )


def test_judgements_of_other_queries_have_no_score(tmp_path: Path) -> None:
    item = '"modality": "text", "txt": "a"'
    (tmp_path / "pool").write_text(f'{{"did": "1:1", {item}}}\n')
    (tmp_path / "queries").write_text('{"qid": "1:1", "query_modality": "text", "query_txt": "a"}')
    (tmp_path / "instructions").write_text("dataset_id\tquery_modality\tcand_modality\n")
    files = {name: str(tmp_path / name) for name in ("pool", "queries", "qrels", "instructions")}
    model: Any = None
    for line, message in (
        ("1:2 0 1:1 1 0", r"of 2 judged queries 1 are not in .*: \['1:2'\]; 0 of their candidates"),
        ("1:1 0 1:5 1 0", r"0 are not in .*; 1 of their candidates are not in .*: \['1:5'\]"),
    ):
        (tmp_path / "qrels").write_text(f"1:1 0 1:1 1 0\n{line}\n")
        with pytest.raises(ValueError, match=message):
            UniversalRetrieval(**files, folder=str(tmp_path)).run(model, Settings(), model)


def test_oven_and_infoseek_keep_their_own_candidates() -> None:
    qrels = {"5:1": {"5:2": 1, "6:2": 1}, "6:1": {"5:9": 1}, "2:1": {"3:1": 1}}
    assert judged(qrels) == {"5:1": {"5:2": 1}, "2:1": {"3:1": 1}}


def save(rank: int, world: int, init: str, folder: Path) -> None:
    """Write a checkpoint of MM-Embed's graph with random weights."""
    from hydra.utils import instantiate

    from nvmm.checkpoint.save import Checkpoint
    from nvmm.data.samples.tokenizer import Tokenizer
    from nvmm.parallel.parameters import build_chunks
    from nvmm.parallel.setup import Parallel, Precision
    from tests.test_evaluate import NoOptimizer

    words = train_byte_level_bpe(
        folder / "tokenizer",
        ["Instruct: Find it.\nQuery: A red square."] * 9,
        vocab_size=300,
        special_tokens=["<image>", "<s>", "</s>", "<pad>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    tokenizer = {"path": str(words), "image_token": "<image>", "end_of_turn": "</s>"}
    model = tiny.multimodal(language=tiny.embedder("Mean"))
    config = {
        "model": model,
        "tokenizer": {"_target_": "nvmm.data.samples.tokenizer.Tokenizer", **tokenizer},
        "precision": {"_target_": "nvmm.parallel.setup.Precision", "dtype": "fp32"},
        "backend": "native",
        "data": {
            "sequence_length": 64,
            "train": {
                "build": {
                    "_target_": "nvmm.data.samples.retrieval.RetrievalBuilder",
                    "_partial_": True,
                    "num_negatives": 0,
                    "in_batch_negatives": True,
                    "masking": "mm_embed",
                    "tokens_per_tile": 4,
                    "tile_size": 16,
                }
            },
        },
    }
    parallel = Parallel()
    parallel.initialize(seed=1, rank=rank, world_size=world, init_method=init)
    chunks = build_chunks(instantiate(model, _convert_="all"), parallel, Precision(), seed=5)
    state = {"config": config, "tokenizer_digest": Tokenizer(**tokenizer).digest}
    Checkpoint(directory=folder / "run" / "checkpoints").save(3, chunks, NoOptimizer(), state)


def score(
    rank: int,
    world: int,
    init: str,
    folder: Path,
    parallel: dict[str, int],
    batch_size: int,
    judge: Literal["nvmm", "mteb"] = "nvmm",
    files: dict[str, str] | None = None,
) -> Any:
    import torch.distributed as dist

    from nvmm.evaluation.benchmark import Settings
    from nvmm.evaluation.journal import Journal
    from nvmm.inference.restore import restore

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    model = restore(folder / "run", parallel=parallel)
    names = ("pool", "queries", "qrels", "instructions")
    files = files or {"folder": str(folder)} | {name: str(folder / name) for name in names}
    benchmark = UniversalRetrieval(**files, judge=judge)
    journal = Journal(folder / "out", {}, model.path)
    return benchmark.run(model, Settings(batch_size=batch_size), journal).summary


def write_set(folder: Path) -> dict[str, str]:
    """Nine candidates, and queries that equal them: texts, pictures and both; the parameters of
    UniversalRetrieval and MBeirFiles."""
    pool, queries, qrels = [], [], []
    for number in range(9):
        stream = io.BytesIO()
        Image.new("RGB", (20, 20), (25 * number, 10, 200)).save(stream, "PNG")
        (folder / f"{number}.png").write_bytes(stream.getvalue())
        kind = ("text", "image", "image,text")[number % 3]
        text = "red " * number + "square" if kind != "image" else None
        image = f"{number}.png" if kind != "text" else None
        pool.append({"did": f"1:{number}", "txt": text, "img_path": image, "modality": kind})
        queries.append(
            {
                "qid": f"1:{number}",
                "query_txt": text,
                "query_img_path": image,
                "query_modality": kind,
                "pos_cand_list": [f"1:{number}"],
            }
        )
        qrels.append(f"1:{number} 0 1:{number} 1 0")
    for name, lines in (("pool", pool), ("queries", queries)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "qrels").write_text("\n".join(qrels))
    kinds = ("text", "image", "image,text")
    rows = ["dataset_id\tquery_modality\tcand_modality\tprompt_1"]
    rows += [f"1\t{kind}\t{kind}\tFind {kind}." for kind in kinds]
    (folder / "instructions").write_text("\n".join(rows))
    return {"folder": str(folder)} | {
        name: str(folder / name) for name in ("pool", "queries", "qrels", "instructions")
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a set."""
    folder = tmp_path_factory.mktemp("mm_embed")
    run_ranks(save, 1, folder)
    write_set(folder)
    return folder


@pytest.mark.slow
def test_a_checkpoint_ranks_texts_and_pictures_at_any_layout(saved: Path) -> None:
    whole = run_ranks(score, 1, saved, {}, 2)[0]
    assert whole["queries"] == 9 and whole["hit_rate_at_10"] == 1.0
    assert 0 < whole["hit_rate_at_1"] <= whole["hit_rate_at_5"] <= 1
    for layout in ({"tensor_model_parallel_size": 2}, {}):
        assert run_ranks(score, 2, saved, layout, 3) == [pytest.approx(whole)] * 2


@pytest.mark.slow
def test_mteb_gives_the_same_scores_of_texts_and_pictures(saved: Path) -> None:
    ours = run_ranks(score, 1, saved, {}, 2)[0]
    theirs = run_ranks(score, 1, saved, {}, 4, "mteb")[0]
    assert theirs["judge"] == "mteb"
    assert 0 < ours["ndcg_at_10"] < 1
    for key in ("ndcg_at_10", *(f"hit_rate_at_{k}" for k in (1, 5, 10))):
        assert theirs[key] == pytest.approx(ours[key], abs=2e-5), key
