"""rules.py and the node's validation.cpp have the same rules, under the same names, in the same order."""

import ast
import re
from pathlib import Path

from traincert.bridge.consensus import rules

NODE = Path(__file__).parents[3] / "bitcoind-patch/src/training/validation.cpp"
ONLY_IN_THE_NODE = {"CheckTrainingHeader"}  # proof of work below the start height
FUNCTION = re.compile(r"^(?:static )?\S+ ((?:Match|Read|Check|ContextualCheck)\w+)\(", re.MULTILINE)
REASON = re.compile(r"Reason: (bad-traincert-[a-z-]+)\. \*/\nstatic bool (\w+)\(")
FUNCTIONS = [each for each in ast.parse(Path(rules.__file__).read_text()).body if isinstance(each, ast.FunctionDef)]


def name_in_the_node(function: ast.FunctionDef) -> str:
    return function.name.title().replace("_", "")


def test_both_have_the_same_rules_in_the_same_order() -> None:
    in_node = [name for name in FUNCTION.findall(NODE.read_text()) if name not in ONLY_IN_THE_NODE]
    assert [name_in_the_node(function) for function in FUNCTIONS] == in_node


def test_each_names_the_same_reason_in_the_same_function() -> None:
    summaries = {function: ast.get_docstring(function) or "" for function in FUNCTIONS}
    in_bridge = {
        summary.removeprefix("Rule ").rstrip("."): name_in_the_node(function)
        for function, summary in summaries.items()
        if summary.startswith("Rule ")
    }
    assert len(in_bridge) == 11
    assert in_bridge == dict(REASON.findall(NODE.read_text()))
