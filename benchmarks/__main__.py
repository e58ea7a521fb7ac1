"""Measure what is named on the command line, or everything, and write benchmarks/results.json and results.md.

What is not named keeps its numbers and its date.
"""

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import coverage, efficiency, injections, last_layer, memory, overhead, training
from textguard import __version__
from textguard.artifacts import write_json, write_text
from textguard.runtime import describe_device, pick_device

HERE = Path(__file__).parent
MEASURES = {
    module.__name__.rpartition(".")[2]: module.measure for module in (last_layer, overhead, memory, coverage, efficiency)
}
MEASURES |= {"training": training.measure, "injections": lambda: injections.measure(list(injections.CASES))}


def main(names: list[str]) -> int:
    """Run the benchmarks, the slowest last. Returns the exit code."""
    if unknown := [name for name in names if name not in MEASURES]:
        print(f"unknown benchmark {unknown[0]!r}; known: {', '.join(MEASURES)}", file=sys.stderr)
        return 1
    where = {
        "device": describe_device(pick_device()),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
    }
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8")) if names else {}
    if names and {name: results[name] for name in where} != where:
        print(f"the other numbers are of {results['device']}, {results['machine']}; measure everything", file=sys.stderr)
        return 1
    today = datetime.now(UTC).date().isoformat()
    results |= {**where, "textguard": __version__}
    for name in names or MEASURES:
        results[name] = MEASURES[name]()
        results["dates"] = results.get("dates", {}) | {name: today}
    write_json(HERE / "results.json", results)
    write_text(HERE / "results.md", table(results))
    print((HERE / "results.md").read_text(encoding="utf-8"))
    return 0


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| Model | Layers | Masked | Forward (images/s) | PyTorchFI (inj/s) | textguard (inj/s) | x PyTorchFI | x forward |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results["injections"].items():
        lines.append(
            f"| {name} | {found['layers']} | {found['masked_share']:.0%} | {_number(found['forward_images_per_s'])} "
            f"| {_number(found.get('pytorchfi_per_s'))} | {_number(found['replay_per_s'])} "
            f"| {_number(found.get('times_pytorchfi'))} | {_number(found['times_forward'])} |"
        )
    shares, peak, last = results["overhead"], results["memory"], results["last_layer"]
    reach, held, trained = results["efficiency"], results["coverage"], results["training"]
    one = reach["each"][0]
    lines += [
        "",
        f"{results['device']}; {_dates(results['dates'])}. Medians of {injections.ROUNDS} alternating runs of the same plan.",
        f"ResNet-18's campaign: {shares['products']:.0%} of the time in convolutions and matrix products, "
        f"{shares['movement']:.0%} in data movement, {shares['other']:.0%} elsewhere.",
        f"Peak memory, ResNet-50 at 224 x 224: {peak['ratio']:.2f} times that of a plain forward pass with the same batch.",
        f"Last layer in closed form: {last['faults']:,} faults in {last['seconds']:.2f} s.",
        f"ResNet-18, until every layer's DeltaLoss has the 99 % half-width that {one['uniform_per_layer']:,} uniform "
        f"injections with PyTorchFI give: {_spread(reach['times_fewer'], 1)} times fewer injections, "
        f"{_spread(reach['times_faster'], 0)} times less time. Brackets hold the lowest and the highest of "
        f"{reach['trainings']} trainings. {reach['reached']} of their {reach['sampled']} sampled layers reached the "
        f"half-width. PyTorchFI ran {one['pytorchfi_timed']:,} of its {one['pytorchfi_injections']:,} injections; its time is "
        "scaled up.",
        f"Training ResNet-50 at 224 x 224 from JPEGs, batches of {trained['batch']}, fp32: {trained['ours']:.2f} images/s, "
        f"{_spread(trained['times_ours'], 2)} times a plain loop after torchvision's references; "
        f"{_spread(trained['times_ours_channels_last'], 2)} times with TEXTGUARD_CHANNELS_LAST=1. In brackets, of "
        f"{training.ROUNDS} rounds the lowest and the highest.",
        "",
        "How often 99 % intervals of DeltaLoss hold, and their mean half-width relative to the truth, in "
        f"{held['repetitions']:,} campaigns: {held['uniform']:,} injections uniformly, {held['neyman']:,} by plan neyman on "
        "images by importance; "
        f"mean +- 2.576 standard errors, Hall's, ours. Of {held['trainings']} trainings, the lowest coverage and the mean "
        "half-width.",
        "",
        "| Layer | CV | Skewness | Uniform: normal | Hall | Ours | Neyman: normal | Hall | Ours |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, layer in held["layers"].items():
        cells = [
            f"{found['coverage']:.1%} (+-{found['half_width']:.2g})"
            for plan in ("uniform", "neyman")
            for found in (layer[plan][interval] for interval in coverage.INTERVALS)
        ]
        lines.append(f"| {name} | {layer['cv']:.0f} | {layer['skewness']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _dates(dates: dict[str, str]) -> str:
    """When most of it was measured, and what on other days."""
    most = max(dates.values(), key=list(dates.values()).count)
    return ", ".join([most, *(f"{name} {date}" for name, date in dates.items() if date != most)])


def _spread(times: list[float], digits: int) -> str:
    """Median, lowest and highest."""
    middle, *ends = (f"{time:.{digits}f}" for time in times)
    return f"{middle} ({' to '.join(ends)})"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
