"""Arithmetic in an answer, computed without running it: ConvFinQA, TAT-QA.

Chen et al. 2022, "ConvFinQA" (arXiv:2210.03849). Gold is a number that a formula gave. ChatRAG
Bench's script looks for the number or the formula in the answer; ChatQA's paper runs the answer's
formula through a calculator first. `convfinqa_accuracy` does both.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence

_LONGEST = 1000
"""Characters of the longest formula that is computed."""
_OPERATIONS: dict[type[ast.AST], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_PERCENT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*%")
_ARITHMETIC = re.compile(r"[\d.()+\-*/\s]+", re.ASCII)
_FORMULA = re.compile(r"[\d.(+\-$][\d.,()+\-*/$%\s]*")
_NOTE = re.compile(r"\((\b\w+\b)\)")
_TYPOGRAPHY = str.maketrans("−–×÷", "--*/")


def calculate(formula: str) -> float | None:
    """Return the value of a formula of numbers with + - * / and parentheses, else None.

    Numbers may have `$` before them, `,` between digits and `%` behind them (a hundredth). Nothing
    of it is run: the syntax tree is walked, and whatever else is in it makes the formula none.
    So do a division by zero and a value that is not finite.
    """
    if len(formula) > _LONGEST:
        return None
    text = formula.translate(_TYPOGRAPHY).replace("$", "").strip()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = _PERCENT.sub(r"(\1/100)", text)
    # Leading zeros are no number in Python.
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", text)
    if not _ARITHMETIC.fullmatch(text):
        return None
    try:
        value = _value(ast.parse(" ".join(text.split()), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no arithmetic")


def formulas(text: str) -> list[str]:
    """Return the parts of a text that are formulas of two numbers or more, in their order."""
    found = (match.group().strip(" ,.+-*/\n\t") for match in _FORMULA.finditer(_tidy(text)))
    return [part for part in found if re.search(r"\d\D*[-+*/]\D*\d", part)]


def convfinqa_accuracy(
    question: str = "", calculator: bool = True, *, prediction: str, answers: Sequence[str]
) -> float:
    """Return 1.0 if the prediction has the number that gold is, or computes it, else 0.0.

    answers: the executed answer (a number), then accepted formulas; each stands for itself.
    question: "percent" in it lets a number stand in hundredths, as ChatRAG Bench's script has it.
    calculator: compute the prediction's formulas; False is the script's rule alone.

    The prediction is cleaned as the script does: without `,`, `$`, "million", "billion" and words
    in parentheses. A number counts where its digits occur, exactly or rounded to 3 or 2 places.
    """
    text = _tidy(prediction).replace(",", "").replace("$", "")
    text = " ".join(text.split())
    for answer in answers:
        if answer.strip() and answer in text:
            return 1.0
        gold = calculate(answer)
        if gold is None:
            continue
        if _is_number(answer) and any(form in text for form in _forms(gold, question, text)):
            return 1.0
        if calculator and any(_equal(formula, gold, answer) for formula in formulas(prediction)):
            return 1.0
    return 0.0


def _tidy(text: str) -> str:
    text = text.translate(_TYPOGRAPHY).replace("million", "").replace("billion", "")
    return _NOTE.sub(lambda match: match[0] if _is_number(match[1]) and _glued(match) else "", text)


def _glued(match: re.Match[str]) -> bool:
    """Return whether parentheses around a number are of a formula, not a note's."""
    before = match.string[: match.start()].rstrip()
    return before[-1:] in ("+", "-", "*", "/", "(", "")


def _forms(gold: float, question: str, text: str) -> list[str]:
    """Return the spellings of a number that the script accepts."""
    forms = [str(gold), str(round(gold, 3)), str(round(gold, 2))]
    if "percent" in question:
        forms += [str(gold * 100), str(round(gold * 100, 1)), str(round(gold * 100, 2))]
    if gold.is_integer():
        forms.append(str(int(gold)))
    if "decrease" in text and gold < 0:
        forms.append(str(-gold))
    return forms


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _equal(formula: str, gold: float, written: str) -> bool:
    """Return whether a formula has the value of gold, at the places that gold is written with."""
    value = calculate(formula)
    if value is None:
        return False
    places = len(written.partition(".")[2]) if _is_number(written) else 5
    return math.isclose(round(value, places), gold, rel_tol=1e-9, abs_tol=1e-9)
