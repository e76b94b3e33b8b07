"""BLEU and ROUGE-L of captions, against sacrebleu and by hand."""

from __future__ import annotations

import pytest

from nvmm.evaluation.bleu import Bleu
from nvmm.evaluation.caption_rouge import caption_rouge_l

PAIRS = [
    (
        "the dog barks at a passing car loudly",
        ["a dog barks at a passing car", "the dog is barking at a car loudly now"],
    ),
    (
        "rain falls on the roof of a house",
        ["rain is falling on the roof of a small house", "heavy rain falls"],
    ),
]


@pytest.mark.parametrize("order", [1, 2, 4])
def test_bleu_is_sacrebleus(order: int) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    metric = sacrebleu.BLEU(max_ngram_order=order, tokenize="none", smooth_method="none")
    references = [[answers[i] for _, answers in PAIRS] for i in range(2)]
    theirs = metric.corpus_score([prediction for prediction, _ in PAIRS], references).score
    assert Bleu(order).of_corpus(PAIRS) == pytest.approx(theirs / 100, abs=1e-12)


def test_bleu_by_hand() -> None:
    """5 of 6 words and 3 of 5 pairs of "the the cat sat on mat", "the" counts once; no penalty."""
    bleu = Bleu(2)(prediction="the the cat sat on mat", answers=["the cat sat on a mat"])
    assert bleu == pytest.approx((5 / 6 * 3 / 5) ** 0.5)
    short = Bleu(1)(prediction="cat", answers=["the cat"])
    assert short == pytest.approx(2.718281828459045**-1)
    assert Bleu()(prediction="a cat", answers=["a cat"]) == 0.0, "it has no 4-gram"
    assert Bleu()(prediction="", answers=["a cat"]) == 0.0
    with pytest.raises(ValueError, match=r"metric\.order=0 must be at least 1"):
        Bleu(0)


def test_rouge_l_by_hand() -> None:
    """LCS "cat sat on mat" of 6 and 6 words; recall is the other reference's, 1 of 1."""
    answers = ["a cat sat on a mat", "cat"]
    precision, recall = 4 / 6, 1.0
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    score = caption_rouge_l(prediction="The cat sat on the mat.", answers=answers)
    assert score == pytest.approx(expected)
    assert caption_rouge_l(prediction="a dog", answers=["a dog"]) == 1.0
    assert caption_rouge_l(prediction="", answers=["a dog", ""]) == 0.0
