"""The documents agree with the code: tests, links, anchors, tables and commands."""

import re
import subprocess
import sys
import unittest
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from bench import lines
from project.api.openapi import INFO
from project.config import strong_key

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "bench", "deploy/**", "examples/**", "project/**", "migrations/**")
    for path in ROOT.glob(f"{folder}/*.md")
)
LINES = re.compile(r"^\| (.+) \| ([0-9,]+) \|$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
TEST = re.compile(r"`(test_\w+)(?:\.(Test\w+))?(?:\.(test_\w+))?`")

TESTS = "".join(path.read_text() for path in Path(__file__).parent.rglob("*.py"))
CI = (ROOT / ".ci" / "run").read_text()
KEY = r'python3? -c "(import secrets; [^"]+)"'
# Where each command of a document is run: its pattern, the place, and the text in that place.
RUN = [
    (r"flask --app project (routes|shell)", TESTS, r'"--app", "project", "{0}"'),
    (r"python manage\.py (runserver) --reload", TESTS, r'"{0}", "--reload"'),
    (r"python manage\.py (runserver|test)", CI, r"python manage.py {0}\$"),
    (r"python manage\.py db (upgrade|downgrade)", TESTS, r'manage\(\s*"db", "{0}"'),
    (r"python manage\.py serve", TESTS, r'"manage.py", "serve"'),
    (r"python manage\.py (?!db )(\w+)( .*)?", TESTS, r'\(\s*"{0}"'),
    (r"python -m (project\.tests\.contract\.client_tables)", TESTS, r'"python -m {0}"'),
    (r"python -m bench\.lines", TESTS, r'"-m", "bench\.lines"'),
    (r"python -m bench\.(failover)( .*)?", CI, r" -m bench\.{0} "),
    (r"python -m (bench)\.(\w+)( .*)?", CI, r"^bench {1} "),
    (r"git worktree add \.\./before COMMIT", CI, r"git worktree add "),
    (r"docker compose up --build", CI, r"\^docker compose up' README"),
    (r"docker compose --profile proxy up", CI, r'"--profile proxy"'),
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
    (r"curl .*(/totp|/recovery_codes|/mfa|/password -H|hedy).*", TESTS, r"class TestMfaCalls"),
    (
        r"curl -X POST http://127\.0\.0\.1:5000/.*(LINK|TOKEN|grace).*",
        TESTS,
        r"class TestLinkCalls",
    ),
    (r"curl (-X POST )?http://127\.0\.0\.1:5000/auth/\w+ .*", TESTS, r"class TestFourCalls"),
    (r"curl .*127\.0\.0\.1:500[012]/(oauth|whoami|reports).*", TESTS, r"class TestServiceCalls"),
    (r"(export ISSUER=|(CLIENT_\w+=\S+ )*flask --app ).*", TESTS, r"class TestServiceCalls"),
    (r'python3? -c "import secrets; .*', TESTS, r"def test_keys"),
]


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a document: in its code blocks, and in its sentences."""
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


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document.

    The text in lower case, without markup and punctuation, with hyphens for blanks; a heading
    that occurs again gets a number.
    """
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    counts: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose, re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
        counts[slug] += 1
    return found


class TestDocuments(unittest.TestCase):
    """README.md and its companions."""

    def test_tests_exist(self) -> None:
        """Every test that a document names exists, in the class that it names."""
        named = [match for path in DOCUMENTS for match in TEST.findall(path.read_text())]
        self.assertLess(20, len(named))
        for file, case, name in named:
            with self.subTest(file, case=case, test=name):
                [path] = (ROOT / "project" / "tests").rglob(f"{file}.py")
                source = path.read_text()
                if case:
                    _, found, source = source.partition(f"\nclass {case}(")
                    self.assertTrue(found)
                if name:
                    source, *_ = source.split("\nclass ")
                    self.assertIn(f"    def {name}(", source)

    def test_links(self) -> None:
        """Every link leads to an existing file, and its anchor to a heading of that file."""
        for path in DOCUMENTS:
            for target, anchor in LINK.findall(path.read_text()):
                with self.subTest(path.name, target=target, anchor=anchor):
                    file = path.parent / target if target else path
                    self.assertTrue(file.exists())
                    if anchor:
                        self.assertIn(anchor, anchors(file.read_text()))

    def test_anchors(self) -> None:
        """Anchors are made as GitHub makes them."""
        text = "# A [link](x.md)\n```sh\n# a comment\n```\n## Rotate `SECRET_KEY`, twice\n# A link"

        self.assertEqual({"a-link", "a-link-1", "rotate-secret_key-twice"}, anchors(text))


class TestChangelog(unittest.TestCase):
    """CHANGELOG.md has the form of Keep a Changelog 1.1.0."""

    TEXT = (ROOT / "CHANGELOG.md").read_text()
    GROUPS: ClassVar[list[str]] = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]

    def test_versions(self) -> None:
        """Unreleased changes are first; the newest version is that of the API document."""
        unreleased, *versions = re.findall(r"^## (.+)$", self.TEXT, re.MULTILINE)

        self.assertEqual("Unreleased", unreleased)
        for version in versions:
            self.assertRegex(version, r"\A\d+\.\d+\.\d+ - \d{4}-\d{2}-\d{2}\Z")
        self.assertEqual(INFO.version, versions[0].split()[0])

    def test_groups(self) -> None:
        """Each version has some of the six groups, each at most once and in their order."""
        for version in self.TEXT.split("\n## ")[1:]:
            groups = re.findall(r"^### (.+)$", version, re.MULTILINE)
            with self.subTest(version.splitlines()[0]):
                self.assertEqual([name for name in self.GROUPS if name in groups], groups)
                self.assertTrue(groups)


