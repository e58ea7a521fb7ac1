"""Questions about classes, as stable records in JSON Lines."""

import functools
import hashlib
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass

from textguard.errors import InvalidParameter, UnknownName

NAMES = ("class", "a_class")
AGREEMENT = {"does": ("does", "do"), "is": ("is", "are"), "it": ("it", "they"), "s": ("s", "")}  # singular, plural
# Letters whose names begin with a vowel sound ("an SUV"), and numbers that do ("an 8-track").
SPELLED = re.compile(r"[AEFHILMNORSX][A-Z]{1,2}\b")
NUMBERS = re.compile(r"(?:8\d*|11|18)(?!\d)")
_END = "\0"  # closes a context until it is known what follows


@dataclass(frozen=True)
class Question:
    """One question about one class. `id` depends on the words alone."""

    id: str
    class_name: str
    text: str


@dataclass(frozen=True)
class Wording:
    """How classes are named. context: said behind every name ("a type of food"), or empty.

    phrases: class name -> what replaces it with its article ("Eiffel Tower" -> "the Eiffel Tower"); it takes a singular verb.
    """

    context: str
    phrases: Mapping[str, str]


PLAIN = Wording("", {})


def ask(classes: list[str], templates: list[str], wording: Wording, where: str) -> list[Question]:
    """Fill D question templates for C classes.

    Templates hold {class} ("zero") or {a_class} ("an airplane", "trousers"), and may hold verbs and pronouns that agree with
    the class: {does} (or do), {is} (are), {it} (they), {s} (appear{s}).
    Returns C x D questions, class by class. Raises InvalidParameter when a template cannot be filled or names no class,
    UnknownName when a phrase belongs to no class.
    """
    for template in templates:
        _check_template(template, where)
    if len(set(templates)) < len(templates):
        raise InvalidParameter(f"{where} holds the same question twice")
    for name in wording.phrases:
        if name not in classes:
            raise UnknownName("class", name, classes, f"{where.rpartition('.')[0]}.phrases")
    return [_question(name, template, wording) for name in classes for template in templates]


def _question(class_name: str, template: str, wording: Wording) -> Question:
    context = f", {wording.context}{_END}" if wording.context else ""
    fields = {"class": class_name + context}
    if any(f"{{{field}}}" in template for field in ("a_class", *AGREEMENT)):
        phrase = wording.phrases.get(class_name)
        plural = phrase is None and is_plural(class_name)
        fields["a_class"] = (phrase or (class_name if plural else with_article(class_name))) + context
        fields |= {field: words[plural] for field, words in AGREEMENT.items()}
    filled = template.format_map(fields)
    # "Describe a samosa, a type of food, in words" but "What is a samosa, a type of food?"
    text = re.sub(_END + r"(?=\s*[.,;:?!]|\s*$)", "", filled).replace(_END, ",")
    return Question(hashlib.sha256(text.encode()).hexdigest()[:12], class_name, text)


@functools.cache
def with_article(name: str) -> str:
    """The name behind "a" or "an", by its sound: "an hourglass", "a unicorn", "an SUV"."""
    if SPELLED.match(name) or NUMBERS.match(name):
        return f"an {name}"
    return _engine().a(name)


@functools.cache
def is_plural(name: str) -> bool:
    """Whether a class name is a plural ("trousers", "onion rings"), which takes no article and another verb."""
    return name.endswith("s") and not name.endswith(("ss", "us", "is")) and bool(_engine().singular_noun(name))


@functools.cache
def _engine():
    import inflect  # takes seconds to load

    return inflect.engine()


def _check_template(template: str, where: str) -> None:
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise InvalidParameter(f"{where}: {template!r} is no template ({error})") from error
    known = [(field, "", None) for field in (*NAMES, *AGREEMENT)]
    if any(part not in known for part in parts) or not any(part[0] in NAMES for part in parts):
        others = ", ".join(f"{{{field}}}" for field in AGREEMENT)
        rule = f"must name the class with {{class}} or {{a_class}}; it may also hold {others}, and nothing else"
        raise InvalidParameter(f"{where}: {template!r} {rule}")
