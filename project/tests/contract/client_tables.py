"""Print the tables of docs/clients.md: python -m project.tests.contract.client_tables.

The columns that the code defines are made from the code. The others, such as what a client should
do, are taken from the document, and are empty in a new row. `test_clients_document` compares the
document with these tables.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from project import create_app, errors
from project.accounts.audit import Kind
from project.api import openapi
from project.tests import scratch

DOCUMENT = scratch.ROOT / "docs" / "clients.md"
SETTINGS = "project.config.TestingConfig"
METHODS = ("get", "post", "put", "patch", "delete")
_ROW = re.compile(r"^\| .* \|$", re.MULTILINE)

Row = tuple[str, ...]


def written(title: str) -> list[list[str]]:
    """Return the rows of the table in the document that begins with the column `title`."""
    for block in DOCUMENT.read_text().split("\n\n"):
        lines = _ROW.findall(block)
        if lines and lines[0].startswith(f"| {title} |"):
            return [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines[1:]]
    raise LookupError(f"{DOCUMENT} has no table of {title}")


def codes() -> Iterator[Row]:
    """Yield every error code with its statuses and messages, in the order of `errors`."""
    kinds: dict[str, list[type[errors.ServiceError]]] = {}
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.ServiceError):
            kinds.setdefault(kind.code, []).append(kind)
    for code, group in kinds.items():
        statuses = ", ".join(str(status) for status in sorted({kind.status for kind in group}))
        yield f"`{code}`", statuses, " / ".join(dict.fromkeys(kind.message for kind in group))


def events() -> Iterator[Row]:
    """Yield every kind of event in the audit log."""
    for kind in Kind:
        yield (f"`{kind}`",)


def fields() -> Iterator[Row]:
    """Yield every field of a request, with the routes that take it, from the API document."""
    document = openapi.describe(create_app(SETTINGS))
    found: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method in (name for name in METHODS if name in operations):
            route = f"`{method.upper()} {re.sub('{[a-z_]+}', '<id>', path)}`"
            for name in _names(operations[method], document):
                found.setdefault(name, []).append(route)
    for name, routes in found.items():
        yield f"`{name}`", ", ".join(dict.fromkeys(routes))


def _names(operation: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    for parameter in operation.get("parameters", ()):
        yield _resolve(parameter, document)["name"]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        yield from _properties(content["schema"], document)


def _properties(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    schema = _resolve(schema, document)
    yield from schema.get("properties", ())
    for keyword in ("allOf", "anyOf", "oneOf"):
        for part in schema.get(keyword, ()):
            yield from _properties(part, document)


def _resolve(part: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in part.get("$ref", "#").split("/")[1:]:
        document = document[name]
    return document if "$ref" in part else part


TABLES: dict[Row, Callable[[], Iterator[Row]]] = {
    ("Code", "Status", "Message", "When", "What a client does"): codes,
    ("Kind", "When", "Details"): events,
    ("Field", "Sent in", "Rule"): fields,
}


def table(titles: Row) -> list[list[str]]:
    """Return the rows of a table, with the cells that only the document has, or empty ones."""
    known = {row[0]: row for row in written(titles[0])}
    rows = []
    for derived in TABLES[titles]():
        texts = known.get(derived[0], [""] * len(titles))[len(derived) :]
        rows.append([*derived, *texts])
    return rows


if __name__ == "__main__":
    for titles in TABLES:
        print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
        print("\n".join(f"| {' | '.join(row)} |" for row in table(titles)), end="\n\n")
