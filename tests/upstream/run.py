"""`make test-upstream`: upstream's complete tests on the unpatched and the patched node, without training options.

Builds both trees with all programs, runs test_bitcoin and test_runner.py on each, and writes the comparison to
bitcoind-patch/upstream-results.txt. Exits 1 if they differ. Takes hours: each result is kept as it comes, and a run
that was interrupted goes on where it stopped. Tests that fail while others run beside them are run once more, alone,
before they count.

In the cache folder each node has a folder of its own, upstream/stock and upstream/patched, which begins anew when the
source or the patch has changed: src/, build/, and results.jsonl, one object a line, of which the last for a test
counts. "test" is "feature_block.py" or "test_bitcoin/<suite>/<case>", with its options if it has any; "status" is
"passed", "skipped", "failed", "aborted", "passed alone" or "failed twice"; "why" says it of a skipped test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from traincert.regtest.build import PATCH_FOLDER, NodeKind, cache_folder, node_folder, prepare_tree

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "bitcoind-patch/upstream-results.txt"
CMAKE_FLAGS = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_GUI=OFF",
    "-DENABLE_IPC=OFF",
    "-DENABLE_WALLET=ON",
    "-DWITH_ZMQ=ON",
]
RUNNER_FLAGS = ["--timeout-factor=4"]
# One line of test_runner's for each test that has ended.
ENDED = re.compile(
    r"(?:Remaining jobs: .*)?\d+/\d+ - (?P<name>.+?) (?P<status>passed|failed|skipped)(?:, Duration: | \((?P<why>.+)\))"
)


@dataclass
class Half:
    """One of the two nodes under test, and its folder."""

    name: str
    folder: Path

    @property
    def build(self) -> Path:
        """Where its complete build is."""
        return self.folder / "build"

    @property
    def results(self) -> Path:
        """What its tests said."""
        return self.folder / "results.jsonl"

    def results_so_far(self) -> dict[str, str]:
        """Return each test's last result."""
        if not self.results.exists():
            return {}
        lines = [json.loads(line) for line in self.results.read_text().splitlines()]
        return {line["test"]: line["status"] for line in lines}

    def keep(self, test: str, status: str, why: str = "") -> None:
        """Append a result."""
        with self.results.open("a") as file:
            file.write(json.dumps({"test": test, "status": status, "why": why}) + "\n")

    def version(self) -> str:
        """Return what bitcoind says that it is."""
        return subprocess.check_output([self.build / "bin/bitcoind", "--version"], text=True).splitlines()[0]


def build_all(half: Half, kind: NodeKind) -> None:
    """Build a complete tree, unless it is there for this source and patch; if not, former results go as well."""
    made_of = node_folder(kind).name
    record = half.folder / "made_of"
    tree = half.folder / "src"
    if not record.exists() or record.read_text() != made_of:
        shutil.rmtree(half.folder, ignore_errors=True)
        half.folder.mkdir(parents=True)
        prepare_tree(kind, tree, lambda step, _done, _total: print(f"{half.name}: {step}", flush=True))
        for ours in (PATCH_FOLDER / "test/functional").glob("*.py"):  # test_runner.py refuses what it does not list
            (tree / "test/functional" / ours.name).unlink(missing_ok=True)
        record.write_text(made_of)
    run(["cmake", "-S", str(tree), "-B", str(half.build), "-G", "Ninja", *CMAKE_FLAGS])
    run(["ninja", "-C", str(half.build)])


def run(command: list[str]) -> None:
    """Run a step of the build; exit if it fails."""
    if returncode := subprocess.run(command, check=False).returncode:
        sys.exit(f"{command[0]} failed with {returncode}")


def run_unit_tests(half: Half) -> None:
    """Run test_bitcoin and keep the result of each of its cases."""
    if any(name.startswith("test_bitcoin/") for name in half.results_so_far()):
        return
    # The report goes to stderr, among whatever else does: with a file for it, the processes that a test forks abort.
    command = [str(half.build / "bin/test_bitcoin"), "--report_level=detailed", "--report_format=XML"]
    print(f"{half.name}: test_bitcoin", flush=True)
    finished = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    half.results.with_suffix(".test_bitcoin.log").write_text(finished.stdout + finished.stderr)
    report = re.search("<TestResult>.*</TestResult>", finished.stderr, re.DOTALL)
    if report is None:
        sys.exit(f"{half.name}: test_bitcoin ended with {finished.returncode} and without a report")
    for suite in ElementTree.fromstring(report[0]).iter("TestSuite"):  # noqa: S314 (the report is test_bitcoin's)
        for case in suite.findall("TestCase"):
            half.keep(f"test_bitcoin/{suite.get('name')}/{case.get('name')}", str(case.get("result")))


def functional_tests(half: Half) -> list[str]:
    """Return upstream's functional tests, with their options: all that test_runner.py runs by default."""
    code = "import json, test_runner; print(json.dumps(test_runner.BASE_SCRIPTS))"
    answer = subprocess.check_output([sys.executable, "-c", code], cwd=half.build / "test/functional", text=True)
    return [str(name) for name in json.loads(answer)]


