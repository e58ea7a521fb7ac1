"""The example that the README shows runs, and says what it promises."""

import sys

from conftest import REPOSITORY
from smoke_grid import run

EXAMPLE = REPOSITORY / "examples" / "own_classifier.py"


def test_the_readme_shows_the_example():
    assert EXAMPLE.read_text(encoding="utf-8").split('"""\n\n', 1)[1].strip() in (REPOSITORY / "README.md").read_text(
        encoding="utf-8"
    )


def test_the_example_prints_each_layer_with_intervals(tmp_path):
    printed = run([sys.executable, str(EXAMPLE)], tmp_path, PYTHONPATH=str(REPOSITORY)).stdout.splitlines()
    names = ["row", *printed[0].split()]
    rows = {fields["layer"]: fields for fields in (dict(zip(names, line.split(), strict=True)) for line in printed[1:])}
    # Layers of an nn.Sequential are called by their number; the linear layer is the more sensitive one.
    assert list(rows) == ["0", "4", "overall"]
    for name in ("delta_loss", "mismatch", "sdc"):
        found = {layer: [float(row[f"{name}{end}"]) for end in ("_low", "", "_high")] for layer, row in rows.items()}
        assert all(low < value < high for low, value, high in found.values())
        assert found["4"][0] > found["0"][2]
