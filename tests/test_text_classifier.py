"""examples/text_classifier.py: sentences of real packages, vectors of the real encoder, one short training, one comparison."""

import json
import sys
from pathlib import Path

import pytest
import torch

from textguard.schema.effects import Effects

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("text_classifier", None)
    import text_classifier

    few = {name: text_classifier.CLASSES[name] for name in ("pandas", "statsmodels")}
    changes = {"CLASSES": few, "TRAINING": 24, "TEST": 24, "EPOCHS": 8, "SEEDS": range(1)}
    for name, value in changes.items():
        monkeypatch.setattr(text_classifier, name, value)
    return text_classifier


def test_docstrings_are_read_and_no_package_runs(example, tmp_path, monkeypatch):
    folder = tmp_path / "loud"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        'raise SystemExit\nclass A:\n    """One thing. And more.\n\n    Rest."""\n    def _own(self):\n        """Hidden."""\n',
        encoding="utf-8",
    )
    (folder / "tests" / "more.py").write_text('def test():\n    """A test."""\n', encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(example.sentences("loud")) == ["One thing"]


def test_a_text_guided_head_starts_from_the_classes_descriptions(example):
    guided, plain = example.build("descriptions", 0), example.build("baseline", 0)
    vectors = torch.randn(3, example.TOKENS, 384)
    assert guided(vectors).shape == plain(vectors).shape == (3, 2)
    assert torch.allclose(guided.head.weight.norm(dim=1), torch.ones(2))
    assert not torch.equal(guided.head.weight, example.build("random", 0).head.weight)


def test_variants_are_trained_hit_and_compared(example, tmp_path):
    example.main(tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    effects = Effects.model_validate_json(json.dumps(found["effects"]))
    assert [one.name for one in effects.contrasts] == list(example.CONTRASTS)
    assert all(share > 0.6 for share in found["top1"].values())  # of two classes: it learns
