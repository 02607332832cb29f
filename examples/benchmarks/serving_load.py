"""Load on the prediction server: how fast served models answer, and whether they stay right for a long time.

    python examples/benchmarks/serving_load.py --model lma=lma.pt --model full=full.pt --rate 300 --seconds 20
    python examples/benchmarks/serving_load.py --model a=lma.pt --model b=full.pt --rate 100 --soak 10

Each model is served by a `torchrec-lma serve` of its own, one after the other, on loopback. Requests are rows of the
test split and arrive at random (Poisson) whether or not earlier ones are answered. A latency counts from the time at
which a request was due, so a server that falls behind shows. The load comes from the same machine and competes with the
server for its cores.

--soak serves one file and replaces it by the next of the models every few seconds, with bad requests and clients that
leave mixed in. Every answer must be that of one of the models. The exit status is 1 if one is not, if a request fails,
if new models are not taken over, or if the server's RAM grows.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fbgemm_gpu  # noqa: F401  registers the operators of scripted tables
import grpc
import numpy as np
import torch

from torchrec_lma.files import replacing
from torchrec_lma.options import add_data_options, open_dataset
from torchrec_lma.quant import request as contract_request
from torchrec_lma.serving.client import PREDICT, make_request
from torchrec_lma.serving.contract import ID_TYPE_KEY
from torchrec_lma.serving.protos.predictor_pb2 import PredictionRequest, PredictionResponse

MAX_OUTSTANDING = 2000  # requests sent and not answered; more are not sent, and counted
TOLERANCE = 1e-5  # of a probability: a row's floats round differently in batches of different sizes
MEMORY_GROWTH = 1.1  # of the server, from the first third of a soak to its last


class Server:
    """`torchrec-lma serve` in a process of its own."""

    def __init__(self, model: Path, options: Sequence[str]) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "torchrec_lma.cli", "serve", str(model), "--port", "0"]
        self._process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        self.events: list[dict[str, Any]] = []
        self._serving = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._serving.wait()
        if self._process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended: {self.events}")

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if not line.startswith("{"):
                self.events.append({"event": line.strip()})
                continue
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == "serving":
                self._serving.set()
        self._process.wait()
        self._serving.set()

    @property
    def address(self) -> str:
        (serving,) = (event for event in self.events if event["event"] == "serving")
        return f"127.0.0.1:{serving['port']}"

    def count(self, name: str) -> int:
        return sum(event["event"] == name for event in self.events)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime, stime

    def memory_bytes(self) -> int:
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        """The exit status; -9 where it had to be killed."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._reader.join()
        return self._process.wait()


@contextmanager
def serving(model: Path, options: Sequence[str]) -> Iterator[Server]:
    server = Server(model, options)
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Load:
    """Requests and, for each, the right answers: one of each model, float32 [models, rows]."""

    requests: list[bytes]
    answers: list[np.ndarray]


def make_load(args: argparse.Namespace, models: Sequence[Path]) -> Load:
    load = Load([], [])
    modules = [torch.jit.load(str(model)).eval() for model in models]
    dataset = open_dataset(args)
    for batch in dataset.batches("test", batch_size=args.rows):
        message = make_request(batch.dense_features, batch.sparse_features, id_type="int64")
        load.requests.append(message.SerializeToString())
        rows = contract_request(batch.dense_features, batch.sparse_features)
        with torch.inference_mode():
            load.answers.append(np.stack([module(rows)["default"].numpy() for module in modules]))
        if len(load.requests) == args.distinct:
            break
    return load


@dataclass
class Outcome:
    seconds: list[float] = field(default_factory=list)  # of the answered, from when they were due
    counts: Counter = field(default_factory=Counter)

    def summary(self, elapsed: float) -> dict[str, Any]:
        milliseconds = 1000 * np.array(self.seconds or [np.nan])
        return {
            **self.counts,
            "requests_per_second": round(len(self.seconds) / elapsed, 1),
            **{f"p{p}_ms": round(float(np.percentile(milliseconds, p)), 2) for p in (50, 90, 99)},
        }


