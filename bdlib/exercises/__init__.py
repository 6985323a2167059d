"""Exercises: checkers that name the input on which a reader's function fails, and the copy for students.

    exercises.check_stamp(stamp)       # check_stamp: passed, 6 inputs
    python -m bdlib.exercises student notebooks/02-anp.ipynb -o anp-student.ipynb

A code exercise is two cells that carry nbgrader's metadata (schema 3): a solution cell, whose answer stands between
`### BEGIN SOLUTION` and `### END SOLUTION`, and a locked test cell that calls a checker. In the chapter the solution
runs; `student` replaces what stands between the markers by a line that raises, exactly as nbgrader does, so nbgrader
is an option for a teacher and no dependency. In Markdown the markers are comments: ``<!-- BEGIN SOLUTION -->``.
"""

from bdlib.exercises.anp import check_choose_threshold, check_mask_step, check_noise_step, check_perturbed_bn
from bdlib.exercises.backdoor import check_asr, check_poison_count, check_stamp
from bdlib.exercises.checking import CheckError, check
from bdlib.exercises.students import answer_cell, solution_cell, student, test_cell, validate

__all__ = [
    "CheckError",
    "answer_cell",
    "check",
    "check_asr",
    "check_choose_threshold",
    "check_mask_step",
    "check_noise_step",
    "check_perturbed_bn",
    "check_poison_count",
    "check_stamp",
    "solution_cell",
    "student",
    "test_cell",
    "validate",
]
