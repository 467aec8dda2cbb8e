"""What README and docs have their reader type in, and where their links lead."""

import re
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import click
import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "bitcoind-patch").glob("*.md"),
]
TRAINCERT = str(Path(sys.executable).parent / "traincert")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def block(page: Path, after: str) -> str:
    """The indented block that follows a line that ends so."""
    assert page.read_text().count(f"{after}\n\n    ") == 1, after
    lines = page.read_text().partition(f"{after}\n\n")[2].splitlines(keepends=True)
    end = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("    "))
    return textwrap.dedent("".join(lines[:end]))


def train(job: str, folder: Path) -> float:
    """Run a job and return its test accuracy."""
    command = [TRAINCERT, "job", "run", job]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return float(answer.stdout.split("test accuracy ")[1].split(" ")[0].rstrip(","))


def test_the_readmes_own_job_learns(tmp_path: Path) -> None:
    (tmp_path / "wine.py").write_text(block(README, "into a module, `wine.py`:"))
    (tmp_path / "wine.toml").write_text(block(README, "in `wine.toml`:"))
    assert train("wine.toml", tmp_path) >= 0.9
    assert (tmp_path / "runs/wine/report/report.html").is_file()
    command = [TRAINCERT, "job", "export", "runs/wine", "--best", "--out", "wine.pt"]
    assert " ".join(["traincert", *command[1:]]) in README.read_text()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    use = block(README, "`wine.json` has the training data's means and deviations:")
    answer = subprocess.run([sys.executable, "-c", use], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert answer.stdout == "tensor(0)\n"  # the sample is nearly the data's second, which is of class 0


def test_the_docs_job_reaches_its_target(tmp_path: Path) -> None:
    page = ROOT / "docs/jobs.md"
    (tmp_path / "cancer.py").write_text(block(page, "Say, `cancer.py`:"))
    (tmp_path / "cancer.toml").write_text(block(page, "and `cancer.toml`:"))
    assert train("cancer.toml", tmp_path) >= 0.93
    stored = b"".join(path.read_bytes() for path in (tmp_path / "runs/cancer/data").rglob("*") if path.is_file())
    assert b"patient 1" not in stored
    assert b"ward 1" not in stored


@pytest.mark.parametrize(
    ("page", "after", "count"),
    [("README.md", "The first test builds bitcoind.", 1), ("docs/pytest.md", "These tests run as they are:", 3)],
)
def test_the_tests_shown_pass(
    pytester: pytest.Pytester, node_programs: Path, page: str, after: str, count: int
) -> None:
    pytester.makepyfile(block(ROOT / page, after))
    result = pytester.runpytest_subprocess(f"--bitcoind={node_programs / 'bitcoind'}", f"--basetemp={pytester.path}/t")
    result.assert_outcomes(passed=count)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150


def anchor(heading: str) -> str:
    """As code hosts name a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("http"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if heading:
            assert heading in {anchor(line.lstrip("#")) for line in target.read_text().splitlines() if line[:1] == "#"}


def test_the_docs_list_the_public_names() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    for package in ("bridge", "trainer", "regtest"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"- `traincert.{package}`: "))
        assert re.findall(r"`(\w+)`", line) == import_module(f"traincert.{package}").__all__


def test_commands_of_the_docs_exist() -> None:
    """Each `traincert ...` in an indented block or in backticks is a command, with options that it has."""
    cli = import_module("traincert.bridge.cli.main").cli
    shown = [
        words.split()
        for page in PAGES
        for words in re.findall(r"(?:^    |`)(?:\.venv/bin/)?traincert ([^`#\n]*)", page.read_text(), re.MULTILINE)
    ]
    assert len(shown) > 20
    for words in shown:
        command, options = cli, []
        for word in words:
            if isinstance(command, click.Group) and (found := command.get_command(click.Context(command), word)):
                command = found
            elif word.startswith("--"):
                options.append(word)
        assert command is not cli or words[0].startswith(("-", ".")), words
        if command.name != "cli":  # what follows is bitcoin-cli's
            known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
            assert {option.partition("=")[0] for option in options} <= known | {"--help"}, words
