"""The `torchrec-lma` command."""

import argparse
import sys
from importlib import import_module

from torchrec_lma.cli.errors import first_to_say
from torchrec_lma.requirements import install_line

# Each is a file here; only the one that runs is imported, so that none waits for what another needs.
COMMANDS = {
    "allocate": "Build an allocation from training data.",
    "inspect": "Look into an allocation.",
    "export": "Make a quantized TorchScript model of a checkpoint.",
    "serve": "Serve a model over gRPC.",
    "predict": "Score rows with a server.",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status: 0, or 2 when the input is at fault, which is said on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="torchrec-lma", description="Tools for LMA-compressed embedding tables.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, description in COMMANDS.items():
        command = commands.add_parser(name, help=description)
        if name in arguments[:1]:
            import_module(f"torchrec_lma.cli.{name}").add_options(command)
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
