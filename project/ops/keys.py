"""The commands about the keys that sign tokens: rotate_keys, keys, reencrypt_keys."""

import sys

from flask import current_app

from project import clock
from project.accounts import audit
from project.extensions import db
from project.lib import encryption
from project.ops.command_line import ORIGIN, exit_without_issuer, time_of
from project.tokens import signing_keys

TABLE_ROW = "{:43}  {:10}  {:20}  {:20}  {:20}  {}"
COLUMNS = "kid", "state", "created", "signs from", "verifies until", "readable"
BREAKS = """\
Warning: within a minute this service refuses every auth token that earlier keys have signed, so
clients have to refresh. Refresh tokens continue to work. Other services that keep the public keys
accept the old tokens for up to 5 minutes, or for as long as their own cache keeps the keys."""


def rotate_keys(now: bool = False) -> None:
    """Add a key that signs tokens 15 minutes later; earlier ones verify until their last token.

    --now is for a key that leaked: the new key signs and the earlier ones verify nothing from now
    on.
    """
    exit_without_issuer()
    kid = signing_keys.rotate(at_once=now)
    audit.record(audit.Kind.KEYS_ROTATED, ORIGIN, user_id=None, key=kid)
    db.session.commit()
    rows = signing_keys.all_keys()
    added = next(row for row in rows if row.kid == kid)
    print(f"The new key is {kid}. It signs from {time_of(added.signs_from)}.")
    if now:
        print(f"The earlier keys verify nothing any more.\n{BREAKS}")
    elif until := max((row.verifies_until for row in rows if row.verifies_until), default=None):
        print(f"The earlier keys verify until {time_of(until)}.")


def keys() -> None:
    """Print the keys that sign tokens, the newest first, as a table without any secret."""
    exit_without_issuer()
    rows, now = signing_keys.all_keys(), clock.utcnow()
    signing = signing_keys.signing(rows, now)
    valid = signing_keys.verifying(rows, now)
    print(TABLE_ROW.format(*COLUMNS))
    for row in rows:
        if row == signing:
            state = "signs"
        elif row not in valid:
            state = "retired"
        else:
            state = "will sign" if row.signs_from > now else "verifies"
        times = map(time_of, (row.created_at, row.signs_from, row.verifies_until))
        readable = signing_keys.is_readable(row, current_app.config["ENCRYPTION_KEYS"])
        print(TABLE_ROW.format(row.kid, state, *times, "yes" if readable else "no"))


def reencrypt_keys() -> None:
    """Encrypt the private keys again, under the first of ENCRYPTION_KEYS."""
    exit_without_issuer()
    try:
        encrypted = signing_keys.reencrypt()
    except encryption.DecryptionFailed:
        sys.exit(
            "No key of ENCRYPTION_KEYS decrypts one of the private keys; python manage.py keys"
            " shows which. Nothing has changed."
        )
    db.session.commit()
    print(f"Private keys encrypted again: {encrypted}.")
