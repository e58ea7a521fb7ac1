"""The regression gate's command line: its table, its exit code, and one line for whatever is wrong with its input."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from gate_runs import INJECTIONS, TOLERANCES, Metrics, changed, row, scaled
from smoke_grid import run
from textguard.errors import InvalidArtifact
from textguard.params import load_gate_params
from textguard.report.gate import main


def test_identical_runs_pass(gate, usual):
    worse, report = gate(usual, usual)
    assert worse == 0
    first, empty, table, *_ = report.splitlines()
    assert (empty, table[:30]) == ("", "| Run | Quantity | Base | New |"[:30])
    assert row(report, "top-1")[-1] == row(report, "DeltaLoss, last layer")[-1] == "same"
    assert row(report, "other numbers of layers")[-1] == "24 same"
    assert "conv3" not in report
    assert first.startswith("**PASS: none of 35 comparisons is worse ")
    assert first.endswith("**")
    assert "Holm" in first


def test_a_baseline_has_no_improvement(gate, usual):
    baseline = changed(usual, "improvement", lambda _: None)
    worse, report = gate(baseline, baseline)
    assert worse == 0
    assert "improvement" not in report


def test_layers_that_one_side_lacks_are_listed(gate, usual):
    without = changed(usual, "layers", lambda layers: layers[:-2])
    without["plan"]["injections"] -= 2 * INJECTIONS
    for base, new, note in ((usual, without, "gone"), (without, usual, "new")):
        worse, report = gate(base, new)
        assert worse == 0
        assert row(report, "conv10")[-1] == row(report, "conv11")[-1] == note
        assert row(report, "other numbers of layers")[-1] == "20 same"


def test_folders_are_matched_by_file_name(gate, usual):
    bad = changed(usual, "last_layer.delta_loss", scaled(2))
    twin = changed(usual, "run", lambda _: "twin")
    only = {name: changed(usual, "run", lambda _, name=name: name) for name in ("old", "young")}
    base = {"a.json": usual, "b.json": twin, "old.json": only["old"], "summary.json": {"x": 1}, "list.json": ["run"]}
    worse, report = gate(base, {"a.json": bad, "b.json": twin, "young.json": only["young"]})
    assert worse == 1
    assert "1 of 70 comparisons is worse" in report
    assert "| old | all |  |  |  |  |  | gone |" in report
    assert "| young | all |  |  |  |  |  | new |" in report
    assert "| twin | other numbers of layers |  |  |  |  |  | 24 same |" in report


def test_folders_with_nothing_in_common_pass(gate, usual):
    worse, report = gate({"a.json": usual}, {"b.json": usual})
    assert worse == 0
    assert "0 comparisons" in report


@pytest.fixture
def folder(tmp_path: Path, usual: Metrics) -> Path:
    """A folder with two runs' files, good.json and bad.json, and parameters of which only the gate's are sound."""
    (tmp_path / "good.json").write_text(json.dumps(usual), encoding="utf-8")
    (tmp_path / "bad.json").write_text(json.dumps(changed(usual, "layers.2.delta_loss", scaled(2))), encoding="utf-8")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"gate": asdict(TOLERANCES), "inject": "later"}), encoding="utf-8")
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "textguard.report.gate", *arguments], folder, check=False, PYTHONPATH=str(REPOSITORY))


def test_the_command_prints_the_table_and_its_exit_code_is_the_verdict(folder):
    done = start(folder, "good.json", "good.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("**PASS")
    done = start(folder, "good.json", "bad.json")
    assert (done.returncode, done.stderr) == (1, "")
    assert row(done.stdout, "DeltaLoss, conv2")[-1] == "worse"
    assert done.stdout.startswith("**FAIL: 1 of 35 comparisons is worse")


BAD_FILES = {
    "missing": (None, ["x.json is missing"]),
    "truncated": ('{"run": "a", ', ["x.json", "Invalid JSON"]),
    "empty": ("", ["x.json", "Invalid JSON"]),
    "not text": (b"\xff\xfe\x00", ["x.json", "Invalid JSON"]),
    "no run": ('{"x": 1}', ["x.json is not what docs/outputs.md describes", "run: Field required"]),
    "a list": ("[]", ["x.json is not what docs/outputs.md describes"]),
    "text for a number": (("top1.value", "high"), ["x.json", "top1.value", "valid number"]),
    "missing interval": (("top1", {"value": 1.0}), ["x.json", "top1.low: Field required"]),
    "confidence": (("confidence", 99), ["x.json", "confidence", "less than or equal to 0.9999"]),
    "a layer": (("layers.3.delta_loss", 0.5), ["x.json", "layers.3.delta_loss"]),
}


@pytest.mark.parametrize(("content", "parts"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line(folder, usual, content, parts, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if isinstance(content, tuple):
        content = json.dumps(changed(usual, content[0], lambda _: content[1]))
    if content is not None:
        Path("x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for arguments in (["good.json", "x.json"], ["x.json", "good.json"]):
        one_line(main(arguments), capsys, "InvalidArtifact", *parts)


def one_line(code: int, capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    printed = capsys.readouterr()
    assert (code, printed.out, len(printed.err.splitlines())) == (2, "", 1), printed
    assert not [part for part in parts if part not in printed.err], printed.err


def test_bad_folders_are_one_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("empty").mkdir()
    one_line(main(["empty", "empty"]), capsys, "InvalidArtifact: empty holds no run's metrics (*.json)")
    Path("mixed").mkdir()
    shutil.copy("good.json", "mixed")
    one_line(main(["mixed", "good.json"]), capsys, "mixed and good.json must be two files or two folders")
    Path("mixed/half.json").write_text("{", encoding="utf-8")
    one_line(main(["mixed", "mixed"]), capsys, "mixed/half.json cannot be read")


BAD_COMMANDS = {
    "one file": (["good.json"], ["required: NEW", "usage: python -m textguard.report.gate"]),
    "unknown option": (["good.json", "good.json", "--alpha", "1"], ["--alpha"]),
    "no parameters": (["good.json", "good.json", "--params", "p.yaml"], ["p.yaml does not exist"]),
}


@pytest.mark.parametrize(("arguments", "parts"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_line(folder, arguments, parts, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    one_line(main(arguments), capsys, "InvalidParameter", *parts)


def test_a_process_of_its_own_prints_the_line_and_nothing_else(folder):
    for arguments in (["good.json", "x.json"], []):
        done = start(folder, *arguments)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done


BAD_PARAMETERS = {
    "an empty section": ({"gate": None}, ["gate is null"]),
    "an empty file": (None, ["gate is null"]),
    "unknown": ({"gate": asdict(TOLERANCES) | {"alpha": 1}}, ["unknown key 'gate.alpha'", "known: delta_loss_percent"]),
    "text": ({"gate": asdict(TOLERANCES) | {"sdc_percent": "ten"}}, ['gate.sdc_percent is "ten"', "valid number"]),
    "negative": ({"gate": asdict(TOLERANCES) | {"top1_points": -1}}, ["gate.top1_points", "greater than or equal to 0"]),
    "of ratios": ({"gate": asdict(TOLERANCES) | {"improvement_percent": 10}}, ["unknown key 'gate.improvement_percent'"]),
    "no evidence": ({"gate": asdict(TOLERANCES) | {"significance": 1.0}}, ["gate.significance", "less than 1"]),
    "no numbers": ({"gate": []}, ["gate is []"]),
}


@pytest.mark.parametrize(("content", "parts"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
def test_bad_tolerances_are_one_line(folder, content, parts, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    one_line(main(["good.json", "good.json"]), capsys, "InvalidParameter", "params.yaml", *parts)


def test_what_a_grid_says_nothing_of_has_the_usual_tolerances(folder, monkeypatch):
    monkeypatch.chdir(folder)
    Path("params.yaml").write_text(yaml.safe_dump({"gate": {"sdc_percent": 20}}), encoding="utf-8")
    assert load_gate_params() == replace(TOLERANCES, sdc_percent=20)
    Path("params.yaml").write_text(yaml.safe_dump({"inject": {}}), encoding="utf-8")
    assert load_gate_params() == TOLERANCES


def test_the_grids_have_the_same_tolerances():
    assert load_gate_params(REPOSITORY / "params.yaml") == TOLERANCES
    assert load_gate_params(REPOSITORY / "grids" / "smoke" / "params.yaml") == TOLERANCES


SETTLED = {  # what a folder that is judged holds beside a run -> what is said
    "a list instead of a run": ("good.json", "[]", "good.json is not what docs/outputs.md describes"),
    "a run under another key": ("good.json", '{"runs": "a"}', "run: Field required"),
    "the same run twice": ("again.json", None, "holds run 'digits-resnet18-descriptions-0', as again.json does; delete one"),
    "not unpacked": ("x.json", "\x1f\x8b", "x.json cannot be read"),
}


@pytest.mark.parametrize(("name", "content", "said"), SETTLED.values(), ids=SETTLED)
def test_a_run_that_a_folder_hides_is_one_line(folder, usual, name, content, said, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for side in ("base", "new"):
        Path(side).mkdir()
        shutil.copy("good.json", side)
        (Path(side) / "twin.json").write_text(json.dumps(changed(usual, "run", lambda _: "twin")), encoding="utf-8")
    good = Path("good.json").read_text(encoding="utf-8")
    (Path("new") / name).write_text(good if content is None else content, encoding="utf-8")
    for arguments in (["base", "new"], ["new", "base"]):
        one_line(main(arguments), capsys, said)


def test_what_nobody_thought_of_is_no_verdict(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("textguard.report.gate.judge", fail)
    one_line(main(["good.json", "good.json"]), capsys, "ZeroDivisionError: division by zero; no verdict", "please report it")


def test_a_folder_that_may_not_be_read_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("shut").mkdir()

    def refuse(path: Path) -> list[Path]:  # as the system does, but for an administrator
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    one_line(main(["shut", "shut"]), capsys, "InvalidArtifact: shut: Permission denied; make it readable")


SHELL = {
    "full": (">/dev/full", 2, "CannotWrite: standard output: No space left on device"),
    "a closed pipe": ("| true", 2, "CannotWrite: standard output: Broken pipe"),
}


@pytest.mark.parametrize(("out", "code", "said"), SHELL.values(), ids=SHELL)
def test_a_verdict_that_cannot_be_printed_is_none(folder, out, code, said):
    command = f"set -o pipefail; (sleep 1; exec '{sys.executable}' -m textguard.report.gate good.json good.json) {out}"
    done = run(["bash", "-c", command], folder, check=False, PYTHONPATH=str(REPOSITORY))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (code, "", 1), done
    assert said in done.stderr


def test_a_closed_output_leaves_the_exit_code(folder):
    """Who closes it wants no table."""
    command = f"'{sys.executable}' -m textguard.report.gate good.json good.json >&-"
    done = run(["bash", "-c", command], folder, check=False, PYTHONPATH=str(REPOSITORY))
    assert (done.returncode, done.stderr) == (0, "")


def test_letters_that_the_terminal_lacks_are_spelt(folder, usual):
    (folder / "cafe.json").write_text(json.dumps(changed(usual, "run", lambda _: "caf\u00e9")), encoding="utf-8")
    command = [sys.executable, "-m", "textguard.report.gate", "cafe.json", "cafe.json"]
    done = run(command, folder, check=False, PYTHONPATH=str(REPOSITORY), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf\\xe9" in done.stdout


def test_intervals_of_another_confidence_are_said(gate, usual):
    worse, report = gate(usual, changed(usual, "confidence", lambda _: 0.95))
    assert worse == 0
    assert row(report, "confidence of intervals")[-1] == "0.99 -> 0.95"


def test_a_loss_of_any_size_is_worse_until_its_sums_are_infinite(gate, usual):
    worse, report = gate(usual, changed(usual, "overall.delta_loss", scaled(1e298)))
    assert worse == 1
    assert row(report, "DeltaLoss, overall")[-1] == "worse"
    with pytest.raises(InvalidArtifact, match=r"has a number above 1e\+300"):
        gate(usual, changed(usual, "overall.delta_loss", scaled(1e307)))


def trained(usual: Metrics, variant: str, seed: int, factor: float = 1.0, weights: str = "") -> Metrics:
    """A training of its own, with so many times the DeltaLoss overall."""
    name = f"digits-resnet18-{variant}-{seed}"
    parts = {"run": name, "variant": variant, "seed": seed, "weights": weights or f"{name} {factor}"}
    return changed(usual, "overall.delta_loss", scaled(factor)) | parts


def test_another_training_is_listed_and_fails_only_where_that_is_asked_for(folder, usual):
    (folder / "other.json").write_text(json.dumps(trained(usual, "descriptions", 0, 3.0)), encoding="utf-8")
    done = start(folder, "good.json", "other.json")
    assert (done.returncode, done.stderr) == (0, "")
    first = done.stdout.splitlines()[0]
    assert first.startswith("**PASS: none of 0 comparisons is worse ")
    assert "Not judged: 1 run has other weights than before, and another training cannot be told from luck." in first
    assert row(done.stdout, "DeltaLoss, overall")[4:] == ["+200.0 %", "", "", "another training"]
    done = start(folder, "good.json", "other.json", "--strict")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("**FAIL: none of 0 comparisons is worse ")
    assert "which --strict fails" in done.stdout.splitlines()[0]
    assert start(folder, "good.json", "good.json", "--strict").returncode == 0


def test_several_trainings_are_judged_by_their_means(gate, usual):
    spread = (0.97, 1.0, 1.02)

    def side(factor: float, first: str) -> dict[str, Metrics]:
        runs = {f"{seed}.json": trained(usual, "descriptions", seed, factor * own) for seed, own in enumerate(spread)}
        return runs | {"random.json": trained(usual, "random", 0, 1.0, first)}

    worse, report = gate(side(1.0, "w"), side(2.0, "w"))
    assert worse == 1
    name = "digits-resnet18-descriptions, 3 trainings -> 3"
    means = "\n".join(line for line in report.splitlines() if name in line)
    line = row(means, "DeltaLoss, overall")
    assert line[4:6] == ["+100.0 %", "trainings"]
    assert line[-1] == "worse"
    assert row(means, "DeltaLoss, last layer")[-1] == "same"
    assert "another training" not in report
    assert "1 of 44 comparisons is worse" in report  # 32 of the other run, 6 of the means
    assert gate(side(2.0, "w"), side(1.0, "w"))[0] == 0
    worse, report = gate(side(1.0, "w"), side(1.05, "x"))
    assert worse == 0
    means = "\n".join(line for line in report.splitlines() if name in line)
    assert row(means, "DeltaLoss, overall")[-1] == "within tolerance"
    assert "Not judged: 1 run has" in report


def test_trainings_of_one_side_alone_are_not_judged(gate, usual):
    many = {f"{seed}.json": trained(usual, "descriptions", seed, 2.0) for seed in range(3)}
    worse, report = gate({"0.json": usual}, many)
    assert worse == 0
    assert "Not judged: 1 run has" in report
    assert "| digits-resnet18-descriptions-1 | all |  |  |  |  |  | new |" in report


def test_the_same_weights_under_many_seeds_are_one_training(gate, usual):
    base, new = ({f"{seed}.json": trained(usual, "descriptions", seed, 1.0, mark) for seed in range(3)} for mark in ("a", "b"))
    worse, report = gate(base, new)
    assert worse == 0
    assert "Not judged: 3 runs have" in report
