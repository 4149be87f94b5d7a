"""Users as the lines of a file: JSON Lines (https://jsonlines.org), or CSV (RFC 4180), in UTF-8.

The fields are those of `schemas.ImportedUser`, and no others: whoever misspells `active` would let
those in whom they meant to keep out. A file may come from anybody: its lines are bounded, and no
refusal repeats anything that stands in it.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import orjson
from pydantic import ValidationError

from project.api import schemas
from project.api.schemas import ImportedUser
from project.errors import InvalidPayload

MAX_BYTES = 64 * 1024  # of a record, as of a body
_BOM = b"\xef\xbb\xbf"
_FIELDS = ImportedUser.model_fields.keys()
_REQUIRED = {name for name, field in ImportedUser.model_fields.items() if field.is_required()}
_FLAGS = {"active", "admin"}
_FLAG = {"true": True, "false": False}
_UNFLAG = {flag: text for text, flag in _FLAG.items()}
_FOLLOWS = "; nothing after it was read"  # where the next record begins cannot be known


class Record(NamedTuple):
    """A user from a file, or what is wrong with the record."""

    line: int  # the number, from 1, of the line on which it begins
    end: int  # bytes of the file up to its end
    user: ImportedUser | None
    errors: dict[str, str]  # by field; "it" is the record itself


class _Line(NamedTuple):
    number: int
    end: int
    text: bytes | None  # None for one that is too long


def read(file: BinaryIO, *, as_csv: bool) -> Iterator[Record]:
    """Yield every record of a file but blank lines; in memory there is never more than one."""
    return _read_csv(_lines(file)) if as_csv else _read_json(_lines(file))


def _lines(file: BinaryIO) -> Iterator[_Line]:
    end = 0
    number = 0
    while piece := file.readline(MAX_BYTES):
        text: bytes | None = piece
        number += 1
        end += len(piece)
        while len(piece) == MAX_BYTES and not piece.endswith(b"\n"):
            text = None
            piece = file.readline(MAX_BYTES)
            end += len(piece)
        yield _Line(number, end, text.removeprefix(_BOM) if text and number == 1 else text)


def _refusal(reason: str) -> InvalidPayload:
    return InvalidPayload(errors={"it": reason})


def _record(line: _Line, fields: dict[str, Any]) -> Record:
    try:
        return Record(line.number, line.end, ImportedUser.model_validate(fields), {})
    except ValidationError as error:
        return _refused(line, schemas.refuse(error))


def _refused(line: _Line, error: InvalidPayload) -> Record:
    return Record(line.number, line.end, None, error.errors or {})


def _read_json(lines: Iterable[_Line]) -> Iterator[Record]:
    for line in lines:
        if line.text is None or line.text.strip():
            try:
                fields = _parse_json(line.text)
            except InvalidPayload as error:
                yield _refused(line, error)
            else:
                yield _record(line, fields)


def _parse_json(text: bytes | None) -> dict[str, Any]:
    """Return the fields of a JSON object; raises InvalidPayload."""
    if text is None:
        raise _refusal(f"is longer than {MAX_BYTES:,} bytes")
    try:
        fields = _JSON.decode(text.decode())
    except UnicodeDecodeError:
        raise _refusal("is not UTF-8") from None
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _refusal("is not a JSON object")
    if not fields.keys() <= _FIELDS:
        raise _refusal(f"has a field that is none of {', '.join(_FIELDS)}")
    return fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _refusal("has a field twice")
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _read_csv(lines: Iterator[_Line]) -> Iterator[Record]:
    names: list[str] = []
    for line, row in _rows(lines):
        try:
            if isinstance(row, InvalidPayload):
                raise row
            if names:
                yield _record(line, _fields(names, row))
            else:
                names = _header(row)
        except InvalidPayload as error:
            yield _refused(line, error)
            if not names:
                return
    if not names:
        yield _refused(_Line(1, 0, b""), _no_header())


def _rows(lines: Iterator[_Line]) -> Iterator[tuple[_Line, list[str] | InvalidPayload]]:
    """Yield each row, and the refusal of one that cannot be told from the next, with its place.

    A row may go on over several lines where it is quoted. To go on reading after one whose quotes
    are broken might take a part of a name for a row, and so for a user. A quote after a backslash
    ends a field, but not where PHP's fputcsv wrote it: nobody can know.
    """
    text = _Text(lines)
    rows = csv.reader(text, strict=True)
    row: list[str] | InvalidPayload = []
    while not isinstance(row, InvalidPayload):
        text.begin_row()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            row = _refusal(f"is not quoted as in RFC 4180{_FOLLOWS}")
        except InvalidPayload as error:
            row = error
        if row:
            yield text.row, row


class _Text:
    """Lines as csv.reader takes them; `row` is the place of the row that it has read from them."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self._begin = self._last = self.row = _Line(0, 0, b"")

    def begin_row(self) -> None:
        self._begin = self._last

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._last = next(self._lines)
        self.row = _Line(self._begin.number + 1, self._last.end, b"")
        if self._last.text is None or self._last.end - self._begin.end > MAX_BYTES:
            raise _refusal(f"is longer than {MAX_BYTES:,} bytes{_FOLLOWS}")
        if b'\\"' in self._last.text:
            raise _refusal(f"has a backslash before a quote{_FOLLOWS}")
        return self._last.text.decode(errors="surrogateescape")


def _no_header() -> InvalidPayload:
    required = [name for name in _FIELDS if name in _REQUIRED]
    optional = [name for name in _FIELDS if name not in _REQUIRED]
    return _refusal(
        f"must be the header, which names {', '.join(required)}, and no others but"
        f" {', '.join(optional)}{_FOLLOWS}"
    )


def _header(row: list[str]) -> list[str]:
    """Return the names of the columns; raises InvalidPayload."""
    names = set(row)
    if len(names) < len(row) or not _REQUIRED <= names <= _FIELDS:
        raise _no_header()
    return row


def _fields(names: list[str], row: list[str]) -> dict[str, Any]:
    """Return the fields of a row as JSON would have them; raises InvalidPayload."""
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        raise _refusal("is not UTF-8") from None
    if len(row) != len(names):
        raise _refusal("has not as many fields as the header")
    fields: dict[str, Any] = dict(zip(names, row, strict=True))
    for name in _FLAGS & fields.keys():
        fields[name] = _FLAG.get(fields[name], fields[name])
    return fields


def write(users: Iterable[dict[str, Any]], file: BinaryIO, *, as_csv: bool) -> int:
    """Write users, each with every field as JSON has it, as `read` takes them; return how many."""
    return _write_csv(users, file) if as_csv else _write_json(users, file)


def _write_json(users: Iterable[dict[str, Any]], file: BinaryIO) -> int:
    count = 0
    for user in users:
        file.write(orjson.dumps(user, option=orjson.OPT_APPEND_NEWLINE))
        count += 1
    return count


def _write_csv(users: Iterable[dict[str, Any]], file: BinaryIO) -> int:
    count = 0
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    rows = csv.writer(text)
    rows.writerow(_FIELDS)
    for user in users:
        rows.writerow([_UNFLAG.get(value, value) for value in user.values()])
        count += 1
    text.detach()
    return count
