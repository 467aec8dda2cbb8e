"""Never two certificates for one slot and round: each is in the journal before its signature exists."""

import os
import signal
import sqlite3
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest

from traincert.bridge.consensus.certificate import Certificate
from traincert.bridge.consensus.rules import check_coordinator_signatures
from traincert.bridge.errors import EncodingError, JournalError
from traincert.bridge.signer import Signer
from training_chain import COORDINATORS, TrainingChain

CHAIN_ID = TrainingChain().params.chain_id

MakeSigner = Callable[..., Signer]


@pytest.fixture
def certificate() -> Certificate:
    return TrainingChain().next_certificate({"height": 1, "previousblockhash": "00" * 32})


@pytest.fixture
def make_signer(tmp_path: Path) -> MakeSigner:
    """Makes a signer with two of the three keys; all have the same journal."""

    def make(chain_id: bytes = CHAIN_ID) -> Signer:
        return Signer(tmp_path / "journal", chain_id, {i: COORDINATORS[i].secret for i in (2, 0)})

    return make


def test_a_signed_certificate_has_the_signatures_of_all_keys_in_order(
    make_signer: MakeSigner, certificate: Certificate
) -> None:
    signed = make_signer().sign(replace(certificate, coordinator_signatures=()))
    assert [each.key_index for each in signed.coordinator_signatures] == [0, 2]
    check_coordinator_signatures(signed, TrainingChain().params.keys_at(1), CHAIN_ID)


def test_the_same_certificate_may_be_signed_again(make_signer: MakeSigner, certificate: Certificate) -> None:
    signer = make_signer()
    assert signer.sign(certificate).body() == make_signer().sign(certificate).body() == certificate.body()


def test_another_certificate_for_the_slot_is_refused(make_signer: MakeSigner, certificate: Certificate) -> None:
    make_signer().sign(certificate)
    with pytest.raises(JournalError, match="block 1, round 0"):
        make_signer().sign(replace(certificate, loss_after=1))


def test_another_round_slot_or_network_is_another_certificate(
    make_signer: MakeSigner, certificate: Certificate
) -> None:
    signer = make_signer()
    signer.sign(certificate)
    signer.sign(replace(certificate, round=1))
    signer.sign(replace(certificate, prev_block=bytes([1] * 32)))
    make_signer(bytes([1] * 32)).sign(replace(certificate, loss_after=1))


def test_what_cannot_be_encoded_is_neither_written_nor_signed(
    make_signer: MakeSigner, certificate: Certificate
) -> None:
    with pytest.raises(EncodingError, match=r"^loss_after: "):
        make_signer().sign(replace(certificate, loss_after=-1))
    make_signer().sign(certificate)


def test_only_its_owner_can_read_the_file(make_signer: MakeSigner, tmp_path: Path) -> None:
    make_signer()
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o600


def test_a_journal_of_another_format_is_refused_by_a_line_that_says_what_to_do(
    make_signer: MakeSigner, tmp_path: Path
) -> None:
    make_signer()
    for found in (0, 2):
        with closing(sqlite3.connect(tmp_path / "journal")) as database:
            database.execute(f"PRAGMA user_version = {found}")
        with pytest.raises(JournalError, match=f"journal has format {found}, this traincert reads format 1: go on"):
            make_signer()


def test_a_file_that_is_no_journal_is_refused(make_signer: MakeSigner, tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("something else " * 100)
    with pytest.raises(JournalError, match="journal cannot be used as a journal: file is not a database"):
        make_signer()
    assert (tmp_path / "journal").read_text().startswith("something else")


def test_where_the_journal_cannot_be_written_nothing_is_signed(
    make_signer: MakeSigner, certificate: Certificate, tmp_path: Path
) -> None:
    signer = make_signer()
    with closing(sqlite3.connect(tmp_path / "journal")) as database:
        database.execute("DROP TABLE signed")
    with pytest.raises(JournalError, match="journal cannot be written: no such table: signed: not signed"):
        signer.sign(certificate)


def test_of_ten_at_once_exactly_one_succeeds(make_signer: MakeSigner, certificate: Certificate) -> None:
    def sign(rival: int) -> bool:
        try:
            make_signer().sign(replace(certificate, loss_after=rival))
        except JournalError:
            return False
        return True

    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(sign, range(10))) == 1


def test_after_a_kill_between_writing_and_signing_only_the_same_certificate_is_signed(
    make_signer: MakeSigner, certificate: Certificate
) -> None:
    process = get_context("fork").Process(target=write_and_die, args=(make_signer, certificate))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(JournalError, match="block 1, round 0"):
        make_signer().sign(replace(certificate, winner_key=bytes(32)))
    make_signer().sign(certificate)


class DyingKey:
    """A key whose process is killed when it is about to sign."""

    def sign_schnorr(self, _: bytes) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def write_and_die(make_signer: MakeSigner, certificate: Certificate) -> None:
    signer = make_signer()
    vars(signer)["_keys"] = {0: DyingKey()}
    signer.sign(certificate)
