"""The structure of the project: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {"trainer": {"trainer"}, "regtest": {"regtest"}, "bridge": {"bridge", "trainer", "regtest"}}

# In the order in which data meets them: a file imports only from those before it.
ORDER = {
    "trainer": (
        "errors job store datasets preprocessing models state segments tasks updates training scoring aggregation "
        "engines.local cycle records report run"
    ),
    "bridge": (
        "errors codec params lottery certificate beacon keys node block producer journal coordinator chain picture "
        "run demo view cli"
    ),
    "regtest": "errors processes source build node network plugin",
}


def modules(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if path.name != "__init__.py"]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports when it runs, without the leading `traincert.`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("traincert."):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("traincert.")}
    return {name.removeprefix("traincert.") for name in names}


def name_of(path: Path, package: str) -> str:
    return ".".join(path.relative_to(ROOT / package).with_suffix("").parts)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_those_they_may(package: str) -> None:
    for path in modules(package):
        assert {name.partition(".")[0] for name in imported(path)} <= MAY_IMPORT[package], path


@pytest.mark.parametrize("package", ORDER)
def test_files_import_only_from_files_before_them(package: str) -> None:
    order = ORDER[package].split()
    assert {name_of(path, package) for path in modules(package)} == set(order)
    for path in modules(package):
        allowed = order[: order.index(name_of(path, package))]
        ours = {name.removeprefix(f"{package}.") for name in imported(path) if name.startswith(f"{package}.")}
        assert {name for name in ours if name in order} <= set(allowed), path


@pytest.mark.parametrize("module", ["bridge.cli", "bridge.chain", "trainer.job", "regtest.network"])
def test_torch_is_imported_only_by_what_trains(module: str) -> None:
    code = f"import sys, traincert.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
