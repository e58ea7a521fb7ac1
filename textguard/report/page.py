"""One page that shows a grid's results: a single HTML file that needs no network and no server.

Class names, answers of language models and parameters come from outside. Every value goes through the template's escaping, and
pictures are data: nothing that was read can become markup or a script.
"""

import base64
import math
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from textguard import __version__
from textguard.analysis.files import RESULTS_DIR, TEXTS_DIR, load_cells, load_results, load_text_quality
from textguard.analysis.regression import compare_all, judge
from textguard.artifacts import read_csv, read_json_lines, write_text
from textguard.environment import run_command
from textguard.errors import InvalidArtifact, TextguardError, printable
from textguard.estimates.statistics import Estimate
from textguard.params import ClassTexts, Params, load_params
from textguard.report.gate import read_runs, verdict_table
from textguard.report.published import load_published
from textguard.report.rendering import Table, show_cell, show_estimate
from textguard.report.tables import tables_of
from textguard.report.theme import place_name, variant_name
from textguard.schema.results import BASELINE, PROPOSED, Cell, RunResult

HERE = Path(__file__).parent
TABLES = {
    "table1": "Table 1: backbones",
    "table2": "Table 2: data sets",
    "table3": "Table 3: what the head starts from",
    "detectors": "Range detectors",
    "resilience": "Resilience of every run",
    "attention": "Where the classifiers look, with faults",
    "audit": "What is published, against itself",
    "recipes": "Recipes",
}
# Stem of a figure's file -> what it shows, in the order of the page.
FIGURES = {
    "architecture": "Architecture",
    "delta_loss": "DeltaLoss per layer",
    "outcomes": "What became of the faults",
    "bits": "DeltaLoss by layer and bit",
    "value_ranges": "Neuron values per layer",
    "range_effect": "Value range and damage",
    "accuracy_by_top2diff": "Accuracy against Top2Diff",
    "convergence": "Convergence of the estimate",
    "last_layer": "Values of the last layer",
    "attention": "Where the classifiers look",
}
MOST_CLASSES = 20  # whose texts are shown
PARTS = [
    ("headline", "What came out"),
    ("run", "What was run"),
    ("tables", "Tables"),
    ("figures", "Figures"),
    ("runs", "Every run"),
    ("texts", "Texts"),
    ("repeat", "How to repeat this"),
    ("not-run", "What was not run"),
]
VERDICTS = {"better": "better", "worse": "worse"}


@dataclass(frozen=True)
class Revision:
    """The code that the page was made with: a commit in short, its date, and whether files differ from it."""

    commit: str
    date: str
    changed: bool

    def __str__(self) -> str:
        return f"{self.commit} of {self.date}{', with changes' if self.changed else ''}" if self.commit else "not in git"


