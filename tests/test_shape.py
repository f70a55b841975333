"""The shape of gen-captions.py: sections in order, calls upwards only, pure sections pure, all small."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator

import pytest

from conftest import TOOL

SOURCE = TOOL.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, Function)]
LENGTHS = [(node.end_lineno or 0) - node.lineno + 1 for node in FUNCTIONS]
PURE = (
    *("Data", "Pixels", "Trigger and style", "Request and reply", "Money", "Encoding", "Review"),
)
SIZES = {
    "bytes": len(SOURCE.encode()),
    "nodes": sum(1 for _ in ast.walk(TREE)),
    "lines": SOURCE.count("\n"),
    "functions": len(FUNCTIONS),
}
LIMITS = {"bytes": 210_000, "nodes": 35_000, "lines": 4_500, "functions": 275}


def sections() -> dict[str, range]:
    """Return the lines of each section."""
    heads = [
        (match[1], SOURCE[: match.start()].count("\n") + 1)
        for match in re.finditer(r"^# -{20,} (.+)$", SOURCE, re.MULTILINE)
    ]
    ends = [line for _, line in heads[1:]] + [SOURCE.count("\n") + 1]
    return {name: range(start, end) for (name, start), end in zip(heads, ends, strict=True)}


SECTIONS = sections()


def nodes_in(section: str) -> Iterator[ast.AST]:
    return (node for node in ast.walk(TREE) if getattr(node, "lineno", 0) in SECTIONS[section])


@pytest.mark.parametrize("unit", SIZES)
def test_the_file_stays_one_that_a_person_reads_in_an_afternoon(unit: str) -> None:
    assert SIZES[unit] <= LIMITS[unit]


def test_functions_are_short() -> None:
    assert statistics.median(LENGTHS) <= 12
    assert sorted(LENGTHS)[int(len(LENGTHS) * 0.9)] <= 35
    assert max(LENGTHS) <= 60


def test_no_line_is_long_and_none_is_kept_from_the_formatter() -> None:
    assert max(map(len, SOURCE.splitlines())) <= 100
    assert "fmt: skip" not in SOURCE
    assert "fmt: off" not in SOURCE


def test_the_docstring_is_the_map_of_the_sections() -> None:
    listed = re.findall(r"^    ([A-Z][\w, ]*?)  +\S", ast.get_docstring(TREE) or "", re.MULTILINE)
    assert listed == list(SECTIONS)


def used_names(top: ast.AST) -> set[str]:
    """Return the names that a function or class uses and does not bind; types are not looked at."""
    used, bound = set[str](), set[str]()
    waiting = [top]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.arg):
            bound.add(node.arg)
            continue
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        waiting += ast.iter_child_nodes(node)
    return used - bound


def test_calls_point_upwards_only() -> None:
    tops = [node for node in TREE.body if isinstance(node, Function | ast.ClassDef)]
    defined = {node.name: node.lineno for node in tops}
    downwards = {
        (top.name, name)
        for top in tops
        for lines in SECTIONS.values()
        for name in used_names(top)
        if top.lineno in lines
        and defined.get(name, 0) >= lines.stop  # within a section the order is free
    }
    assert downwards == set()


@pytest.mark.parametrize("section", PURE)
def test_a_pure_section_touches_nothing_outside_itself(section: str) -> None:
    outside = {
        *("open", "print", "input", "say", "log", "os.environ", "time.time", "datetime.now"),
    }
    for node in nodes_in(section):
        assert not isinstance(node, ast.Await | ast.AsyncFunctionDef)
        if isinstance(node, ast.Name | ast.Attribute):
            assert ast.unparse(node) not in outside


def test_no_name_is_given_twice() -> None:
    names = [node.name for node in TREE.body if isinstance(node, Function | ast.ClassDef)]
    for node in TREE.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        names += [name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)]
    assert {name for name in names if names.count(name) > 1} == set()


def test_nothing_runs_at_import() -> None:
    plain = (
        *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
        *(ast.Assign, ast.AnnAssign, ast.If),
    )
    others = [node for node in TREE.body if not isinstance(node, plain)]
    assert len(others) == 1  # the docstring
    tests = [ast.unparse(node.test) for node in TREE.body if isinstance(node, ast.If)]
    assert tests == ["TYPE_CHECKING", "__name__ == '__main__'"]


def test_every_function_is_annotated_and_every_public_one_documented() -> None:
    for node in FUNCTIONS:
        arguments = [*node.args.args, *node.args.kwonlyargs]
        assert node.returns is not None, node.name
        assert all(a.annotation or a.arg in {"self", "cls"} for a in arguments), node.name
    for top in TREE.body:
        if isinstance(top, Function | ast.ClassDef) and not top.name.startswith("_"):
            assert ast.get_docstring(top), top.name
