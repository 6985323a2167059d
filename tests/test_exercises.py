"""Exercises: right answers pass, plausible wrong ones fail by the input's name, a student's copy holds stubs."""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT

from bdlib import exercises
from bdlib.exercises import students

PATCH = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])


def stamp(images):
    out = images.clone()
    out[:, :, -3:, -3:] = PATCH
    return out


def stamp_in_place(images):
    images[:, :, -3:, -3:] = PATCH
    return images


def stamp_at(rows, columns, patch=PATCH):
    def wrong(images):
        out = images.clone()
        out[:, :, rows, columns] = patch
        return out

    return wrong


def asr(predictions, labels, target):
    return (predictions[labels != target] == target).float().mean()


def bn(xhat, gamma, beta, m, delta, xi):
    shape = (1, -1, 1, 1)
    return (gamma * (m + delta)).view(shape) * xhat + (beta * (1 + xi)).view(shape)


def bn_with(scale, shift):
    def wrong(x, g, b, m, d, xi):
        return scale(g, m, d).view(1, -1, 1, 1) * x + shift(b, m, xi).view(1, -1, 1, 1)

    return wrong


def choose(thresholds, accuracies, before, max_drop):
    return max((t for t, a in zip(thresholds, accuracies, strict=True) if before - a <= max_drop), default=-1)


def choose_first_violation(thresholds, accuracies, before, max_drop):
    best = -1
    for t, a in zip(thresholds, accuracies, strict=True):
        if before - a > max_drop:
            break
        best = t
    return best


def choose_last(thresholds, accuracies, before, max_drop):
    return [-1, *(t for t, a in zip(thresholds, accuracies, strict=True) if before - a <= max_drop)][-1]


