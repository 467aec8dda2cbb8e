"""The structure of the project: who may import whom."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {"trainer": {"trainer"}, "regtest": {"regtest"}, "bridge": {"bridge", "trainer", "regtest"}}

# In the order in which data meets them: a file imports only from those before it.
ORDER = {
    "trainer": (
        "errors interrupts failpoints imports determinism resources monitoring energy job accounting weights usercode "
        "store datasets examples sharding preprocessing models state segments tasks updates privacy training scoring "
        "aggregation engines.orders engines.executor engines.local engines.broker engines.nats standings judging "
        "spot_checks cycle records export replay report compare run"
    ),
    "bridge": (
        "errors fields consensus.codec consensus.params consensus.lottery consensus.certificate consensus.beacon "
        "consensus.block consensus.rules status keys signer recorded messages invitations broker members member "
        "coordinator_folder rpc chain block_files verified verifier receipts producer coordinator appointing "
        "remote_miners cosigning coordinator_program miner checker cosigner audit deployment energy explorer.blocks "
        "explorer.luck explorer.cycles explorer.nodes explorer.watch explorer.texts explorer.pictures explorer.views "
        "explorer.metrics explorer.app explorer.serve testing.invalid testing.network testing.plugin cli.options "
        "cli.view cli.events cli.picture cli.explorer cli.demo cli.node cli.job cli.broker cli.coordinator cli.reading "
        "cli.miner cli.cosigner cli.network cli.receipt cli.audit cli.energy cli.completion cli.main cli.man"
    ),
    "regtest": (
        "errors processes source build node blockfiles relay links reaper containers network snapshot lasting faucet "
        "plugin"
    ),
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, without the leading `traincert.`; those for type checkers too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("traincert"):
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("traincert")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
    return {name.removeprefix("traincert.") for name in names if name.startswith("traincert.")}


def name_of(path: Path, package: str) -> str:
    return ".".join(path.relative_to(ROOT / package).with_suffix("").parts)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_those_they_may(package: str) -> None:
    for path in modules(package):
        own = {"lazy"} if path.name == "__init__.py" else set()
        assert {name.partition(".")[0] for name in imported(path)} <= MAY_IMPORT[package] | own, path


@pytest.mark.parametrize("package", ORDER)
def test_files_import_only_from_files_before_them(package: str) -> None:
    order = ORDER[package].split()
    files = [path for path in modules(package) if path.name != "__init__.py"]
    assert {name_of(path, package) for path in files} == set(order)
    for path in files:
        allowed = order[: order.index(name_of(path, package))]
        ours = {name.removeprefix(f"{package}.") for name in imported(path) if name.startswith(f"{package}.")}
        assert {name for name in ours if name in order} <= set(allowed), path


@pytest.mark.parametrize("package", ORDER)
def test_init_files_name_only_their_own_package_and_import_nothing_when_they_run(package: str) -> None:
    for path in (path for path in modules(package) if path.name == "__init__.py"):
        own = ".".join(path.parent.relative_to(ROOT).parts)
        assert {name for name in imported(path) if not name.startswith(f"{own}.")} <= {"lazy", "lazy.importer"}, path
        code = f"import sys, traincert.{own}; print(*sorted(name for name in sys.modules if 'traincert' in name))"
        above = {".".join(["traincert", *own.split(".")[:depth]]) for depth in range(own.count(".") + 2)}
        loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
        assert {name for name in loaded if not name.startswith("__editable__")} == above | {"traincert.lazy"}, path


@pytest.mark.parametrize("package", ORDER)
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(f"traincert.{package}")
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert not isinstance(getattr(module, name), ModuleType), name
    with pytest.raises(AttributeError, match=f"module 'traincert.{package}' has no attribute 'Nothing'"):
        _ = module.Nothing


LIGHT = (
    "bridge.chain bridge.verifier bridge.cli.main bridge.cli.completion bridge.cli.reading bridge.cli.audit "
    "bridge.cli.broker bridge.cli.coordinator bridge.cli.cosigner bridge.cli.energy bridge.cli.explorer "
    "bridge.cli.job bridge.cli.miner bridge.cli.network bridge.cli.node bridge.cli.receipt bridge.testing.plugin "
    "bridge.testing.network regtest regtest.network regtest.plugin regtest.snapshot"
)
# What the extra `train` brings.
EXTRA = {"cryptography", "jinja2", "matplotlib", "nats", "nkeys", "numpy", "pydantic", "safetensors", "sklearn"}
EXTRA |= {"tensorboard", "tomlkit", "torch"}
EXPLORER = {"prometheus_client", "sse_starlette", "starlette", "uvicorn"}


def imports_of(*names: str) -> set[str]:
    """What is imported, by top-level name, when these are."""
    code = f"import sys, {', '.join(names)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


@pytest.mark.parametrize("module", LIGHT.split())
def test_what_only_training_needs_is_imported_only_by_what_trains(module: str) -> None:
    assert not imports_of(f"traincert.{module}") & (EXTRA | EXPLORER)


def test_the_explorer_needs_what_its_own_extra_brings() -> None:
    assert imports_of("traincert.bridge.explorer.serve") & (EXTRA | EXPLORER) == EXPLORER | {"jinja2", "pydantic"}


def test_a_job_is_read_and_a_receipt_is_checked_without_torch() -> None:
    assert "torch" not in imports_of("traincert.trainer.job", "traincert.bridge.receipts")


def test_every_start_of_pytest_imports_none_of_our_libraries() -> None:
    """Our plugins are loaded in every project of an environment that has us."""
    assert imports_of("pytest", "traincert.regtest.plugin", "traincert.bridge.testing.plugin") - imports_of(
        "pytest"
    ) == {"traincert"}
