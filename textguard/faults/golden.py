"""Whether fault-free inferences can be compared with at all: an image gives the same logits again, and in any company.

DeltaLoss compares an inference with a fault to one without. Where the latter differs from itself, the difference counts as the
fault's. A handful of images tells.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from textguard.errors import UnsupportedModel
from textguard.faults.engines import Engine
from textguard.faults.inputs import batches, positions
from textguard.faults.task import CLASSES, Task

IMAGES = 8  # that are looked at
REPETITIONS = 8  # of a golden run that is not always the same, from which its noise is measured
# What rounding may change, as shares of the logits' range: the same sums in the same order, and in another one.
AGAIN, IN_COMPANY = 1e-5, 2e-3
# The same where values are rounded to few bits: where they lie between two numbers, a last digit decides.
ROUNDED_AGAIN, ROUNDED_IN_COMPANY = 1e-2, 0.1


@dataclass(frozen=True)
class Golden:
    """What a few images say of a model's fault-free inferences.

    Attributes
    ----------
    images : int
        How many were looked at.
    problems : tuple of str
        What is not the same as it was before, with the cure; empty for an ordinary classifier.
    noise : float
        Mean absolute DeltaLoss, in nats, of inferences without any fault; 0 where there are no problems.
    probabilities : bool
        Whether all logits are from 0 to 1, and sum to 1: then they are no logits.

    Examples
    --------
    >>> from textguard.faults.golden import Golden
    >>> Golden(images=8, problems=(), noise=0.0, probabilities=False).refuse()
    """

    images: int
    problems: tuple[str, ...]
    noise: float
    probabilities: bool

    def refuse(self) -> None:
        """Raises UnsupportedModel with the first problem."""
        if self.problems:
            raise UnsupportedModel(f"{self.problems[0]}; or measure it: CampaignSettings(noise='report')")


@torch.inference_mode()
def look_at_golden_run(engine: Engine, loader: DataLoader, *, alone: bool = False, task: Task = CLASSES) -> Golden:
    """Run a few images several times without any fault, and compare.

    Parameters
    ----------
    engine : Engine
        Runs the model; see `make_engine`.
    loader : DataLoader
        Gives images and labels, from a map-style data set.
    alone : bool, default False
        Whether every inference of the campaign is of one image, so that images cannot see each other.
    task : Task, default that of an ordinary classifier
        What batches and logits mean.

    Returns
    -------
    Golden
        What was found. Its `refuse` raises where something differs.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import make_engine
    >>> from textguard.faults.golden import look_at_golden_run
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    >>> loader = DataLoader(TensorDataset(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
    >>> look_at_golden_run(make_engine("replay", model, torch.zeros(4), batch_size=8), loader)
    Golden(images=5, problems=(), noise=0.0, probabilities=False)
    """
    read = positions(loader)
    chosen = [read[number] for number in np.unique(np.linspace(0, len(read) - 1, min(IMAGES, len(read))).astype(int))]
    (_, images, labels), (_, reread, _) = batches(loader, engine.device, [chosen, chosen], task)

    def together() -> Tensor:
        return engine.observe(images)

    def one_by_one() -> Tensor:
        return torch.cat([engine.observe(image[None]) for image in images])

    # A model that is always alone is compared with itself alone.
    run = one_by_one if alone else together
    first, again, apart = run(), run(), one_by_one()
    rounds = engine.number_format.name != "fp32" or first.dtype in (torch.float16, torch.bfloat16)
    problems = _problems(images, reread, first, again, apart, rounds)
    noise = 0.0
    if problems:
        before = task.loss(first, labels)
        others = [task.loss(way(), labels) for _ in range(REPETITIONS // 2) for way in (run, one_by_one)]
        changes = (torch.stack(others) - before).abs()
        noise = float(changes[changes.isfinite()].mean())
    return Golden(len(images), tuple(problems), noise, task.has_softmax and _are_probabilities(first))


def _problems(images: Tensor, reread: Tensor, first: Tensor, again: Tensor, apart: Tensor, rounds: bool) -> list[str]:
    found: list[str] = []
    same, in_company = (ROUNDED_AGAIN, ROUNDED_IN_COMPANY) if rounds else (AGAIN, IN_COMPANY)
    # NaN in an image is no augmentation.
    if images.shape != reread.shape or not bool(((images == reread) | (images.isnan() & reread.isnan())).all()):
        gap = f"by {_gap(images, reread)}" if images.shape == reread.shape else "in size"
        found.append(
            f"the data set gives other images when the same {len(images)} positions are read again (they differ {gap}); take "
            "random augmentation out of its transform"
        )
    if _share(first, again) > same:
        found.append(
            f"the model gives other logits for the same {len(images)} images when it is run again (they differ by "
            f"{_gap(first, again)}): it is random or keeps a state; call model.eval(), write F.dropout(x, p, self.training), "
            "take noise out of forward"
        )
    elif _share(first, apart) > in_company:
        found.append(
            f"the logits of an image depend on the others of its batch (alone and among {len(images)} they differ by "
            f"{_gap(first, apart)}), so that a fault on one changes all; compute each image by itself, or take "
            "engine='whole', batch_size=1, image_batch=1 and a DataLoader with batch_size=1"
        )
    return found


def _share(a: Tensor, b: Tensor) -> float:
    """The largest difference of two logits [B, C] as a share of their range; NaN differs from numbers only."""
    differ = ~((a == b) | (a.isnan() & b.isnan()))
    if not differ.any():
        return 0.0
    known = a[a.isfinite()].double()
    if not len(known):
        return math.inf
    # Logits that are nearly the same differ by rounding of what they have in common.
    scale = max(float(known.max() - known.min()), 0.01 * float(known.abs().max()))
    gap = float((a.double() - b.double())[differ].abs().max())
    return gap / scale if math.isfinite(gap) and scale else math.inf


def _gap(a: Tensor, b: Tensor) -> str:
    gap = float((a.double() - b.double()).abs().nan_to_num(math.inf).max())
    known = a[a.isfinite()].double()
    spread = float(known.max() - known.min()) if len(known) else 0.0
    return f"up to {gap:.3g}, {gap / spread:.1%} of their range" if spread else f"up to {gap:.3g}"


def _are_probabilities(logits: Tensor) -> bool:
    """Whether logits [B, C] look as if a softmax had made them."""
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        return False
    sums = logits.double().sum(dim=1)
    return bool(((logits >= 0) & (logits <= 1)).all() and ((sums - 1).abs() < 1e-3).all())


def fake_quantised(model: nn.Module) -> list[str]:
    """The modules of a model that only pretend to quantise, or observe ranges for it, as in quantisation-aware training."""
    kinds = {"FakeQuantizeBase", "ObserverBase"}
    return [name for name, module in model.named_modules() if kinds & {base.__name__ for base in type(module).__mro__}]
