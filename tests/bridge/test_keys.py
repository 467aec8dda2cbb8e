"""Key files are secret, never overwritten, and refused when they are not what they should be."""

import stat
from pathlib import Path

import pytest

from traincert.bridge.errors import KeyFileError
from traincert.bridge.keys import create_secret, load_secret, xonly_key


def test_a_new_key_is_its_owners_only_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "a.key"
    secret = create_secret(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_secret(path) == secret
    assert len(xonly_key(secret)) == 32


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    secret = create_secret(tmp_path / "a.key")
    with pytest.raises(KeyFileError, match="never overwritten"):
        create_secret(tmp_path / "a.key")
    assert load_secret(tmp_path / "a.key") == secret


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    create_secret(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_secret(tmp_path / "a.key")


@pytest.mark.parametrize("text", ["", "00" * 32, "ff" * 32, "11" * 31, "11" * 33, "no hex"])
def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="64 hex digits") as caught:
        load_secret(path)
    assert not text or text not in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=r"a\.key: No such file"):
        load_secret(tmp_path / "a.key")
