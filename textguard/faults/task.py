"""What batches and logits mean: how a model is called on a batch, which answers are right, and what a wrong one costs.

The ordinary classifier gets images with labels, gives a logit for each class, and pays the cross entropy. `Task` says what is
otherwise. A function that it is given sees whole batches, so every result has one entry per image.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from textguard.errors import InvalidParameter, Setting, UnknownName

SMALLEST = torch.finfo(torch.float32).tiny  # what a probability is at least, so that its logarithm is finite


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each image, [B], in nats. logits: [B, C]. labels: int64 [B]."""
    return F.cross_entropy(logits, labels, reduction="none")


def first_class(logits: Tensor) -> Tensor:
    """The class with the largest logit, int64 [B]. logits: [B, C]."""
    return logits.argmax(dim=1)


def top2diff(logits: Tensor) -> Tensor:
    """Difference of the two largest softmax probabilities. logits: [N, C], C >= 2. Returns [N], 0 to 1."""
    return _lead(logits.softmax(dim=1))


def class_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The own logit minus the logsumexp of the others, [B]: cross entropy is softplus(-margin). labels: int64 [B]."""
    own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, labels[:, None], True)
    return logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(dim=1)


def _lead(probabilities: Tensor) -> Tensor:
    first, second = probabilities.topk(2, dim=1).values.unbind(dim=1)
    return first - second


def _same_class(logits: Tensor, labels: Tensor) -> Tensor:
    return first_class(logits) == labels


def _class_labels(logits: Tensor, labels: Tensor) -> str:
    """What is wrong with labels for logits [B, C] of classes, and the cure; nothing where they are right."""
    count, found = logits.shape[1], f"labels are {_kind(labels)}"
    if labels.shape == logits.shape and labels.ndim == 2 and bool(((labels == 0) | (labels == 1)).all()):
        if bool((labels.sum(dim=1) == 1).all()):
            return f"{found}, one-hot; the number of the class is needed: labels=lambda batch: batch[1].argmax(1)"
        return f'{found}, with several classes of an image set; take task="multilabel"'
    if labels.shape == (len(logits), 1) and not labels.is_floating_point():
        return f"{found}; one number per image is needed: labels=lambda batch: batch[1].squeeze(1)"
    if labels.ndim != 1:
        return f"{found}; the number of each image's class, [{len(logits)}], is needed; for another task say loss= and correct="
    if labels.is_floating_point():
        whole = bool((labels == labels.round()).all())
        cure = "labels=lambda batch: batch[1].long()" if whole else "a regression has no classes: say loss= and correct="
        return f"{found}; whole numbers of classes are needed: {cure}"
    wrong = labels[(labels < 0) | (labels >= count)]
    if len(wrong):
        return (
            f"label {int(wrong[0])} is none of the model's {count} classes, 0 to {count - 1}; number them so with labels=, "
            "or leave the image out with torch.utils.data.Subset"
        )
    return ""


def _kind(labels: Tensor) -> str:
    return f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"


def _binary_logits(logits: Tensor) -> Tensor:
    """One logit of each image, [B], from [B] or [B, 1]."""
    return logits.reshape(len(logits))


def _binary_loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits = _binary_logits(logits)
    return F.binary_cross_entropy_with_logits(logits, labels.reshape(len(logits)).to(logits), reduction="none")


def _positive(logits: Tensor) -> Tensor:
    return _binary_logits(logits) > 0


def _binary_correct(logits: Tensor, labels: Tensor) -> Tensor:
    return _positive(logits) == (labels.reshape(len(logits)) > 0.5)


def _binary_certainty(logits: Tensor) -> Tensor:
    return (_binary_logits(logits) / 2).tanh().abs()  # |p - (1 - p)|


def _binary_labels(logits: Tensor, labels: Tensor) -> str:
    if logits.numel() != len(logits):
        return f"logits have shape {list(logits.shape)}; a binary task has one per image, [{len(logits)}] or [{len(logits)}, 1]"
    if labels.numel() != len(logits) or not bool(((labels == 0) | (labels == 1)).all()):
        return f"labels are {_kind(labels)} with {_some(labels)}; a binary task needs one 0 or 1 per image"
    return ""


def _multilabel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(dim=1)


def _set_classes(logits: Tensor) -> Tensor:
    return logits > 0


def _multilabel_correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (_set_classes(logits) == (labels > 0.5)).all(dim=1)


def _multilabel_certainty(logits: Tensor) -> Tensor:
    return (logits / 2).tanh().abs().amin(dim=1)


def _multilabel_labels(logits: Tensor, labels: Tensor) -> str:
    if labels.shape != logits.shape or not bool(((labels == 0) | (labels == 1)).all()):
        return (
            f"labels are {_kind(labels)} with {_some(labels)}; a multilabel task needs 0 or 1 for each of {list(logits.shape)}"
        )
    return ""


def _some(labels: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in labels.flatten()[:3].tolist())


def _log_probability_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(probabilities.clamp(min=SMALLEST).log(), labels, reduction="none")


def _any_labels(logits: Tensor, labels: Tensor) -> str:
    return ""


def _any_certainty(logits: Tensor) -> Tensor:
    """Top2Diff by the shape of logits: of one logit |p - (1 - p)|; of more dimensions, 1."""
    if logits.ndim == 1 or logits.shape[1:] == (1,):
        return _binary_certainty(logits)
    return top2diff(logits) if logits.ndim == 2 else torch.ones(len(logits), device=logits.device)


def _any_prediction(logits: Tensor) -> Tensor:
    """What is predicted by the shape of logits: whether the only logit is above 0, else the class with the largest."""
    return _positive(logits) if logits.ndim == 1 or logits.shape[1:] == (1,) else first_class(logits)


@dataclass(frozen=True)
class Task:
    """How a model is called on a batch, which answers are right, and what a wrong one costs.

    Four are ready, and `make_task` knows them by name and changes some of their functions. `classes` is the ordinary
    classifier. `binary` has one logit per image, above 0 for class 1, and labels 0 and 1. `multilabel` has one logit per class,
    above 0 where the image has it, and labels 0 and 1 for each; an image is right where all of them are. `probabilities` is a
    model that ends in a softmax.

    Parameters
    ----------
    name : str, default "classes"
        What the settings of a campaign call it.
    forward : callable, optional
        From the model and a batch, as the loader gives it, to logits [B, ...]. By default the model gets the first item of the
        batch. Tensors of the batch have one row per image. What is no tensor becomes None.
    labels : callable, optional
        From a batch to labels [B, ...]. By default the batch's second item.
    loss : callable
        From logits and labels to one loss per image, float [B], from 0 up.
    correct : callable
        From logits and labels to bool [B].
    predicted : callable
        From logits to what is predicted, [B, ...]. A fault that changes it is a mismatch.
    certainty : callable
        From logits to Top2Diff, float [B]. Images where it is 0 are in a tie, and not eligible.
    problem : callable
        From logits and labels to what is wrong with them, in words; to "" where they fit.

    Examples
    --------
    >>> import torch
    >>> from textguard.faults import make_task
    >>> task, logits, labels = make_task("binary"), torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 1])
    >>> task.correct(logits, labels).tolist(), [round(loss, 2) for loss in task.loss(logits, labels).tolist()]
    ([True, False], [0.13, 1.31])
    """

    name: str = "classes"
    forward: Callable[[nn.Module, Any], Tensor] | None = None
    labels: Callable[[Any], Tensor] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    correct: Callable[[Tensor, Tensor], Tensor] = _same_class
    predicted: Callable[[Tensor], Tensor] = first_class
    certainty: Callable[[Tensor], Tensor] = top2diff
    problem: Callable[[Tensor, Tensor], str] = _class_labels

    @property
    def has_softmax(self) -> bool:
        """Whether the loss is the cross entropy of a softmax, which exact last layers and predictions have formulas for."""
        return self.loss is cross_entropy and self.predicted is first_class

    def precise_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss [B] as float64, computed in float64 where it is one of ours."""
        ours = self.loss in (cross_entropy, _binary_loss, _multilabel_loss, _log_probability_loss)
        return self.loss(logits.double() if ours else logits, labels).double()

    def margin(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The number [B] whose softplus, of its negative, is the loss."""
        if self.has_softmax:
            return class_margin(logits, labels)
        return -torch.log(torch.expm1(self.precise_loss(logits, labels)))

    def differs(self, logits: Tensor, golden: Tensor) -> Tensor:
        """Whether logits [N, ...] predict something else than golden ones [N, ...] do, bool [N]."""
        return (self.predicted(logits) != self.predicted(golden)).reshape(len(logits), -1).any(dim=1)

    def as_json(self) -> dict[str, str]:
        """What a campaign's settings say of it: nothing of the ordinary classifier, else its name and the given functions'."""
        if self == CLASSES:
            return {}
        ready = READY.get(self.name, CLASSES)
        names = ("forward", "labels", "loss", "correct", "predicted", "certainty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not getattr(ready, name)}
        return {"task": self.name, **{name: _name_of(function) for name, function in given.items()}}


def _name_of(function: Callable) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"


CLASSES = Task()
BINARY = Task("binary", None, None, _binary_loss, _binary_correct, _positive, _binary_certainty, _binary_labels)
MULTILABEL = Task(
    *("multilabel", None, None, _multilabel_loss, _multilabel_correct),
    *(_set_classes, _multilabel_certainty, _multilabel_labels),
)
PROBABILITIES = Task("probabilities", loss=_log_probability_loss, certainty=_lead)
READY = {task.name: task for task in (CLASSES, BINARY, MULTILABEL, PROBABILITIES)}


def make_task(
    task: str | Task = CLASSES,
    *,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    labels: Callable[[Any], Tensor] | None = None,
    correct: Callable[[Tensor, Tensor], Tensor] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    predicted: Callable[[Tensor], Tensor] | None = None,
) -> Task:
    """A ready task with some functions of its user's; see `Task` for what each gets and returns.

    Parameters
    ----------
    task : {"classes", "binary", "multilabel", "probabilities"} or Task, default "classes"
        What the rest is taken from.
    forward, labels, correct, loss, predicted : callable, optional
        What takes the place of the task's own. With a loss or an answer of its user's, one logit per image is taken for a
        binary decision at 0, several for classes, unless `predicted` says otherwise.

    Returns
    -------
    Task
        The changed task.

    Raises
    ------
    UnknownName, InvalidParameter
        There is no such task, or something given is no function.

    Examples
    --------
    >>> from textguard.faults import make_task
    >>> task = make_task(forward=lambda model, batch: model(**batch).logits, labels=lambda batch: batch["labels"])
    >>> sorted(task.as_json())
    ['forward', 'labels', 'task']
    """
    if not isinstance(task, Task):
        if not isinstance(task, str) or task not in READY:
            raise UnknownName("task", task, READY, Setting("task"))
        task = READY[task]
    given = {"forward": forward, "labels": labels, "correct": correct, "loss": loss, "predicted": predicted}
    given = {name: function for name, function in given.items() if function is not None}
    for name, function in given.items():
        if not callable(function):
            raise InvalidParameter(Setting(name), f" is {function!r:.60}; it must be a function")
    if task.has_softmax and "loss" in given:  # labels may be anything now, and so may logits
        task = replace(task, problem=_any_labels, certainty=_any_certainty, predicted=_any_prediction)
    return replace(task, **given)
