"""Start a program: parse its options, and print a user's mistake as one line."""

import os
import sys
from collections.abc import Callable

import tyro

from common.errors import UserError
from common.signals import end_of_imports


def run_program(main: Callable, options: type, description: str, renders: bool = False) -> None:
    """Calls `main` with the command line's options; a UserError or Ctrl-C ends it with one line.

    Unless the program renders, MuJoCo needs no driver.
    """
    end_of_imports()
    if not renders:
        os.environ["MUJOCO_GL"] = "disable"
    try:
        main(tyro.cli(options, description=description))
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")


def say(text: str) -> None:
    """Prints a line to stderr, where it does not mix with tables."""
    print(text, file=sys.stderr)
