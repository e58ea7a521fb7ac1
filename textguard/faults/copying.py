"""Copies of models that hold more than tensors and modules."""

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from textguard.errors import UnsupportedModel, printable


def copy_model(model: nn.Module) -> nn.Module:
    """A copy of a model, whose weights can be changed.

    Tensors that a forward has left behind, such as those of Grad-CAM or of the old `weight_norm`, are copied without their
    gradients. What cannot be copied, such as locks, open files and generators, is shared with the model.

    Parameters
    ----------
    model : nn.Module
        The model; it stays as it is.

    Returns
    -------
    nn.Module
        The copy.

    Raises
    ------
    UnsupportedModel
        The model cannot be copied.

    Examples
    --------
    >>> import threading
    >>> from torch import nn
    >>> from textguard.faults.copying import copy_model
    >>> model = nn.Linear(2, 2)
    >>> model.lock = threading.Lock()
    >>> copied = copy_model(model)
    >>> copied.lock is model.lock, copied.weight is model.weight
    (True, False)
    """
    held = tree_leaves([vars(module) for module in model.modules()])
    known: dict[int, Any] = {
        id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, dict(known))
    except Exception:
        known |= {
            id(value): value for value in held if not isinstance(value, (Tensor, nn.Module)) and not _can_be_copied(value)
        }
    try:
        return copy.deepcopy(model, known)
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        cure = "keep what cannot be copied out of its attributes, or give it a __deepcopy__"
        raise UnsupportedModel(f"{type(model).__name__} cannot be copied ({reason}); {cure}") from error


def _can_be_copied(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True
