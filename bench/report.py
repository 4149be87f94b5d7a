"""What the benchmarks have in common: where they run, and how they say what they found."""

import argparse
import math
import os
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from types import FrameType

import psycopg2
from sqlalchemy import URL

from bench.servers import url_text

CONFIDENCE = 0.95


def spread(ratios: Sequence[float]) -> str:
    """Return the median and its interval; the lowest and the highest where five or fewer say none.

    In 95 of 100 such runs the interval holds the median that endless rounds would give. It goes
    by the order of the ratios alone: nothing is assumed of how they scatter.
    """
    ordered = sorted(ratios)
    left_out = max(0, _left_out(len(ordered)))
    low, high = ordered[left_out], ordered[-1 - left_out]
    return f"**{statistics.median(ordered):#.3g}** ({low:#.3g} to {high:#.3g})"


def _left_out(count: int) -> int:
    """Return how many of `count` values the interval leaves out at each end; -1: there is none."""
    left_out = -1
    outside = 0.0  # the chance that the median is beyond: that of so few heads, or tails
    while (outside := outside + 2 * math.comb(count, left_out + 1) / 2**count) <= 1 - CONFIDENCE:
        left_out += 1
    return left_out


def spread_in_words(count: int) -> str:
    """Return what `spread` shows behind the median of `count` ratios."""
    if _left_out(count) < 0:
        return "the lowest and the highest"
    return f"the {CONFIDENCE:.0%} interval of the median"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def machine(server_url: URL) -> str:
    """Return cores and versions, in a few words."""
    connection = psycopg2.connect(url_text(server_url.set(drivername="postgresql")))
    version = connection.info.server_version
    connection.close()
    return (
        f"{cores()} cores, Python {platform.python_version()},"
        f" PostgreSQL {version // 10_000}.{version % 10_000}"
    )


def say(text: str) -> None:
    """Tell the person who waits how far it is."""
    print(text, file=sys.stderr, flush=True)


def add_database_url(parser: argparse.ArgumentParser) -> None:
    """Give a command line the option that every benchmark has."""
    parser.add_argument(
        "--database-url",
        default="postgresql://postgres@127.0.0.1:5432/postgres",
        help="a PostgreSQL server on which databases may be made and dropped",
    )


def leave_when_terminated() -> None:
    """End, on SIGTERM too, with every server stopped and every database dropped."""
    signal.signal(signal.SIGTERM, _leave)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.exit("stopped")
