"""Node and bridge give the same verdict, and the same reason, on whatever block."""

from pathlib import Path

from differential.run import compare
from traincert.bridge.testing.invalid import WRONG, WRONG_WITH_PARENT


def test_node_and_bridge_agree_on_blocks_that_are_wrong_in_many_ways(node_programs: Path) -> None:
    verdicts, disagreements = compare(node_programs / "training_check", 4000, seed=1)
    assert disagreements == []
    assert set(verdicts) == {"ok", *WRONG, *WRONG_WITH_PARENT}
