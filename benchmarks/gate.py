"""How often the regression gate is wrong, and what it finds: python -m benchmarks gate (under three minutes of processor time).

Big campaigns on a trained classifier, one with uniform injections and one with guided ones, stand for all faults of its layers.
Small ones are drawn from them, again and again, and compared as the gate compares the runs of a grid.

- A/A: both sides are drawn from the same faults, with other seeds. Whatever is called worse is a false alarm.
- Power: DeltaLoss is so many times as large in one layer, or in all. `each`: the same faults, each of which does so much more.
  `others`: the same plan, but other faults do the harm, so that pairs tell nothing. `unpaired`: another plan.
- Trainings: log-normal DeltaLoss overall, and nothing else that differs; the new side's mean is so many times as large.
"""

from typing import Any

import numpy as np

from benchmarks.common import SEED, digits_campaign
from textguard.analysis.regression import (
    LAYER_QUANTITIES,
    QUANTITIES,
    Comparison,
    compare_layers,
    compare_measured,
    compare_over_trainings,
    judge,
)
from textguard.faults.damage import SINGLE_FLIP
from textguard.faults.execution import run_campaign
from textguard.faults.guided import draw_guided
from textguard.faults.plans import draw_plan
from textguard.faults.profiling import image_chances
from textguard.params import GateParams
from textguard.schema.base import Measured

POPULATION = 2048  # injections into each layer, of either kind
INJECTIONS, BLOCKS = 1024, 32  # of a small campaign, per layer, as in the demo
RUNS = 8  # of a call: Holm's correction is over the numbers of all of them
CALLS = 1000
FACTORS = (1.1, 1.25, 1.5, 2.0, 4.0)
POWER_CALLS = 30
TRAININGS, SPREAD = (3, 5, 10), 0.2  # on each side; standard deviation of log DeltaLoss among trainings
CELLS = 8  # of a grid, each with 6 numbers that are judged
TOLERANCES = GateParams()
OVERALL = [quantity for quantity in QUANTITIES if quantity.name in ("DeltaLoss, overall", "SDC, overall")]

Side = list[list[Measured]]  # of DeltaLoss and SDC: all layers, then their mean


def measure() -> dict[str, Any]:
    """Plan -> false alarms per call, and power by kind of change, layers and factor; power over trainings."""
    pools = _pools()
    return {
        "calls": CALLS,
        "comparisons": _family(pools["guided"]),
        "plans": {
            name: {"false_alarms": _false_alarms(pool), "errors": _errors(pool), "power": _power(pool)}
            for name, pool in pools.items()
        },
        "trainings": _over_trainings(),
    }


def _family(pool: np.ndarray) -> int:
    """How many numbers a call compares: of each run, DeltaLoss and SDC of each layer, of their mean, and of all together."""
    return RUNS * 2 * (pool.shape[1] + 2)


def _pools() -> dict[str, np.ndarray]:
    """Plan -> weighted DeltaLoss and SDC of every injection, float [2, layers, POPULATION].

    Losses that are not finite count as none.
    """
    setup = digits_campaign()
    sites = setup.engine.sites[:-1]  # whose last is enumerated
    plain, chances = (image_chances(setup.engine, setup.loader, how) for how in ("uniform", "guided"))
    budget = {site.layer: (0, POPULATION) for site in sites}
    plans = {
        "uniform": draw_plan(sites, plain, POPULATION, SEED),
        "guided": draw_guided(setup.engine, sites, setup.loader, chances, budget, SEED, SINGLE_FLIP, [setup.limits]),
    }
    pools = {}
    for name, plan in plans.items():
        records = run_campaign(setup.engine, setup.loader, plan, setup.limits, image_batch=64, label=name)
        loss = (records["faulty_loss"] - records["golden_loss"]).abs().to_numpy(float)
        finite, weight = np.isfinite(loss), records["weight"].to_numpy(float)
        records = records.assign(
            loss=weight * np.where(finite, loss, 0.0), sdc=weight * (records["mismatch"].to_numpy(bool) | ~finite)
        )
        layers = [part for _, part in records.groupby("layer", sort=False)]
        pools[name] = np.array([[part[column].to_numpy() for part in layers] for column in ("loss", "sdc")])
    return pools


def _errors(pool: np.ndarray) -> list[float]:
    """The standard error of a small campaign's DeltaLoss, as a share of it, by layer."""
    return (pool[0].std(axis=1) / pool[0].mean(axis=1) / np.sqrt(INJECTIONS)).tolist()


