"""A patch applies exactly, or is an error that names it; ours applies exactly to each base, and is small."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from traincert.regtest.build import PATCH_FOLDER, NodeKind, apply_patch, cache_folder, diffs, prepare_tree
from traincert.regtest.errors import BuildError

GOOD = """\
--- a/src/main.cpp
+++ b/src/main.cpp
@@ -3,5 +3,5 @@
 int main()
 {
-    std::puts("upstream");
+    std::puts("patched");
     return 0;
 }
"""


def test_new_files_are_added_and_patches_applied_in_order(patch: Path, tree: Path) -> None:
    (patch / "src/training").mkdir(parents=True)
    (patch / "src/training/new.cpp").write_text("// new\n")
    (patch / "test/functional").mkdir(parents=True)
    (patch / "test/functional/feature_new.py").write_text("# new\n")
    (patch / "patches/01-first.patch").write_text(GOOD)
    (patch / "patches/02-second.patch").write_text(GOOD.replace("patched", "twice").replace("upstream", "patched"))
    apply_patch(patch, tree)
    assert '"twice"' in (tree / "src/main.cpp").read_text()
    assert (tree / "src/training/new.cpp").is_file()
    assert (tree / "test/functional/feature_new.py").is_file()
    assert not list(tree.rglob("*.orig"))


@pytest.mark.parametrize(
    ("diff", "why"),
    [
        (GOOD.replace("upstream", "other"), "src/main.cpp: Hunk #1 FAILED at 3"),
        (GOOD.replace("int main()", "int main(void)"), "src/main.cpp: Hunk #1 FAILED at 3"),  # would need fuzz
        (GOOD.replace("main.cpp", "gone.cpp"), "src/gone.cpp: no such file in the tree"),
        ("this is no patch\n", "garbage"),
    ],
    ids=["other line", "other context", "no such file", "no patch"],
)
def test_patch_that_does_not_apply_is_named_with_the_file(diff: str, why: str, patch: Path, tree: Path) -> None:
    (patch / "patches/01-good.patch").write_text(GOOD.replace("patched", "upstream"))
    (patch / "patches/02-bad.patch").write_text(diff)
    with pytest.raises(BuildError) as raised:
        apply_patch(patch, tree)
    assert "02-bad.patch: does not apply: " in str(raised.value)
    assert why in str(raised.value)


def test_patch_that_is_applied_already_is_named(patch: Path, tree: Path) -> None:
    (patch / "patches/01-first.patch").write_text(GOOD)
    (patch / "patches/02-again.patch").write_text(GOOD)
    with pytest.raises(BuildError, match=r"02-again.patch: does not apply: src/main.cpp: .*previously applied"):
        apply_patch(patch, tree)


@pytest.mark.parametrize("name", ["src/main.cpp", "test/functional/feature_upstream.py"])
def test_upstreams_files_are_not_overwritten(name: str, patch: Path, tree: Path) -> None:
    before = (tree / name).read_text()
    (patch / name).parent.mkdir(parents=True)
    (patch / name).write_text("ours")
    with pytest.raises(BuildError, match=f"{name}: upstream has this file"):
        apply_patch(patch, tree)
    assert (tree / name).read_text() == before


def test_a_bases_own_diff_goes_before_the_one_for_all(patch: Path, tree: Path) -> None:
    (patch / "patches/01-first.patch").write_text("no patch\n")
    (patch / "patches/02-second.patch").write_text(GOOD.replace("patched", "twice").replace("upstream", "patched"))
    (patch / "patches/28").mkdir()
    (patch / "patches/28/01-first.patch").write_text(GOOD)
    (patch / "patches/28/03-more.patch").write_text(GOOD.replace("patched", "thrice").replace("upstream", "twice"))
    apply_patch(patch, tree, "28")
    assert '"thrice"' in (tree / "src/main.cpp").read_text()


# Changed lines in upstream's files. 28 also needs a few that give upstream's functions their later names.
BUDGET = {"31": 70, "28": 90}


def changed_lines(diff: Path) -> int:
    """How many lines a diff adds or takes away."""
    return len(re.findall(r"^(?:\+(?!\+\+ )|-(?!-- ))", diff.read_text(), re.MULTILINE))


@pytest.mark.parametrize("base", BUDGET)
def test_our_patch_applies_exactly_to_each_base(base: str, real_cache: Path, tmp_path: Path) -> None:
    assert cache_folder() == real_cache  # where the sources are
    tree = tmp_path / "upstream"
    prepare_tree(NodeKind(base), tree, lambda _step, _done, _total: None)
    assert not [*tree.rglob("*.orig"), *tree.rglob("*.rej")]
    assert sum(map(changed_lines, diffs(PATCH_FOLDER, base))) <= BUDGET[base]


def test_every_diff_belongs_to_a_base() -> None:
    bases = list(tomllib.loads((PATCH_FOLDER / "upstream.toml").read_text()))
    assert bases == list(BUDGET)
    used = {diff for base in bases for diff in diffs(PATCH_FOLDER, base)}
    assert used == {file for file in (PATCH_FOLDER / "patches").rglob("*") if file.is_file()}
