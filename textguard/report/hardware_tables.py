"""Tables of the faults of section `hardware`: where the ranking of variants holds, and what protected memory is worth."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from textguard.report.rendering import Judged, Table
from textguard.schema.hardware import USUAL, Bargain, FaultRatio, Hardware, HardwareCell, Protected
from textguard.schema.results import BASELINE, MEASURES, Cell


def fault_model_table(cells: Sequence[HardwareCell], usual: Sequence[Cell], note: str) -> Table:
    """Each variant beside its baseline, under every kind of faults. usual: the same under those of section inject."""
    known = {(cell.dataset, cell.backbone, cell.variant): cell for cell in usual}
    rows = []
    for cell in cells:
        first = known[cell.dataset, cell.backbone, cell.variant].first
        names = {ratio.faults: None for ratio in cell.ratios if ratio.measure != "rate"}
        kept = {(ratio.faults, ratio.measure, ratio.place): ratio for ratio in cell.ratios if ratio.measure != "rate"}
        usual_verdicts = {name: getattr(first.verdict, name).overall for name in MEASURES}
        row: list[Any] = [cell.dataset, cell.backbone, cell.variant]
        if names:
            said = []
            for measure, scale in (("sdc", 100), ("delta_loss", 1)):
                sides = [getattr(side.overall, measure).times(scale) for side in (first.baseline, first.own)]
                ratio = getattr(first.improvement, measure).overall
                said += [*sides, Judged(ratio, usual_verdicts[measure])]
            rows.append([*row, USUAL, *said, None, None, None, None])
        for name in names:
            found = {measure: kept[name, measure, "overall"] for measure in ("sdc", "delta_loss")}
            lost = kept.get((name, "accuracy", "overall"))
            rows.append(
                [
                    *row,
                    name,
                    *_shown(found["sdc"], 100),
                    *_shown(found["delta_loss"], 1),
                    *([lost.baseline, lost.own] if lost else [None, None]),
                    *(ranking(usual_verdicts[measure], ratio.verdict) for measure, ratio in found.items()),
                ]
            )
    caption = (
        "Other faults than section inject's: plain means over layers, or over stored tensors where faults in weights stay. "
        "(x): the baseline's / ours, above 1 is better. Accuracy lost: points of top-1 per fault that stays. Ranking: whether "
        f"the verdict is that of {USUAL}; reversed where one is better and the other worse. {note}"
    )
    headers = [
        *("Data Set", "Backbone", "Variant", "Faults", "SDC Baseline (%)", "SDC Ours (%)", "SDC (x)", "DeltaLoss Baseline"),
        *("DeltaLoss Ours", "DeltaLoss (x)", "Accuracy Lost Baseline (points)", "Accuracy Lost Ours (points)"),
        *("Ranking by SDC", "Ranking by DeltaLoss"),
    ]
    return Table("fault_models", caption, headers, rows)


def ranking(usual: str, other: str) -> str:
    """Whether two verdicts say the same of who is better."""
    if usual == other and usual in ("better", "worse"):
        return "the same"
    return "reversed" if {usual, other} == {"better", "worse"} else "not told"


def _shown(ratio: FaultRatio, scale: float) -> list[Any]:
    return [ratio.baseline.times(scale), ratio.own.times(scale), Judged(ratio.ratio, ratio.verdict)]


def error_rate_table(cells: Sequence[HardwareCell], runs: Mapping[str, Hardware], note: str) -> Table:
    """The bit error rates of stored parameters that cost accuracy, and what protection is worth."""
    bits = {curve.protection: curve.bits for run in runs.values() for curve in run.curves}
    rows = [
        [
            *(cell.dataset, cell.backbone, cell.variant, ratio.faults, f"{bits[ratio.faults]:.4g}", f"{ratio.points:g}"),
            *(ratio.baseline, ratio.own, Judged(ratio.ratio, ratio.verdict)),
        ]
        for cell in cells
        for ratio in cell.ratios
        if ratio.measure == "rate"
    ]
    caption = (
        "Bit errors that stay in the memory of the parameters: the rate per stored bit at which a classifier loses so many "
        "points of top-1 on average. (x): ours / the baseline's, above 1 is better. A rate that "
        f"was not reached is above its bound. Stored bits: per bit of data, check bits included, which are hit alike. {note}"
    )
    headers = [
        *("Data Set", "Backbone", "Variant", "Protection", "Stored Bits (x)", "Points Lost", "Rate Baseline", "Rate Ours"),
        "Rate (x)",
    ]
    return Table("error_rates", caption, headers, rows)


def protection_table(cells: Sequence[HardwareCell], note: str) -> Table:
    """What each protection of parameters and each mitigation of neurons costs and buys, on every variant."""
    shown: dict[tuple[str, ...], list[Any]] = {}
    for cell in cells:
        for found in cell.protected:
            for variant, bargain in ((BASELINE, found.baseline), (cell.variant, found.own)):
                row = [cell.dataset, cell.backbone, found.name, variant, *_bargain(found, bargain)]
                # A baseline is in the cells of all its variants, but for one with other trainings: the first is shown.
                shown.setdefault((cell.dataset, cell.backbone, found.kind, found.name, variant), row)
    place = {name: number for number, name in enumerate(dict.fromkeys(key[:4] for key in shown))}
    rows = [shown[key] for key in sorted(shown, key=lambda key: place[key[:4]])]
    caption = (
        "What protects, what it costs and what it buys. Protections are of stored parameters, whose bits err at a rate: the "
        "lowest tried at which the baseline loses 10 points of top-1 without one, or the highest; SDC is the share of "
        f"predictions that change. Mitigations are of neurons, under {USUAL} without a range detector, in the plain mean over "
        "layers. (x): without / with, above 1 it helps; both meet the same faults, and intervals are those of others, so they "
        "are rather too wide. Stored bits: per bit of the parameters, with check bits or bounds. Gates: of two inputs, to read "
        f"all parameters once. Comparisons: added to an inference; no multiply-add is. Top-1: without any fault. {note}"
    )
    headers = [
        *("Data Set", "Backbone", "Protection", "Variant", "Of", "Stored Bits (x)", "Gates (M)", "Comparisons (M per image)"),
        *("Top-1 Added (points)", "Bit Error Rate", "SDC Without (%)", "SDC With (%)", "SDC (x)", "DeltaLoss Without"),
        *("DeltaLoss With", "DeltaLoss (x)"),
    ]
    return Table("protections", caption, headers, rows)


def _bargain(found: Protected, bargain: Bargain) -> list[Any]:
    of = "parameters" if found.kind == "protection" else "neurons"
    gates = None if math.isnan(bargain.gates) else f"{bargain.gates / 1e6:.4g}"
    costs = [f"{bargain.bits:.4g}", gates, f"{bargain.comparisons / 1e6:.4g}"]
    sdc, loss = bargain.sdc, bargain.delta_loss
    return [
        *(of, *costs, bargain.top1_change, None if found.rate is None else f"{found.rate:g}"),
        *(sdc.without.times(100), sdc.under.times(100), sdc.ratio),
        *(loss.without, loss.under, loss.ratio),
    ]
