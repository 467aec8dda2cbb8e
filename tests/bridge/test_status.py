"""What a running program is doing, as other commands read it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from traincert.bridge.status import is_locked, read_status, write_status


def test_threads_may_write_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_status(tmp_path, {"number": number}), range(400)))
    assert read_status(tmp_path)["number"] in range(400)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_there_is_no_status_before_the_first(tmp_path: Path) -> None:
    assert read_status(tmp_path) == {}
    assert not is_locked(tmp_path / ".lock")
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) == {}
