"""Attackers are refused by name, in cycles as on a chain. `make bench-attacks` measures what they earn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import attacks

CYCLES = 4


def refused(attack: str, cycles: int = CYCLES) -> dict[str, int]:
    """Return how often attackers and honest miners were refused, by reason."""
    found: dict[str, int] = attacks.run("digits", attacks.RULE, attack, 0, cycles)["refusals"]
    return found


def test_honest_miners_are_not_refused() -> None:
    assert refused("honest") == {}


@pytest.mark.parametrize(
    ("attack", "reasons"),
    [
        ("lazy", {"no-improvement", "not-its-shard", "spot-check-failed"}),
        ("copy x4", {"copy"}),
        ("replay", {"copy", "spot-check-failed", "not-its-shard"}),
        ("sign-flipped", {"no-improvement", "not-its-shard"}),
        ("label-flipped", {"no-improvement", "not-its-shard", "spot-check-failed"}),
        ("withholding", {"withheld"}),
    ],
)
def test_attackers_are_refused_and_nobody_else(attack: str, reasons: set[str]) -> None:
    found = refused(attack)
    assert found
    assert {name.removeprefix("attackers ") for name in found} <= reasons, found


@pytest.fixture
def all_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attacks.JOBS, "digits", replace(attacks.JOBS["digits"], spot_checks=1.0))


@pytest.mark.usefixtures("all_checked")
@pytest.mark.parametrize("attack", ["scaled x3", "half-lazy scaled", "noisy copy", "known validation", "all shards"])
def test_who_does_something_else_than_its_task_is_found_by_doing_it_again(attack: str) -> None:
    found = refused(attack, 2)
    assert found.pop("attackers spot-check-failed") + found.pop("attackers not-its-shard", 0) == 2
    assert found == {}


@pytest.mark.usefixtures("all_checked")
def test_who_failed_a_spot_check_has_no_task_any_more() -> None:
    result = attacks.run("digits", attacks.RULE, "scaled x10", 0, 6)
    assert result["refusals"] == {"attackers spot-check-failed": 2}
    assert result["share"] == pytest.approx(0.2 / 6, rel=0.2)  # a fifth in the first cycle, then nothing
