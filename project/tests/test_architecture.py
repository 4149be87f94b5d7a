"""The law of the house: imports go down only, and everybody can see which way down is."""

import ast
import unittest
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

# From the ground up; a module imports only from floors below its own.
FLOORS = [
    {"addresses", "clock", "identifiers", "errors"},
    {"config", "extensions", "metrics", "password_rules", "proxies"},
    {"bulkhead", "logs", "postgresql", "tokens"},
    {"database"},
    {"passwords", "readiness"},
    {"api.models", "diagnosis"},
    {"audit", "ratelimit"},
    {"sessions"},
    {"accounts"},
    {"api.answers", "care"},
    {"api.guards", "api.requests", "api.responses", "api.schemas"},
    {"api.access", "api.browsers", "api.error_handlers", "records"},
    {"api.auth", "api.document", "api.health", "api.users", "transfer"},
    {""},  # project/__init__.py, which makes the application
]
FLOOR = {module: number for number, floor in enumerate(FLOORS) for module in floor}
WITHOUT_FLASK = {
    "addresses",
    "clock",
    "config",
    "errors",
    "identifiers",
    "password_rules",
    "proxies",
    "tokens",
}


def modules() -> dict[str, ast.Module]:
    """Return every module of the service with its syntax tree, named from project on."""
    found = {}
    for path in PROJECT.rglob("*.py"):
        parts = path.relative_to(PROJECT).with_suffix("").parts
        if parts[0] != "tests" and parts != ("api", "__init__"):
            found[".".join(parts).removesuffix("__init__")] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    """Return every dotted name that a module imports, as far as it goes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(name: str) -> str:
    """Return the module of ours that a dotted name stands for; "" is the package itself."""
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in FLOOR:
        parts.pop()
    return ".".join(parts)


class TestArchitecture(unittest.TestCase):
    """The rooms and the stairs between them."""

    def test_every_module_has_a_floor(self) -> None:
        """A new module is given its place on purpose."""
        self.assertEqual(set(FLOOR), set(modules()))

    def test_imports_go_down(self) -> None:
        """No module imports from its own floor or a higher one, so there are no circles."""
        for module, tree in modules().items():
            for name in imports(tree):
                if name.split(".")[0] == "project":
                    with self.subTest(module=module, imports=name):
                        self.assertLess(FLOOR[own(name)], FLOOR[module])

    def test_pure_modules_know_no_flask(self) -> None:
        """What needs no web framework imports none."""
        for module in WITHOUT_FLASK:
            with self.subTest(module=module):
                roots = {name.split(".")[0] for name in imports(modules()[module])}

                self.assertEqual(set(), {root for root in roots if root.startswith("flask")})

    def test_one_clock(self) -> None:
        """Only clock.py asks the machine for the time."""
        for module, tree in modules().items():
            calls = {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and node.attr in {"now", "today"}
            }
            with self.subTest(module=module):
                self.assertEqual({"now"} if module == "clock" else set(), calls)