def run_functional_tests(half: Half, jobs: int) -> None:
    """Run the functional tests that have no result yet, then those that failed once more, one at a time."""
    tests = functional_tests(half)
    known = half.results_so_far()
    if remaining := [test for test in tests if test not in known]:
        run_test_runner(half, remaining, jobs)
    for test, status in half.results_so_far().items():
        if status == "failed":
            run_test_runner(half, [test], jobs=1, again=True)
    if missing := set(tests) - set(half.results_so_far()):
        sys.exit(f"{half.name}: test_runner.py said nothing of {', '.join(sorted(missing))}")


def run_test_runner(half: Half, chosen: list[str], jobs: int, *, again: bool = False) -> None:
    """Run upstream's test_runner.py and keep each result as it comes."""
    temporary = half.results.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    script = half.build / "test/functional/test_runner.py"
    command = [sys.executable, str(script), *RUNNER_FLAGS, f"--jobs={jobs}", f"--tmpdirprefix={temporary}"]
    command.append(f"--filter=^({'|'.join(re.escape(test) for test in chosen)})$")  # names would match variants, too
    with (
        half.results.with_suffix(".log").open("a") as log,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        ) as process,
    ):
        for line in process.stdout or []:
            log.write(line)
            log.flush()
            if ended := ENDED.search(line):
                status = ended["status"]
                if again:
                    status = {"passed": "passed alone", "failed": "failed twice"}.get(status, status)
                half.keep(ended["name"], status, ended["why"] or "")
                print(f"{half.name}: {ended['name']} {status}", flush=True)


def verdict(status: str | None) -> str:
    """Return what a result counts as."""
    return {None: "not run", "passed alone": "passed", "failed twice": "failed"}.get(status, str(status))


def is_ours(test: str) -> bool:
    """Whether a unit test is the patch's own, which the unpatched node cannot have."""
    return test.startswith("test_bitcoin/training_")


def report(stock: Half, patched: Half, jobs: int) -> bool:
    """Write the comparison; return whether both say the same."""
    results = {half.name: half.results_so_far() for half in (stock, patched)}
    tests = sorted(set(results["stock"]) | set(results["patched"]))
    verdicts = {test: [verdict(results[name].get(test)) for name in ("stock", "patched")] for test in tests}
    differences = [test for test in tests if not is_ours(test) and len(set(verdicts[test])) > 1]
    lines = [
        "Upstream's own tests on the unpatched (stock) and the patched node, without training options.",
        "Written by `make test-upstream`.",
        "",
        f"stock:    {stock.version()}",
        f"patched:  {patched.version()}",
        f"machine:  {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        f"commands: test_bitcoin; test_runner.py {' '.join(RUNNER_FLAGS)} --jobs={jobs}",
        "A functional test that failed beside others was run once more, alone; that result counts.",
        "",
    ]
    for title, unit in (("unit test cases (test_bitcoin)", True), ("functional tests (test_runner.py)", False)):
        lines.append(title)
        for i, name in enumerate(("stock", "patched")):
            chosen = [test for test in tests if test.startswith("test_bitcoin/") == unit and not is_ours(test)]
            counts = Counter(verdicts[test][i] for test in chosen)
            lines.append(
                f"  {name + ':':9} " + ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
            )
    own = Counter(verdicts[test][1] for test in tests if is_ours(test))
    lines += [
        f"  the patch's own cases: {', '.join(f'{number} {status}' for status, number in sorted(own.items()))}",
        "",
    ]
    for name in ("stock", "patched"):
        alone = [test for test, status in results[name].items() if status == "passed alone"]
        lines.append(f"passed only alone, {name}: {', '.join(alone) or 'none'}")
    not_passed = [test for test in tests if not is_ours(test) and verdicts[test] in (["failed"] * 2, ["skipped"] * 2)]
    lines += ["", "failed or skipped on both:", *(f"  {test}: {verdicts[test][0]}" for test in not_passed)]
    lines += ["", f"differences: {len(differences) or 'none'}"]
    lines += [f"  {test}: stock {verdicts[test][0]}, patched {verdicts[test][1]}" for test in differences]
    REPORT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return not differences and all(status == "passed" for status in own)


def main() -> None:
    """Build both, run all, compare."""
    parser = argparse.ArgumentParser(description="Runs upstream's complete tests on both nodes.")
    parser.add_argument("--jobs", type=int, default=(os.cpu_count() or 1) + 1, help="tests at a time (%(default)s)")
    jobs = parser.parse_args().jobs
    cache = cache_folder() / "upstream"
    stock, patched = Half("stock", cache / "stock"), Half("patched", cache / "patched")
    for half in (stock, patched):
        build_all(half, NodeKind(stock=half is stock))
        run_unit_tests(half)
        run_functional_tests(half, jobs)
    sys.exit(not report(stock, patched, jobs))


if __name__ == "__main__":
    main()