def read_revision() -> Revision:
    """What git says of the current folder; an empty revision where it says nothing."""
    commit = _git("log", "-1", "--format=%h %cs").split()
    if not commit:
        return Revision("", "", False)
    # What stages write is no change of what they were made with.
    return Revision(*commit, changed=bool(_git("status", "--porcelain", "--", "*.py", "*.yaml", "*.lock", ":!*dvc.lock")))


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main(arguments: list[str]) -> int:
    """Write the grid's page beside another state of it: the folder of that state's results, its name, the page's file."""
    if len(arguments) != 3:
        print("usage: python -m textguard.report.page BASE_RESULTS NAME PAGE", file=sys.stderr)
        return 2
    try:
        base, name, page = Path(arguments[0]), arguments[1], Path(arguments[2])
        params = load_params()
        significance = params.gate.significance
        judgements = judge(compare_all(read_runs(base), read_runs(RESULTS_DIR), params.gate), significance)
        table = verdict_table(judgements, significance)
        write_page(page, params, read_revision(), (name, table))
    except TextguardError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def write_page(path: Path, params: Params, revision: Revision, compared: tuple[str, Table] | None = None) -> None:
    """Write the page of the grid in the current folder. Raises InvalidArtifact.

    compared: the name of another state of the grid, and the gate's table of both.
    """
    cells, runs = load_cells(params.runs), load_results(params.runs)
    grid = "default" if params.root == "." else printable(Path.cwd().name)  # it need not be text
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False)
    template = environment.from_string((HERE / "page.html").read_text(encoding="utf-8"))
    content = template.render(
        title=f"textguard: {grid} grid",
        version=__version__,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        parts=PARTS if compared is None else [PARTS[0], ("compared", "Compared"), *PARTS[1:]],
        headline=[_headline(cell) for cell in cells if cell.variant == PROPOSED] or [_headline(cell) for cell in cells],
        remarks=_remarks(cells, runs),
        headline_figures=[
            _picture(Path("plots/figures") / name, title)
            for name, title in (("improvement", "Improvement over the baseline"), ("tradeoff", "Accuracy and resilience"))
            if (Path("plots/figures") / f"{name}.png").exists()
        ],
        compared={"label": compared[0], "table": _table(compared[1], f"{compared[0]} and now")} if compared else None,
        facts=_facts(params, runs, grid, revision),
        tables=[_table(table, TABLES.get(table.name, table.name)) for table in tables_of(params)],
        figures=_figures(runs),
        runs=[_run(key, run, params) for key, run in runs.items()],
        texts=[_text(texts) for texts in params.class_texts.values()],
        commands=_commands(grid, revision),
        parameters=_parameters(params),
        not_run=_not_run(runs, {dataset.source for dataset in params.datasets.values()}),
    )
    write_text(path, content)


def _headline(cell: Cell) -> dict[str, str]:
    verdict = cell.verdict
    return {
        "place": place_name(cell.dataset, cell.backbone),
        "last_layer": show_estimate(cell.last_layer),
        "overall": show_estimate(cell.overall),
        "top1": show_estimate(cell.top1.times(100)),
        "top1_baseline": show_estimate(cell.top1_baseline.times(100)),
        "variant": variant_name(cell.variant),
        "verdict": verdict.overall,
        "last_verdict": verdict.last_layer,
        "kind": VERDICTS.get(verdict.overall, ""),
        "last_kind": VERDICTS.get(verdict.last_layer, ""),
    }


def _cell_name(cell: Cell) -> str:
    return f"{place_name(cell.dataset, cell.backbone)} with {variant_name(cell.variant)}"


def _remarks(cells: Sequence[Cell], runs: Mapping[str, RunResult]) -> list[str]:
    confidence = ", ".join(dict.fromkeys(f"{100 * run.confidence:g} %" for run in runs.values()))
    remarks = [
        f"Brackets are intervals of confidence {confidence}; “exact” means that every fault was tried. "
        "A verdict is “better” or “worse” only where the interval leaves 1 out."
    ]
    if any(len(cell.seeds) == 1 for cell in cells):
        remarks.append(
            "Rows with one training say nothing about the spread between trainings, which is in none of their intervals."
        )
    weighed = [
        f"{_cell_name(cell)}, {show_estimate(cell.head)}" for cell in cells if cell.verdict.head != cell.verdict.last_layer
    ]
    if weighed:
        remarks.append(
            "The last layer of a text-guided classifier is the weighted mean of its latent layer and its head "
            "(statistics.last_layer_weights). The head alone, against the baseline's last layer, has another verdict for "
            f"{'; '.join(weighed)}."
        )
    changed = [_cell_name(cell) for cell in cells if len({found.overall.value > 1 for found in cell.detectors.values()}) > 1]
    if changed:
        remarks.append(
            "The range detector decides whether the mean over all layers got better or worse for "
            f"{'; '.join(changed)}: see the table of range detectors."
        )
    return remarks


