"""Exercises: checkers that name the input on which a reader's function fails, and the copy for students.

    exercises.check_stamp(stamp)       # check_stamp: passed, 6 inputs
    python -m bdlib.exercises student notebooks/02-anp.ipynb -o anp-student.ipynb

A code exercise is two cells that carry nbgrader's metadata (schema 3): a solution cell, whose answer stands between
`### BEGIN SOLUTION` and `### END SOLUTION`, and a locked test cell that calls a checker. In the chapter the solution
runs; `student` replaces what stands between the markers by a line that raises, exactly as nbgrader does, so nbgrader
is an option for a teacher and no dependency. In Markdown the markers are comments: ``<!-- BEGIN SOLUTION -->``.
"""

import argparse
import ast
import copy
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHECKER = ((0, 0, 1), (0, 1, 0), (1, 0, 1))  # 1 is white: the patch of the NAD and ANP code

CODE_STUB = ("# YOUR CODE HERE", "raise NotImplementedError()")
TEXT_STUB = "YOUR ANSWER HERE"

_BEGIN, _END = "BEGIN SOLUTION", "END SOLUTION"
_BEGIN_HIDDEN, _END_HIDDEN = "BEGIN HIDDEN TESTS", "END HIDDEN TESTS"
_HIDING_TAGS = ("hide-cell", "hide-input", "remove-cell", "remove-input")


class CheckError(AssertionError):
    """A reader's function gave a wrong answer; the message names the input and the first wrong place."""


def check(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[tuple[str, tuple[Any, ...]]],
    *,
    tol: float = 1e-5,
    name: str = "check",
) -> None:
    """Compare a function with a reference on named inputs, and print one line when it passes all of them.

    Args:
        fn: the reader's function.
        reference: what it should compute, with the same arguments.
        inputs: pairs of a description ("a black image") and the arguments.
        tol: largest absolute difference between numbers.
        name: what the printed line calls the exercise.

    Raises:
        CheckError: another result, type or shape, an exception, or arguments that were changed in place.
        NotImplementedError: passed on as it is, so that an empty stub says that it is empty.
    """
    for where, args in inputs:
        expected = reference(*copy.deepcopy(args))
        given = copy.deepcopy(args)
        try:
            got = fn(*given)
        except NotImplementedError:
            raise
        except Exception as error:
            raise CheckError(f"{name}: on {where}, your function raised {type(error).__name__}: {error}") from error
        problem = _difference(got, expected, tol)
        if problem:
            raise CheckError(f"{name}: on {where}, {problem}")
        for i, (before, after) in enumerate(zip(args, given, strict=True)):
            if _difference(after, before, 0):
                raise CheckError(f"{name}: on {where}, your function changed its argument {i + 1}: work on a copy")
    count = len(inputs)
    print(f"{name}: passed, {count} input{'' if count == 1 else 's'}")  # noqa: T201 (the line is the product)


def check_stamp(
    stamp: Callable[[Tensor], Tensor], *, pattern: Sequence[Sequence[float]] = CHECKER, seed: int = 0
) -> None:
    """`stamp(images)` returns a copy with the 3x3 checkered patch in the bottom right corner.

    Args:
        stamp: ``(N, C, H, W)`` float in [0, 1] -> the same shape.
        pattern: the patch, rows from the top; 1 is white and 0 black.
        seed: of the random images.

    Raises:
        CheckError: see `check`.
    """
    patch = torch.tensor(pattern, dtype=torch.float32)
    high, wide = patch.shape

    def reference(images: Tensor) -> Tensor:
        out = images.clone()
        out[..., -high:, -wide:] = patch
        return out

    rng = torch.Generator().manual_seed(seed)
    inputs = [
        ("a black 32x32 image", (torch.zeros(1, 3, 32, 32),)),
        ("a white 32x32 image", (torch.ones(1, 3, 32, 32),)),
        ("4 random 32x32 images", (torch.rand(4, 3, 32, 32, generator=rng),)),
        ("3 random grey 28x28 images of one channel", (torch.rand(3, 1, 28, 28, generator=rng),)),
        ("2 random images 20 high and 24 wide", (torch.rand(2, 3, 20, 24, generator=rng),)),
        ("an empty batch", (torch.zeros(0, 3, 32, 32),)),
    ]
    check(stamp, reference, inputs, name="check_stamp")


