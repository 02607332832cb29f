"""The `torchrec-lma` command."""

import argparse
import sys
from importlib import import_module

from torchrec_lma.cli.errors import first_to_say
from torchrec_lma.requirements import install_line

# Where each subcommand is: only the one that runs is imported, so that none waits for what another needs.
COMMANDS = {
    "allocate": "torchrec_lma.cli.allocate",
    "inspect": "torchrec_lma.cli.inspect",
    "export": "torchrec_lma.cli.export",
    "serve": "torchrec_lma.cli.serve",
    "predict": "torchrec_lma.cli.predict",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status: 0, or 2 when the input is at fault, which is said on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="torchrec-lma", description="Tools for LMA-compressed embedding tables.")
    commands = parser.add_subparsers(dest="command", required=True)
    wanted = [name for name in COMMANDS if name in arguments[:1]]
    for name in wanted or COMMANDS:
        getattr(import_module(COMMANDS[name]), f"add_{name}")(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        if (install := install_line(error.name)) is None:
            raise
        print(f"torchrec-lma {args.command}: {error}: {install}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        if first_to_say(str(error)):
            print(f"torchrec-lma {args.command}: {error}", file=sys.stderr)
        return 2
    return 0