def _facts(params: Params, runs: Mapping[str, RunResult], grid: str, revision: Revision) -> list[tuple[str, str]]:
    inject, faults = params.inject, params.inject.faults
    sampled = sum(run.plan.injections for run in runs.values())
    enumerated = sum(run.plan.enumerated for run in runs.values())
    plans = ", ".join(dict.fromkeys(run.plan.plan for run in runs.values()))
    return [
        ("Grid", f"{grid}: {len(runs)} trainings of {', '.join(dict.fromkeys(run.backbone for run in runs.values()))}"),
        ("Data", ", ".join(dict.fromkeys(run.dataset for run in runs.values()))),
        ("Code", str(revision)),
        ("Device", "; ".join(dict.fromkeys(run.settings["device"] for run in runs.values()))),
        ("Faults", f"{faults.operation}, {faults.bits} bit(s) in {faults.values} {faults.target}(s), {inject.format}"),
        ("Campaigns", f"plan {plans}, seed {inject.seed}: {sampled:,} injections, and {enumerated:,} faults enumerated"),
        ("Detectors", ", ".join(dict.fromkeys([inject.detector, *inject.compare_detectors]))),
        ("Text encoder", params.encoder),
    ]


def _table(table: Table, label: str) -> dict[str, Any]:
    """A table as the template takes it: cells with a text, a number to sort by, and a kind (class) where it is a verdict."""
    rows = [
        [
            {
                "text": f"{value:,}" if isinstance(value, int) else show_cell(value),
                "value": _number(value.value if isinstance(value, Estimate) else value),
                "kind": VERDICTS.get(value, "") if isinstance(value, str) else "",
            }
            for value in row
        ]
        for row in table.rows
    ]
    return {"id": _id(table.name), "label": label, "caption": table.caption, "headers": table.headers, "rows": rows}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _figures(runs: Mapping[str, RunResult]) -> list[dict[str, Any]]:
    groups = []
    for dataset, backbone in dict.fromkeys((run.dataset, run.backbone) for run in runs.values()):
        stem, place = f"{dataset}-{backbone}", place_name(dataset, backbone)
        pictures = [
            _picture(Path("plots/figures") / f"{name}-{stem}", f"{title}, {place}")
            for name, title in FIGURES.items()
            if (Path("plots/figures") / f"{name}-{stem}.png").exists()
        ]
        groups.append({"id": _id(f"figures-{stem}"), "title": place, "pictures": pictures})
    return groups


def _picture(stem: Path, title: str) -> dict[str, Any]:
    """A PNG as the template takes it, small enough for sharp print. Raises InvalidArtifact."""
    file = stem.with_name(f"{stem.name}.png")
    if not file.exists():
        raise InvalidArtifact(f"{file} does not exist; run 'dvc repro', which draws it")
    content = file.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    numbers = str(stem.with_name(f"{stem.name}.csv"))
    size = {"width": round(width / 1.5), "height": round(height / 1.5)}
    return {"id": _id(str(stem)), "source": source, "title": title, "caption": f"{title}.", "numbers": numbers, **size}


def _run(key: str, run: RunResult, params: Params) -> dict[str, Any]:
    facts = [
        ("Parameters", f"{run.parameters:,}"),
        ("Multiply-adds per image", f"{run.multiply_adds:,}"),
        ("Top2Diff", show_estimate(run.top2diff)),
        ("DeltaLoss, last layer", f"{show_estimate(run.last_layer.delta_loss)} nats"),
        ("DeltaLoss by neurons", f"{show_estimate(run.overall.delta_loss_by_neurons)} nats"),
        ("FIT", show_estimate(run.overall.fit)),
        ("Largest logit, scale", f"{run.largest_logit:.3g}, {run.scale:.3g}"),
        ("Images", f"{run.plan.eligible_images:,} predicted right without faults"),
        ("Recipe, seed", f"{params.backbones[run.backbone].recipe}, {run.seed}"),
        ("Fingerprint", run.settings["inputs"]),
    ]
    return {
        "key": key,
        "top1": show_estimate(run.top1.times(100)),
        "overall": show_estimate(run.overall.delta_loss),
        "sdc": show_estimate(run.overall.sdc.times(100)),
        "facts": facts,
        "layers": _table(_layers(run), f"Layers of {key}"),
        "command": f"dvc repro inject@{key}",
    }


