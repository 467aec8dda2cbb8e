"""Another project's tests, with traincert installed as its README says, into an environment without PyTorch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from traincert.regtest import node_folder

ROOT = Path(__file__).parents[1]
EXTRA = ["cryptography", "jinja2", "matplotlib", "nats", "nkeys", "numpy", "pydantic", "safetensors", "sklearn"]
EXTRA += ["tensorboard", "tomlkit", "torch"]


def run(*command: str | Path, cwd: Path) -> str:
    answer = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{command}:\n{answer.stdout}{answer.stderr}"
    return answer.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example; in its .venv is what its README installs, in the versions of the lock file."""
    project = tmp_path_factory.mktemp("outside") / "project"
    shutil.copytree(ROOT / "examples/outside-project", project, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    run(sys.executable, "-m", "venv", "--without-pip", ".venv", cwd=project)
    wheel, install = commands()
    wheel = wheel.replace("~/traincert", shlex.quote(str(ROOT)))
    pip = f'pip() {{ {shlex.quote(sys.executable)} -m pip --quiet --python .venv/bin/python "$@"; }}'
    constraint = f"export PIP_CONSTRAINT={shlex.quote(str(ROOT / 'requirements.lock'))}"
    run("sh", "-euc", "\n".join([pip, constraint, wheel, install]), cwd=project)
    return project


def commands() -> tuple[str, str]:
    """The commands that make a wheel of traincert, and that install it with the example. Its README has them."""
    lines = (ROOT / "examples/outside-project/README.md").read_text().splitlines()
    wheel, install, pytest = (line.strip() for line in lines if line.startswith("    "))
    assert pytest == "pytest"
    return wheel, install


def test_its_workflow_installs_what_its_readme_says() -> None:
    workflow = (ROOT / "examples/outside-project/.github/workflows/test.yml").read_text()
    assert f"- run: {commands()[1]} #" in workflow


def test_nobody_is_told_to_install_traincert_from_an_index() -> None:
    """It is not there: who asks for it by its name gets a stranger's package."""
    by_name = re.compile(r"""pip3? install(?: -\S+)* ['"]?traincert(?![\w*./-])""")
    files = [ROOT / name for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]]
    found = [path for path in files if path.is_file() and by_name.search(path.read_text("latin-1"))]
    assert found == []
    needs = tomllib.loads((ROOT / "examples/outside-project/pyproject.toml").read_text())["project"]
    assert not [
        each for each in [*needs["dependencies"], *needs["optional-dependencies"]["test"]] if "traincert" in each
    ]


def test_its_tests_pass(project: Path) -> None:
    lines = run(".venv/bin/python", "-m", "pytest", cwd=project).splitlines()
    assert lines[-1].strip("= ").startswith("3 passed"), lines


def test_its_tests_pass_with_another_bitcoind(project: Path, stock_programs: Path) -> None:
    command = [".venv/bin/python", "-m", "pytest", f"--bitcoind={stock_programs / 'bitcoind'}"]
    lines = run(*command, "tests/test_plain_chain.py", cwd=project).splitlines()
    assert lines[-1].strip("= ").startswith("2 passed"), lines


def test_its_environment_has_nothing_that_only_training_needs(project: Path) -> None:
    code = f"import importlib.util; print([name for name in {EXTRA} if importlib.util.find_spec(name)])"
    assert run(".venv/bin/python", "-c", code, cwd=project) == "[]\n"


def test_the_wheel_has_the_patch_and_finds_the_same_build(project: Path) -> None:
    assert run(".venv/bin/traincert", "node", "path", cwd=project).strip() == str(node_folder() / "bin")


@pytest.mark.parametrize(
    "arguments", [["demo"], ["job", "run", "digits"], ["job", "show", "text"], ["job", "replay", "."]]
)
def test_commands_that_train_say_what_to_install(project: Path, arguments: list[str]) -> None:
    command = [".venv/bin/traincert", *arguments]
    answer = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    (line,) = answer.stderr.splitlines()
    assert line.startswith("traincert: this command needs ")
    assert line.endswith(", which is not installed: pip install '.[train]' in a clone of traincert")
    assert answer.returncode == 1


USES_EVERY_PUBLIC_NAME = """
from traincert import bridge, regtest, trainer
{imports}


def check(network: regtest.Network, client: bridge.NodeClient, job: trainer.TrainingJob) -> str:
    tip: str = network.wait_until_same_tip()
    params: bridge.TrainingParams = bridge.read_params(client)
    heights: list[int] = [block.certificate.height for block in bridge.read_chain(client, params)]
    with trainer.RunFolder(network.directory, job) as run:
        cycles: int = run.cycles
    return f"{{tip}} {{heights}} {{cycles}}"
"""


def test_strict_mypy_accepts_projects_that_use_the_wheel(project: Path) -> None:
    """The example, and a file that uses every public name; and it finds a wrong use."""
    packages = ("bridge", "regtest", "trainer")
    names = {package: import_module(f"traincert.{package}").__all__ for package in packages}
    imports = "\n".join(f"from traincert.{package} import {', '.join(names[package])}" for package in packages)
    (project / "uses.py").write_text(USES_EVERY_PUBLIC_NAME.format(imports=imports))
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", ".venv/bin/python"]
    assert run(*command, ".", cwd=project).startswith("Success: no issues found in ")
    (project / "wrong.py").write_text("from traincert.regtest import Network\n\nNetwork(1, 2, 3)\n")
    answer = subprocess.run([*command, "wrong.py"], cwd=project, capture_output=True, text=True, check=False)
    assert 'wrong.py:3: error: Argument 1 to "Network" has incompatible type "int"; expected "Path"' in answer.stdout
