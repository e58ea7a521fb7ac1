"""What the head of a treatment starts from: rows that are drawn, or made of a text's class embeddings."""

import torch
from torch import Tensor

from textguard.errors import InvalidEmbeddings
from textguard.text.embeddings import control


def start_rows(start: str, classes: int, width: int, text: Tensor | None, seed: int) -> Tensor:
    """The first weights of a head, from a generator of their own.

    Parameters
    ----------
    start : str
        `unit`, rows of length 1 in random directions; `orthogonal`, such rows at right angles; `one_hot`, row i is the i-th
        unit vector; `shuffled:TEXT`, the text's rows, each at another class's place; `cosines:TEXT`, the text's rows turned by
        a random orthogonal matrix, so that lengths and cosines stay and directions mean nothing; `TEXT`, the text's rows.
    classes, width : int
        C and E.
    text : Tensor or None
        The text's class embeddings, float32 [C, E], where `start` names one.
    seed : int
        Of what is drawn.

    Returns
    -------
    Tensor
        float32 [C, E].

    Raises
    ------
    InvalidEmbeddings
        Where orthogonal or one-hot rows have no place, because E < C; or the text's width is not E.

    Examples
    --------
    >>> import torch
    >>> from textguard.text.starts import start_rows
    >>> rows = start_rows("orthogonal", 3, 8, None, seed=0)
    >>> torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)
    True
    >>> turned = start_rows("cosines:told", 3, 8, 2 * rows, seed=1)
    >>> torch.allclose(turned @ turned.T, 4 * torch.eye(3), atol=1e-5), torch.equal(turned, 2 * rows)
    (True, False)
    """
    generator = torch.Generator().manual_seed(seed)
    if text is not None:
        if text.shape != (classes, width):
            raise InvalidEmbeddings(
                f"start {start!r} has rows of width {text.shape[1]}, and the latent layer {width}; set its width to null"
            )
        if start.startswith("shuffled:"):
            return control(text, "shuffled", seed)
        return (text.double() @ _rotation(width, generator)).float() if start.startswith("cosines:") else text
    if start != "unit" and classes > width:
        raise InvalidEmbeddings(f"start {start!r} needs a width of {classes} or more for {classes} classes, not {width}")
    if start == "one_hot":
        return torch.eye(classes, width)
    if start == "orthogonal":
        return _rotation(width, generator)[:classes].float()
    drawn = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    return (drawn / drawn.norm(dim=1, keepdim=True)).float()


def _rotation(width: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix, float64 [E, E], uniform over all of them. Source: Mezzadri, Notices of the AMS 54 (2007)."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()
