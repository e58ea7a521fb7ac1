"""Some hostile inputs of every kind, always the same ones; `make fuzz` tries others for an hour."""

import time
from collections.abc import Iterator

import pytest

from fuzzing import RUN, TEXT, Campaign, Example, Workplace, judge, workplace

pytestmark = pytest.mark.slow
EXAMPLES = 6  # of every kind
BUDGET_S = 60.0  # after which the second half of them is left out, on a machine that is slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("fuzz"), figures=False) as found:
        yield found


def test_hostile_inputs_are_taken_well_or_refused_in_one_line(place):
    campaign, started = Campaign(place), time.monotonic()
    for number in range(2):
        for kind in place.kinds:
            if not number or time.monotonic() - started < BUDGET_S:
                campaign.round(kind, number, EXAMPLES // 2, shrink=False)
    print(campaign.table())
    assert not campaign.faults, f"\n{campaign.report(campaign.faults)}"  # each with its numbers for `make fuzz`
    assert set(campaign.ends) == set(place.kinds)


def test_what_is_untouched_is_taken_and_gives_the_same_bytes(place):
    """So that a fault is the input's, and the grid is put back after each example."""
    for command in (f"evaluate {RUN}", f"prompts {TEXT}", "results", "tables"):
        reply = place.run(command)
        assert (reply.code, reply.outside) == (0, ())
        for name, content in place.clean[command].items():
            assert (place.grid / name).read_bytes() == content
        place.restore()


PLANTED = {
    "a write outside": ("Path('../outside').touch()", "outside"),
    "a program": ("import subprocess; subprocess.run(['true'])", "outside"),
    "a traceback": ("[][0]", "IndexError"),
    "no end": ("time.sleep(99)", "does not end"),
    "memory": ("bytearray(1 << 40)", "MemoryError"),
    "a crash": ("os.kill(os.getpid(), 11)", "signal 11"),
    "another exit code": ("sys.exit(3)", "exit code 3"),
    "no line": ("sys.exit(1)", "0 error lines"),
    "a temporary file": ("Path('x.tmp').touch()", "temporary"),
    "a changed output": ("Path('metrics/cells.json').write_text('[]'); sys.exit(1)", "has changed"),
    "a warning": ("print('UserWarning: x', file=sys.stderr)", "says UserWarning"),
    "NaN": ("Path('metrics/cells.json').write_text('NaN')", "NaN in JSON"),
    "no result": ("Path('metrics/results/x.json').write_text('{}')", "Field required"),
    "an interval beside its value": (
        """Path('metrics/x.json').write_text('{"sdc": {"value": 2, "low": 3, "high": 4, "n": 1}}')""",
        "is no interval",
    ),
    "a share of 2": (
        f"p = Path('metrics/runs/{RUN}/evaluation.json'); t = json.loads(p.read_text()); "
        "t['top1'].update(value=2.0, high=2.0); p.write_text(json.dumps(t))",
        "not from",
    ),
    "the mark of code that ran": ("Path('EXECUTED').touch()", "was run"),
}


@pytest.mark.parametrize(("code", "found"), PLANTED.values(), ids=PLANTED)
def test_what_must_not_happen_is_seen(place, code, found):
    before = place.files_of(place.grid)
    reply = place.ask([code], "fuzz_server", 2.0)
    seen = [signature for signature, _ in judge("planted", Example("results"), reply, before, place)]
    place.restore()
    assert any(found in signature for signature in seen), seen
