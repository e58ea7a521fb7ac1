"""Tables of corrupted images: what they cost each variant, and whether what stands faults stands them."""

from typing import Any

from textguard.report.rendering import Judged, Table
from textguard.schema.corruptions import CLEAN, EFFECTS, ComparedCorruptions, CorruptionCell, CorruptionEffect

# Measure, what a shown value is multiplied with, its unit, and that of the effect.
SHOWN = [
    ("top1", 100, " (%)", "points"),
    ("top2diff", 100, " (%)", "points"),
    ("loss", 1, "", "x"),
    ("sdc", 100, " (%)", "x"),
    ("delta_loss", 1, "", "x"),
]


def corruption_table(compared: ComparedCorruptions, note: str) -> Table:
    """Each variant beside its baseline on clean images and under every corruption."""
    rows = [
        [cell.dataset, cell.backbone, cell.variant, image_name(*place), *_values(effects)]
        for cell in compared.cells
        for place, effects in _by_place(cell).items()
    ]
    caption = (
        "Test images that got worse, in severities 1 to 5 of Hendrycks and Dietterich, the same for all classifiers. Top-1, "
        "Top2Diff and loss: without faults, over images; (points): ours - the baseline's, above 0 is better. SDC and "
        "DeltaLoss: plain means over layers of a small campaign, where one was made, on the images that are still predicted "
        "right, with ranges profiled on clean training images. (x): the baseline's / ours, above 1 is better. "
        f"{note}"
    )
    headers = ["Data Set", "Backbone", "Variant", "Images"]
    for measure, _, unit, of_effect in SHOWN:
        name = EFFECTS[measure]
        headers += [f"{name} Baseline{unit}", f"{name} Ours{unit}", f"{name} ({of_effect})"]
    return Table("corruptions", caption, headers, rows)


def image_name(kind: str, severity: int) -> str:
    """Images as tables call them: clean, or noise 3."""
    return kind if kind == CLEAN else f"{kind} {severity}"


def _by_place(cell: CorruptionCell) -> dict[tuple[str, int], dict[str, CorruptionEffect]]:
    found: dict[tuple[str, int], dict[str, CorruptionEffect]] = {}
    for effect in cell.effects:
        found.setdefault((effect.kind, effect.severity), {})[effect.measure] = effect
    return found


def _values(effects: dict[str, CorruptionEffect]) -> list[Any]:
    values: list[Any] = []
    for measure, scale, _, _ in SHOWN:
        effect = effects.get(measure)
        if effect:
            values += [effect.baseline.times(scale), effect.own.times(scale), Judged(effect.effect, effect.verdict)]
        else:
            values += [None] * 3
    return values


def together_table(compared: ComparedCorruptions, confidence: str) -> Table:
    """Whether classifiers that stand faults well stand corruption well."""
    rows = [
        [one.dataset, EFFECTS[one.measure], one.correlation, one.correlation.n]
        for one in compared.together
        if compared.classifiers
    ]
    caption = (
        "Whether what stands faults stands corruption: Spearman's rank correlation, over classifiers, of what faults do on "
        "clean images (section inject, plain mean over layers) with the points of top-1 that a corruption costs, in the mean "
        "over kinds and severities. Above 0: together; below 0: one at the other's expense; 0 within the brackets: not told. "
        f"Brackets: intervals of confidence {confidence}, with trainings of one variant taken as independent."
    )
    return Table("faults_and_corruptions", caption, ["Data Set", "Faults", "Rank Correlation", "Classifiers"], rows)
