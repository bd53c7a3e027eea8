"""Answering signals: a program that still imports ends at once, later everything is saved first."""

import contextlib
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def quiet_imports() -> None:
    """Lets Ctrl-C end the program at once and without a traceback, until `end_of_imports`."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_of_imports() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def say(text: str) -> None:
    """Prints to stderr. If whoever read it has gone, nothing is printed from now on."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stdout = sys.stderr = open(os.devnull, "w")


class Stopped(SystemExit):
    """A signal has ended the program, and everything is saved."""


class StopRequest:
    """Remembers a signal until everything is saved; where nothing is unsaved, exits at once.

    A second signal of the same kind ends the program at once, except for SIGHUP.
    """

    def __init__(self, farewell: str):
        self.farewell = farewell  # the program's last words
        self.requested = False
        self.unsaved = False  # whether there is work that a checkpoint would save
        self.handlers = {}  # signal -> what was there before

    def install(self) -> None:
        """Handles the signals from here on."""
        with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.handlers[number] = signal.signal(number, self._answer)

    def restore(self) -> None:
        """Gives the signals back to the handlers from before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _answer(self, number: int, _: FrameType | None) -> None:
        # A terminal that is closed sends SIGHUP more than once; nobody repeats it on purpose.
        hung_up = number == signal.SIGHUP
        signal.signal(number, signal.SIG_IGN if hung_up else signal.SIG_DFL)
        self.requested = True
        if not self.unsaved:
            self.leave()
        name = signal.Signals(number).name
        say(f"\n{name}: saving after this step; repeat it to end at once")

    def leave(self) -> None:
        """Ends the program, because everything is saved."""
        raise Stopped(self.farewell)
