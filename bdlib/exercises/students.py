"""The cells of an exercise, with nbgrader's metadata (schema 3), and the copy of a chapter for students."""

import argparse
import ast
import copy
import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CODE_STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")
TEXT_STUB = "YOUR ANSWER HERE"

_BEGIN, _END = "BEGIN SOLUTION", "END SOLUTION"
_BEGIN_HIDDEN, _END_HIDDEN = "BEGIN HIDDEN TESTS", "END HIDDEN TESTS"
_HIDING_TAGS = ("hide-cell", "hide-input", "remove-cell", "remove-input")


def solution_cell(source: str, grade_id: str, *, gated: bool = True) -> Any:
    """A code cell with an answer between the markers, folded away in JupyterLab and in the page.

    Args:
        source: the code, markers included.
        grade_id: unique in the notebook; letters, digits, _ and -.
        gated: the cell stands between ``{solution-start}`` and ``{solution-end}`` with ``:class: dropdown``, which
            fold it in the page; without them a `hide-cell` tag does.

    Raises:
        ValueError: no answer between the markers, or a grade id with other characters.
    """
    cell = _cell("code", source, grade_id, solution=True)
    cell.metadata["jupyter"] = {"source_hidden": True}
    if not gated:
        cell.metadata["tags"] = ["hide-cell"]
    return cell


def test_cell(source: str, grade_id: str, points: float = 1) -> Any:
    """A locked code cell that calls a checker."""
    return _cell("code", source, grade_id, grade=True, locked=True, points=points)


test_cell.__test__ = False  # type: ignore[attr-defined]  # pytest takes the name for a test


def answer_cell(source: str, grade_id: str, points: float = 1) -> Any:
    """A Markdown cell for a written answer, graded by hand.

    The model answer stands between comment markers; in a `{solution}` block of class dropdown the page folds it away.
    """
    return _cell("markdown", source, grade_id, grade=True, solution=True, points=points)


