"""What a measurement gives: rows of bench/results.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]


def row(name: str, value: float, unit: str, bar: float | None = None) -> Row:
    """A value, and the bar that it must not be above."""
    return {"name": name, "value": round(value, 4), "unit": unit, "bar": bar, "holds": bar is None or value <= bar}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds something took, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
