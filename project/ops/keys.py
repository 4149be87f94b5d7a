"""The commands about keys: rotate_keys and keys, of those that sign tokens, and reencrypt_keys."""

import sys
from collections.abc import Sequence
from datetime import datetime

from flask import current_app

from project import clock
from project.accounts import audit, second_factor
from project.extensions import db
from project.lib import encryption
from project.ops.command_line import ORIGIN, as_time, exit_without_issuer
from project.tokens import signing_keys
from project.tokens.signing_keys import SigningKeyRow

TABLE_ROW = "{:43}  {:9}  {:20}  {:20}  {:20}  {}"
COLUMNS = "kid", "state", "created", "signs from", "verifies until", "decrypts"

# 5 minutes: the max-age of /.well-known/jwks.json.
WARNING = f"""
Warning: this breaks tokens that are in use.
- Within {signing_keys.MAX_AGE} seconds, every process of this service refuses the auth tokens that
  earlier keys have signed, and stops signing with them. Clients have to refresh; refresh tokens
  stay valid. Other services have to request their own tokens again.
- Other services accept such tokens for up to 5 minutes longer, or for as long as they keep the
  public keys.\
"""


def rotate_keys(now: bool = False) -> None:
    """Add a key that signs 15 minutes later; earlier keys verify until their tokens expire.

    --now is for a key that leaked: the new key signs at once, and the earlier ones verify nothing.
    """
    exit_without_issuer()
    kid = signing_keys.rotate(at_once=now)
    audit.record(audit.Kind.KEYS_ROTATED, ORIGIN, user_id=None, key=kid)
    db.session.commit()
    rows, moment = signing_keys.all_keys(), clock.utcnow()
    new = next(row for row in rows if row.kid == kid)
    print(f"New key: {kid}")
    signs_now = signing_keys.signing(rows, moment) == new
    print(f"It signs from {'now' if signs_now else as_time(new.signs_from)} on.")
    ends = [row.verifies_until for row in signing_keys.verifying(rows, moment) if row != new]
    if ends:
        print(f"Earlier keys verify tokens until {as_time(max(ends))}.")
    else:
        print("No earlier key verifies tokens.")
    if now:
        print(WARNING)


def keys() -> None:
    """Print the keys that sign and verify tokens, newest first, as a table without secrets.

    A key signs, is published and will sign, verifies only, or is retired. The last column says
    whether one of ENCRYPTION_KEYS decrypts the private key.
    """
    exit_without_issuer()
    rows, now = signing_keys.all_keys(), clock.utcnow()
    encryption_keys = current_app.config["ENCRYPTION_KEYS"]
    print(TABLE_ROW.format(*COLUMNS))
    for row in rows:
        times = map(as_time, (row.created_at, row.signs_from, row.verifies_until))
        decrypts = "yes" if signing_keys.is_readable(row, encryption_keys) else "no"
        print(TABLE_ROW.format(row.kid, _state(row, rows, now), *times, decrypts))


def _state(row: SigningKeyRow, rows: Sequence[SigningKeyRow], now: datetime) -> str:
    if row not in signing_keys.verifying(rows, now):
        return "retired"
    if row == signing_keys.signing(rows, now):
        return "signs"
    return "published" if row.signs_from > now else "verifies"


def reencrypt_keys() -> None:
    """Encrypt with the first of ENCRYPTION_KEYS what was encrypted with another one of them."""
    if not current_app.config["ENCRYPTION_KEYS"]:
        sys.exit("ENCRYPTION_KEYS is not set: the service encrypts nothing.")
    factors = unreadable = 0
    for changed, not_decrypted in second_factor.reencrypt():
        db.session.commit()
        factors += changed
        unreadable += not_decrypted
    print(f"Authenticators encrypted again: {factors}.")
    try:
        number = signing_keys.reencrypt()
    except encryption.DecryptionFailed:
        sys.exit(
            "No private key has changed: ENCRYPTION_KEYS decrypts not every one of them."
            " python manage.py keys shows which; purge deletes those that are retired."
        )
    db.session.commit()
    print(f"Private keys encrypted again: {number}.")
    if unreadable:
        sys.exit(f"Authenticators that no key of ENCRYPTION_KEYS decrypts: {unreadable}.")
