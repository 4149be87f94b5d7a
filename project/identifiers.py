"""The ids of rows as they appear in paths and tokens."""

import re

_CANONICAL = re.compile(r"[1-9][0-9]{0,9}")
MAX_ID = 2**31 - 1


def parse(text: object) -> int:
    """Return the id that `text` is the canonical decimal of.

    An id is a positive 32-bit integer, written in ASCII digits with no leading zero.
    Raises ValueError for everything else, so that no two texts ever name the same row.
    """
    if not isinstance(text, str) or not _CANONICAL.fullmatch(text) or int(text) > MAX_ID:
        raise ValueError("not the canonical decimal of an id")
    return int(text)