class TestContributing(unittest.TestCase):
    """The tables of CONTRIBUTING.md."""

    TEXT = (ROOT / "CONTRIBUTING.md").read_text()

    def test_files(self) -> None:
        """Every module and every shelf is described once, and nothing else is."""
        section = self.TEXT.split("\n## Shelves and files\n")[1].split("\n## ")[0]
        modules = {
            path
            for path in (ROOT / "project").rglob("*.py")
            if path.relative_to(ROOT).parts[1] != "tests" and path.read_text()
        }
        files = {str(path.relative_to(ROOT)) for path in modules | {ROOT / "manage.py"}}
        shelves = {f"{path.parent.relative_to(ROOT)}/" for path in modules} - {"project/"}

        self.assertEqual(
            sorted(files | shelves), sorted(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
        )

    def test_lines_of_code(self) -> None:
        """The numbers differ from those that the command prints by at most 5 %."""
        command = [sys.executable, "-m", "bench.lines"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        expected, told = (
            {shelf: int(number.replace(",", "")) for shelf, number in LINES.findall(text)}
            for text in (printed.stdout, self.TEXT)
        )

        self.assertEqual(list(expected), list(told))
        for shelf, number in expected.items():
            with self.subTest(shelf):
                self.assertAlmostEqual(number, told[shelf], delta=number / 20)

    def test_login(self) -> None:
        """Every function on the way of a login is in the file that the picture names."""
        steps = re.findall(r"^\|    (\S+\.py) +([\w.]+)", self.TEXT, re.MULTILINE)
        self.assertLess(10, len(steps))
        for file, name in steps:
            with self.subTest(file, name=name):
                first, *others = name.split(".")
                source = (ROOT / "project" / file).read_text()
                self.assertRegex(source, rf"(?m)^((def|class) {first}\b|{first} =)")
                if "session" not in others:  # an attribute that Flask-SQLAlchemy makes
                    for method in others:
                        self.assertIn(f"    def {method}(", source)

    def test_lines_that_count(self) -> None:
        """Blank lines, comments and docstrings do not count; other texts do."""
        source = '"""A\ndocstring."""\n\n# a comment\ntext = """two\nlines"""  # of code\n'

        self.assertEqual(2, lines.count(source))


class TestCommands(unittest.TestCase):
    """Every command that a document names is run, by a test or by .ci/run."""

    def test_every_command(self) -> None:
        """RUN names the place where each command is run, and each option occurs in such a place.

        The commands of deploy/README.md change a whole machine, and only a person runs them.
        """
        documents = [path for path in DOCUMENTS if path != ROOT / "deploy" / "README.md"]
        found = {command for path in documents for command in commands(path.read_text())}
        self.assertLess(20, len(found))
        for command in sorted(found):
            with self.subTest(command):
                places = [
                    (where, what.format(*map(str, match.groups())))
                    for pattern, where, what in RUN
                    if (match := re.fullmatch(pattern, command))
                ]
                self.assertTrue(places, "RUN does not say where this is run")
                where, what = places[0]
                self.assertRegex(where, re.compile(what, re.MULTILINE))
                if command.startswith("python"):
                    for option in re.findall(r"(?<= )--[a-z-]+", command):
                        self.assertIn(option, TESTS + CI)

    def test_keys(self) -> None:
        """The command for a random key prints a strong one, and a different one each time."""
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
