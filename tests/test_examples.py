"""The example that the README shows runs, and says what it promises."""

import sys

from conftest import REPOSITORY, run

EXAMPLE = REPOSITORY / "examples" / "own_classifier.py"


def test_the_readme_shows_the_example():
    assert EXAMPLE.read_text().split('"""\n\n', 1)[1].strip() in (REPOSITORY / "README.md").read_text()


def test_the_example_prints_each_layer_with_intervals(tmp_path):
    printed = run([sys.executable, str(EXAMPLE)], tmp_path, PYTHONPATH=str(REPOSITORY)).stdout.splitlines()
    assert "delta_loss_low" in printed[0]
    # Layers of an nn.Sequential are called by their number; the linear layer is the more sensitive one.
    rows = {fields[1]: [float(number) for number in fields[5:8]] for fields in map(str.split, printed[1:])}
    assert list(rows) == ["0", "4"]
    assert all(low < value < high for value, low, high in rows.values())
    assert rows["4"][1] > rows["0"][2]
