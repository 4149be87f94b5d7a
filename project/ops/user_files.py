"""Users as the lines of a file: JSON Lines (https://jsonlines.org), or CSV (RFC 4180), in UTF-8.

The fields are those of `ImportedUser`. A record with any other field is refused: a misspelled
`active` would otherwise activate users who are to stay deactivated. A file can come from an
untrusted source: the length of a record is bounded, and no refusal repeats any of its content.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, BinaryIO, NamedTuple

import orjson
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    InstanceOf,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from project import clock
from project.accounts.fields import Body, Email, Roles, Username, invalid_payload, refuse
from project.errors import InvalidPayload
from project.lib import hashing
from project.ops import exported_factors
from project.ops.exported_factors import Factor

MAX_BYTES = 64 * 1024  # of a record, the same as of a request body
_BOM = b"\xef\xbb\xbf"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# https://www.rfc-editor.org/rfc/rfc3339#section-5.6
_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})",
    re.IGNORECASE,
)
_BOOLEAN_FIELDS = {"active", "admin", "email_verified"}
_BOOLEANS = {"true": True, "false": False}
_BOOLEAN_TEXTS = {value: text for text, value in _BOOLEANS.items()}
_STOPPED = "; nothing after it was read"


def _password_hash(text: str) -> str:
    try:
        return hashing.import_hash(text)
    except ValueError as error:
        raise refuse(str(error)) from None


def _past_time(value: Any) -> datetime:
    try:
        if not isinstance(value, str) or not _RFC_3339.fullmatch(value):
            raise ValueError
        time = datetime.fromisoformat(value.upper())
    except ValueError:
        raise refuse("must be a moment like 2026-11-22T09:00:00Z") from None
    if not _EPOCH <= time <= clock.utcnow():
        raise refuse("must lie between 1970 and now")
    return time.astimezone(UTC)


class ImportedUser(Body):
    """A user from a file; validation turns `password_hash` into the form in which it is stored.

    `second_factor` is decrypted. `created_at` is limited to the times that a pagination cursor of
    GET /users can express.
    """

    username: Username
    email: Email
    password_hash: Annotated[str, AfterValidator(_password_hash)]
    active: bool = True
    admin: bool = False
    email_verified: bool = False
    roles: Roles = Field(default_factory=list)
    created_at: Annotated[datetime | None, BeforeValidator(_past_time)] = None
    second_factor: InstanceOf[Factor] | None = None

    @field_validator("second_factor", mode="before")
    @classmethod
    def _unseal(cls, text: Any, info: ValidationInfo) -> Factor:
        if not isinstance(text, str):
            raise refuse("must be a string")
        try:
            return exported_factors.unseal(text, info.data.get("email", ""))
        except ValueError as error:
            raise refuse(str(error)) from None


_FIELDS = ImportedUser.model_fields.keys()
_REQUIRED = {name for name, field in ImportedUser.model_fields.items() if field.is_required()}


class Record(NamedTuple):
    """A user from a file, or what is wrong with the record."""

    line: int  # the number, from 1, of its first line
    end: int  # bytes of the file up to the end of the record
    user: ImportedUser | None
    errors: dict[str, str]  # by field; "it" is the record itself


def read(file: BinaryIO, *, as_csv: bool) -> Iterator[Record]:
    """Yield the records of a file, without blank lines; at most one record is in memory."""
    return _read_csv(file) if as_csv else _read_json(file)


class _CountedLines:
    """The lines of a file; counts lines and bytes, and replaces a line that is too long by None."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0  # of the last line read, from 1
        self.end = 0  # bytes read

    def __iter__(self) -> Iterator[bytes | None]:
        while piece := self._file.readline(MAX_BYTES):
            line: bytes | None = piece
            self.number += 1
            self.end += len(piece)
            while len(piece) == MAX_BYTES and not piece.endswith(b"\n"):
                line = None
                piece = self._file.readline(MAX_BYTES)
                self.end += len(piece)
            yield line.removeprefix(_BOM) if line and self.number == 1 else line


def _refusal(reason: str) -> InvalidPayload:
    return InvalidPayload(errors={"it": reason})


def _record(number: int, end: int, fields: dict[str, Any]) -> Record:
    try:
        return Record(number, end, ImportedUser.model_validate(fields), {})
    except ValidationError as error:
        return _refused(number, end, invalid_payload(error))


def _refused(number: int, end: int, error: InvalidPayload) -> Record:
    return Record(number, end, None, error.errors or {})


def _read_json(file: BinaryIO) -> Iterator[Record]:
    lines = _CountedLines(file)
    for line in lines:
        if line is None or line.strip():
            try:
                fields = _parse_json(line)
            except InvalidPayload as error:
                yield _refused(lines.number, lines.end, error)
            else:
                yield _record(lines.number, lines.end, fields)


