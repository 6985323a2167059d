"""What every checker is made of: `check` compares a reader's function with a reference on named inputs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


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
