"""The numbers from 0 to 9 in eight languages, as a sentence and as an answer to a question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """sentence: with a place for the number's word. words: of 0 to 9."""

    sentence: str
    question: str
    words: tuple[str, ...]

    def say(self, number: int) -> str:
        """Return the sentence that names a number."""
        return self.sentence.format(self.words[number])


def _language(sentence: str, question: str, words: str) -> Language:
    return Language(sentence, question, tuple(words.split()))


LANGUAGES = {
    "de": _language(
        "Das ist {}.",
        "Welche Zahl ist das?",
        "null eins zwei drei vier fünf sechs sieben acht neun",
    ),
    "en": _language(
        "It is {}.",
        "Which number is it?",
        "zero one two three four five six seven eight nine",
    ),
    "es": _language(
        "Esto es {}.",
        "¿Qué número es?",
        "cero uno dos tres cuatro cinco seis siete ocho nueve",
    ),
    "fr": _language(
        "C'est {}.",
        "Quel nombre est-ce ?",
        "zéro un deux trois quatre cinq six sept huit neuf",
    ),
    "it": _language(
        "Questo è {}.",
        "Che numero è?",
        "zero uno due tre quattro cinque sei sette otto nove",
    ),
    "nl": _language(
        "Dit is {}.",
        "Welk getal is dit?",
        "nul een twee drie vier vijf zes zeven acht negen",
    ),
    "pt": _language(
        "Isto é {}.",
        "Que número é este?",
        "zero um dois três quatro cinco seis sete oito nove",
    ),
    "sv": _language(
        "Det är {}.",
        "Vilket tal är det?",
        "noll ett två tre fyra fem sex sju åtta nio",
    ),
}
