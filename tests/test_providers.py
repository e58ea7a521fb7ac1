"""Text variants: what params.yaml leaves out stands in providers.yaml."""

import json

import pytest
import torch
import yaml

from textguard.artifacts import sha256_of_file
from textguard.errors import InvalidArtifact, InvalidParameter, UnknownName
from textguard.text.cleaning import describe
from textguard.text.language_models import Network
from textguard.text.providers import FEATURES, LANGUAGE_MODEL, LIBRARY, SHARED, with_defaults
from textguard.text.questions import PLAIN, ask
from textguard.text.responses import PROVIDERS, Sources, answer

WHERE = "params.yaml texts.t.provider"


def test_every_provider_has_defaults_and_every_default_a_provider():
    library = yaml.safe_load(LIBRARY.read_text(encoding="utf-8"))
    assert set(library) - {SHARED, LANGUAGE_MODEL} == set(PROVIDERS)


def test_what_a_variant_says_replaces_what_the_library_says():
    found = with_defaults({"provider": "replay", "questions": ["{class}?"], "samples": 3, "drop": ["cut"]}, WHERE)
    assert found == {
        "provider": "replay",
        "questions": ["{class}?"],
        "limit_questions": 0,
        "samples": 3,
        "model": None,
        "cache": [],
        "templates": [],
        "drop": ["cut"],
        "embedding": {"unit_before": True, "unit_after": True, "vectors": "encoder", "seed": 0, "template_weight": 0.5},
    }


def test_mappings_within_a_variant_are_merged_field_by_field():
    found = with_defaults({"provider": "template", "embedding": {"vectors": "shuffled", "seed": 7}}, WHERE)
    assert found["embedding"] == {
        "unit_before": True,
        "unit_after": True,
        "vectors": "shuffled",
        "seed": 7,
        "template_weight": 0.5,
    }


def test_a_provider_has_defaults_of_its_own():
    assert with_defaults({"provider": "replay"}, WHERE)["drop"] == ["duplicate", "filtered", "refused"]
    assert with_defaults({"provider": FEATURES}, WHERE)["drop"] == []
    assert with_defaults({"provider": FEATURES, "drop": ["cut"]}, WHERE)["drop"] == ["cut"]


def test_a_language_model_has_defaults_where_one_is_named():
    assert with_defaults({"provider": "openai"}, WHERE)["model"] is None
    model = with_defaults({"provider": "openai", "model": {"model": "m", "seed": 3, "temperature": None}}, WHERE)["model"]
    assert model == {
        "model": "m",
        "endpoint": "chat.completions",
        "base_url": "https://api.openai.com/v1",
        "system": None,
        "temperature": None,
        "max_tokens": 60,
        "stop": [],
        "seed": 3,
    }


def test_no_variant_changes_what_the_next_one_gets():
    with_defaults({"provider": "replay"}, WHERE)["drop"].append("cut")
    assert "cut" not in with_defaults({"provider": "replay"}, WHERE)["drop"]


@pytest.mark.parametrize("provider", ["gpt", SHARED, LANGUAGE_MODEL])
def test_an_unknown_provider_is_named_with_the_known_ones(provider):
    known = "known: features, import, openai, replay, template$"
    with pytest.raises(UnknownName, match=f"provider '{provider}' in {WHERE}; {known}"):
        with_defaults({"provider": provider}, WHERE)


@pytest.mark.parametrize("fields", [{}, {"provider": None}, {"provider": ["replay"]}, {"provider": "replay", "model": 3}])
def test_what_is_no_variant_is_left_to_the_checks_of_params_yaml(fields):
    found = with_defaults(fields, WHERE)
    assert fields.items() <= found.items()
    assert found["samples"] == 1


def test_each_row_of_text_features_answers_for_one_class_and_names_the_file(tmp_path):
    file = tmp_path / "features.pth"
    torch.save(torch.eye(2), file)
    sources = Sources(1, [file], None, Network(1, 1, 1, 1, None, None), tmp_path / "none", "test")
    questions = ask(["ship", "truck"], ["A published description of {a_class}"], PLAIN, "here")
    answers = answer(FEATURES, questions, sources)
    digest = sha256_of_file(file, "")
    assert [(given.class_name, given.answer, given.provider) for given in answers] == [
        ("ship", f"row 0 of features.pth, {digest}", "published in features.pth"),
        ("truck", f"row 1 of features.pth, {digest}", "published in features.pth"),
    ]
    assert not any("empty" in described.flags for described in describe(answers))
    torch.save(2 * torch.eye(2), file)
    assert answer(FEATURES, questions, sources)[0].answer != answers[0].answer
    file.unlink()
    with pytest.raises(InvalidArtifact, match=r"features\.pth is missing"):
        answer(FEATURES, questions, sources)


def test_rows_that_a_map_names_answer_for_a_class(tmp_path):
    torch.save(torch.eye(3), tmp_path / "f.pth")
    stated = {"truck": {"rows": {"1": "lorry"}, "why": "it is"}, "ship": {"rows": {"0": "liner", "2": "boat"}, "why": "both"}}
    (tmp_path / "rows.json").write_text(json.dumps(stated), encoding="utf-8")
    files = [tmp_path / "f.pth", tmp_path / "rows.json"]
    questions = ask(["ship", "truck"], ["A published description of {a_class}"], PLAIN, "here")
    answers = answer(FEATURES, questions, Sources(1, files, None, Network(1, 1, 1, 1, None, None), tmp_path / "none", "test"))
    assert [given.answer.rpartition(",")[0] for given in answers] == ["rows 0, 2 of f.pth", "rows 1 of f.pth"]


def test_text_features_take_one_question_and_one_file(tmp_path):
    one, two = (ask(["ship"], templates, PLAIN, "here") for templates in (["{class}"], ["{class}", "a {class}"]))
    for questions, files in ((two, ["a.pth"]), (one, []), (one, ["a.pth", "b.json", "c.json"])):
        sources = Sources(1, [tmp_path / name for name in files], None, Network(1, 1, 1, 1, None, None), tmp_path, "test")
        with pytest.raises(InvalidParameter, match=r"takes one question.* one \.pth file in cache"):
            answer(FEATURES, questions, sources)
