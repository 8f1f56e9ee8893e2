"""`python -m course grade`: grade notebooks that students handed in. The work is done in course/grading."""

from course.grading.grade import EXAMPLE, add_arguments, main

__all__ = ["EXAMPLE", "add_arguments", "main"]
