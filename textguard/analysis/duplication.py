"""What it costs to compute layers twice, and which share of SDC is in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from textguard.schema.results import RunResult


@dataclass(frozen=True)
class Duplicated:
    """One training's layers in the order in which they are computed twice.

    cost, covered: float [L + 1], after the first none, one, two, ... layers: shares of the multiply-adds and of the SDC of a
    fault in any neuron. Layers that are not computed by multiply-adds cost nothing.
    """

    run: str
    layers: Sequence[str]
    cost: np.ndarray
    covered: np.ndarray

    def at(self, cost: np.ndarray) -> np.ndarray:
        """Which share is covered for at most this share of multiply-adds, float [N]."""
        return self.covered[np.searchsorted(self.cost, cost + 1e-9, side="right") - 1]

    def cost_of(self, share: float) -> float:
        """Which share of multiply-adds it takes to cover so much of SDC."""
        return float(self.cost[np.argmax(self.covered >= share - 1e-9)])


def duplicated(results: Sequence[RunResult]) -> list[Duplicated]:
    """The trainings of one variant; those without SDC, or with layers of unknown cost, are left out.

    The order is that of SDC per multiply-add in the mean of the other trainings, so that no training's faults choose an order
    that they are then counted by. A single training has no others: its order is its own, which is optimistic.
    """
    known = [run for run in results if all(layer.multiply_adds is not None for layer in run.layers)]
    names = [layer.layer for layer in known[0].layers] if known else []
    known = [run for run in known if [layer.layer for layer in run.layers] == names]
    harm = np.array([[layer.sdc.value * layer.neurons for layer in run.layers] for run in known])
    cost = np.array([[layer.multiply_adds for layer in run.layers] for run in known], dtype=float)
    found = []
    for number, run in enumerate(known):
        if not (np.isfinite(harm).all() and harm[number].sum() > 0 and cost[number].sum() > 0):
            continue
        others = np.delete(harm, number, axis=0) if len(known) > 1 else harm
        gain = others.mean(axis=0) / np.maximum(cost[number], 1)
        order = np.argsort(-gain, kind="stable")
        shares = [np.concatenate([[0.0], np.cumsum(part[number][order]) / part[number].sum()]) for part in (cost, harm)]
        found.append(Duplicated(run.run, [names[place] for place in order], *shares))
    return found