class Sender:
    """Sends requests to one address and checks what comes back."""

    def __init__(self, address: str, load: Load, allowed: Sequence[int], seed: int) -> None:
        self.load = load
        self.allowed = list(allowed)  # models whose answers are right
        self.random = random.Random(seed)
        self.outcome = Outcome()
        self._channel = grpc.aio.insecure_channel(address)
        self._call = self._channel.unary_unary(PREDICT)
        self._outstanding: set[asyncio.Task[None]] = set()

    async def send_at_rate(self, rate: float, seconds: float, bad_share: float = 0.0) -> None:
        """Poisson arrivals, and then the wait for the last answers."""
        start = due = time.perf_counter()
        while due < start + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if len(self._outstanding) >= MAX_OUTSTANDING:
                self.outcome.counts["not_sent"] += 1
            else:
                bad = self.random.random() < bad_share
                task = asyncio.create_task(self._bad() if bad else self._good(due))
                self._outstanding.add(task)
                task.add_done_callback(self._outstanding.discard)
            due += self.random.expovariate(rate)
        await asyncio.gather(*self._outstanding)

    async def close(self) -> None:
        await self._channel.close()

    async def _good(self, due: float) -> None:
        index = self.random.randrange(len(self.load.requests))
        try:
            data = await self._call(self.load.requests[index], timeout=10, metadata=[(ID_TYPE_KEY, "int64")])
        except grpc.RpcError as error:
            self.outcome.counts[f"failed_{error.code().name}"] += 1
            return
        self.outcome.seconds.append(time.perf_counter() - due)
        answer = np.array(PredictionResponse.FromString(data).predictions["default"].data, np.float32)
        right = self.load.answers[index][self.allowed]
        same = answer.shape == right.shape[1:] and (np.abs(right - answer).max(axis=1) <= TOLERANCE).any()
        self.outcome.counts["right" if same else "wrong"] += 1

    async def _bad(self) -> None:
        """What must be refused, or a client that leaves."""
        request = PredictionRequest.FromString(self.random.choice(self.load.requests))
        fault = self.random.choice(("garbage", "size", "negative", "nan", "leaves"))
        if fault == "leaves":
            call = self._call(request.SerializeToString(), metadata=[(ID_TYPE_KEY, "int64")])
            await asyncio.sleep(self.random.random() * 0.005)
            call.cancel()
            self.outcome.counts["left"] += 1
            return
        if fault == "size":
            request.batch_size += self.random.choice((-1, 1, 2**31 - 1 - request.batch_size))
        elif fault == "negative":
            request.id_list_features.lengths = b"\xff" * len(request.id_list_features.lengths)
        elif fault == "nan":
            request.float_features.values = b"\xff" * len(request.float_features.values)
        data = self.random.randbytes(200) if fault == "garbage" else request.SerializeToString()
        try:
            await self._call(data, timeout=10, metadata=[(ID_TYPE_KEY, "int64")])
            self.outcome.counts["bad_answered"] += 1
        except grpc.RpcError as error:
            refused = error.code() == grpc.StatusCode.INVALID_ARGUMENT
            self.outcome.counts["bad_refused" if refused else f"bad_{error.code().name}"] += 1


