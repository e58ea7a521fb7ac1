"""Errors that a user can act on. Each message says what was found, what is allowed, and where to change it."""

from collections.abc import Callable, Iterable


def printable(text: str, limit: int = 200) -> str:
    """Foreign text for a message: one line, no control characters (which a terminal may obey), at most `limit` long."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


class Setting(str):
    """The name of a library's argument, as a part of an error's message. Only the caller knows where its user sets it."""


class TextguardError(Exception):
    """Base of every error that is shown as one line, without a traceback. Its arguments are the parts of the message."""

    def __str__(self) -> str:
        return self.told("argument {}".format)

    def told(self, name: Callable[[Setting], str]) -> str:
        """The message, with the arguments of the library that it speaks of called as `name` says."""
        parts = (name(part) if isinstance(part, Setting) else str(part) for part in self.args)
        return " ".join("".join(parts).split())


class InvalidParameter(TextguardError):
    """A setting is missing, unknown, of the wrong type or out of range."""


class UnknownName(TextguardError):
    """A name that no registry knows (data set, backbone, variant, encoder, detector, engine ...)."""

    def __init__(self, kind: str, name: object, known: Iterable[str], where: str) -> None:
        super().__init__(f"{kind} {printable(repr(name), 100)} in ", where, f"; known: {', '.join(sorted(known))}")


class MissingAnswer(TextguardError):
    """A class has no stored answer for one of its questions."""


class LanguageModelError(TextguardError):
    """A language model, or the server that it runs on, did not answer."""


class BudgetExhausted(LanguageModelError):
    """The next request could cost more than the budget allows."""


class InvalidEmbeddings(TextguardError):
    """Class embeddings that do not belong to these classes, or are no usable vectors."""


class InvalidArtifact(TextguardError):
    """A file that is missing, damaged, or not what its reader expects."""


class UnreadableImage(InvalidArtifact):
    """A file of a data set that was an image when its index was made, and is not any more."""

    def __init__(self, message: str) -> None:
        # What a DataLoader's process raises comes back with its whole traceback in the message; its last line is ours.
        super().__init__(message.strip().rpartition("\n")[2].removeprefix(f"{__name__}.{type(self).__name__}: "))


class CannotWrite(TextguardError):
    """The file system refused a write (read-only, full, no permission)."""


class UnsupportedModel(TextguardError):
    """A model in which faults cannot be injected as asked."""


class CampaignMismatch(TextguardError):
    """Records, plan and model that do not belong together."""