def check_poison_count(count: Callable[[int, float], int]) -> None:
    """`count(n, rate)` is how many of n images are poisoned: n times rate, rounded to the nearest whole number.

    Raises:
        CheckError: see `check`.
    """
    cases = [(5000, 0.1), (5000, 0.0), (5000, 1.0), (100, 0.29), (7, 0.2), (39209, 0.1), (0, 0.1)]
    inputs = [(f"n = {n}, rate = {rate}", (n, rate)) for n, rate in cases]
    check(count, lambda n, rate: round(rate * n), inputs, tol=0, name="check_poison_count")


def check_asr(asr: Callable[[Tensor, Tensor, int], float], *, seed: int = 0) -> None:
    """`asr(predictions, labels, target)` is the attack success rate: hits among images of the other classes.

    Args:
        asr: predictions on triggered images ``(N,)``, their true labels ``(N,)`` and the target -> share in [0, 1].
        seed: of the random predictions.

    Raises:
        CheckError: see `check`.
    """

    def reference(predictions: Tensor, labels: Tensor, target: int) -> float:
        eligible = labels != target
        return float((predictions[eligible] == target).double().mean())

    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (60,), generator=rng)
    inputs = [
        ("a perfect attack (all 60 predicted as the target)", (torch.full((60,), 2), labels, 2)),
        ("a failed attack (all 60 predicted correctly)", (labels.clone(), labels, 2)),
        ("60 random predictions, target 0", (torch.randint(0, 4, (60,), generator=rng), labels, 0)),
        ("60 random predictions, target 3", (torch.randint(0, 4, (60,), generator=rng), labels, 3)),
        ("labels (1, 1, 1, 0), predictions (1, 1, 1, 1), target 1", (torch.ones(4).long(), _ints(1, 1, 1, 0), 1)),
        ("labels (1, 1, 0, 2), predictions (1, 1, 1, 2), target 1", (_ints(1, 1, 1, 2), _ints(1, 1, 0, 2), 1)),
    ]
    check(asr, reference, inputs, name="check_asr")


def check_perturbed_bn(bn: Callable[..., Tensor], *, seed: int = 0) -> None:
    """`bn(xhat, gamma, beta, m, delta, xi)` is BatchNorm's output with a mask and noise on its two parameters.

    ``gamma (m + delta) xhat + beta (1 + xi)``, per channel.

    Args:
        bn: normalised input ``(N, C, H, W)`` and five tensors ``(C,)`` -> ``(N, C, H, W)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `check`.
    """

    def reference(xhat: Tensor, gamma: Tensor, beta: Tensor, m: Tensor, delta: Tensor, xi: Tensor) -> Tensor:
        scale, shift = gamma * (m + delta), beta * (1 + xi)
        return scale[None, :, None, None] * xhat + shift[None, :, None, None]

    rng = torch.Generator().manual_seed(seed)

    def case(n: int, c: int, h: int, w: int, m: float | None, delta: float, xi: float) -> tuple[Tensor, ...]:
        mask = torch.rand(c, generator=rng) if m is None else torch.full((c,), m)
        noise = [scale * (2 * torch.rand(c, generator=rng) - 1) for scale in (delta, xi)]
        gamma, beta = torch.rand(c, generator=rng) + 0.5, torch.randn(c, generator=rng)
        return torch.randn(n, c, h, w, generator=rng), gamma, beta, mask, *noise

    inputs = [
        ("m = 1, no noise (plain BatchNorm), shape (2, 5, 3, 4)", case(2, 5, 3, 4, 1, 0, 0)),
        ("m = 0, no noise (only beta is left), shape (2, 5, 3, 4)", case(2, 5, 3, 4, 0, 0, 0)),
        ("a random mask, no noise, shape (2, 5, 3, 4)", case(2, 5, 3, 4, None, 0, 0)),
        ("m = 1, noise delta only, shape (2, 5, 3, 4)", case(2, 5, 3, 4, 1, 0.4, 0)),
        ("m = 1, noise xi only, shape (2, 5, 3, 4)", case(2, 5, 3, 4, 1, 0, 0.4)),
        ("m = 0, noise delta (gamma (m + delta) may be negative)", case(2, 5, 3, 4, 0, 0.4, 0)),
        (
            "mask and both noises, as many channels as pixels across, shape (2, 4, 4, 4)",
            case(2, 4, 4, 4, None, 0.4, 0.4),
        ),
    ]
    check(bn, reference, inputs, name="check_perturbed_bn")