# checker, a right answer, and wrong ones with a piece of the message that names the input
TABLE: list[tuple[Callable, Callable, list[tuple[Callable, str]]]] = [
    (
        exercises.check_stamp,
        stamp,
        [
            (stamp_in_place, r"on a black 32x32 image, your function changed its argument 1"),
            (stamp_at(slice(-3, None), slice(-3, None), 1 - PATCH), r"black 32x32 image, result\[0, 0, 29, 29\] is 1"),
            (stamp_at(slice(-3, None), slice(-3, None), PATCH.flip(1)), "black 32x32 image"),
            (stamp_at(slice(29, 32), slice(29, 32)), "28x28 images of one channel, your function raised RuntimeError"),
            (stamp_at(slice(0, 3), slice(0, 3)), r"black 32x32 image, result\[0, 0, 0, 2\] is 1, expected 0"),
            (stamp_at(slice(-4, -1), slice(-4, -1)), "black 32x32 image"),
            (lambda x: (x + stamp(torch.zeros_like(x))).clamp(0, 1), r"a white 32x32 image, result\[0, 0, 29, 29\]"),
            (lambda x: stamp(x)[0], r"shape \(3, 32, 32\), expected \(1, 3, 32, 32\)"),
            (lambda x: (stamp(x) * 255).byte(), "torch.uint8, expected torch.float32"),
            (lambda x: stamp(x).numpy(), "returned a ndarray, expected a tensor"),
            (lambda x: None, "returned None"),
        ],
    ),
    (
        exercises.check_poison_count,
        lambda n, rate: round(n * rate),
        [
            (lambda n, rate: int(n * rate), "n = 100, rate = 0.29, the result is 28, expected 29"),
            (lambda n, rate: n * rate, "n = 100, rate = 0.29|n = 7"),
            (lambda n, rate: -int(-n * rate // 1), "n = 7, rate = 0.2"),
            (lambda n, rate: max(1, round(n * rate)), "n = 5000, rate = 0.0"),
            (
                lambda n, rate: round(1 / (1 / (n * rate))),
                "n = 5000, rate = 0.0, your function raised ZeroDivisionError",
            ),
        ],
    ),
    (
        exercises.check_asr,
        asr,
        [
            (lambda p, y, t: (p == t).float().mean(), "a failed attack .* is 0.[0-9]+, expected 0"),
            (lambda p, y, t: (p != y).float().mean(), "perfect attack"),
            (lambda p, y, t: ((p == t) & (y != t)).float().mean(), "perfect attack"),
            (lambda p, y, t: (p == y).float().mean(), "perfect attack"),
            (lambda p, y, t: 100 * asr(p, y, t), "perfect attack .* is 100, expected 1"),
            (lambda p, y, t: p == t, "returned a tensor of shape"),
            (lambda p, y, t: (p[y != 2] == 2).float().mean(), "target 0"),
        ],
    ),
    (
        exercises.check_perturbed_bn,
        bn,
        [
            (bn_with(lambda g, m, d: g * m * (1 + d), lambda b, m, xi: b * (1 + xi)), "m = 0, noise delta"),
            (bn_with(lambda g, m, d: g * (m + d), lambda b, m, xi: b * m * (1 + xi)), r"m = 0, no noise \(only beta"),
            (bn_with(lambda g, m, d: g * (m + d), lambda b, m, xi: b + xi), "noise xi only"),
            (bn_with(lambda g, m, d: g * (m + d), lambda b, m, xi: b), "noise xi only"),
            (bn_with(lambda g, m, d: g * m, lambda b, m, xi: b * (1 + xi)), "noise delta only"),
            (bn_with(lambda g, m, d: (g * (m + d)).clamp(min=0), lambda b, m, xi: b * (1 + xi)), "may be negative"),
            (lambda x, g, b, m, d, xi: g * (m + d) * x + b * (1 + xi), "plain BatchNorm.* raised RuntimeError"),
        ],
    ),
    (
        exercises.check_noise_step,
        lambda noise, grad, size, eps: torch.clamp(noise + size * torch.sign(grad), -eps, eps),
        [
            (lambda n, g, s, e: (n - s * g.sign()).clamp(-e, e), "gradient \\(\\+1, -1, 0\\)"),
            (lambda n, g, s, e: (n + s * g).clamp(-e, e), "very different size"),
            (lambda n, g, s, e: n + s * g.sign(), "pushed outwards"),
            (lambda n, g, s, e: (n + s * g.sign()).clamp(0, e), "gradient \\(\\+1, -1, 0\\)"),
            (lambda n, g, s, e: n.add_(s * g.sign()).clamp_(-e, e), "changed its argument 1"),
            (lambda n, g, s, e: e * g.sign(), "gradient \\(\\+1, -1, 0\\)"),
        ],
    ),
    (
        exercises.check_mask_step,
        lambda mask, grad, lr: (mask - lr * grad).clamp(0, 1),
        [
            (lambda m, g, lr: m - lr * g, "mask 1, gradient -1: it must stay at 1"),
            (lambda m, g, lr: (m + lr * g).clamp(0, 1), "mask 0.5"),
            (lambda m, g, lr: (m - lr * g.sign()).clamp(0, 1), r"mask 0.1, gradient \+3|8 random"),
            (lambda m, g, lr: (m - lr * g).clamp(min=0), "mask 1, gradient -1"),
            (lambda m, g, lr: torch.sigmoid(m - lr * g), "mask 0.5"),
        ],
    ),
    (
        exercises.check_choose_threshold,
        choose,
        [
            (choose_first_violation, "dip and recover"),
            (choose_last, "thresholds in falling order"),
            (lambda t, a, b, d: max(x for x, y in zip(t, a, strict=True) if b - y <= d), "no threshold that qualifies"),
            (
                lambda t, a, b, d: max((x for x, y in zip(t, a, strict=True) if b - y < d), default=-1),
                "exactly the allowed",
            ),
            (
                lambda t, a, b, d: max((x for x, y in zip(t, a, strict=True) if abs(b - y) <= d), default=-1),
                "pruning improves",
            ),
            (
                lambda t, a, b, d: max((x for x, y in zip(t, a, strict=True) if (b - y) / b <= d), default=-1),
                "10 points allowed|no threshold|6.25|12.5",
            ),
            (lambda t, a, b, d: t[int(np.argmax(a))], "falling accuracies"),
            (lambda t, a, b, d: t.sort() or choose(t, a, b, d), "in falling order"),
        ],
    ),
]
NAMES = [checker.__name__ for checker, *_ in TABLE]


@pytest.mark.parametrize(("checker", "right"), [row[:2] for row in TABLE], ids=NAMES)
def test_right_answers_pass_with_one_line(checker, right, capsys) -> None:
    checker(right)
    out = capsys.readouterr().out
    assert out.startswith(f"{checker.__name__}: passed, ") and out.count("\n") == 1


@pytest.mark.parametrize(
    ("checker", "wrong", "message"),
    [(checker, wrong, message) for checker, _, all_wrong in TABLE for wrong, message in all_wrong],
    ids=[f"{checker.__name__}-{i}" for checker, _, all_wrong in TABLE for i in range(len(all_wrong))],
)
def test_wrong_answers_fail_by_the_name_of_an_input(checker, wrong, message, capsys) -> None:
    with pytest.raises(exercises.CheckError, match=message) as failure:
        checker(wrong)
    assert str(failure.value).startswith(f"{checker.__name__}: on ")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("checker", [row[0] for row in TABLE], ids=NAMES)
def test_an_empty_stub_says_that_it_is_empty(checker) -> None:
    def stub(*args):
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        checker(stub)


def test_checkers_agree_with_the_library() -> None:
    from bdlib.attacks.badnets import BadNets
    from bdlib.neurons import choose_threshold

    exercises.check_choose_threshold(choose_threshold)
    trigger = BadNets.official().trigger((3, 32, 32), 10)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(trigger(images), stamp(images))


def test_check_compares_nested_values_and_names_the_place() -> None:
    right = [("an input", (2,))]
    exercises.check(lambda n: (n, "x", torch.ones(1)), lambda n: (2, "x", torch.ones(1)), right)
    for wrong, message in [
        (lambda n: (3, "x"), "in value 0, the result is 3, expected 2"),
        (lambda n: (2, "y"), "in value 1, the result is 'y', expected 'x'"),
        (lambda n: (2,), "expected 2 values"),
        (lambda n: (float("nan"), "x"), "is nan"),
    ]:
        with pytest.raises(exercises.CheckError, match=message):
            exercises.check(wrong, lambda n: (2, "x"), right)
    with pytest.raises(exercises.CheckError, match=r"result\[1\] is nan, expected 1"):
        exercises.check(lambda n: torch.tensor([1, float("nan")]), lambda n: torch.ones(2), right)


SOLUTION = """def stamp(images):
    \"\"\"Return a copy of the images with the patch in the corner.\"\"\"
    ### BEGIN SOLUTION
    patch = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    out = images.clone()
    out[..., -3:, -3:] = patch
    return out
    ### END SOLUTION
"""
STUB = """def stamp(images):
    \"\"\"Return a copy of the images with the patch in the corner.\"\"\"
    # YOUR CODE HERE
    raise NotImplementedError()
"""


def chapter():
    make = nbformat.v4
    cells = [
        make.new_markdown_cell("# A chapter\n\n```{exercise} Stamp\n:label: ex-stamp\nWrite `stamp`.\n```"),
        make.new_code_cell("import torch\nfrom bdlib import exercises", execution_count=1),
        make.new_markdown_cell("````{solution-start} ex-stamp\n:class: dropdown\n````"),
        exercises.solution_cell(SOLUTION, "stamp"),
        make.new_markdown_cell("````{solution-end}\n````"),
        exercises.test_cell(
            "exercises.check_stamp(stamp)\n### BEGIN HIDDEN TESTS\nassert stamp.__doc__\n### END HIDDEN TESTS",
            "stamp-check",
            2,
        ),
        make.new_markdown_cell("Why?\n\n:::{solution} ex-why\n:class: dropdown\nBecause.\n:::\n\nNext."),
        exercises.answer_cell("Derive it.\n\n<!-- BEGIN SOLUTION -->\nIt follows.\n<!-- END SOLUTION -->", "derive", 3),
        make.new_code_cell("1 + 1", execution_count=3, outputs=[make.new_output("stream", text="2")]),
    ]
    book = make.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    book.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    return book


def run(notebook) -> list[str]:
    """Execute the code cells in one namespace; the names of what each raised, or ""."""
    space: dict = {}
    raised = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(cell.source, space)
                raised.append("")
            except Exception as error:
                raised.append(type(error).__name__)
    return raised


def test_the_chapter_runs_and_the_stub_fails_only_with_not_implemented() -> None:
    source = chapter()
    exercises.validate(source)
    assert run(source) == ["", "", "", ""]
    made = exercises.student(source)
    assert run(made) == ["", "", "NotImplementedError", ""]
    nbformat.validate(made)
    exercises.validate(source, made)


def test_student_changes_answers_and_outputs_and_nothing_else() -> None:
    source = chapter()
    before = copy.deepcopy(source)
    made = exercises.student(source)
    assert source == before, "the chapter itself must stay as it is"
    text = [cell.source for cell in made.cells]
    assert text == [
        source.cells[0].source,
        source.cells[1].source,
        STUB,
        "exercises.check_stamp(stamp)",
        "Why?\n\n\nNext.",
        "Derive it.\n\nYOUR ANSWER HERE",
        "1 + 1",
    ]
    assert "widgets" not in made.metadata and made.metadata.kernelspec.name == "python3"
    assert all(not cell.outputs and cell.execution_count is None for cell in made.cells if cell.cell_type == "code")
    # the answer was folded away in the page; the student must see the stub
    stub = made.cells[2]
    assert "tags" not in stub.metadata and "jupyter" not in stub.metadata
    assert stub.metadata.nbgrader == source.cells[3].metadata.nbgrader
    assert source.cells[3].metadata.jupyter.source_hidden and "tags" not in source.cells[3].metadata
    source.cells[3] = exercises.solution_cell(SOLUTION, "stamp", gated=False)
    assert source.cells[3].metadata.tags == ["hide-cell"]
    assert "tags" not in exercises.student(source).cells[2].metadata


def test_gates_without_a_blank_line_and_longer_fences() -> None:
    lines = ["before", "`````{solution} a", "```python", "x", "```", "`````", "after"]
    assert students._without_solution_blocks(lines) == ["before", "after"]
    lines = ["before", "```{solutions}", "kept", "```", ":::{solution-start} b", ":::", "kept too"]
    assert students._without_solution_blocks(lines) == ["before", "```{solutions}", "kept", "```", "kept too"]


def break_chapter(change: Callable) -> nbformat.NotebookNode:
    notebook = chapter()
    change(notebook)
    return notebook


def mark(cell: int, **changes) -> Callable:
    def change(notebook):
        notebook.cells[cell].metadata.nbgrader.update(changes)

    return change


def write(cell: int, source: str) -> Callable:
    def change(notebook):
        notebook.cells[cell].source = source

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mark(5, grade_id="stamp"), "cell 5: grade_id 'stamp' is used by cell 3 as well"),
        (mark(3, grade_id="a b"), "cell 3: grade_id must be letters, digits, _ and -, got 'a b'"),
        (mark(3, schema_version=2), "schema_version must be 3, got 2"),
        (mark(3, points=1), "only graded cells have points, got 1"),
        (mark(3, locked=True), "must not be locked"),
        (mark(3, task="no"), "'task' must be true or false, got 'no'"),
        (mark(3, extra=1), "unknown keys: extra"),
        (mark(5, points=-1), "needs points, 0 or more, got -1"),
        (mark(5, points=True), "needs points, 0 or more, got True"),
        (mark(5, locked=False), "a test cell must be locked"),
        (mark(7, grade=False), "must be both graded and a solution"),
        (lambda n: n.cells[5].metadata.nbgrader.pop("points"), "needs points, 0 or more, got None"),
        (lambda n: n.cells.pop(5), "solution 'stamp' has no test cell after it"),
        (
            lambda n: n.cells.insert(4, exercises.solution_cell(SOLUTION, "two")),
            "'stamp' has no test cell before cell 4",
        ),
        (write(3, "def f():\n    return 1"), "needs ### BEGIN SOLUTION"),
        (write(3, SOLUTION.replace("    ### END SOLUTION\n", "")), "BEGIN SOLUTION without END SOLUTION"),
        (write(3, "### END SOLUTION\n" + SOLUTION), "END SOLUTION without BEGIN SOLUTION"),
        (write(3, SOLUTION.replace("return out", "### BEGIN SOLUTION")), "a second BEGIN SOLUTION"),
        (write(3, "def f():\n    ### BEGIN SOLUTION\n\n    ### END SOLUTION\n    pass"), "nothing between"),
        (write(3, SOLUTION.replace("return out", "return )")), "the solution does not parse"),
        (write(3, SOLUTION.replace("    ### BEGIN", "### BEGIN")), "must be indented as the answer"),
        (write(1, SOLUTION), "stand in a cell that is not marked as a solution"),
        (write(5, "### BEGIN HIDDEN TESTS"), "BEGIN HIDDEN TESTS without"),
    ],
)
def test_validate_names_the_cell_and_the_fault(change, message) -> None:
    broken = break_chapter(change)
    with pytest.raises(ValueError, match=message):
        exercises.validate(broken)
    with pytest.raises(ValueError, match="do not hold together"):
        exercises.student(broken)


