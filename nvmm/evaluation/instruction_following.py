"""Verifiable instructions: whether an answer has so many words, ends with a phrase, is JSON, ...

The ids and parameters are those of IFEval (Zhou et al. 2023, arXiv:2311.07911), so that its
published data can be scored. Each verifier is a pure function of an answer. Two things differ from
the authors' code: sentences and words in capitals are counted by rules of ours, where theirs are
NLTK's, and no language is detected (`language:response_language` is unknown here, and the case of
letters is checked without it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Verifier = Callable[..., bool]
LESS_THAN, AT_LEAST = "less than", "at least"
RELATIONS = (LESS_THAN, AT_LEAST)
DIRECTIONS = ("ascending", "descending")
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
"""What `constrained_response` lets one choose from."""
_ABBREVIATIONS = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|sr|jr|st|vs|etc|e\.g|i\.e|fig|no|inc|ltd)\.$", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s+|$)")


def follows(answer: str, name: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether an answer follows an instruction; an empty one follows none.

    arguments: of the verifier; those that are None, as published files have them, are left out.

    Raises ValueError for an unknown instruction, and for arguments that it does not take.
    """
    if name not in VERIFIERS:
        raise ValueError(f"unknown instruction {name!r}; known are {', '.join(VERIFIERS)}")
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        followed = VERIFIERS[name](answer, **given)
    except (TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{name} does not take {given!r}: {error}") from error
    return bool(answer.strip()) and followed


def follows_loosely(answer: str, name: str, arguments: Mapping[str, Any]) -> bool:
    """Return whether an answer follows an instruction without its first or last line, or without
    asterisks: IFEval's loose criterion."""
    return any(follows(variant, name, arguments) for variant in variants(answer))


def variants(answer: str) -> list[str]:
    """Return the eight forms of an answer that the loose criterion accepts."""
    lines = answer.split("\n")
    cuts = [answer, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cuts, *(cut.replace("*", "") for cut in cuts)]


def accuracies(followed: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Return the share of prompts whose instructions are all followed, and that of instructions.

    followed: of each prompt, whether each of its instructions is; at least one.
    """
    each = [one for prompt in followed for one in prompt]
    return sum(map(all, followed)) / len(followed), sum(each) / len(each)


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text, which end with a full stop, a mark or a paragraph."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        start = 0
        for end in _SENTENCE_END.finditer(paragraph):
            if _ABBREVIATIONS.search(paragraph[start : end.end()]):
                continue
            found.append(paragraph[start : end.end()].strip())
            start = end.end()
        found.append(paragraph[start:].strip())
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def compare(count: int, relation: str, limit: int) -> bool:
    """Return whether a count is `less than` or `at least` a limit."""
    if relation not in RELATIONS:
        raise ValueError(f"relation {relation!r} must be one of {', '.join(RELATIONS)}")
    return count < limit if relation == LESS_THAN else count >= limit


def existence(answer: str, *, keywords: Sequence[str]) -> bool:
    """Every keyword is there, in any case."""
    return all(word.lower() in answer.lower() for word in keywords)


def frequency(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword is there so often."""
    return compare(answer.lower().count(keyword.lower().strip()), relation, frequency)


def forbidden_words(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    """None of the words is there as a whole word."""
    found = (re.search(rf"\b{re.escape(word)}\b", answer, re.I) for word in forbidden_words)
    return not any(found)


def letter_frequency(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A letter is there so often, in any case."""
    return compare(answer.lower().count(letter.lower()), let_relation, let_frequency)


def number_sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    """It has so many sentences."""
    return compare(len(sentences(answer)), relation, num_sentences)


def number_words(answer: str, *, num_words: int, relation: str) -> bool:
    """It has so many words."""
    return compare(len(words(answer)), relation, num_words)


def number_paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    """It has so many paragraphs, with *** between them."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    inner = parts[1:-1]
    return all(inner) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(
    answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """It has so many paragraphs, with an empty line between them, and one begins with a word."""
    parts = [part.strip() for part in answer.split("\n\n")]
    count = sum(map(bool, parts))
    if not 1 <= nth_paragraph <= count:
        return False
    begins = parts[nth_paragraph - 1].split()
    first = re.split(r"[.,?!'\"]", begins[0].lstrip("'\""))[0] if begins else ""
    return count == num_paragraphs and first.lower() == first_word.lower()


def number_placeholders(answer: str, *, num_placeholders: int) -> bool:
    """It has at least so many placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def postscript(answer: str, *, postscript_marker: str) -> bool:
    """It has a postscript that begins with the marker; P.S. and P.P.S may have spaces."""
    letters = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = letters.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(rf"\s*{marker}.*$", answer.lower(), re.MULTILINE) is not None


def number_bullet_lists(answer: str, *, num_bullets: int) -> bool:
    """It has exactly so many bullet points, which begin with * or -."""
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", answer, re.MULTILINE)) == num_bullets


def constrained_response(answer: str) -> bool:
    """It has one of `CHOICES`."""
    return any(choice in answer for choice in CHOICES)


def number_highlighted_sections(answer: str, *, num_highlights: int) -> bool:
    """It has at least so many *highlighted* parts."""
    single = re.findall(r"\*[^\n\*]*\*", answer)
    double = re.findall(r"\*\*[^\n\*]*\*\*", answer)
    return sum(bool(part.strip("*").strip()) for part in [*single, *double]) >= num_highlights


def multiple_sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    """It has at least so many sections, each of which begins with the word and a number."""
    mark = rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?"
    return len(re.split(mark, answer)) - 1 >= num_sections


def json_format(answer: str) -> bool:
    """It is JSON, in a code fence or not."""
    text = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(answer: str) -> bool:
    """It has a title in double angular brackets."""
    found = re.findall(r"<<[^\n]+>>", answer)
    return any(text.lstrip("<").rstrip(">").strip() for text in found)


def two_responses(answer: str) -> bool:
    """It is two different answers, with ****** between them."""
    parts = [part.strip() for part in answer.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(answer: str, *, prompt_to_repeat: str) -> bool:
    """It begins with the prompt, in any case."""
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def start_checker(answer: str, *, start_phrase: str) -> bool:
    """It begins with a phrase, in any case (ours; IFEval has none)."""
    return answer.strip().strip('"').lower().startswith(start_phrase.strip().lower())


def end_checker(answer: str, *, end_phrase: str) -> bool:
    """It ends with a phrase, in any case."""
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(answer: str) -> bool:
    """It stands in double quotation marks."""
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words are all in capitals."""
    found = re.findall(r"[^\W_][\w'-]*", answer)
    return compare(sum(word.isupper() for word in found), capital_relation, capital_frequency)


def english_capital(answer: str) -> bool:
    """All letters are capitals."""
    return answer.isupper()


def english_lowercase(answer: str) -> bool:
    """No letter is a capital."""
    return answer.islower()


def no_comma(answer: str) -> bool:
    """There is no comma."""
    return "," not in answer


def alphabetical(answer: str, *, direction: str) -> bool:
    """Its words are in alphabetical order, `ascending` or `descending`, in any case (ours)."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r} must be one of {', '.join(DIRECTIONS)}")
    found = [word.lower() for word in words(answer)]
    return found == sorted(found, reverse=direction == DIRECTIONS[1])


VERIFIERS: dict[str, Verifier] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:start_checker": start_checker,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
    "order:alphabetical": alphabetical,
}
"""Name of an instruction -> its verifier."""
