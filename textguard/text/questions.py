"""Questions about classes, as stable records in JSON Lines."""

import hashlib
import string
from dataclasses import dataclass

import inflect

from textguard.errors import InvalidParameter

FIELDS = ("class", "a_class")
_english = inflect.engine()


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
    text = template.format_map({"class": class_name, "a_class": _english.a(class_name)})
    return Question(hashlib.sha256(text.encode()).hexdigest()[:12], class_name, text)


def _check_template(template: str, where: str) -> None:
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise InvalidParameter(f"{where}: {template!r} is no template ({error})") from error
    if not fields or not fields <= set(FIELDS):
        raise InvalidParameter(f"{where}: {template!r} must name the class with {{class}} or {{a_class}}, and nothing else")
