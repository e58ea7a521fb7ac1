"""Questions about classes, as stable records in JSON Lines."""

import functools
import hashlib
import string
from dataclasses import dataclass

from textguard.errors import InvalidParameter

FIELDS = ("class", "a_class")


@dataclass(frozen=True)
class Question:
    """One question about one class. `id` depends on the words alone."""

    id: str
    class_name: str
    text: str


def ask(classes: list[str], templates: list[str], where: str) -> list[Question]:
    """Fill D question templates for C classes.

    Templates may hold {class} ("zero") and {a_class} ("an airplane").
    Returns C x D questions, class by class. Raises InvalidParameter when a template cannot be filled or names no class.
    """
    for template in templates:
        _check_template(template, where)
    if len(set(templates)) < len(templates):
        raise InvalidParameter(f"{where} holds the same question twice")
    return [_question(name, template) for name in classes for template in templates]


def _question(class_name: str, template: str) -> Question:
    article = {"a_class": with_article(class_name)} if "{a_class}" in template else {}
    text = template.format_map({"class": class_name, **article})
    return Question(hashlib.sha256(text.encode()).hexdigest()[:12], class_name, text)


@functools.cache
def with_article(name: str) -> str:
    """The name behind "a" or "an", by its sound: "an hourglass", "a unicorn"."""
    import inflect  # takes seconds to load

    return inflect.engine().a(name)


def _check_template(template: str, where: str) -> None:
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise InvalidParameter(f"{where}: {template!r} is no template ({error})") from error
    if not parts or any(part not in ((field, "", None) for field in FIELDS) for part in parts):
        raise InvalidParameter(f"{where}: {template!r} must name the class with {{class}} or {{a_class}}, and nothing else")
