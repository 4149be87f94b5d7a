"""The commands that run the tests: test and cov."""

import re
import subprocess
import sys
import time
import unittest
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jwt.warnings import InsecureKeyLengthWarning

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "project" / "tests"
# unittest's names for a module that cannot be imported or that is skipped as a whole.
_PLACEHOLDER = re.compile(r"\Aunittest\.loader\.\w+\.")


def test(names: Sequence[str] = (), verbose: bool = False) -> int:
    """Run tests, with every warning an error; return the exit code.

    `names` are dotted names of packages, modules, classes or tests; without any, all tests run.
    With `verbose`, each test module has a line of progress. The exit code is 0 if tests ran and
    all of them passed, else 1.
    """
    warnings.simplefilter("error")
    # The tests use short keys, the lesson's among them.
    warnings.simplefilter("ignore", InsecureKeyLengthWarning)
    suite = SuiteOfModules(_select(names))
    runner = unittest.TextTestRunner(
        buffer=True,
        resultclass=Result,  # type: ignore[arg-type]  # typeshed is stricter about its stream
        verbosity=0 if verbose else 1,
    )
    result = runner.run(suite)
    return 0 if result.testsRun and result.wasSuccessful() else 1


def _select(names: Sequence[str]) -> Iterator[unittest.TestCase]:
    """Yield the tests with these names, or all; end the command when a name is unknown."""
    suite = unittest.TestLoader().discover(str(TESTS), top_level_dir=str(ROOT))
    tests = {_name(test): test for test in _flatten(suite)}
    unknown = [name for name in names if not any(_is_part(test, name) for test in tests)]
    if unknown:
        sys.exit("\n".join(f"There is no test named {name}." for name in unknown))
    for name, test in tests.items():
        if not names or any(_is_part(name, selected) for selected in names):
            yield test


def _flatten(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _flatten(test)
        else:
            yield test


def _name(test: unittest.TestCase) -> str:
    return _PLACEHOLDER.sub("", test.id())


def _is_part(test: str, name: str) -> bool:
    """Tell whether a test is in the package, module or class of this name, or has it itself."""
    return f"{test}.".startswith(f"{name}.")


def _module(test: unittest.TestCase) -> str:
    return _name(test) if _PLACEHOLDER.match(test.id()) else type(test).__module__


class Result(unittest.TextTestResult):
    """The results of a run, which list the skipped tests by reason, and then the failures."""

    def begin_module(self, name: str) -> None:
        """Print the name of a module whose tests are about to run, if the run is verbose."""
        self._begun_at = time.monotonic()
        self._before = self.testsRun, self._number_failed()
        if not self.dots:
            self.stream.write(f"{name:<48} ")
            self.stream.flush()

    def end_module(self) -> None:
        """Print how many tests ran, for how long, and how many failed, if the run is verbose."""
        if not self.dots:
            seconds = time.monotonic() - self._begun_at
            ran = self.testsRun - self._before[0]
            failed = self._number_failed() - self._before[1]
            self.stream.writeln(f"{ran:>4} tests {seconds:>6.1f} s {failed:>3} failed")

    def _number_failed(self) -> int:
        return len(self.failures) + len(self.errors) + len(self.unexpectedSuccesses)

    def printErrors(self) -> None:  # noqa: N802  # it overrides unittest's
        """Print the skipped tests by reason, then the failures."""
        reasons = defaultdict(list)
        for test, reason in self.skipped:
            reasons[reason].append(_name(test))
        if self.dots and reasons:
            self.stream.writeln()
        for reason, tests in reasons.items():
            self.stream.writeln(f"\nSkipped ({reason}): {len(tests)}")
            for name in tests:
                self.stream.writeln(f"  {name}")
        super().printErrors()


class SuiteOfModules(unittest.TestSuite):
    """Tests, grouped in a suite for each module."""

    def __init__(self, tests: Iterator[unittest.TestCase]) -> None:
        modules: dict[str, unittest.TestSuite] = defaultdict(unittest.TestSuite)
        for test in tests:
            modules[_module(test)].addTest(test)
        super().__init__(modules.values())
        self._modules = modules

    def run(self, result: Any, debug: bool = False) -> Any:
        """Run the suites one after the other; each drops its tests as they end."""
        for name, suite in self._modules.items():
            result.begin_module(name)
            suite.run(result, debug)
            result.end_module()
        return result


def cov() -> int:
    """Run all tests with branch coverage; print a table, write htmlcov/, return the exit code.

    The exit code is 0 if all tests passed and the coverage is at least that of pyproject.toml.
    """
    coverage = [sys.executable, "-m", "coverage"]
    failed = subprocess.call([*coverage, "run", str(ROOT / "manage.py"), "test"], cwd=ROOT)
    subprocess.check_call([*coverage, "combine", "--quiet"], cwd=ROOT)
    subprocess.check_call([*coverage, "html", "--quiet", "--fail-under=0"], cwd=ROOT)
    return subprocess.call([*coverage, "report"], cwd=ROOT) or failed
