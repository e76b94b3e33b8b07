"""A ranker's exports: the score of Transformers, and of vLLM's settings, is our P(True)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nvmm.commands.convert import main
from tests.jobs import rag_run
from tests.jobs.rag_run import DOCUMENTS
from tests.ranks import run_ranks

PAIRS = [
    (question, text)
    for question in ("Who sings?", 'Which "cat" eats?')
    for text in (*DOCUMENTS.values(), "Short.")
]


def ours(rank: int, world: int, init: str, run: Path) -> tuple[list[float], list[list[int]]]:
    """Logit differences by P(True) of the RAG run's ranking, and the prompts' tokens."""
    import torch.distributed as dist

    from nvmm.data.samples.contexts import Ranking
    from nvmm.data.samples.record import members_of
    from nvmm.inference.restore import restore
    from nvmm.jobs.prompts import asking

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    model = restore(run)
    form = Ranking()
    asks = asking(model, form)
    words = [asks.answer_tokens(word) for word in (form.relevant, form.irrelevant)]
    prompts = [
        asks.prompt(members_of({"question": question, "passages": [text]}, source="pair"))
        for question, text in PAIRS
    ]
    table = model.score_continuations(prompts, words).softmax(1)
    return table[:, 0].tolist(), [prompt.text.tokens.tolist() for prompt in prompts]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranker")
    config = rag_run.generator_config(folder / "words")
    config["precision"]["dtype"] = "fp32"
    run_ranks(rag_run.save_generator, 1, config, folder / "run", "fp32")
    return folder / "run"


@pytest.fixture(scope="module")
def expected(run: Path) -> tuple[Tensor, list[list[int]]]:
    [(scores, tokens)] = run_ranks(ours, 1, run)
    return torch.tensor(scores), tokens


def export(run: Path, to: Path, name: str) -> Path:
    assert main(["export", "--from", str(run), "--to", str(to), "--format", name, "--ranker"]) == 0
    return to


def scored(words: Any, model: Any, template: str) -> tuple[Tensor, list[list[int]]]:
    """Scores and tokens as vLLM makes them: the template's text, tokenised as any text is."""
    texts = [
        words.apply_chat_template(
            [{"role": "query", "content": question}, {"role": "document", "content": text}],
            chat_template=template,
            tokenize=False,
        )
        for question, text in PAIRS
    ]
    batch = words(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits, [words(text)["input_ids"] for text in texts]


def test_a_classifier_scores_as_we_rank(
    run: Path, expected: tuple[Tensor, list[list[int]]], tmp_path: Path
) -> None:
    import transformers

    folder = export(run, tmp_path / "classifier", "llama_reward")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label == {0: "True"} and model.config.problem_type is None
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == words.pad_token_id
    template = (folder / "vllm_score_template.jinja").read_text()
    logits, tokens = scored(words, model.eval(), template)
    assert logits.shape == (len(PAIRS), 1)
    assert tokens == expected[1]
    torch.testing.assert_close(logits[:, 0].sigmoid(), expected[0], atol=1e-5, rtol=0)
    assert expected[0].std() > 1e-3, "the scores tell the pairs apart"
    assert not (folder / "vllm_hf_overrides.json").exists()


def test_vllm_s_settings_make_the_same_score(
    run: Path, expected: tuple[Tensor, list[list[int]]], tmp_path: Path
) -> None:
    """By vLLM's rule of `from_2_way_softmax`: the second word's row minus the first's."""
    import transformers

    folder = export(run, tmp_path / "plain", "llama")
    overrides = json.loads((folder / "vllm_hf_overrides.json").read_text())
    assert overrides.keys() == {"architectures", "classifier_from_token", "method"}
    assert overrides["architectures"] == ["LlamaForSequenceClassification"]
    assert overrides["method"] == "from_2_way_softmax"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    false, true = map(words.convert_tokens_to_ids, overrides["classifier_from_token"])
    assert [words.decode([token]) for token in (false, true)] == [" False", " True"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    template = (folder / "vllm_score_template.jinja").read_text()
    logits, tokens = scored(words, model, template)
    assert tokens == expected[1]
    last = logits[torch.arange(len(PAIRS)), torch.tensor([len(ids) - 1 for ids in tokens])]
    score = (last[:, true] - last[:, false]).sigmoid()
    torch.testing.assert_close(score, expected[0], atol=1e-5, rtol=0)


def answers(
    rank: int, world: int, init: str, run: Path, records: list[dict[str, Any]]
) -> list[str]:
    """Our greedy answers to records with contexts."""
    import torch.distributed as dist

    from nvmm.data.samples.contexts import ContextChat
    from nvmm.data.samples.record import members_of
    from nvmm.inference.restore import restore
    from nvmm.jobs.prompts import asking

    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
    model = restore(run)
    asks = asking(model, ContextChat(), 12)
    prompts = [asks.prompt(members_of(record, source="record")) for record in records]
    return model.generate(prompts, 12, share_prefix=True)


def test_a_plain_folder_answers_as_we_do(run: Path, tmp_path: Path) -> None:
    """Messages with contexts through the exported chat template, and greedily from there."""
    import transformers

    question = {"role": "user", "content": "Who sings?"}
    talk = [question, {"role": "assistant", "content": "The bird."}, question]
    contexts = list(DOCUMENTS.values())[:2]
    records: list[dict[str, Any]] = [
        {"messages": [question]},
        {"messages": [question], "contexts": contexts},
        {"messages": talk, "contexts": contexts[:1]},
    ]
    [ours] = run_ranks(answers, 1, run, records)
    folder = export(run, tmp_path / "plain", "llama")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    for record, expected in zip(records, ours, strict=True):
        block = "\n\n".join(record.get("contexts", []))
        before = [{"role": "context", "content": block}] if block else []
        inputs = words.apply_chat_template(
            [*before, *record["messages"]],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            found = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        text = words.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == expected
    assert len(set(ours)) == 3


def test_rankers_that_cannot_be_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nvmm.convert.chat_template import conversation
    from nvmm.convert.models import open_checkpoint
    from nvmm.convert.rankers import Ranker, _Difference
    from nvmm.convert.sources import InMemory, read
    from nvmm.data.samples.contexts import Ranking

    saved = open_checkpoint(run)
    talk = conversation(saved, None)
    assert talk is not None
    with pytest.raises(ValueError, match="No way and True must be one token each"):
        Ranker(Ranking(irrelevant="No way")).words(talk)
    # Of a tied model the rows are those of the word embeddings.
    weight = torch.arange(448 * 3.0).view(448, 3)
    for name in ("output_layer.weight", "embedding.word_embeddings.weight"):
        head = read(_Difference(InMemory({name: weight}), (5, 7)), "head.weight")
        assert torch.equal(head, weight[7:8] - weight[5:6])
    saved.state["config"]["data"]["train"]["build"]["form"] = None
    with pytest.raises(ValueError, match="was trained without a form that ranks"):
        Ranker.of(saved)
    arguments = ["--from", str(run), "--to", str(tmp_path / "x"), "--format", "llama"]
    assert main(["export", *arguments, "--ranker", "--part", "language"]) == 2
    assert "--ranker is of a whole language model" in capsys.readouterr().err