def _draw(pool: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A small campaign: float [2, layers, INJECTIONS]."""
    chosen = draw.integers(0, pool.shape[2], (1, pool.shape[1], INJECTIONS))
    return np.take_along_axis(pool, chosen, axis=2)


def _side(values: np.ndarray) -> Side:
    """What the results hold of a small campaign."""
    means, errors = values.mean(axis=2), values.std(axis=2, ddof=1) / np.sqrt(INJECTIONS)
    blocks = values.reshape(*values.shape[:2], INJECTIONS // BLOCKS, BLOCKS).mean(axis=2)
    overall = np.sqrt((errors**2).sum(axis=1)) / errors.shape[1]
    return [
        [
            _measured(*found)
            for found in (
                *zip(means[row], errors[row], blocks[row], strict=True),
                (means[row].mean(), overall[row], blocks[row].mean(axis=0)),
            )
        ]
        for row in range(2)
    ]


def _measured(value: float, error: float, blocks: np.ndarray) -> Measured:
    value, error = float(value), float(error)
    return Measured(value, value - error, value + error, INJECTIONS, error, blocks.tolist())


def _compare(base: Side, new: Side, *, paired: bool, run: str = "run") -> list[Comparison]:
    compared = []
    for overall, of_layers, old, now in zip(OVERALL, LAYER_QUANTITIES, base, new, strict=False):
        *layers, last = zip(old, now, strict=True)
        compared.append(compare_measured(run, overall, *last, TOLERANCES, paired=paired))
        compared += [
            compare_measured(run, of_layers, *pair, TOLERANCES, paired=paired, layer=str(number))
            for number, pair in enumerate(layers)
        ]
        compared.append(compare_layers(run, of_layers, layers, TOLERANCES))
    return compared


def _worse(comparisons: list[Comparison]) -> bool:
    judged = judge(comparisons, TOLERANCES.significance)
    return any(judgement.verdict == "worse" for judgement in judged)


def _false_alarms(pool: np.ndarray) -> dict[str, int]:
    """In how many of CALLS calls anything is worse, with RUNS runs and with one run each."""
    draw = np.random.default_rng(SEED)
    found = {"runs": 0, "one_run": 0}
    for _ in range(CALLS):
        call = [_compare(_side(_draw(pool, draw)), _side(_draw(pool, draw)), paired=False) for _ in range(RUNS)]
        found["runs"] += _worse([comparison for run in call for comparison in run])
        found["one_run"] += _worse(call[0])
    return found


def _power(pool: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Kind of change -> `all` layers, `one` (mean over layers), the `worst` one -> share of calls that find each of FACTORS.

    A change in one layer is found where DeltaLoss of that layer is worse; one in all layers, where any number is. In `doubled`,
    the share that find twice the DeltaLoss, by layer.
    """
    draw, family = np.random.default_rng(SEED + 1), _family(pool)
    found = {}
    for kind in ("each", "others", "unpaired"):
        single, together = np.zeros((len(FACTORS), pool.shape[1])), np.zeros(len(FACTORS))
        for _ in range(POWER_CALLS):
            before = _draw(pool, draw)
            base, after = _side(before), before if kind == "each" else _draw(pool, draw)
            for number, factor in enumerate(FACTORS):
                new = _side(after * np.array([factor, 1.0])[:, None, None])
                overall, *layers, joint = _compare(base[:1], new[:1], paired=kind != "unpaired")
                together[number] += _worse(_among([overall, *layers, joint], family))
                single[number] += [_worse(_among([layer], family)) for layer in layers]
        shares = single / POWER_CALLS
        found[kind] = {
            "all": (together / POWER_CALLS).tolist(),
            "one": shares.mean(axis=1).tolist(),
            "worst": shares.min(axis=1).tolist(),
            "doubled": shares[FACTORS.index(2.0)].tolist(),
        }
    return found


def _among(comparisons: list[Comparison], family: int) -> list[Comparison]:
    """Comparisons among others of the same call that have not changed."""
    same = [Comparison("", "same", worse_by=0.0, allowed=0.0, p=1.0)] * (family - len(comparisons))
    return comparisons + same


def _over_trainings() -> dict[str, list[float]]:
    """Trainings on each side -> the share of calls that find each of FACTORS, after that of false alarms."""
    draw, found = np.random.default_rng(SEED), {}
    for count in TRAININGS:
        shares = []
        for factor in (1.0, *FACTORS):
            worse = 0
            for _ in range(CALLS):
                sides = [
                    [
                        Measured(value, value, value, 1, 0.0)
                        for value in (scale * np.exp(SPREAD * draw.normal(size=count))).tolist()
                    ]
                    for scale in (1.0, factor)
                ]
                compared = compare_over_trainings("cell", OVERALL[0], *sides, TOLERANCES)
                worse += _worse(_among([compared], 6 * CELLS))
            shares.append(worse / CALLS)
        found[str(count)] = shares
    return found
