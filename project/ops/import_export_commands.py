"""The commands import_users and export_users: files, progress, and what they print."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from project.accounts import audit
from project.errors import MfaNotConfigured
from project.extensions import db
from project.lib import database
from project.ops import import_export, user_files
from project.ops.command_line import ORIGIN, OneEvent, describe_fields

ANSWER_TIMEOUT = 60.0  # seconds that the database may take for one batch


def import_users(file: str, csv: bool = False) -> int:
    """Add the users of a JSON Lines file, or of a CSV file (named *.csv, or with --csv).

    The file - is standard input. Refused lines are listed on stderr, and the exit code is then 1.
    """
    database.set_answer_timeout(ANSWER_TIMEOUT)
    imported = OneEvent(audit.Kind.USERS_IMPORTED)
    added = existing = refused = 0
    with _open_source(file) as source, _progress_bar(source) as bar:
        try:
            for batch in import_export.import_users(source, as_csv=_is_csv(file, csv)):
                if batch.added:
                    imported.record(users=added + batch.added)
                db.session.commit()
                added += batch.added
                existing += batch.existing
                refused += len(batch.refused)
                for line, errors in batch.refused:
                    bar.write(f"line {line}: {describe_fields(errors)}", file=sys.stderr)
                bar.update(batch.end - bar.n)
        except MfaNotConfigured:
            sys.exit("ENCRYPTION_KEYS does not decrypt every second factor of existing users.")
        finally:
            bar.close()
            print(f"Users added: {added}; there already: {existing}; lines refused: {refused}.")
    return 1 if refused else 0


@contextlib.contextmanager
def _open_source(file: str) -> Iterator[BinaryIO]:
    """Open a file, or standard input; end the command when it cannot be read."""
    try:
        if file == "-" and sys.stdin:
            yield sys.stdin.buffer
        else:
            with Path(file).open("rb") as source:
                yield source
    except OSError as error:
        sys.exit(f"{file} cannot be read: {error.strerror}")


def _progress_bar(source: BinaryIO) -> "tqdm[Any]":
    """Return a bar in bytes, shown if stderr is a terminal; its total is a regular file's size."""
    status = os.fstat(source.fileno())
    total = status.st_size if stat.S_ISREG(status.st_mode) else None
    return tqdm(total=total, unit="B", unit_scale=True, disable=None)


def export_users(file: str, csv: bool = False, with_factors: bool = False) -> None:
    """Write all users, with their password hashes, to a new file that import_users can read.

    The format is JSON Lines, or CSV (named *.csv, or with --csv). The file - is standard output.
    --with-factors also writes second factors, encrypted with the first of ENCRYPTION_KEYS.
    """
    database.set_answer_timeout(ANSWER_TIMEOUT)
    details = {"second_factors": True} if with_factors else {}
    try:
        with _open_target(file) as target:
            audit.record(
                audit.Kind.USERS_EXPORTED, ORIGIN, user_id=None, session_id=None, **details
            )
            db.session.commit()
            users = import_export.export_users(with_factors=with_factors)
            count = user_files.write(
                users, target, as_csv=_is_csv(file, csv), with_factors=with_factors
            )
    except FileExistsError:
        sys.exit(f"{file} already exists; nothing was written.")
    except OSError as error:
        sys.exit(f"{file} cannot be written: {error.strerror}")
    except MfaNotConfigured:
        outcome = "the output is incomplete" if file == "-" else "nothing was written"
        sys.exit(f"ENCRYPTION_KEYS does not decrypt every second factor; {outcome}.")
    print(f"Users written: {count}.", file=sys.stderr)
    if not with_factors and (left_out := import_export.users_with_factor()):
        print(
            f"Second factors are not in the file: {left_out} users will have to set theirs up"
            " again. --with-factors writes them too.",
            file=sys.stderr,
        )


@contextlib.contextmanager
def _open_target(file: str) -> Iterator[BinaryIO]:
    """Create a file that only its owner can read, or use standard output.

    An incomplete file is removed.
    """
    if file == "-":
        with os.fdopen(os.dup(1), "wb") as target:
            yield target
        return
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as target:
            yield target
    except BaseException:
        Path(file).unlink()
        raise


def _is_csv(file: str, csv: bool) -> bool:
    return csv or file.lower().endswith(".csv")
