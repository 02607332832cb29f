"""The command line of train.py."""

import argparse
from pathlib import Path
from typing import NoReturn

from model import OPTIMIZERS
from torchrec.distributed.types import ShardingType

from torchrec_lma.cli.errors import first_to_say
from torchrec_lma.options import add_data_options, add_lma_options, add_table_options, positive, positive_number

EXIT_TERMINATED = 75  # EX_TEMPFAIL of sysexits.h: run it again
DESCRIPTION = """Train a DLRM with full or LMA-compressed tables through TorchRec.

On one process:       python examples/dlrm/train.py --table lma --compression 16
On two:               torchrun --nproc-per-node 2 examples/dlrm/train.py ...
Through a scheduler:  torchx run --scheduler slurm torchx_components/lma.py:train -j 2x8 -- ...

Runs on CUDA with NCCL where there is a GPU for each local rank, else on the CPU with gloo.
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong once, however many ranks there are."""

    def error(self, message: str) -> NoReturn:
        if first_to_say(message):
            super().error(message)
        self.exit(2)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=("lma", "full"), default="lma", help="kind of tables (default: %(default)s)")
    add_data_options(parser)
    add_table_options(parser)
    add_lma_options(parser)
    parser.add_argument_group("LMA").add_argument(
        "--allocation",
        type=Path,
        metavar="FILE",
        help="from `torchrec-lma allocate`, of these or of earlier rows of the same columns, with its vocabulary; "
        "without it one is built first",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--dense-layers", type=positive, nargs="*", default=[64], metavar="WIDTH", help="before the last, dim"
    )
    model.add_argument(
        "--over-layers", type=positive, nargs="*", default=[128, 64], metavar="WIDTH", help="before the logit"
    )

    training = parser.add_argument_group("training")
    training.add_argument("--batch-size", type=positive, default=512, help="rows on each rank (default: %(default)s)")
    training.add_argument("--epochs", type=positive, default=1, help="at most (default: %(default)s)")
    training.add_argument(
        "--evaluations-per-epoch",
        type=positive,
        default=3,
        metavar="N",
        help="how often the validation rows are scored (default: %(default)s)",
    )
    training.add_argument(
        "--patience",
        type=positive,
        default=3,
        metavar="N",
        help="stop after this many evaluations without a better validation AUC (default: %(default)s)",
    )
    training.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="rowwise-adagrad", help="of the tables (default: %(default)s)"
    )
    training.add_argument("--lr", type=positive_number, default=0.05, help="of the tables (default: %(default)s)")
    training.add_argument(
        "--dense-lr", type=positive_number, default=1e-3, help="of the layers, Adam (default: %(default)s)"
    )
    training.add_argument("--seed", type=int, default=0, help="of weights and shuffling (default: %(default)s)")

    sharding = parser.add_argument_group("sharding")
    sharding.add_argument(
        "--sharding-types",
        nargs="+",
        metavar="TYPE",
        choices=[sharding_type.value for sharding_type in ShardingType],
        help="what the planner may choose from (default: all)",
    )

    run = parser.add_argument_group("run")
    run.add_argument("--max-steps", type=positive, metavar="N", help="stop after this many steps of all epochs")
    run.add_argument("--json", type=Path, metavar="FILE", help="write a record of the run")

    restart = parser.add_argument_group("restart (docs/restart.md)")
    restart.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="save after every evaluation, at the end, and at SIGTERM or Ctrl-C, which end the run with status "
        f"{EXIT_TERMINATED}; on a file system that all ranks share",
    )
    restart.add_argument(
        "--checkpoint-every", type=positive, metavar="N", help="also save after every N steps of an epoch"
    )
    restart.add_argument(
        "--keep",
        type=positive,
        default=2,
        metavar="K",
        help="newest checkpoints to keep, beside the best one (default: %(default)s)",
    )
    restart.add_argument(
        "--resume",
        nargs="?",
        const="required",
        choices=("required", "auto"),
        metavar="auto",
        help="go on from the newest whole checkpoint in --checkpoint-dir, which must be there; auto: start where there "
        "is none, for a command that a scheduler runs again; a restart by torchrun goes on without being told",
    )
    args = parser.parse_args(arguments)
    for option in ("resume", "checkpoint_every"):
        if getattr(args, option) and args.checkpoint_dir is None:
            parser.error(f"--{option.replace('_', '-')} needs --checkpoint-dir")
    if args.table == "full" and args.raw_ids:
        parser.error(
            "--raw-ids is of LMA tables; full tables take the ids of a vocabulary, or with --num-embeddings hashes"
        )
    return args
