"""The files of other projects are those of their packages, byte for byte."""

from __future__ import annotations

import hashlib

from explorer.javascript import STATIC

VENDOR = STATIC / "vendor"
OURS = {"README.md", "SHA256SUMS"}


def test_every_file_has_the_hash_that_is_listed_and_no_other_is_there() -> None:
    lines = (VENDOR / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    files = {path.relative_to(VENDOR).as_posix(): path for path in VENDOR.rglob("*") if path.is_file()}
    assert {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if name not in OURS
    } == (listed)


def test_every_package_has_its_licence_and_is_described() -> None:
    described = (VENDOR / "README.md").read_text()
    for folder in (path for path in VENDOR.iterdir() if path.is_dir()):
        assert "MIT" in (folder / "LICENSE").read_text()
        name, _, version = folder.name.rpartition("-")
        assert f"{name.replace('noble-', '@noble/')} | {version} |" in described
