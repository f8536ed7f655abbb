"""Which language a text is in, by py3langid's naive Bayes over byte n-grams (Lui and Baldwin, 2012).

Fenced blocks (``` to ```) are cut before classifying, so that an answer is of the language of its prose. Probabilities
are those of the library, which it tempers by the text's length: a word or a number gets a low one for every language.
Only the start of what is left is read, which tells as much as the rest of it.
"""

import re
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

READ = 1000
"""Characters; some 10,000 such answers a second and core."""
NONE = "zxx"
"""ISO 639-2: no linguistic content."""
FENCED = r"(?ms)^[ \t]*```.*?(?:^[ \t]*```[ \t]*$|\z)"
"""In RE2's words; a fence opens a line, and one that is never closed runs to the end, as Markdown has it."""


@cache
def identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str, least: float) -> str | None:
    """Its ISO 639-1 code; None where there is no prose, or none has a probability of `least`."""
    language, probability = identifier().classify(prose_of(text))
    return str(language) if probability >= least and language != NONE else None


def prose_of(text: str) -> str:
    # Python spells the end of a text otherwise than RE2 does
    return re.sub(FENCED.replace(r"\z", r"\Z"), " ", text).strip()[:READ]
