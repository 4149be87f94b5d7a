"""The shelves of the package, and which way imports run between them."""

import ast
import io
import re
import tokenize
import unittest
from graphlib import TopologicalSorter
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

# From the bottom up. A module imports from its own shelf and from those below it; shelves of the
# same row do not import from each other. The last row is project/__init__.py.
LAYERS: list[set[str]] = [
    {"clock", "config", "errors", "extensions", "ids"},
    {"lib"},
    {"models"},
    {"tokens", "mail"},
    {"accounts"},
    {"api", "ops"},
    {""},
]
LAYER = {shelf: number for number, row in enumerate(LAYERS) for shelf in row}
# The lesson has User.encode_auth_token and User.decode_auth_token, which import inside the method.
EXCEPTIONS = {("models", "tokens.codec"), ("models", "tokens.keys")}
WITHOUT_FLASK = {
    *("clock", "config", "errors", "ids"),
    *(
        "accounts.fields",
        "lib.addresses",
        "lib.codes",
        "lib.forwarded",
        "lib.slow_clients",
        "tokens.codec",
    ),
}
# What lib may not know, so that another service can use it as it is.
DOMAIN = re.compile(r"(?<![a-z])(user|token)s?(?![a-z])|/auth|/ping|/health", re.IGNORECASE)


def modules() -> dict[str, Path]:
    """Return the path of every module of the service, by its name from `project` on."""
    found = {}
    for path in PROJECT.rglob("*.py"):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        if parts[0] != "tests":
            found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()
TREES = {module: ast.parse(path.read_text()) for module, path in MODULES.items()}


def shelf(module: str) -> str:
    """Return the shelf of a module."""
    return module.split(".")[0]


def names(tree: ast.Module) -> set[str]:
    """Return every dotted name that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(module: str) -> set[str]:
    """Return the modules of the service that `module` imports, but for the exceptions."""
    found = set()
    for name in names(TREES[module]):
        parts = name.split(".")
        if parts.pop(0) == "project":
            while ".".join(parts) not in MODULES:
                parts.pop()
            found.add(".".join(parts))
    return {other for other in found if (module, other) not in EXCEPTIONS}


class TestArchitecture(unittest.TestCase):
    """The shelves and the imports between them."""

    def test_every_module_is_on_a_shelf(self) -> None:
        """There is no module and no folder beside the shelves."""
        self.assertEqual(set(LAYER), set(map(shelf, MODULES)))

    def test_imports_run_down(self) -> None:
        """No shelf imports from one above it, nor from one beside it."""
        for module in MODULES:
            for other in imports(module):
                with self.subTest(module=module, imports=other):
                    down = LAYER[shelf(other)] < LAYER[shelf(module)]
                    both_at_the_bottom = LAYER[shelf(module)] == 0 == LAYER[shelf(other)]
                    self.assertTrue(down or both_at_the_bottom or shelf(other) == shelf(module))

    def test_no_circles(self) -> None:
        """No chain of imports leads back to where it began, between files either."""
        order = TopologicalSorter({module: imports(module) for module in MODULES})

        self.assertEqual(set(MODULES), set(order.static_order()))

    def test_the_exceptions_occur(self) -> None:
        """Each exception exists, and is inside a function."""
        for module, other in EXCEPTIONS:
            with self.subTest(module=module, imports=other):
                self.assertIn(f"project.{other}", names(TREES[module]))
                at_the_top = [
                    node for node in TREES[module].body if isinstance(node, ast.ImportFrom)
                ]
                self.assertNotIn("project.tokens", {node.module for node in at_the_top})

    def test_lib_knows_nothing_of_the_domain(self) -> None:
        """No name and no text in lib mentions users, of tokens or of a route."""
        for module, path in MODULES.items():
            if shelf(module) == "lib":
                for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
                    with self.subTest(module=module, line=token.start[0], text=token.string):
                        self.assertNotRegex(token.string, DOMAIN)

    def test_pure_modules_know_no_flask(self) -> None:
        """What needs no web framework imports none."""
        for module in WITHOUT_FLASK:
            with self.subTest(module=module):
                roots = {name.split(".")[0] for name in names(TREES[module])}

                self.assertEqual(set(), {root for root in roots if root.startswith("flask")})

    def test_one_clock(self) -> None:
        """Only clock.py asks the machine for the time."""
        for module, tree in TREES.items():
            calls = {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and node.attr in {"now", "today"}
            }
            with self.subTest(module=module):
                self.assertEqual({"now"} if module == "clock" else set(), calls)

    def test_test_files_import_no_other_test_file(self) -> None:
        """What several test files share is in a separate module."""
        for path in (PROJECT / "tests").rglob("test_*.py"):
            for name in names(ast.parse(path.read_text())):
                with self.subTest(path.name, imports=name):
                    self.assertNotRegex(name, r"(^|\.)test_\w+")

    def test_bench_imports_no_tests(self) -> None:
        """The benchmarks run without the tests."""
        for path in (PROJECT.parent / "bench").glob("*.py"):
            for name in names(ast.parse(path.read_text())):
                with self.subTest(path.name, imports=name):
                    self.assertFalse(name.startswith("project.tests"))