def student(notebook: Any) -> Any:
    """The student's copy: answers replaced by stubs, hidden tests and `{solution}` blocks removed, outputs cleared.

    Args:
        notebook: a path, or a notebook as `nbformat.read` returns it; it is not changed.

    Returns:
        A new notebook, valid for nbformat 4 and for nbgrader.

    Raises:
        ValueError: the notebook does not pass `validate`.
    """
    source = _read(notebook)
    validate(source)
    out = copy.deepcopy(source)
    cells = []
    for cell in out.cells:
        marked = _marks(cell).get("solution", False)
        cell.source = _student_source(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if marked:
            _unhide(cell)
        if cell.source.strip() or marked:
            cells.append(cell)
    out.cells = cells
    # the widget state, glued numbers and the run's stamp belong to the executed chapter
    out.metadata = type(out.metadata)({k: v for k, v in out.metadata.items() if k in ("kernelspec", "language_info")})
    return out


def validate(notebook: Any, copy_of_student: Any = None) -> None:
    """Check the exercises of a chapter (a student's copy has no markers left: give it as the second argument).

    Schema-3 metadata with unique grade ids, points exactly on graded cells; markers paired, in solution cells only,
    around something; a solution that parses with and without its answer; a test after every solution.

    Args:
        notebook: a path or a notebook.
        copy_of_student: a path or a notebook that must equal what `student` makes of it.

    Raises:
        ValueError: the list of all problems, each with its cell.
    """
    source = _read(notebook)
    problems: list[str] = []
    seen: dict[str, int] = {}
    waiting: str | None = None
    for i, cell in enumerate(source.cells):
        found = _cell_problems(cell)
        marks = _marks(cell)
        grade_id = marks.get("grade_id")
        if grade_id in seen:
            found.append(f"grade_id {grade_id!r} is used by cell {seen[grade_id]} as well")
        elif grade_id is not None:
            seen[grade_id] = i
        if cell.cell_type == "code" and marks.get("solution") and not marks.get("grade"):
            if waiting:
                problems.append(f"solution {waiting!r} has no test cell before cell {i}")
            waiting = grade_id
        elif cell.cell_type == "code" and marks.get("grade"):
            waiting = None
        problems += [f"cell {i}: {problem}" for problem in found]
    if waiting:
        problems.append(f"solution {waiting!r} has no test cell after it")
    if not problems and copy_of_student is not None:
        problems = _copy_problems(student(source), _read(copy_of_student))
    if problems:
        raise ValueError("the exercises do not hold together:\n" + "\n".join(f"  {p}" for p in problems))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: `student NOTEBOOK -o OUT` and `validate NOTEBOOK ...`."""
    parser = argparse.ArgumentParser(prog="python -m bdlib.exercises", description="Exercises for students.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("student", help="write the copy for students: stubs instead of answers, no outputs")
    make.add_argument("notebook", type=Path)
    make.add_argument("-o", "--output", type=Path, required=True, help="the notebook to write")
    checks = commands.add_parser("validate", help="check metadata, markers and tests of notebooks")
    checks.add_argument("notebooks", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    try:
        if options.command == "validate":
            for path in options.notebooks:
                validate(path)
                _say(f"{path}: exercises are in order")
            return 0
        if options.output.resolve() == options.notebook.resolve():
            raise ValueError(f"the output {options.output} is the chapter itself: choose another file")
        made = student(options.notebook)
        _write(made, options.output)
        count = sum(bool(_marks(cell).get("solution")) for cell in made.cells)
        _say(f"{options.output}: {count} exercises without their answers")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _say(line: str) -> None:
    print(line)  # noqa: T201 (the command line's answer)


def _marks(cell: Any) -> dict[str, Any]:
    return dict(cell.metadata.get("nbgrader", {}))


def _cell(kind: str, source: str, grade_id: str, points: float | None = None, **flags: bool) -> Any:
    from nbformat import v4

    marks: dict[str, Any] = {"schema_version": 3, "grade": False, "solution": False, "locked": False, "task": False}
    marks |= {"grade_id": grade_id, **flags} | ({} if points is None else {"points": points})
    make = v4.new_code_cell if kind == "code" else v4.new_markdown_cell
    cell = make(source, metadata={"nbgrader": marks})
    problems = _cell_problems(cell)
    if problems:
        raise ValueError(f"{grade_id}: " + "; ".join(problems))
    return cell


def _cell_problems(cell: Any) -> list[str]:
    problems = []
    marks = _marks(cell)
    if "nbgrader" in cell.metadata:
        problems += _mark_problems(cell, marks)
    regions, broken = _regions(cell.source.split("\n"), _BEGIN, _END)
    problems += broken
    problems += _regions(cell.source.split("\n"), _BEGIN_HIDDEN, _END_HIDDEN)[1]
    solution = bool(marks.get("solution"))
    if regions and not solution:
        problems.append("solution markers stand in a cell that is not marked as a solution")
    if solution and cell.cell_type == "code" and not regions:
        problems.append(f"a solution cell needs ### {_BEGIN} and ### {_END} around the answer")
    if any(not any(line.strip() for line in region) for region in regions):
        problems.append("there is nothing between the solution markers")
    if solution and cell.cell_type == "code" and not problems:
        problems += _indent_problems(cell.source)
        for name, text in (("the solution", cell.source), ("the stub", _student_source(cell))):
            try:
                ast.parse(re.sub(r"^\s*[%!].*$", "", text, flags=re.M))
            except SyntaxError as error:
                problems.append(f"{name} does not parse: {error}")
    return problems


def _indent_problems(source: str) -> list[str]:
    # the stub takes the marker's indentation: at the margin it would raise before the function is ever called
    lines = source.split("\n")
    for i, line in enumerate(lines):
        if _BEGIN in line:
            first = next(later for later in lines[i + 1 :] if later.strip())
            if len(first) - len(first.lstrip()) != len(line) - len(line.lstrip()):
                return [f"{_BEGIN} must be indented as the answer below it"]
    return []


def _mark_problems(cell: Any, marks: dict[str, Any]) -> list[str]:
    problems = []
    if marks.get("schema_version") != 3:
        problems.append(f"nbgrader schema_version must be 3, got {marks.get('schema_version')!r}")
    for key in ("grade", "solution", "locked", "task"):
        if not isinstance(marks.get(key), bool):
            problems.append(f"nbgrader {key!r} must be true or false, got {marks.get(key)!r}")
    grade_id = marks.get("grade_id")
    if not isinstance(grade_id, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", grade_id):
        problems.append(f"grade_id must be letters, digits, _ and -, got {grade_id!r}")
    unknown = set(marks) - {"schema_version", "grade", "solution", "locked", "task", "grade_id", "points", "cell_type"}
    if unknown:
        problems.append(f"nbgrader metadata has unknown keys: {', '.join(sorted(unknown))}")
    points, graded = marks.get("points"), bool(marks.get("grade") or marks.get("task"))
    if graded and (isinstance(points, bool) or not isinstance(points, int | float) or not 0 <= points < float("inf")):
        problems.append(f"a graded cell needs points, 0 or more, got {points!r}")
    if not graded and points is not None:
        problems.append(f"only graded cells have points, got {points!r}")
    if marks.get("solution") and marks.get("locked"):
        problems.append("a solution cell must not be locked: students write in it")
    if marks.get("grade") and not marks.get("solution") and not marks.get("locked"):
        problems.append("a test cell must be locked")
    if marks.get("task") and (cell.cell_type != "markdown" or marks.get("grade") or marks.get("solution")):
        problems.append("a task must be a Markdown cell that is neither graded nor a solution")
    if cell.cell_type == "markdown" and bool(marks.get("grade")) != bool(marks.get("solution")):
        problems.append("a written answer must be both graded and a solution")
    return problems


def _regions(lines: Sequence[str], begin: str, end: str) -> tuple[list[list[str]], list[str]]:
    """What stands between pairs of markers, and what is wrong with the pairs."""
    regions: list[list[str]] = []
    inside: list[str] | None = None
    for line in lines:
        if begin in line:
            if inside is not None:
                return regions, [f"a second {begin} before {end}"]
            inside = []
        elif end in line:
            if inside is None:
                return regions, [f"{end} without {begin}"]
            regions.append(inside)
            inside = None
        elif inside is not None:
            inside.append(line)
    return regions, [] if inside is None else [f"{begin} without {end}"]


def _student_source(cell: Any) -> str:
    code = cell.cell_type == "code"
    lines = _replace(cell.source.split("\n"), _BEGIN, _END, CODE_STUB if code else (TEXT_STUB,))
    lines = _replace(lines, _BEGIN_HIDDEN, _END_HIDDEN, ())
    if not code:
        lines = _without_solution_blocks(lines)
    return "\n".join(lines)


def _replace(lines: Sequence[str], begin: str, end: str, stub: Sequence[str]) -> list[str]:
    out: list[str] = []
    inside = False
    for line in lines:
        if begin in line:
            indent = re.match(r"\s*", line).group()  # type: ignore[union-attr]
            out += [indent + part for part in stub]
            inside = True
        elif end in line:
            inside = False
        elif not inside:
            out.append(line)
    return out


def _without_solution_blocks(lines: Sequence[str]) -> list[str]:
    """Drop ``{solution}`` directives, and the two fences of a gated one (its code cell has markers of its own)."""
    out: list[str] = []
    fence: str | None = None
    for line in lines:
        opening = re.match(r"\s*(`{3,}|:{3,})\{solution(-start|-end)?\}", line)
        if fence is None and opening:
            fence = opening.group(1)
        elif fence is None:
            out.append(line)
        elif re.fullmatch(rf"\s*{fence[0]}{{{len(fence)},}}\s*", line):
            fence = None
    return out


def _unhide(cell: Any) -> None:
    tags = [tag for tag in cell.metadata.get("tags", []) if tag not in _HIDING_TAGS]
    cell.metadata.pop("tags", None)
    if tags:
        cell.metadata["tags"] = tags
    cell.metadata.pop("jupyter", None)


def _copy_problems(made: Any, given: Any) -> list[str]:
    problems = []
    for i, (a, b) in enumerate(itertools.zip_longest(made.cells, given.cells)):
        if a is None or b is None:
            problems.append(f"the student copy has {len(given.cells)} cells, expected {len(made.cells)}")
            break
        if (a.cell_type, a.source, _marks(a)) != (b.cell_type, b.source, _marks(b)):
            problems.append(f"cell {i} of the student copy differs from what `student` makes: generate it again")
    return problems


def _read(notebook: Any) -> Any:
    import nbformat

    if not isinstance(notebook, str | Path):
        return notebook
    try:
        return nbformat.read(notebook, as_version=4)
    except (json.JSONDecodeError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise ValueError(f"{notebook} is not a notebook: {str(error)[:200]}") from None


def _write(notebook: Any, path: Path) -> None:
    import nbformat

    text = nbformat.writes(notebook) + "\n"
    # first beside it, then in its place: an interrupted run leaves the old file whole
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
