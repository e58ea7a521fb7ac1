"""From an answer to a text that can be embedded: visible rules, and flags for what looks wrong.

Answers are data. Nothing here drops one, and the raw answer stays beside the clean text.
"""

import functools
import re
import unicodedata
from collections.abc import Callable, Iterable

import ftfy

from textguard.text.answers import Answer, Description

FEWEST_WORDS = 4
SURE = 0.5  # a text counts as another language from this probability on
FLAGS = ("empty", "duplicate", "too_short", "unnamed", "not_english", "cut", "filtered", "refused")

_OPENINGS = re.compile(
    r"""^(?:(?:sure(?:\sthing)?|certainly|of\scourse|absolutely|okay|ok|yes)\s*[,.!:-]+\s*
        |(?:here(?:\sis|\sare|['’]s)|below\sis|the\sfollowing\sis)\b[^.!?\n]{0,120}?:\s*
        |(?:answer|description|caption|response)\s*:\s*
        |as\san?\s(?:ai|artificial\sintelligence|(?:large\s)?language)\b[^,.\n]{0,60},\s*)+""",
    re.IGNORECASE | re.VERBOSE,
)
_REFUSALS = re.compile(
    r"^I(?:['’]?m sorry| am sorry| apologi[sz]e| can(?:not|['’]t) (?:describe|help|assist|provide))", re.IGNORECASE
)
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "‘": "’", "'": "'", "`": "`"}
# "It is large and grey" describes the class that the question named.
_REFERENCES = re.compile(r"^(?:it|its|they|their|them|this|these|those|that|one|both|each)\b", re.IGNORECASE)
_STOP_WORDS = {"the", "and", "with", "for", "from", "pair"}


_REASONING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\]", re.IGNORECASE)
# Rules between paragraphs; bullets, numbers and headings, as many as there are in front of a line.
_MARKS = re.compile(
    r"(?m)^[ \t]*(?:[-*_][ \t]*){3,}$|^(?:[ \t]*(?:[-*•–—·]+[ \t]*|\(?\d{1,2}[.)][ \t]+|#{1,6}[ \t]+))+",
)
# In pairs around something that neither begins nor ends with a blank, and not inside a word or a product.
_EMPHASIS = (
    re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*]*?[^\s*])\1(?![\w*])"),
    re.compile(r"(?<!\w)(_{1,3})(?=[^\s_])([^_]*?[^\s_])\1(?!\w)"),
)


def _reasoned(text: str) -> tuple[str, bool]:
    """A text without what a model thought before it answered, and whether it was cut while it thought."""
    kept, depth, start = [], 0, 0
    for tag in _REASONING.finditer(text):
        closing = "/" in tag[0]
        if closing and not depth:
            kept = []  # the opening tag stands in the prompt of some models
        elif not depth:
            kept.append(text[start : tag.start()])
        depth = max(0, depth - 1) if closing else depth + 1
        start = tag.end()
    return "".join(kept) + ("" if depth else text[start:]), depth > 0


def _without_marks(text: str) -> str:
    return _MARKS.sub("", text)


def _without_emphasis(text: str) -> str:
    for pattern in _EMPHASIS:
        text = pattern.sub(r"\2", text)
    return text


def _without_quotes(text: str) -> str:
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def _without_controls(text: str) -> str:
    return "".join(" " if unicodedata.category(letter) in ("Cc", "Zl", "Zp") else letter for letter in text)


# What any text can have, and what only people and models put around an answer.
PLAIN_RULES: dict[str, Callable[[str], str]] = {
    "text decoded with the wrong encoding": ftfy.fix_encoding,
    "control characters": _without_controls,
    "runs of whitespace": lambda text: " ".join(text.split()),
}
RULES: dict[str, Callable[[str], str]] = {
    "text decoded with the wrong encoding": ftfy.fix_encoding,
    "a model's reasoning": lambda text: _reasoned(text)[0],
    "emphasis": _without_emphasis,  # first, or its opening stars would pass for bullets
    "bullets, numbers and headings in front of lines": _without_marks,
    "control characters": _without_controls,
    "runs of whitespace": lambda text: " ".join(text.split()),
    "boilerplate openings": lambda text: _OPENINGS.sub("", text),
    "quotation marks around it all": _without_quotes,
}


def clean(answer: str, rules: dict[str, Callable[[str], str]] = RULES) -> str:
    """Apply rules to an answer, again and again until none of them changes it."""
    before = None
    while answer != before:
        before = answer
        for rule in rules.values():
            answer = rule(answer)
    return answer


def describe(answers: Iterable[Answer]) -> list[Description]:
    """Clean and flag answers. A text is a duplicate of an earlier one of its class if at most case and punctuation differ."""
    seen: set[tuple[str, str]] = set()
    descriptions = []
    for answer in answers:
        # A template stands for itself: "3. Liga" is a class, and no third point.
        text = clean(answer.answer, PLAIN_RULES if answer.provider == "template" else RULES)
        words = re.findall(r"\w+", text.casefold())
        same = (answer.class_name, " ".join(words))
        flags = {
            "empty": not words,
            "duplicate": bool(words) and same in seen,
            "too_short": 0 < len(words) < FEWEST_WORDS and answer.provider != "template",
            "unnamed": bool(words) and not _refers_to(text, words, answer.class_name),
            "not_english": bool(words) and not is_english(text),
            "cut": answer.finish_reason == "length" or _reasoned(answer.answer)[1],
            "filtered": answer.finish_reason == "content_filter",
            "refused": answer.finish_reason == "refusal" or bool(_REFUSALS.match(text)),
        }
        seen.add(same)
        descriptions.append(Description(**answer.__dict__, text=text, flags=[name for name in FLAGS if flags[name]]))
    return descriptions


def _refers_to(text: str, words: list[str], class_name: str) -> bool:
    """Whether a text names its class, or any content word of its name, or speaks of it with a pronoun."""
    if _REFERENCES.match(text):
        return True
    named = [word for word in re.findall(r"\w+", class_name.casefold()) if len(word) > 2 and word not in _STOP_WORDS]
    stems = [_stem(word) for word in named] or [class_name.casefold()]
    return any(_stem(word).startswith(stem) or stem in word for word in words for stem in stems)


def _stem(word: str) -> str:
    """Singular and plural alike: "buses" and "bus", "butterflies" and "butterfly"."""
    for ending, singular in (("ies", "y"), ("es", ""), ("s", ""), ("y", "y"), ("e", "")):
        if word.endswith(ending) and len(word) - len(ending) > 2:
            return word.removesuffix(ending) + singular
    return word


def is_english(text: str) -> bool:
    """Whether py3langid takes the text for English, or is not sure of another language."""
    language, probability = _identifier().classify(text)
    return language == "en" or probability < SURE


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # takes a second to load

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
