"""What a measurement gives: rows of bench/results.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def row(name: str, value: float, unit: str, at_most: float | None = None, *, at_least: float | None = None) -> Row:
    """A value, and its bar."""
    bar = f"≤ {at_most:g}" if at_most is not None else f"≥ {at_least:g}" if at_least is not None else None
    holds = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    return {"name": name, "value": round(value, 4), "unit": unit, "bar": bar, "holds": holds}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds something took, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
