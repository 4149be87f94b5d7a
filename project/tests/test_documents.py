"""What the documents say of the code is so."""

import re
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

from project.config import strong_key

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
TEST = re.compile(r"`(test_\w+)(?:\.(Test\w+))?(?:\.(test_\w+))?`")

TESTS = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))
CI = (ROOT / ".ci" / "run").read_text()
KEY = r'python3? -c "(import secrets; [^"]+)"'
# What runs a command: what has to stand in a test, or in .ci/run.
RUN = [
    (r"python manage\.py (runserver|test)", CI, r"python manage.py {0}\$"),
    (r"python manage\.py db (upgrade|downgrade)", TESTS, r'manage\(\s*"db", "{0}"'),
    (r"python manage\.py serve", TESTS, r'"manage.py", "serve"'),
    (r"python manage\.py (?!db )(\w+)( .*)?", TESTS, r'\(\s*"{0}"'),
    (r"python -m (bench)\.(\w+)( .*)?", CI, r"^bench {1} "),
    (r"python -m unittest -b project\.tests\.test_auth", CI, r"unittest \[\^`\]\*' CONTRIBUTING"),
    (r"git worktree add \.\./before COMMIT", CI, r"git worktree add "),
    (r"docker compose up --build", CI, r"\^docker compose up' README"),
    (
        r"docker compose (exec -T users-service python manage\.py import_users - <)users\.jsonl",
        CI,
        r"{0}",
    ),
    (r"pip install -r requirements(-dev)?\.txt", CI, r"pip install .*-r requirements-dev"),
    (r"python3 -m venv venv", CI, r"python3 -m venv venv"),
    (r"\. venv/bin/activate", CI, r"^\. venv/bin/activate"),
    (r"\.ci/run", CI, r"^#!/usr/bin/env bash"),
    (r"pg_(dump|restore) .*", TESTS, r"pg_\(\?:dump\|restore\) "),
    (r"curl (-X POST )?http://127\.0\.0\.1:5000/auth/\w+ .*", TESTS, r"class TestFourCalls"),
    (r'python3? -c "import secrets; .*', TESTS, r"def test_keys"),
]


def commands(text: str) -> Iterator[str]:
    """Yield what a document says may be typed: in its blocks, and in its sentences."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    typed = [line for block in blocks for line in re.sub(r"\\\n *", "", block).splitlines()]
    spans = re.findall(
        r"`((?:python3?|pip|docker|git|\.ci|pg_\w+|[A-Z_]+=\S+ python)[ /][^`]*)`", text
    )
    for line in typed + spans:
        for command in line.split(" && "):
            command = re.sub(
                r"^(export )?\w+=\$?\(?(?=python)|^[A-Z_]+=\S+ +(?=python)|\)$", "", command
            )
            if not re.match(r"\w+=\.\.\.|python manage\.py COMMAND", command):
                yield command.strip()


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


class TestCommands(unittest.TestCase):
    """Every command that a document names is run, by a test or by .ci/run."""

    def test_every_command(self) -> None:
        """A new one is given a place where it is run, on purpose, and each of its options too."""
        found = {command for path in DOCUMENTS for command in commands(path.read_text())}
        self.assertLess(20, len(found))
        for command in sorted(found):
            with self.subTest(command):
                places = [
                    (where, what.format(*map(str, match.groups())))
                    for pattern, where, what in RUN
                    if (match := re.fullmatch(pattern, command))
                ]
                self.assertTrue(places, "nobody has said where this is run")
                where, what = places[0]
                self.assertRegex(where, re.compile(what, re.MULTILINE))
                if command.startswith("python"):
                    for option in re.findall(r"(?<= )--[a-z-]+", command):
                        self.assertIn(option, TESTS + CI)

    def test_keys(self) -> None:
        """What makes a key makes one that is good enough, and another each time."""
        lines = {line for path in DOCUMENTS for line in re.findall(KEY, path.read_text())}
        for line in lines:
            with self.subTest(line):
                made = {
                    subprocess.run(
                        [sys.executable, "-c", line], capture_output=True, text=True, check=True
                    ).stdout.strip()
                    for _ in range(2)
                }
                self.assertEqual(2, len(made))
                self.assertEqual(made, set(map(strong_key, made)))
        self.assertEqual(1, len(lines))
