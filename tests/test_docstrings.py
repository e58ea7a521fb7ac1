"""Every public name of `textguard.faults` is documented with an example that runs, and gives what it shows."""

import doctest

import pytest

import textguard.faults


@pytest.mark.parametrize("name", textguard.faults.__all__)
def test_the_example_runs(name):
    # Without the module's own names: what an example needs, it imports, as its reader has to.
    tests = doctest.DocTestFinder(recurse=True).find(getattr(textguard.faults, name), name, globs={})
    examples = [test for test in tests if test.examples]
    assert examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_names_are_exported_in_order():
    assert textguard.faults.__all__ == sorted(textguard.faults.__all__)