def test_a_copy_that_drifted_is_found() -> None:
    source = chapter()
    drifted = exercises.student(source)
    drifted.cells[2].source = STUB.replace("a copy", "one")
    with pytest.raises(ValueError, match="cell 2 of the student copy differs"):
        exercises.validate(source, drifted)
    drifted.cells.pop()
    with pytest.raises(ValueError, match="has 6 cells, expected 7"):
        exercises.validate(source, drifted)


def test_cells_cannot_be_made_wrong() -> None:
    with pytest.raises(ValueError, match="nothing between"):
        exercises.solution_cell("### BEGIN SOLUTION\n### END SOLUTION", "x")
    with pytest.raises(ValueError, match="a graded cell needs points"):
        exercises.test_cell("check()", "x", -2)


def test_command_line(tmp_path: Path, capsys) -> None:
    source, out = tmp_path / "chapter.ipynb", tmp_path / "student.ipynb"
    nbformat.write(chapter(), source)
    assert students.main(["student", str(source), "-o", str(out)]) == 0
    assert "2 exercises without their answers" in capsys.readouterr().out
    exercises.validate(source, out)
    assert "patch = torch.tensor" not in out.read_text() and json.loads(out.read_text())["nbformat"] == 4
    assert students.main(["validate", str(source), str(source)]) == 0
    assert capsys.readouterr().out.count("in order") == 2
    assert students.main(["validate", str(out)]) == 1
    assert "needs ### BEGIN SOLUTION" in capsys.readouterr().err

    kept = source.read_bytes()
    assert students.main(["student", str(source), "-o", str(source)]) == 1
    assert "choose another file" in capsys.readouterr().err and source.read_bytes() == kept
    (tmp_path / "no.ipynb").write_text("not json")
    for bad in ("no.ipynb", "absent.ipynb"):
        assert students.main(["student", str(tmp_path / bad), "-o", str(out)]) == 1
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        students.main(["student", str(source)])


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_chapter_has_exercises_in_order(path: Path) -> None:
    exercises.validate(path, exercises.student(path))
