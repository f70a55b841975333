"""The shape of gen-captions.py: rooms in order, calls upwards only, pure rooms pure, functions small."""

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
PURE = ["Text", "Data", "Pixels", "Request and reply", "Money", "Trigger and style", "Encoding", "Review"]
SIZES = [(node.end_lineno or 0) - node.lineno + 1 for node in FUNCTIONS]


def rooms() -> dict[str, tuple[int, int]]:
    """Return each room's first and last line."""
    heads = [
        (match[1], SOURCE[: match.start()].count("\n") + 1)
        for match in re.finditer(r"^# -{20,} (.+)$", SOURCE, re.MULTILINE)
    ]
    ends = [line for _, line in heads[1:]] + [SOURCE.count("\n") + 1]
    return {name: (start, end) for (name, start), end in zip(heads, ends, strict=True)}


def nodes_in(room: str) -> Iterator[ast.AST]:
    start, end = rooms()[room]
    return (node for node in ast.walk(TREE) if start <= getattr(node, "lineno", 0) < end)


def test_the_docstring_is_the_map_of_the_rooms() -> None:
    listed = re.findall(r"^    ([A-Z][\w, ]*?)  +\S", ast.get_docstring(TREE) or "", re.MULTILINE)
    assert listed == list(rooms())


def test_calls_point_upwards_only() -> None:
    defined = {node.name: node.lineno for node in TREE.body if isinstance(node, Function | ast.ClassDef)}
    downwards = []
    for top in TREE.body:
        if not isinstance(top, Function | ast.ClassDef):
            continue
        start, end = top.lineno, top.end_lineno or 0
        for node in ast.walk(top):
            if isinstance(node, ast.Name) and defined.get(node.id, 0) > end:
                room = next(name for name, (first, last) in rooms().items() if first <= start < last)
                if not rooms()[room][0] <= defined[node.id] < rooms()[room][1]:  # within a room, the order is free
                    downwards.append((top.name, node.id))
    assert downwards == []


@pytest.mark.parametrize("room", PURE)
def test_a_pure_room_touches_nothing_outside_itself(room: str) -> None:
    for node in nodes_in(room):
        assert not isinstance(node, ast.Await | ast.AsyncFunctionDef)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "print", "input"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("os", "environ"), ("time", "time"), ("datetime", "now")}
            assert node.value.id != "log"


def test_nothing_runs_at_import() -> None:
    allowed = (
        ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    )
    others = [node for node in TREE.body if not isinstance(node, allowed | ast.If)]
    assert len(others) == 1  # the docstring
    tests = [ast.unparse(node.test) for node in TREE.body if isinstance(node, ast.If)]
    assert tests == ["TYPE_CHECKING", "__name__ == '__main__'"]


def test_functions_are_small() -> None:
    assert statistics.median(SIZES) <= 10
    assert sorted(SIZES)[int(len(SIZES) * 0.9)] <= 35
    assert max(SIZES) <= 60


def test_every_function_is_annotated_and_every_public_one_documented() -> None:
    for node in FUNCTIONS:
        arguments = [*node.args.args, *node.args.kwonlyargs]
        assert node.returns is not None, node.name
        assert all(a.annotation or a.arg in {"self", "cls"} for a in arguments), node.name
    for top in TREE.body:
        if isinstance(top, Function | ast.ClassDef) and not top.name.startswith("_"):
            assert ast.get_docstring(top), top.name


def test_the_file_stays_one_that_a_person_can_read() -> None:
    assert SOURCE.count("\n") < 7350