def check_noise_step(step: Callable[[Tensor, Tensor, float, float], Tensor], *, seed: int = 0) -> None:
    """`step(noise, grad, size, eps)` is one step of projected sign ascent.

    Towards a larger loss by `size` along the sign of the gradient, then back into [-eps, eps].

    Args:
        step: noise ``(C,)``, its gradient ``(C,)``, step size, bound -> noise ``(C,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `check`.
    """
    rng = torch.Generator().manual_seed(seed)
    start = 0.8 * torch.rand(6, generator=rng) - 0.4
    inputs = [
        ("noise 0, gradient (+1, -1, 0), size 0.1, eps 0.4", (torch.zeros(3), torch.tensor([1.0, -1, 0]), 0.1, 0.4)),
        ("gradients of very different size", (torch.zeros(3), torch.tensor([1e-6, -500.0, 2.0]), 0.1, 0.4)),
        ("noise at the bound, pushed outwards", (torch.tensor([0.4, -0.4]), torch.tensor([1.0, -1]), 0.4, 0.4)),
        ("noise at the bound, pushed inwards", (torch.tensor([0.4, -0.4]), torch.tensor([-1.0, 1]), 0.1, 0.4)),
        ("6 random noises, size 0.4, eps 0.4", (start, torch.randn(6, generator=rng), 0.4, 0.4)),
        ("eps 0", (torch.zeros(4), torch.randn(4, generator=rng), 0.1, 0.0)),
    ]
    check(step, lambda x, g, size, eps: (x + size * g.sign()).clamp(-eps, eps), inputs, name="check_noise_step")


def check_mask_step(step: Callable[[Tensor, Tensor, float], Tensor], *, seed: int = 0) -> None:
    """`step(mask, grad, lr)` is one step of gradient descent on the mask, kept in [0, 1].

    Args:
        step: mask ``(C,)`` in [0, 1], its gradient ``(C,)``, learning rate -> mask ``(C,)``.
        seed: of the random tensors.

    Raises:
        CheckError: see `check`.
    """
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(8, generator=rng)
    inputs = [
        ("mask 0.5, gradient (+1, -1, 0), lr 0.2", (torch.full((3,), 0.5), torch.tensor([1.0, -1, 0]), 0.2)),
        ("mask 1, gradient -1: it must stay at 1", (torch.ones(3), torch.full((3,), -1.0), 0.2)),
        ("mask 0.1, gradient +3: it must stop at 0", (torch.full((3,), 0.1), torch.full((3,), 3.0), 0.2)),
        ("8 random masks, lr 0.2", (mask, torch.randn(8, generator=rng), 0.2)),
        ("8 random masks, lr 0: nothing moves", (mask, torch.randn(8, generator=rng), 0.0)),
    ]
    check(step, lambda m, g, lr: (m - lr * g).clamp(0, 1), inputs, name="check_mask_step")


