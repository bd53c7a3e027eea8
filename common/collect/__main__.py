"""The command `python -m common.collect` (see docs/guides/data.md)."""

import sys
from collections.abc import Sequence

if __name__ == "__main__":
    from common.signals import quiet_imports

    quiet_imports()  # Ctrl-C ends the imports below without a traceback

import tyro

from common.collect.dataset import collect
from common.errors import UserError
from common.signals import end_of_imports


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        config = (tyro.conf.PositionalRequiredArgs,)
        tyro.cli(collect, prog="python -m common.collect", args=args, config=config)
    except (UserError, OSError) as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; run the same command again to continue.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    end_of_imports()
    sys.exit(main())
