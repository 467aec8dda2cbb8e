"""Never two certificates for one slot and round."""

import os
import signal
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.errors import JournalError
from traincert.bridge.signer import Journal
from training_chain import TrainingChain

CHAIN_ID = bytes(32)


@pytest.fixture
def certificate() -> Certificate:
    return TrainingChain().next_certificate({"height": 1, "previousblockhash": "00" * 32})


def test_the_same_certificate_may_be_signed_again(tmp_path: Path, certificate: Certificate) -> None:
    journal = Journal(tmp_path / "journal")
    journal.record(certificate, CHAIN_ID)
    Journal(tmp_path / "journal").record(certificate, CHAIN_ID)


def test_another_certificate_for_the_slot_is_refused(tmp_path: Path, certificate: Certificate) -> None:
    Journal(tmp_path / "journal").record(certificate, CHAIN_ID)
    with pytest.raises(JournalError, match="block 1, round 0"):
        Journal(tmp_path / "journal").record(replace(certificate, loss_after=1), CHAIN_ID)


def test_another_round_slot_or_network_is_another_certificate(tmp_path: Path, certificate: Certificate) -> None:
    journal = Journal(tmp_path / "journal")
    journal.record(certificate, CHAIN_ID)
    journal.record(replace(certificate, round=1), CHAIN_ID)
    journal.record(replace(certificate, prev_block=bytes([1] * 32)), CHAIN_ID)
    journal.record(replace(certificate, loss_after=1), bytes([1] * 32))


def test_only_its_owner_can_read_the_file(tmp_path: Path) -> None:
    Journal(tmp_path / "journal")
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o600


def test_of_ten_at_once_exactly_one_succeeds(tmp_path: Path, certificate: Certificate) -> None:
    def record(rival: int) -> bool:
        try:
            Journal(tmp_path / "journal").record(replace(certificate, loss_after=rival), CHAIN_ID)
        except JournalError:
            return False
        return True

    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(record, range(10))) == 1


def test_after_a_kill_between_writing_and_signing_only_the_same_certificate_is_signed(
    tmp_path: Path, certificate: Certificate
) -> None:
    path = tmp_path / "journal"
    process = get_context("fork").Process(target=record_and_die, args=(path, certificate))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(JournalError, match="block 1, round 0"):
        Journal(path).record(replace(certificate, winner_key=bytes(32)), CHAIN_ID)
    Journal(path).record(certificate, CHAIN_ID)


def record_and_die(path: Path, certificate: Certificate) -> None:
    Journal(path).record(certificate, CHAIN_ID)
    os.kill(os.getpid(), signal.SIGKILL)