def _layers(run: RunResult) -> Table:
    headers = ["Layer", "Kind", "Neurons", "Faults", "DeltaLoss (nats)", "SDC (%)", "Masked (%)"]
    rows = [
        [
            layer.layer,
            layer.kind,
            layer.neurons,
            layer.injections,
            layer.delta_loss,
            layer.sdc.times(100),
            f"{100 * layer.outcomes.masked:.1f}",
        ]
        for layer in run.layers
    ]
    if run.variant != BASELINE:
        headers.append("Improvement (x)")
        rows = [[*row, layer.improvement or "no such layer"] for row, layer in zip(rows, run.layers, strict=True)]
    return Table(f"layers-{run.run}", "In order of execution.", headers, rows)


def _text(texts: ClassTexts) -> dict[str, Any]:
    key, text, path = texts.key, texts.params, Path("prompts") / texts.key / "responses.jsonl"
    answers, quality = read_json_lines(path, "responses"), load_text_quality(key)
    columns = ["class", "answers", "embedded", "words", "spread", "nearest_wrong", "cosine"]
    classes = read_csv(TEXTS_DIR / f"{key}.csv", "text_quality", columns[:1], ["answers", "spread", "cosine"])
    said: dict[str, list[str]] = {}
    for answer in answers:
        said.setdefault(answer["class_name"], []).append(answer["text"])
    providers = dict.fromkeys(" ".join(filter(None, (answer["provider"], answer["model"]))) for answer in answers)
    pictures = Path("plots/texts") / key
    return {
        "key": key,
        "facts": [
            ("Answered by", "; ".join(providers)),
            ("Questions", " / ".join(text.questions[: text.limit_questions or None])),
            (
                "Texts",
                f"{quality.answers:,}, of which {quality.embedded:,} were embedded, for {quality.classes:,} classes",
            ),
            ("Mean cosine of two classes", f"{quality.mean_pairwise_cosine:.3f}"),
            ("Encoder", quality.encoder),
        ],
        "pictures": [
            _picture(pictures / name, f"{title}, {key}")
            for name, title in (("similarity", "Similarity of classes"), ("projection", "Texts and class means"))
        ],
        "classes": _table(_classes(key, classes[[name for name in columns if name in classes]]), f"Classes of {key}"),
        "said": list(said.items())[:MOST_CLASSES],
        "said_note": f"{min(len(said), MOST_CLASSES)} of {len(said)} classes",
    }


def _classes(key: str, classes: pd.DataFrame) -> Table:
    rows = [[_short(value) for value in row] for row in classes.itertuples(index=False)]
    note = "Spread: mean cosine distance of a text to its class's mean; cosine: to the nearest wrong class."
    return Table(f"classes-{key}", note, [name.replace("_", " ") for name in classes.columns], rows)


def _short(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else (value if isinstance(value, str) else int(value))


def _commands(grid: str, revision: Revision) -> str:
    lines = ["make setup && . .venv/bin/activate"]
    if revision.commit:
        lines.insert(
            0, f"git checkout {revision.commit}" + ("   # and the changes that were not committed" if revision.changed else "")
        )
    where = [] if grid == "default" else [f"cd grids/{grid}"]
    return "\n".join([*lines, *where, "dvc repro dvc.yaml"])


def _parameters(params: Params) -> str:
    """What the results depend on, as params.yaml has it."""
    sections = asdict(params)
    del sections["network"], sections["gate"]
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def _not_run(runs: Mapping[str, RunResult], sources: set[str]) -> list[str]:
    published = [row for row in load_published() if row.source == "paper"]
    lines = []
    for what, of_paper, here in (
        ("data sets", {row.dataset for row in published}, sources),
        ("backbones", {row.backbone for row in published}, {run.backbone for run in runs.values()}),
    ):
        if missing := sorted(of_paper - here):
            lines.append(
                f"Of the paper's {len(of_paper)} {what}: {', '.join(missing)}. This grid's params.yaml does not name them."
            )
    if all(run.variant == BASELINE for run in runs.values()):
        lines.append("Any text-guided classifier.")
    for key, run in runs.items():
        lines += [f"{key}: faults in {layer}: {reason}." for layer, reason in run.skipped.items()]
    return lines or ["Nothing of what the paper ran is missing."]


def _id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)


if __name__ == "__main__":
    sys.exit(run_command(main, 2))
