"""The test command: parts by name, progress, skipped tests, and exit codes."""

import contextlib
import io
import sys
import tempfile
import textwrap
import unittest
import warnings
from pathlib import Path
from unittest import mock

from project.ops import testing
from project.tests import scratch

ONE = """
    import unittest
    import warnings

    class TestOne(unittest.TestCase):
        def test_passes(self):
            print("from the test")

        @unittest.skip("needs a moon")
        def test_skipped(self):
            pass

    class TestTwo(unittest.TestCase):
        def test_warns(self):
            warnings.warn("a warning")
"""
OTHER = """
    import unittest

    class TestOther(unittest.TestCase):
        def test_passes(self):
            pass

        @unittest.skip("needs a moon")
        def test_skipped(self):
            pass
"""


class TestTestCommand(unittest.TestCase):
    """The command on a folder of its own, which has two modules that load and one that does not."""

    def setUp(self) -> None:
        """Write the tests and let the command find them."""
        root = Path(self.enterContext(tempfile.TemporaryDirectory()))
        folder = root / "sample"
        folder.mkdir()
        for name, text in (
            ("__init__", ""),
            ("test_one", ONE),
            ("test_other", OTHER),
            ("test_broken", "import nothing_that_exists\n"),
        ):
            (folder / f"{name}.py").write_text(textwrap.dedent(text))
        self.enterContext(mock.patch.multiple(testing, ROOT=root, TESTS=folder))
        self.enterContext(mock.patch.object(sys, "path", list(sys.path)))
        self.enterContext(mock.patch.dict(sys.modules))
        self.enterContext(warnings.catch_warnings())

    def run_tests(self, *names: str, verbose: bool = False) -> tuple[int, str]:
        """Return the exit code and what is printed."""
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            code = testing.test(names, verbose)
        return code, printed.getvalue()

    def test_everything(self) -> None:
        """Without a name all tests run; a warning and a module that does not load are errors."""
        code, printed = self.run_tests()

        self.assertEqual(1, code)
        self.assertIn("Ran 6 tests", printed)
        self.assertIn("FAILED (errors=2, skipped=2)", printed)
        self.assertIn("UserWarning: a warning", printed)
        self.assertIn("No module named 'nothing_that_exists'", printed)
        self.assertNotIn("from the test", printed)

    def test_parts_by_name(self) -> None:
        """A package, a module, a class, a test, or several of these."""
        for names, code, number in (
            (["sample"], 1, 6),
            (["sample.test_one"], 1, 3),
            (["sample.test_one.TestOne"], 0, 2),
            (["sample.test_one.TestOne.test_passes"], 0, 1),
            (["sample.test_one.TestOne.test_passes", "sample.test_other"], 0, 3),
            (["sample.test_other", "sample.test_other.TestOther"], 0, 2),
            (["sample.test_broken"], 1, 1),
        ):
            with self.subTest(names):
                found, printed = self.run_tests(*names)

                self.assertEqual(code, found, printed)
                self.assertIn(f"Ran {number} test", printed)

    def test_unknown_names(self) -> None:
        """Names that no test has end the command with 1, and nothing runs."""
        unknown = ["sample.test_none", "sample.test_on", "sample.test_one.TestOne.passes"]

        with self.assertRaises(SystemExit) as raised:
            self.run_tests("sample.test_other", *unknown)

        # An exit with a text prints it on stderr, and the exit code is 1.
        lines = [f"There is no test named {name}." for name in unknown]
        self.assertEqual("\n".join(lines), raised.exception.code)

    def test_progress(self) -> None:
        """With -v each module has a line: name, number of tests, seconds, failures."""
        _, printed = self.run_tests(verbose=True)

        for module, ran, failed in (("one", 3, 1), ("other", 2, 0), ("broken", 1, 1)):
            with self.subTest(module):
                line = rf"sample\.test_{module} +{ran} tests +\d+\.\d s +{failed} failed"
                self.assertRegex(printed, rf"(?m)^{line}$")

    def test_skipped_tests(self) -> None:
        """The summary lists skipped tests by reason, with -v or without."""
        expected = (
            "\nSkipped (needs a moon): 2\n"
            "  sample.test_one.TestOne.test_skipped\n"
            "  sample.test_other.TestOther.test_skipped\n"
        )
        for verbose in (False, True):
            with self.subTest(verbose=verbose):
                self.assertIn(expected, self.run_tests(verbose=verbose)[1])


class TestCommandLine(unittest.TestCase):
    """The command as it is typed."""

    def test_a_part(self) -> None:
        """Names and -v reach the command, and its exit code is that of the process."""
        name = "project.tests.lib.test_addresses"
        result = scratch.manage("test", name, "-v")
        self.assertEqual(0, result.returncode, result.stderr)
        self.assertRegex(result.stderr, rf"\A{name} +\d+ tests")

        result = scratch.manage("test", f"{name}.TestNothing")
        self.assertEqual(1, result.returncode)
        self.assertEqual(f"There is no test named {name}.TestNothing.\n", result.stderr)
