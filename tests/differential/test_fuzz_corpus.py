"""The fuzz targets' relations hold on the committed inputs. CONTRIBUTING.md says how to look for new ones."""

import os
import subprocess
from pathlib import Path

import pytest

CORPORA = Path(__file__).parents[2] / "bitcoind-patch/test/fuzz_corpora"
TARGETS = sorted(folder.name for folder in CORPORA.iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_the_targets_relations_hold_on_its_corpus(node_programs: Path, target: str) -> None:
    corpus = CORPORA / target
    environment = os.environ | {"FUZZ": target}
    answer = subprocess.run(
        [node_programs / "fuzz_training", corpus], check=False, capture_output=True, text=True, env=environment
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert f"{target}: succeeded against {len(list(corpus.iterdir()))} files" in answer.stdout


def test_every_target_has_a_corpus(node_programs: Path) -> None:
    environment = os.environ | {"PRINT_ALL_FUZZ_TARGETS_AND_ABORT": "1"}
    listed = subprocess.check_output([node_programs / "fuzz_training"], text=True, env=environment)
    assert listed.split() == TARGETS
