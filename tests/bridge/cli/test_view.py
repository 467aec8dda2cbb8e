"""The tables of cycles, in a terminal of 80 columns and elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest

from traincert.bridge.cli.events import CoordinatorEvents
from traincert.bridge.cli.view import CyclesView, JobView
from traincert.trainer.errors import Reason

HASH = "2cf1" * 16
MANY = ["copy", "late", "no-improvement", "spot-check-failed"]


def closed(refusals: Sequence[str], round_: int = 0) -> dict[str, object]:
    """What a coordinator says of a cycle with four tasks."""
    return {
        "height": 12,
        "winner": "miner3",
        "round": round_,
        "tasks": 4,
        "refusals": refusals,
        "loss_before": 79_000_000,
        "loss_after": 73_800_000,
        "metric": 0.9639,
        "block": HASH,
    }


def record(refusals: Sequence[str]) -> dict[str, object]:
    return {
        "cycle": 12,
        "tasks": [{"refusal": each, "update_size": 101_112} for each in [*refusals, *[None] * (4 - len(refusals))]],
        "loss_offset": 0,
        "loss_before": 79_000_000,
        "loss_after": 73_800_000,
        "metric": 0.9639,
        "model_after": HASH,
    }


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def last_frame(capsys: pytest.CaptureFixture[str], first: str) -> list[str]:
    """The lines of the last table that a terminal was shown, without the bar; `first` is its first heading."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", capsys.readouterr().err)
    return [line.rstrip() for line in text[text.rindex(f" {first} ") :].splitlines() if "━" not in line]


def column(lines: list[str], first: str, last: str) -> str:
    """What a table has between two headings, in all lines together."""
    begin, end = lines[0].index(first), lines[0].index(last)
    return " ".join(line[begin:end].strip() for line in lines[1:])


@pytest.mark.usefixtures("terminal")
def test_a_terminal_of_80_columns_shows_why_updates_were_refused_and_all_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with CyclesView() as cycles:
        cycles.closed(closed(["no-improvement"] * 4))
    lines = last_frame(capsys, "height")
    assert re.fullmatch(r" 12 +miner3 +0 of 4 .*0\.0738 +0\.9639 +(2cf1){3}\S+", lines[1])
    assert column(lines, "updates", "loss").strip() == "0 of 4 (4 no-improvement)"
    with CyclesView() as cycles:
        cycles.closed(closed(MANY, round_=11))
    lines = last_frame(capsys, "height")
    assert re.fullmatch(r" 12 +miner3 \(round 11\) +0 of 4 .*0\.0738 +0\.9639 +(2cf1){3}\S+", lines[1])
    assert "".join(MANY) == re.sub("[^a-z-]|of", "", column(lines, "updates", "loss"))
    with JobView() as job:
        job.cycle(record(["no-improvement"] * 4))
        job.cycle(record(MANY))
    lines = last_frame(capsys, "cycle")
    assert re.fullmatch(r" 12 +0 of 4 \(4 no-improvement\) +404,448 +0\.0738 +0\.9639 +(2cf1){3}\S+", lines[1])
    assert all(len(line) <= 80 for line in lines)
    assert "".join(MANY) == re.sub("[^a-z-]|of", "", column([lines[0], *lines[2:]], "updates", "bytes"))


def test_elsewhere_a_cycle_is_one_line_with_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    every = list(map(str, Reason))
    with CyclesView() as cycles:
        cycles.closed(closed(["no-improvement"] * 4))
        cycles.closed(closed(["late"]))
        cycles.closed(closed([]))
        cycles.closed(closed(every) | {"tasks": len(every)})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f"block 12 by miner3: updates 0 of 4 (4 no-improvement), loss 0.0790 → 0.0738, metric 0.9639, {HASH}"
    )
    assert [line.split(", ")[0] for line in lines[1:3]] == [
        "block 12 by miner3: updates 3 of 4 (1 late)",
        "block 12 by miner3: updates 4 of 4",
    ]
    assert len(lines) == 4
    with JobView() as job:
        job.cycle(record(["copy", "late", "late"]))
    assert capsys.readouterr().err.startswith("cycle 12: updates 1 of 4 (1 copy, 2 late), 404,448 bytes, ")


def test_the_coordinators_lines_have_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    CoordinatorEvents(as_json=True).closed(closed(["no-improvement"] * 4))
    event = json.loads(capsys.readouterr().out)
    assert event["text"] == f"block 12 by miner3: updates 0 of 4 (4 no-improvement), {HASH}"
    assert event["refusals"] == ["no-improvement"] * 4
