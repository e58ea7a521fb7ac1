"""Every public name of the library is documented with an example that runs, and gives what it shows."""

import doctest

import pytest

import public_names
import textguard.assessment
import textguard.faults
import textguard.hardware

PACKAGES = (textguard.assessment, textguard.faults, textguard.hardware)


@pytest.mark.parametrize(("package", "name"), [(package, name) for package in PACKAGES for name in package.__all__])
def test_the_example_runs(package, name):
    # Without the module's own names: what an example needs, it imports, as its reader has to.
    tests = doctest.DocTestFinder(recurse=True).find(getattr(package, name), name, globs={})
    examples = [test for test in tests if test.examples]
    assert examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_exported_in_order(package):
    assert package.__all__ == sorted(package.__all__)


def test_docs_list_all_names():
    assert public_names.PAGE.read_text(encoding="utf-8") == public_names.page(), "run 'python tests/public_names.py'"
    assert [found[1] for found in public_names.TABLE.findall(public_names.page())] == [each.__name__ for each in PACKAGES]
