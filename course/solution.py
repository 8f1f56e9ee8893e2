"""`python -m course solution`: print one solution of a workbook, and none of the others."""

import argparse
import sys

from course import artifacts, workbook
from course.source import BuildError

EXAMPLE = """examples:
  python -m course solution 4                the exercises of workbook 4
  python -m course solution 4 repeat_kv      one solution, without the others"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `course solution`."""
    parser.add_argument("chapter", help="a number or a name: 4, 04, 04_attention")
    parser.add_argument("exercise", nargs="?", help="its name; left out, the exercises are listed")


def main(args: argparse.Namespace) -> int:
    """Print it; 1 where there is none."""
    try:
        book = workbook.load(name_of(args.chapter), artifacts.home())
        if args.exercise is None:
            for each in book.exercises:
                print(f"{each.name:24}{each.points:2} points {each.minutes:3} minutes  difficulty {each.difficulty}  {each.kind}")
        else:
            print(book.solution(args.exercise))
    except (FileNotFoundError, KeyError, BuildError) as error:
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 1
    return 0


def name_of(chapter: str) -> str:
    """4 -> 04_attention."""
    names = sorted(path.stem for path in (artifacts.home() / "solutions" / "src").glob("[0-9][0-9]_*.py"))
    for name in names:
        if chapter == name or (chapter.isdigit() and int(chapter) == int(name[:2])):
            return name
    raise KeyError(f"there is no workbook {chapter!r} with solutions; there are {', '.join(names) or 'none'}")
