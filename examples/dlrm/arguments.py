"""The command line of train.py."""

import argparse
import shlex
from pathlib import Path
from typing import Any, NoReturn

from model import OPTIMIZERS
from torchrec.distributed.types import ShardingType

from torchrec_lma.cli.errors import first_to_say
from torchrec_lma.options import add_data_options, add_lma_options, add_table_options, positive, positive_number

EXIT_TERMINATED = 75  # EX_TEMPFAIL of sysexits.h: run it again
DESCRIPTION = """Train a DLRM with full or LMA-compressed tables through TorchRec.

On one process:           python examples/dlrm/train.py --table lma --compression 16
On two:                   torchrun --nproc-per-node 2 examples/dlrm/train.py ...
Through a scheduler:      torchx run --scheduler slurm torchx_components/lma.py:train -j 2x8 -- ...
As the LMA paper does:    python examples/dlrm/train.py @examples/dlrm/criteo_kaggle.args --data train.txt

Runs on CUDA with NCCL where there is a GPU for each local rank, else on the CPU with gloo.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong once, however many ranks there are. Reads arguments from `@FILE`, with comments after `#`."""

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def error(self, message: str) -> NoReturn:
        if first_to_say(message):
            super().error(message)
        self.exit(2)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars="@"
    )
    parser.add_argument(
        "--table", choices=("lma", "full"), default="lma", help="LMA tables or full ones (default: %(default)s)."
    )
    add_data_options(parser)
    add_table_options(parser)
    add_lma_options(parser).add_argument(
        "--allocation",
        type=Path,
        metavar="FILE",
        help="An allocation from `torchrec-lma allocate`, of these or of earlier rows of the same columns, with its "
        "vocabulary beside it. Without it one is built first.",
    )

    _add_model_options(parser.add_argument_group("model"))
    _add_training_options(parser.add_argument_group("training"))
    _add_restart_options(parser.add_argument_group("restart (docs/restart.md)"))
    args = parser.parse_args(arguments)
    for option in ("resume", "checkpoint_every"):
        if getattr(args, option) and args.checkpoint_dir is None:
            parser.error(f"--{option.replace('_', '-')} needs --checkpoint-dir")
    if args.table == "full" and args.raw_ids:
        parser.error(
            "--raw-ids is for LMA tables; full tables take the ids of a vocabulary, or with --num-embeddings hashes"
        )
    return args


def _add_model_options(model: Any) -> None:
    model.add_argument(
        "--dense-layers",
        type=positive,
        nargs="*",
        default=[64],
        metavar="WIDTH",
        help="Layers that numbers go through before the one of --dim (default: 64).",
    )
    model.add_argument(
        "--over-layers",
        type=positive,
        nargs="*",
        default=[128, 64],
        metavar="WIDTH",
        help="Layers between the interactions and the logit (default: 128 64).",
    )


def _add_training_options(training: Any) -> None:
    training.add_argument(
        "--batch-size", type=positive, default=512, help="Rows in a batch, on each rank (default: %(default)s)."
    )
    training.add_argument("--epochs", type=positive, default=1, help="Epochs at most (default: %(default)s).")
    training.add_argument("--max-steps", type=positive, metavar="N", help="Steps at most, of all epochs together.")
    training.add_argument(
        "--evaluations-per-epoch",
        type=positive,
        default=3,
        metavar="N",
        help="How often in an epoch the validation rows are scored (default: %(default)s).",
    )
    training.add_argument(
        "--patience",
        type=positive,
        default=3,
        metavar="N",
        help="Stop after this many evaluations without a better validation AUC (default: %(default)s).",
    )
    training.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="rowwise-adagrad",
        help="The optimizer of the tables; that of the layers is Adam (default: %(default)s).",
    )
    training.add_argument(
        "--lr", type=positive_number, default=0.05, help="Learning rate of the tables (default: %(default)s)."
    )
    training.add_argument(
        "--dense-lr", type=positive_number, default=1e-3, help="Learning rate of the layers (default: %(default)s)."
    )
    training.add_argument(
        "--seed", type=int, default=0, help="Seed of the first weights and of shuffling (default: %(default)s)."
    )
    training.add_argument(
        "--sharding-types",
        nargs="+",
        metavar="TYPE",
        choices=[sharding_type.value for sharding_type in ShardingType],
        help="Sharding types that the planner may choose from (default: all).",
    )
    training.add_argument("--json", type=Path, metavar="FILE", help="Write a record of the run.")


def _add_restart_options(restart: Any) -> None:
    restart.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="Save there after every evaluation, at the end, and at SIGTERM or Ctrl-C, which end the run with status "
        f"{EXIT_TERMINATED}. All ranks must share the file system.",
    )
    restart.add_argument(
        "--checkpoint-every", type=positive, metavar="N", help="Save after every N steps of an epoch too."
    )
    restart.add_argument(
        "--keep",
        type=positive,
        default=2,
        metavar="K",
        help="How many of the newest checkpoints to keep, beside the best (default: %(default)s).",
    )
    restart.add_argument(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        metavar="auto",
        help="Continue from the newest whole checkpoint in --checkpoint-dir, which must be there; with auto start "
        "where there is none, for a command that a scheduler runs again. A restart by torchrun continues without it.",
    )