def check_choose_threshold(choose: Callable[[list[float], list[float], float, float], float]) -> None:
    """`choose(thresholds, accuracies, before, max_drop)` is the largest threshold that clean accuracy can afford.

    Args:
        choose: thresholds, clean accuracy at each, accuracy of the unpruned network, allowed drop (all accuracies as
            shares in [0, 1]) -> the largest threshold with ``before - accuracy <= max_drop``, or -1 (prune nothing).

    Raises:
        CheckError: see `check`.
    """

    def reference(thresholds: list[float], accuracies: list[float], before: float, max_drop: float) -> float:
        fine = [t for t, accuracy in zip(thresholds, accuracies, strict=True) if before - accuracy <= max_drop]
        return max(fine, default=-1.0)

    # accuracies are multiples of 1/16, which floats hold exactly: no answer hangs on a rounding
    grid = [0.0, 0.2, 0.4, 0.6, 0.8]
    falling = [0.9375, 0.9375, 0.875, 0.625, 0.25]
    bumpy = [0.9375, 0.75, 0.9375, 0.875, 0.25]
    inputs = [
        ("falling accuracies, 12.5 points allowed", (grid, falling, 0.9375, 0.125)),
        ("a drop that is exactly the allowed 6.25 points", (grid, falling, 0.9375, 0.0625)),
        ("no drop allowed", (grid, falling, 0.9375, 0.0)),
        ("accuracies that dip and recover, 10 points allowed", (grid, bumpy, 0.9375, 0.1)),
        ("thresholds in falling order", (grid[::-1], falling[::-1], 0.9375, 0.125)),
        ("an accuracy that pruning improves", (grid, [0.5, 0.75, 0.75, 0.25, 0.25], 0.5, 0.0)),
        ("no threshold that qualifies: -1 is expected", (grid, [0.5, 0.5, 0.25, 0.25, 0.25], 0.9375, 0.125)),
    ]
    check(choose, reference, inputs, name="check_choose_threshold")


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


def _ints(*values: int) -> Tensor:
    return torch.tensor(values)


def _say(line: str) -> None:
    print(line)  # noqa: T201 (the command line's answer)


def _difference(got: Any, expected: Any, tol: float) -> str | None:
    """What is wrong with a result, in words, or None."""
    if got is None and expected is not None:
        return "your function returned None: is a `return` missing?"
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor):
            return f"your function returned {_type(got)}, expected a tensor"
        if got.shape != expected.shape:
            return f"the result has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        if got.is_floating_point() != expected.is_floating_point():
            return f"the result is {got.dtype}, expected {expected.dtype}"
        if not expected.numel():
            return None
        a, b = got.detach().double().cpu(), expected.detach().double().cpu()
        wrong = ~((a - b).abs() <= tol)  # catches nan as well
        if not wrong.any():
            return None
        place = tuple(int(i) for i in wrong.nonzero()[0])
        return (
            f"result[{', '.join(map(str, place))}] is {float(a[place]):.6g}, expected {float(b[place]):.6g} "
            f"({int(wrong.sum())} of {wrong.numel()} values differ)"
        )
    if isinstance(expected, bool | int | float):
        try:
            number = float(got)
        except (TypeError, ValueError, RuntimeError):
            return f"your function returned {_type(got)}, expected a number"
        return None if abs(number - expected) <= tol else f"the result is {number:.6g}, expected {expected:.6g}"
    if isinstance(expected, list | tuple):
        if not isinstance(got, list | tuple) or len(got) != len(expected):
            return f"your function returned {_type(got)}, expected {len(expected)} values"
        pairs = enumerate(zip(got, expected, strict=True))
        return next((f"in value {i}, {p}" for i, (a, b) in pairs if (p := _difference(a, b, tol))), None)
    return None if got == expected else f"the result is {got!r}, expected {expected!r}"


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


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


if __name__ == "__main__":
    raise SystemExit(main())
