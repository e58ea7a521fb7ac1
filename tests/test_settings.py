"""Settings that cannot be: the library names its argument, the stage runner the place in params.yaml."""

import sys
from dataclasses import asdict
from types import ModuleType

import pytest
import torch

import stages.__main__ as runner
from conftest import REPOSITORY
from stages.settings import campaign_settings
from textguard.assessment import assess
from textguard.errors import InvalidParameter, Setting, TextguardError, UnknownName
from textguard.estimates.summary import cap_of
from textguard.faults import Campaign, CampaignSettings, FaultModel, protect
from textguard.params import load_params

SMOKE = REPOSITORY / "grids" / "smoke" / "params.yaml"
# An argument of `assess`, a value that cannot be, and what the line says in the library's and in the pipeline's terms.
WRONG = [
    ("plan", "foo", "plan 'foo' in {}; known", "plan", "inject.plan"),
    ("images", "best", "way to draw images 'best' in {}; known", "images", "inject.images"),
    ("engine", "hooks", "engine 'hooks' in {}; known", "engine", "inject.engine"),
    ("detector", "tmr", "detector 'tmr' in {}; known", "detector", "inject.detector"),
    ("detector", "fixed:ten", "{} is 'fixed:ten'; X must be", "detector", "inject.detector"),
    ("number_format", "fp12", "number format 'fp12' in {}; known", "number_format", "inject.format"),
    ("number_format", "int(1)", "{} is 'int(1)'; int(B) takes", "number_format", "inject.format"),
    ("kinds", ["Pools"], "kind of site 'Pools' in {}; known", "kinds", "inject.kinds"),
    ("kinds", ["Conv3d"], "); change {}", "kinds", "inject.kinds"),
    ("stop_at", "soon", "{} is 'soon'; allowed: never", "stop_at", "inject.stop_at"),
    ("injections_per_layer", 0, "{} is 0; at least 1", "injections_per_layer", "inject.injections_per_layer"),
    (
        "injections_per_layer",
        50.0,
        "{} is 50.0; it must be a whole number",
        "injections_per_layer",
        "inject.injections_per_layer",
    ),
    ("injections_per_layer", True, "{} is True; it must be a whole", "injections_per_layer", "inject.injections_per_layer"),
    ("injections_per_layer", 10**40, "less than 2^63", "injections_per_layer", "inject.injections_per_layer"),
    ("seed", -1, "{} is -1; at least 0", "seed", "inject.seed"),
    ("seed", "0", "{} is '0'; it must be a whole number", "seed", "inject.seed"),
    ("pilot", 0, "{} is 0; at least 1", "pilot", "inject.pilot"),
    ("batch_size", 0, "{} is 0; at least 1", "batch_size", "inject.batch_size"),
    ("image_batch", 0, "{} is 0; at least 1", "image_batch", "inject.image_batch"),
    ("enumerate_up_to", -1, "{} is -1; at least 0", "enumerate_up_to", "inject.enumerate_up_to"),
    ("confidence", 99, "{} is 99; it must be a number from 0.5 to 0.9999", "confidence", "inject.confidence"),
    ("confidence", 0.9999999999999999, "it must be a number from 0.5 to", "confidence", "inject.confidence"),
    ("confidence", float("nan"), "{} is nan; it must be", "confidence", "inject.confidence"),
    ("kinds", "Conv2d", "{} is 'Conv2d'; it must be a list of names", "kinds", "inject.kinds"),
    ("kinds", [torch.nn.Conv2d], "it must be a list of names", "kinds", "inject.kinds"),
    ("detector", None, "{} is None; it must be text", "detector", "inject.detector"),
    ("number_format", 32, "{} is 32; it must be text", "number_format", "inject.format"),
    ("plan", ["uniform"], "plan ['uniform'] in {}; known", "plan", "inject.plan"),
    ("fault_model", "flip", "{} is 'flip'; it must be a FaultModel", "fault_model", "inject.fault_model"),
    ("shard_dir", 7, "{} is 7; it must be a path", "shard_dir", "inject.shard_dir"),
    ("fault_model", FaultModel(bits=33), "{} is 33; there are 32", "fault_model.bits", "inject.faults.bits"),
    ("fault_model", FaultModel("metadata"), "no metadata; change {}", "fault_model.target", "inject.faults.target"),
]


@pytest.fixture
def in_stage(tmp_path, monkeypatch, capsys):
    """Run something as a stage of the smoke grid. Returns the line that it ends with."""
    (tmp_path / "params.yaml").write_text(SMOKE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(work) -> str:
        stage = ModuleType("stages.tables")
        stage.main = lambda params: work()
        monkeypatch.setitem(sys.modules, "stages.tables", stage)
        capsys.readouterr()
        assert runner.main(["tables"]) == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(("name", "value", "line", "argument", "place"), WRONG, ids=str)
def test_the_library_names_its_argument_and_the_stage_the_key(name, value, line, argument, place, resnet, loader, in_stage):
    def work():
        assess(resnet, loader, **{"injections_per_layer": 5, name: value})

    with pytest.raises(TextguardError) as raised:
        work()
    assert line.format(f"argument {argument}") in str(raised.value)
    assert "params.yaml" not in str(raised.value)
    assert in_stage(work).splitlines()[-1].startswith(f"{type(raised.value).__name__}: ")
    assert line.format(f"params.yaml {place}") in in_stage(work)


def test_settings_of_other_sections_have_their_places(in_stage, resnet, images):
    assert "params.yaml statistics.nonfinite is 'drop'; allowed" in in_stage(lambda: cap_of("drop"))
    line = in_stage(lambda: protect(resnet, images[0], {}, "tmr"))
    assert line.startswith("UnknownName: mitigation 'tmr' in params.yaml inject.mitigation; known: ")


def test_an_error_is_one_line_and_survives_what_users_write():
    error = InvalidParameter(Setting("plan"), " is {0} %s\n  argument; ", "twice ", Setting("plan"))
    assert str(error) == "argument plan is {0} %s argument; twice argument plan"
    assert error.told(str.upper) == "PLAN is {0} %s argument; twice PLAN"
    assert str(UnknownName("run", "a", ["c", "b"], "params.yaml runs")) == "run 'a' in params.yaml runs; known: b, c"


def test_every_key_of_section_inject_reaches_the_campaign():
    inject = asdict(load_params(SMOKE).inject)
    inject["number_format"], inject["fault_model"] = inject.pop("format"), FaultModel(**inject.pop("faults"))
    del inject["mitigation"]  # the model is protected before
    inject["noise"] = "refuse"  # a grid's classifiers have none
    assert vars(campaign_settings(load_params(SMOKE).inject)) == inject


def test_assess_has_the_defaults_of_the_settings(resnet, loader, monkeypatch):
    given = []

    class Recorded(Campaign):
        def __init__(self, model, loader, settings, *others):
            given.append(settings)
            raise KeyboardInterrupt

    monkeypatch.setattr("textguard.assessment.assessing.Campaign", Recorded)
    with pytest.raises(KeyboardInterrupt):
        assess(resnet, loader)
    assert given == [CampaignSettings()]
