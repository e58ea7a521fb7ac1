"""Measure what is named on the command line, or everything, and write benchmarks/results.json and results.md.

What is not named keeps its numbers and its date.
"""

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import (
    coverage,
    efficiency,
    gate,
    guidance,
    guided,
    injections,
    last_layer,
    lists,
    memory,
    networks,
    overhead,
    persistent,
    protection,
    training,
)
from textguard import __version__
from textguard.artifacts import write_json, write_text
from textguard.runtime import describe_device, pick_device

HERE = Path(__file__).parent
MEASURES = {
    module.__name__.rpartition(".")[2]: module.measure
    for module in (last_layer, overhead, memory, networks, protection, guided, gate, coverage, efficiency)
}
MEASURES |= {
    "simulated": coverage.simulate,
    "guidance": guidance.measure,
    "training": training.measure,
    "persistent": persistent.measure,
    "lists": lists.measure,
    "injections": lambda: injections.measure(list(injections.CASES)),
}


def main(names: list[str]) -> int:
    """Run the benchmarks, the slowest last. Returns the exit code."""
    if unknown := [name for name in names if name not in MEASURES]:
        print(f"unknown benchmark {unknown[0]!r}; known: {', '.join(MEASURES)}", file=sys.stderr)
        return 1
    where = {
        "device": describe_device(pick_device()),
        "machine": f"{platform.machine()}, {platform.system()}, Python {'.'.join(platform.python_version_tuple()[:2])}",
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
        write_json(HERE / "results.json", results)  # an interruption loses one part, not all
    write_text(HERE / "results.md", table(results))
    print((HERE / "results.md").read_text(encoding="utf-8"))
    return 0


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| Model | Layers | Forward (images/s) | Faults per image | Masked | PyTorchFI (inj/s) | textguard (inj/s) "
        "| x PyTorchFI | r | At most | x forward |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in results["injections"].items():
        head = f"{name} | {found['layers']} | {_number(found['forward_images_per_s'])}"
        for density, own in found["densities"].items():
            lines.append(
                f"| {head} | {density} | {own['masked_share']:.0%} | {_number(own.get('pytorchfi_per_s'))} "
                f"| {_number(own['replay_per_s'])} | {_number(own.get('times_pytorchfi'))} | {own['r']:.3f} "
                f"| {_number(own.get('bound'))} | {_number(own['times_forward'])} |"
            )
            head = " | | "
    shares, peak, last = results["overhead"], results["memory"], results["last_layer"]
    reach, held, trained = results["efficiency"], results["coverage"], results["training"]
    one = reach["each"][0]
    lines += [
        "",
        f"{results['device']}; {_dates(results['dates'])}. Medians of {injections.ROUNDS} alternating runs. Injections of both "
        "engines are counted with the golden run of their images. PyTorchFI is declared once. r: what a fault costs the "
        "replay engine beyond the golden run, in forward passes of one image. At most: (1 + n) / (1 + n r) with n faults per "
        "image, which is what a golden run as fast as a forward pass would come to.",
        _goal(results["injections"]),
        "Memory format and batch size that were the fastest, of PyTorchFI and of the plain forward pass: "
        + "; ".join(f"{name}: {found['pytorchfi']} / {found['forward']}" for name, found in results["injections"].items())
        + ".",
        f"ResNet-18's campaign: {shares['products']:.0%} of the time in convolutions and matrix products, "
        f"{shares['movement']:.0%} in data movement, {shares['other']:.0%} elsewhere.",
        f"Peak memory, ResNet-50 at 224 x 224: {peak['ratio']:.2f} times that of a plain forward pass with the same batch.",
        *_families(results.get("networks")),
        f"Last layer in closed form: {last['faults']:,} faults in {last['seconds']:.2f} s.",
        f"ResNet-18, until every layer's DeltaLoss has the 99 % half-width that {one['uniform_per_layer']:,} uniform "
        f"injections with PyTorchFI give: {_spread(reach['times_fewer'], 1)} times fewer injections, "
        f"in the median layer {_spread(reach['times_fewer_median'], 0)}, in the worst one "
        f"{_spread(reach['times_fewer_worst'], 0)}; "
        f"{_spread(reach['times_faster'], 0)} times less time. Brackets hold the lowest and the highest of "
        f"{reach['trainings']} trainings. {reach['reached']} of their {reach['sampled']} sampled layers reached the "
        f"half-width. PyTorchFI ran {one['pytorchfi_timed']:,} of its {one['pytorchfi_injections']:,} injections; its time is "
        "scaled up.",
        f"Training ResNet-50 at 224 x 224 from JPEGs, batches of {trained['batch']}, fp32: {trained['ours']:.2f} images/s, "
        f"{_spread(trained['times_ours'], 2)} times a plain loop after torchvision's references; "
        f"{_spread(trained['times_ours_channels_last'], 2)} times with TEXTGUARD_CHANNELS_LAST=1. In brackets, of "
        f"{training.ROUNDS} rounds the lowest and the highest.",
        "",
        f"How often 99 % intervals hold in {held['repetitions']:,} campaigns on {coverage.LAYERS} layers: DeltaLoss of the "
        "worst layer, with mean +- 2.576 standard errors, Hall's interval and ours; ours in the mean over layers, its "
        "half-width as a share of the truth (median layer) and over 2.576 true standard errors; DeltaLoss of the mean of these "
        "layers, with ours; and SDC probability, of the worst layer and in the mean over layers.",
        "",
        "| Classifier | Plan, injections | Normal | Hall | Ours | Ours, mean | Half-width | Over ideal | Mean of layers "
        "| SDC | SDC, mean |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, classifier in held["classifiers"].items():
        for campaign, found in classifier["campaigns"].items():
            ours = found["ours"]
            numbers = [
                *(f"{found[interval]['lowest_coverage']:.1%}" for interval in ("normal", "hall", "ours")),
                f"{ours['coverage']:.1%}",
                f"{ours['half_width']:.0%}",
                f"{found['ours_ideal']:.2f}",
                f"{ours['mean_coverage']:.1%} (+-{ours['mean_half_width']:.0%})",
                f"{found['sdc']['lowest_coverage']:.1%}",
                f"{found['sdc']['coverage']:.1%}",
            ]
            lines.append(f"| {name} | {campaign} | {' | '.join(numbers)} |")
    lines += [
        "",
        "What a guided plan is worth: how uneven the results of single injections are, weights counted (coefficient of "
        "variation, CV), and the ratio of the variances of a layer's DeltaLoss, uniform over guided, at the same number of "
        "injections.",
        "",
        "| Classifier | Layer | CV, uniform | CV, guided | Variance ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, classifier in held["classifiers"].items():
        for layer, own in classifier["layers"].items():
            ratio = (own["uniform_cv"] / own["guided_cv"]) ** 2
            lines.append(f"| {name} | {layer} | {own['uniform_cv']:.0f} | {own['guided_cv']:.2g} | {_number(ratio)} |")
    for name, found in results["guided"].items():
        for layer, own in found["layers"].items():
            lines.append(
                f"| {name} at 224 x 224 | {layer} | {own['uniform_cv']:.0f} | {own['guided_cv']:.2g} "
                f"| {_number(own['variance_ratio'])} |"
            )
    lines += _simulated(results["simulated"])
    lines += ["", "Drawing takes, per image and for " + _preparation(results["guided"]) + ".", *_gate(results["gate"])]
    lines += protection.lines(results.get("protection"))
    lines += guidance.lines(results.get("guidance"))
    lines += [*_persistent(results.get("persistent")), *_lists(results.get("lists"))]
    return "\n".join(lines) + "\n"


def _families(found: dict | None) -> list[str]:
    """Which engine takes one network of each of timm's families; nothing where that was not measured."""
    if not found:
        return []
    others, not_run = (
        "; ".join(f"{name} ({reason.rstrip('.')})" for name, reason in found[part].items()) or "none"
        for part in ("whole", "not_run")
    )
    return [
        f"One network of each of timm's families: {found['replay']} of {found['replay'] + len(found['whole'])} are replayed. "
        f"Others, whole inferences: {others}. Not run on such images: {not_run}."
    ]


def _persistent(found: dict | None) -> list[str]:
    """Persistent faults beside the plain loop and PyTorchFI; nothing where that was not measured."""
    if not found:
        return []
    lines = [
        "",
        f"Persistent faults, each on the same images; the goal on ResNet-20 is {persistent.GOAL:g} times the loop. This flips "
        "a weight, runs all images and flips it back, in its fastest memory format and batch size. PyTorchFI's weight "
        "injection copies the model for each fault. Faults are uniform over tensors or over stored bits. Foreseen: with "
        f"gradients in the place of inferences where changes are small. Medians of {persistent.ROUNDS} alternating runs.",
        "",
        "| Model | Loop (inferences/s) | Faults uniform over | Foreseen | Inferences/s | x loop | x PyTorchFI |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in found.items():
        for plan, foreseen in (("tensors", "yes"), ("bits", "yes"), ("tensors, run", "no")):
            own = case[plan]
            lines.append(
                f"| {name} | {_number(case['loop_per_s'])} | {plan.partition(',')[0]} | {foreseen} | {_number(own['per_s'])} "
                f"| {_number(own['times_loop'])} | {_number(own.get('times_pytorchfi'))} |"
            )
    return lines


def _lists(found: dict | None) -> list[str]:
    """dnn-benchmarks' lists of weight faults, replayed; nothing where they were not at hand."""
    if not found:
        return []
    lines = [
        "",
        "Published weight faults (dnn-benchmarks, 10,000 test images of CIFAR-10 each), and the same on some of these images, "
        "as the folder has them: correlations of the shares of critical images; the share of faults in the same class (never "
        f"critical; for less than {lists.MOST:.0%} of images; for more); that of faults which are critical for them as often "
        "as one of our images, or more; and mean shares of critical images.",
        "",
        "| Model | Top-1 | Faults | Images | Pearson | Spearman | Same class | ... where shown | Mean, ours | Mean, theirs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in found.items():
        for own in case.values():
            lines.append(
                f"| {name} | {own['top1']:.1%} | {own['faults']:,} | {own['images']:,} | {own['pearson']:.3f} "
                f"| {own['spearman']:.2f} | {own['same_class']:.1%} | {own['same_class_where_shown']:.1%} "
                f"| {own['mean_changed'][0]:.2%} | {own['mean_changed'][1]:.2%} |"
            )
    return lines


def _gate(found: dict) -> list[str]:
    """False alarms and power of the regression gate."""
    alarms = "; ".join(
        f"{plan}: {own['false_alarms']['runs']} of {found['calls']:,} ({own['false_alarms']['one_run']} with one run)"
        for plan, own in found["plans"].items()
    )
    factors = " | ".join(f"x {factor:g}" for factor in gate.FACTORS)
    lines = [
        "",
        f"The regression gate, with {gate.INJECTIONS:,} injections per layer of ResNet-18, and {gate.RUNS} runs in a call "
        f"({found['comparisons']} comparisons). False alarms, both sides having the same faults to draw from: {alarms}. "
        "Power, the share of calls that find so many times the DeltaLoss in one layer (mean over layers; the worst layer) or "
        "in all: where each of the same faults does more; where other faults do, under the same plan; under another plan.",
        "",
        f"| Plan | What does more | Layers | {factors} |",
        "| --- | --- | --- |" + " --- |" * len(gate.FACTORS),
    ]
    kinds = {"each": "each fault", "others": "other faults", "unpaired": "another plan's faults"}
    for plan, own in found["plans"].items():
        for kind, power in own["power"].items():
            for layers, shares in (("one", power["one"]), ("the worst", power["worst"]), ("all", power["all"])):
                lines.append(f"| {plan} | {kinds[kind]} | {layers} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    lines += [
        "",
        f"Trainings of one cell among {gate.CELLS}; the logarithm of DeltaLoss has a standard deviation of {gate.SPREAD:g}:",
        "",
        f"| Trainings on each side | x 1 | {factors} |",
        "| --- | --- |" + " --- |" * len(gate.FACTORS),
    ]
    return lines + [
        f"| {count} | {' | '.join(f'{share:.1%}' for share in shares)} |" for count, shares in found["trainings"].items()
    ]


def _simulated(found: dict) -> list[str]:
    """Intervals over trainings, and of samples that mostly round."""
    lines = [
        "",
        f"Intervals (99 %) of an improvement over trainings, {coverage.SIMULATIONS:,} simulations each: how often they hold, "
        "their half-width as a factor (median), and how often they find a true improvement. Standard deviations are those of "
        "the logarithm, between trainings and of each one's estimate (injections).",
        "",
        "| Trainings | Between | Injections | Hold | Half-width | "
        + " | ".join(f"Find {factor:g} x" for factor in coverage.FACTORS)
        + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(coverage.FACTORS),
    ]
    lines += [
        f"| {own['trainings']} | {own['between']} | {own['within']} | {own['coverage']:.1%} | x/÷ {_number(own['half_width'])} "
        f"| {' | '.join(f'{share:.0%}' for share in own['power'].values())} |"
        for own in found["trainings"]
    ]
    lines += [
        "",
        "How often 99 % intervals of DeltaLoss hold where injections do nothing but round, but for some: with twice the worst "
        f"seen as the unseen, and with ours, where another layer of the campaign has seen {coverage.WORST:g} nats.",
        "",
        "| Injections that do something | Injections | Twice the worst seen | Ours |",
        "| --- | --- | --- | --- |",
    ]
    return lines + [
        f"| {name} | {size} | {own['seen']:.1%} | {own['ours']:.1%} |"
        for name, sizes in found["rounded"].items()
        for size, own in sizes.items()
    ]


def _goal(cases: dict[str, dict]) -> str:
    """Where the replay engine is less than GOAL times as fast as PyTorchFI."""
    missed = [
        f"{name} with {density} faults per image ({_number(own['times_pytorchfi'])}, at most {_number(own['bound'])})"
        for name, found in cases.items()
        for density, own in found["densities"].items()
        if own.get("times_pytorchfi", injections.GOAL) < injections.GOAL
    ]
    return f"Less than {injections.GOAL:.0f} times PyTorchFI: {'; '.join(missed) or 'nowhere'}."


def _preparation(cases: dict[str, dict]) -> str:
    each = "; ".join(
        f"{name}, {found['drawing_s_per_image']:.2g} s, {found['drawing_s_per_image'] / found['forward_s_per_image']:.1f} "
        "forward passes"
        for name, found in cases.items()
    )
    one = next(iter(cases.values()))
    return f"{one['injections'] // one['images']} injections on each: {each}"


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
