"""The `torchrec-lma` command."""

import argparse
import sys

from torchrec_lma.allocation.command import add_allocate
from torchrec_lma.inference.commands import add_export, add_predict, add_serve
from torchrec_lma.inference.export import CheckFailed
from torchrec_lma.inspection.command import add_inspect


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status: 0, or 2 when the input is at fault, which is said on stderr."""
    parser = argparse.ArgumentParser(prog="torchrec-lma", description="Tools for LMA-compressed embedding tables.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_allocate(commands)
    add_inspect(commands)
    add_export(commands)
    add_serve(commands)
    add_predict(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, CheckFailed) as error:
        print(f"torchrec-lma {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
