"""examples/dlrm/train.py, in which one rank sends itself a signal or ruins its weights, as a test's `Fault` says."""

import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "dlrm"
sys.path.insert(0, str(EXAMPLE))


@dataclass
class Fault:
    """
    Attributes:
        signal: number of the signal; 0: a weight becomes NaN instead.
        rank: which rank gets it.
        step: in this step of all epochs, from 1; 0: in the middle of a save.
        file: of a save: before this file of the checkpoint is written.
        save: of a save: before the how manieth checkpoint is whole, from 0.
        done: is created when the signal is sent: a restarted rank gets no other one.
        to_torchrun: the signal goes to the process above the rank instead.
    """

    signal: int
    rank: int
    step: int
    done: str
    file: str = ""
    save: int = 0
    to_torchrun: bool = False

    def to_environment(self) -> dict[str, str]:
        return {"FAULT": json.dumps(asdict(self))}

    def send(self) -> None:
        if int(os.environ["RANK"]) == self.rank and not Path(self.done).exists():
            Path(self.done).touch()
            os.kill(os.getppid() if self.to_torchrun else os.getpid(), self.signal)


def install(fault: Fault) -> None:
    import checkpointing
    import torch
    from trainer import Trainer

    over_ranks, write_json = Trainer._over_ranks, checkpointing._write_json

    def counting(self: Any, *values: Any) -> list[float]:
        in_a_step = len(values) == 2 and self.model.training  # before the step is counted
        if in_a_step and self.progress.steps + 1 == fault.step:
            if fault.signal:
                fault.send()
            elif int(os.environ["RANK"]) == fault.rank:
                torch.nn.init.constant_(next(self.model.parameters()), torch.nan)
        return over_ranks(self, *values)

    def writing(file: Path, content: dict[str, Any]) -> None:
        if not fault.step and file.name == fault.file and len(list(file.parents[1].glob("step-*"))) == fault.save:
            fault.send()
        write_json(file, content)

    Trainer._over_ranks, checkpointing._write_json = counting, writing  # type: ignore[method-assign]


if __name__ == "__main__":
    import train

    # Ignored where the tests run in the background of a shell, or under nohup, which the trainer respects.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if "FAULT" in os.environ:
        install(Fault(**json.loads(os.environ["FAULT"])))
    try:
        train.main(train.parse_args())
    except train.Terminated:
        sys.exit(train.EXIT_TERMINATED)
