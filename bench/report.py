"""Functions that the benchmarks share: options, statistics, and a description of the machine."""

import argparse
import math
import os
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psycopg2
from sqlalchemy import URL

from bench.servers import url_text

CONFIDENCE = 0.95


def spread(ratios: Sequence[float]) -> str:
    """Return the median and its interval, or the lowest and the highest of five ratios or fewer.

    In 95 of 100 runs, the interval contains the true median. It depends only on the order of the
    ratios and assumes no distribution.
    """
    ordered = sorted(ratios)
    left_out = max(0, _left_out(len(ordered)))
    low, high = ordered[left_out], ordered[-1 - left_out]
    return f"**{statistics.median(ordered):#.3g}** ({low:#.3g} to {high:#.3g})"


def _left_out(count: int) -> int:
    """Return how many of `count` values the interval omits at each end; -1 if there is none."""
    left_out = -1
    outside = 0.0  # probability that the median is outside: a binomial tail with p = 1/2
    while (outside := outside + 2 * math.comb(count, left_out + 1) / 2**count) <= 1 - CONFIDENCE:
        left_out += 1
    return left_out


def spread_in_words(count: int) -> str:
    """Return the description of the interval that `spread` gives for `count` ratios."""
    if _left_out(count) < 0:
        return "the lowest and the highest"
    return f"the {CONFIDENCE:.0%} interval of the median"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu() -> str:
    """Return the model of the CPU."""
    names = (
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    return next(names, platform.machine())


def machine(server_url: URL) -> str:
    """Return a short description of cores and versions."""
    connection = psycopg2.connect(url_text(server_url.set(drivername="postgresql")))
    version = connection.info.server_version
    connection.close()
    return (
        f"{cores()} cores ({cpu()}), Python {platform.python_version()},"
        f" PostgreSQL {version // 10_000}.{version % 10_000}"
    )


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def add_database_url(parser: argparse.ArgumentParser) -> None:
    """Add the option for the PostgreSQL server."""
    parser.add_argument(
        "--database-url",
        default="postgresql://postgres@127.0.0.1:5432/postgres",
        help="a PostgreSQL server on which databases may be created and dropped",
    )


def exit_on_sigterm() -> None:
    """Exit on SIGTERM with every server stopped and every database dropped."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(_signal: int, _frame: FrameType | None) -> None:
    sys.exit("stopped")
