"""What the documents say of the code is so."""

import re
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
TEST = re.compile(r"`(test_\w+)(?:\.(Test\w+))?(?:\.(test_\w+))?`")


class TestDocuments(unittest.TestCase):
    """README.md and its companions."""

    def test_tests_exist(self) -> None:
        """A test that a document names is there, in the class that it says."""
        named = [match for path in DOCUMENTS for match in TEST.findall(path.read_text())]
        self.assertLess(20, len(named))
        for file, case, name in named:
            with self.subTest(file, case=case, test=name):
                source = (ROOT / "project" / "tests" / f"{file}.py").read_text()
                if case:
                    _, found, source = source.partition(f"\nclass {case}(")
                    self.assertTrue(found)
                if name:
                    source, *_ = source.split("\nclass ")
                    self.assertIn(f"    def {name}(", source)

    def test_links(self) -> None:
        """A link to a file of the project leads to it."""
        for path in DOCUMENTS:
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
                with self.subTest(path.name, target=target):
                    self.assertTrue((path.parent / target).exists())