def _parse_json(line: bytes | None) -> dict[str, Any]:
    """Return the fields of a JSON object; raise InvalidPayload if `line` is anything else."""
    if line is None:
        raise _refusal(f"is longer than {MAX_BYTES:,} bytes")
    try:
        fields = _JSON.decode(line.decode())
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


class _CsvLines:
    """A file as csv.DictReader reads it, which knows where the current row begins and ends.

    A quoted field can contain line breaks, so only the reader knows where a row ends. After a row
    that is too long or has broken quotes, the rest of a field could pass as a row, and so as a
    user: InvalidPayload is raised, or csv.Error by the reader, and no more can be read. The same
    goes for a backslash before a quote, which PHP's fputcsv writes inside a field and RFC 4180
    reads as the end of the field.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._counted = _CountedLines(file)
        self._lines = iter(self._counted)
        self.first_line = 1  # of the row
        self.begin_row()

    def begin_row(self) -> None:
        """Take the next line that is not blank for the first of a row."""
        self._is_first = True
        self._begin = self._counted.end
        self.is_utf8 = True

    @property
    def end(self) -> int:
        """The bytes of the file up to the end of the row."""
        return self._counted.end

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if self._is_first:
            while line is not None and not line.strip(b"\r\n"):
                self._begin = self.end
                line = next(self._lines)
            self.first_line = self._counted.number
            self._is_first = False
        if line is None or self.end - self._begin > MAX_BYTES:
            raise _refusal(f"is longer than {MAX_BYTES:,} bytes{_STOPPED}")
        if b'\\"' in line:
            raise _refusal(f"has a backslash before a quote{_STOPPED}")
        try:
            return line.decode()
        except UnicodeDecodeError:
            self.is_utf8 = False
            return line.decode(errors="replace")


def _read_csv(file: BinaryIO) -> Iterator[Record]:
    lines = _CsvLines(file)
    rows = csv.DictReader(lines, strict=True)
    try:
        _check_header(rows.fieldnames or ())
        lines.begin_row()
        for row in rows:
            yield _csv_record(lines, row)
            lines.begin_row()
    except csv.Error:
        error = _refusal(f"is not quoted as in RFC 4180{_STOPPED}")
        yield _refused(lines.first_line, lines.end, error)
    except InvalidPayload as error:
        yield _refused(lines.first_line, lines.end, error)


def _check_header(names: Sequence[str]) -> None:
    """Raise InvalidPayload unless these are names of columns, with all that are required."""
    if len(set(names)) < len(names) or not _REQUIRED <= set(names) <= _FIELDS:
        required = [name for name in _FIELDS if name in _REQUIRED]
        optional = [name for name in _FIELDS if name not in _REQUIRED]
        raise _refusal(
            f"must be the header, which names {', '.join(required)}, and no others but"
            f" {', '.join(optional)}{_STOPPED}"
        )


def _csv_record(lines: _CsvLines, row: dict[str | Any, Any]) -> Record:
    """Return a row as a record; with booleans and lists where JSON has them."""
    reason = None
    if not lines.is_utf8:
        reason = "is not UTF-8"
    # DictReader's value for a missing field is None, and so is its key for excess fields.
    elif None in row or None in row.values():
        reason = "has not as many fields as the header"
    if reason:
        return _refused(lines.first_line, lines.end, _refusal(reason))
    for name in _BOOLEAN_FIELDS & row.keys():
        row[name] = _BOOLEANS.get(row[name], row[name])
    if "roles" in row:
        row["roles"] = row["roles"].split()
    if row.get("second_factor") == "":
        del row["second_factor"]
    return _record(lines.first_line, lines.end, row)


def write(
    users: Iterable[dict[str, Any]], file: BinaryIO, *, as_csv: bool, with_factors: bool = False
) -> int:
    """Write users, dictionaries of all fields, in a format that `read` reads; return how many.

    The field `second_factor` may be missing. Without `with_factors`, a CSV file has no such column.
    """
    if not as_csv:
        return _write_json(users, file)
    names = [name for name in _FIELDS if with_factors or name != "second_factor"]
    return _write_csv(users, file, names)


def _write_json(users: Iterable[dict[str, Any]], file: BinaryIO) -> int:
    count = 0
    for user in users:
        file.write(orjson.dumps(user, option=orjson.OPT_APPEND_NEWLINE))
        count += 1
    return count


def _write_csv(users: Iterable[dict[str, Any]], file: BinaryIO, names: list[str]) -> int:
    count = 0
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    rows = csv.writer(text)
    rows.writerow(names)
    for user in users:
        texts = user | {"roles": " ".join(user["roles"])}
        values = (texts.get(name, "") for name in names)
        rows.writerow([_BOOLEAN_TEXTS.get(value, value) for value in values])
        count += 1
    text.detach()
    return count
