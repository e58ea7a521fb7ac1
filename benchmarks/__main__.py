"""Measure what is named on the command line, or everything, and write benchmarks/results.json and results.md."""

import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import coverage, efficiency, injections, last_layer, memory, overhead, training
from textguard import __version__
from textguard.artifacts import write_json, write_text
from textguard.runtime import describe_device, pick_device

HERE = Path(__file__).parent


def main(names: list[str]) -> None:
    """Run the benchmarks, the slowest last."""
    results = {
        "device": describe_device(pick_device()),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "textguard": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "last_layer": last_layer.measure(),
        "overhead": overhead.measure(),
        "memory": memory.measure(),
        "coverage": coverage.measure(),
        "efficiency": efficiency.measure(),
        "training": training.measure(),
    }
    results["injections"] = injections.measure(names or list(injections.CASES))
    write_json(HERE / "results.json", results)
    write_text(HERE / "results.md", table(results))
    print((HERE / "results.md").read_text())


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
    lines += [
        "",
        f"{results['device']}; {results['date']}. Medians of {injections.ROUNDS} alternating runs of the same plan.",
        f"ResNet-18's campaign: {shares['products']:.0%} of the time in convolutions and matrix products, "
        f"{shares['movement']:.0%} in data movement, {shares['other']:.0%} elsewhere.",
        f"Peak memory, ResNet-50 at 224 x 224: {peak['ratio']:.2f} times that of a plain forward pass with the same batch.",
        f"Last layer in closed form: {last['faults']:,} faults in {last['seconds']:.2f} s.",
        f"ResNet-18, every layer's DeltaLoss as well known (99 % half-width) as from {reach['uniform_per_layer']:,} uniform "
        f"injections with PyTorchFI: {reach['times_fewer']:.1f} times fewer injections ({reach['injections']:,} into "
        f"{reach['sampled']} sampled layers; {reach['reached']} of them got there), {reach['times_faster']:.0f} times less "
        f"time ({reach['seconds']:.1f} s; PyTorchFI's scaled from {reach['pytorchfi_timed']:,} of its "
        f"{reach['pytorchfi_injections']:,}).",
        f"Training ResNet-50 at 224 x 224 from JPEGs, batches of {trained['batch']}, fp32: {trained['ours']:.2f} images/s, "
        f"{trained['times_ours']:.2f} times a plain loop after torchvision's references; "
        f"{trained['times_ours_channels_last']:.2f} times with TEXTGUARD_CHANNELS_LAST=1.",
        "",
        "How often 99 % intervals of DeltaLoss hold, and their mean half-width relative to the truth, in "
        f"{held['repetitions']:,} campaigns: {held['uniform']:,} injections uniformly, {held['neyman']:,} by plan neyman on "
        "images by importance; "
        "mean +- 2.576 standard errors, Hall's, ours.",
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


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main(sys.argv[1:])