def measure(args: argparse.Namespace, models: dict[str, Path], load: Load) -> dict[str, Any]:
    """Each model in turn, `--rounds` times, so that what else the machine does meets all of them."""

    async def one(server: Server, index: int, seed: int) -> dict[str, Any]:
        warm_up = Sender(server.address, load, [index], seed)
        await warm_up.send_at_rate(args.rate, 2)
        await warm_up.close()
        sender = Sender(server.address, load, [index], seed)
        started, cpu = time.perf_counter(), server.cpu_seconds()
        await sender.send_at_rate(args.rate, args.seconds)
        summary = sender.outcome.summary(time.perf_counter() - started)
        summary["server_cpu_ms_per_request"] = round(
            1000 * (server.cpu_seconds() - cpu) / max(1, len(sender.outcome.seconds)), 3
        )
        summary["server_memory_mib"] = server.memory_bytes() >> 20
        await sender.close()
        return summary

    results: dict[str, Any] = {name: [] for name in models}
    for turn in range(args.rounds):
        for index, (name, path) in enumerate(models.items()):
            with serving(path, args.serve_option) as server:
                result = asyncio.run(one(server, index, args.seed + turn))
            results[name].append(result)
            print(f"{name}: {json.dumps(result)}", flush=True)
    return results


def soak(args: argparse.Namespace, models: dict[str, Path], load: Load) -> dict[str, Any]:
    """Load with swaps and bad requests for `--soak` minutes."""
    memory: list[int] = []
    swaps = 0

    async def run(server: Server, path: Path) -> Sender:
        nonlocal swaps
        sender = Sender(server.address, load, range(len(models)), args.seed)
        sending = asyncio.create_task(sender.send_at_rate(args.rate, 60 * args.soak, bad_share=0.2))
        while not sending.done():
            await asyncio.wait({sending}, timeout=args.swap_seconds)
            memory.append(server.memory_bytes())
            swaps += 1
            replace(path, list(models.values())[swaps % len(models)])
        await sending
        await sender.close()
        return sender

    def replace(path: Path, source: Path) -> None:
        with replacing(path) as temporary:
            shutil.copyfile(source, temporary)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        replace(path, next(iter(models.values())))
        server = Server(path, args.serve_option)
        started = time.perf_counter()
        try:
            sender = asyncio.run(run(server, path))
            elapsed = time.perf_counter() - started
            loads = server.count("model loaded")
            refused_models = [event["error"] for event in server.events if event["event"].startswith("model refused")]
        finally:
            status = server.stop()
    third = max(1, len(memory) // 3)
    first, last = statistics.median(memory[:third]), statistics.median(memory[-third:])
    counts = sender.outcome.counts
    result = {
        **sender.outcome.summary(elapsed),
        "minutes": round(elapsed / 60, 2),
        "files_replaced": swaps,
        "models_loaded": loads,
        "models_refused": refused_models,
        "memory_mib": {"first_third": int(first) >> 20, "last_third": int(last) >> 20, "max": max(memory) >> 20},
        "memory_mib_over_time": [size >> 20 for size in memory],
        "exit_status": status,
    }
    unexpected = {name: n for name, n in counts.items() if name not in ("right", "bad_refused", "left")}
    result["passed"] = (
        not unexpected
        and status == 0
        and not refused_models
        and loads - 1 > swaps // 2  # the last files may come too late, or two between two looks
        and last <= MEMORY_GROWTH * first
    )
    print(json.dumps(result, indent=1))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", required=True, metavar="NAME=FILE", help="may be given several times"
    )
    parser.add_argument("--rate", type=float, default=200, help="requests a second (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="of load on each model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="through all models (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=32, help="of a request (default: %(default)s)")
    parser.add_argument("--distinct", type=int, default=200, help="requests to choose from (default: %(default)s)")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="look for faults instead of measuring")
    parser.add_argument("--swap-seconds", type=float, default=5, help="between new models in a soak (default: 5)")
    parser.add_argument(
        "--serve-option", action="append", default=[], help="of torchrec-lma serve, as --serve-option=--x"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals and choices (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    add_data_options(parser)
    args = parser.parse_args()
    models = {name: Path(file) for name, _, file in (model.partition("=") for model in args.model)}
    torch.set_num_threads(1)
    load = make_load(args, list(models.values()))
    result = measure(args, models, load) if args.soak is None else soak(args, models, load)
    if args.json is not None:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1))
    return 0 if args.soak is None or result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
