"""`make thread-safety`: clang's thread-safety analysis of the C++ files that the patch adds or changes.

Exits 1 at a warning. https://clang.llvm.org/docs/ThreadSafetyAnalysis.html
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from traincert.regtest.build import PATCHED, diffs, prepare_tree

FLAGS = ["-fsyntax-only", "-Wthread-safety", "-Werror=thread-safety"]


def patched_files() -> set[str]:
    """Return the C++ files that the patch adds or changes, relative to the tree."""
    new = {str(file.relative_to(PATCHED.patch)) for file in PATCHED.patch.glob("src/**/*.cpp")}
    changed = [re.findall(r"^\+\+\+ b/(\S+\.cpp)$", diff.read_text(), re.MULTILINE) for diff in diffs(PATCHED.patch)]
    return new.union(*changed)


def main() -> None:
    """Prepare a tree, configure it for clang, and let clang read the files."""
    with tempfile.TemporaryDirectory() as temporary:
        tree, out = Path(temporary, "src"), Path(temporary, "out")
        prepare_tree(PATCHED, tree, lambda _step, _done, _total: None)
        configure = ["cmake", "-S", str(tree), "-B", str(out), "-G", "Ninja", "-DCMAKE_CXX_COMPILER=clang++-19"]
        configure += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DENABLE_IPC=OFF", "-DBUILD_FUZZ_BINARY=ON"]
        configure += ["-DWITH_EMBEDDED_ASMAP=OFF"]  # or its header would have to be made
        subprocess.run(configure, check=True, capture_output=True)
        vectors = ["ninja", "-C", str(out), "src/test/data/training.json.h"]
        subprocess.run(vectors, check=True, stdout=subprocess.DEVNULL)
        commands = json.loads((out / "compile_commands.json").read_text())
        by_file = {str(Path(each["file"]).relative_to(tree)): shlex.split(each["command"]) for each in commands}

        def warnings(name: str) -> str:
            command = [*by_file[name], *FLAGS]
            ran = subprocess.run(command, cwd=out, check=False, capture_output=True, text=True)
            return ran.stderr if ran.returncode else ""

        files = sorted(patched_files())
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = "".join(pool.map(warnings, files))
    if found:
        sys.exit(found)
    print(f"{len(files)} files, no warning")


if __name__ == "__main__":
    main()
