"""The picture of a grid's classifiers: drawn from parameters and measured numbers."""

import math
from dataclasses import replace

from stored_grid import store_text_quality
from textguard.analysis.files import load_result, load_results
from textguard.params import Params, Run
from textguard.report.architecture import draw_architecture
from textguard.report.figures import group
from textguard.report.variants import Variant


def variants_of(runs: dict[str, Run], params: Params, dataset: str) -> list[Variant]:
    results = load_results(key for key, run in runs.items() if run.dataset == dataset)
    (variants,) = group(list(results.values()), params).values()
    return variants


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_architecture_is_drawn_from_parameters_and_measured_numbers(runs, params):
    figure, table = draw_architecture(variants_of(runs, params, "d"), "ResNet-18 on d", params)
    numbers = table.set_index("variant")
    assert list(numbers.index) == ["baseline", "template", "descriptions"]
    described = params.texts["descriptions"]
    drawn = numbers.loc["descriptions"]
    assert (drawn["questions"], drawn["samples"]) == (len(described.questions), described.samples)
    assert (drawn["answers"], drawn["embedded"], drawn["encoder"]) == (150, 148, "minilm")
    assert (drawn["classes"], drawn["width"], drawn["image_size"]) == (10, 90, params.backbones["resnet18"].image_size)
    assert numbers["parameters"].to_list() == [load_result(key).parameters for key, run in runs.items() if run.dataset == "d"]
    assert numbers["extra_parameters"].to_list() == [0, 250_000, 250_000]
    assert math.isnan(numbers.loc["baseline", "width"])
    said = words(figure)
    assert {"10 classes x 5 questions", "x 3 answers", "150 texts", "148 kept", "“a photo of a [class]”", "10 x 90"} <= set(
        said
    )
    assert any("11,250,000 parameters (+250,000)" in text for text in said)


def test_a_grid_of_baselines_has_an_architecture_without_texts(runs, params):
    figure, table = draw_architecture(variants_of(runs, params, "e"), "AlexNet on e", replace(params, texts={}))
    assert table["variant"].to_list() == ["baseline"]
    assert "its own last layer" in words(figure)
    assert not any("guided" in text or "text" in text or "head" in text for text in words(figure))


def test_the_architecture_says_what_starts_without_texts(runs, params):
    variants = variants_of(runs, params, "d")[1:]
    features = replace(params.texts["descriptions"], provider="features", cache=["prompts/cache/gpt.pth"])
    params = replace(params, texts={"descriptions": features})  # and so no template
    figure, table = draw_architecture(variants, "ResNet-18 on d", params)
    said = words(figure)
    assert {"no text: nothing is asked, nothing encoded", "random numbers", "from the file gpt.pth", "vectors"} <= set(said)
    assert table["answers"].to_list() == [0, 0]
    assert table["extra_parameters"].isna().all()


def overlapping(figure) -> list[tuple[str, str]]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.axes[0].texts]
    return [
        (one, other)
        for number, (one, first) in enumerate(boxes)
        for other, second in boxes[number + 1 :]
        if first.padded(-1).overlaps(second.padded(-1))
    ]


def test_long_names_do_not_overlap_in_the_architecture(runs, params, tmp_path):
    encoder = "open_clip:ViT-B-16-SigLIP-i18n-256:/checkpoints/webli.safetensors"
    store_text_quality("d-descriptions", 1_000_000, 999_999, encoder)
    template = replace(params.texts["template"], questions=["a bad photo of many of the many, many handwritten {class}"])
    params = replace(params, texts=params.texts | {"template": template})
    variants = variants_of(runs, params, "d")
    for shown in (variants, variants[:2], variants[1:]):
        figure, _ = draw_architecture(shown, "ResNet-18 on d", params)
        assert overlapping(figure) == []
