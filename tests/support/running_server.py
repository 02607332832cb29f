"""What the tests of the server share: tiny scripted models with a formula known outside them, and a running server."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import torch
from torch import nn

from torchrec_lma.serving.protos.predictor_pb2 import (
    FloatFeatures,
    PredictionRequest,
    PredictionResponse,
    SparseFeatures,
)
from torchrec_lma.serving.server import PredictionServer
from torchrec_lma.serving.settings import Settings

POISON = 666_666  # an id that makes the model fail
FLOATS, IDS, SCORED = ("price", "age"), ("user", "item", "tags"), ("clicks",)


class Formula(nn.Module):
    """A prediction that depends on every number of its row and on nothing else, see `expected`."""

    square: torch.Tensor

    def __init__(self, bias: float = 0.0, work: int = 0) -> None:
        super().__init__()
        self.bias = bias
        self.work = work
        self.register_buffer("square", torch.zeros(256, 256))

    def bags(self, lengths: torch.Tensor, terms: torch.Tensor, rows: int) -> torch.Tensor:
        """Sum over features f and ids of a row of (f + 1) * term, float64 [rows]."""
        bag = torch.repeat_interleave(torch.arange(lengths.size(0)), lengths.long())  # of each id
        feature, row = bag // rows, bag % rows
        return torch.zeros(rows, dtype=torch.float64).index_add(0, row, terms.double() * (feature + 1))

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        floats = features["float_features"].double()
        values = features["id_list_features.values"]
        if bool((values == 666_666).any()):
            raise RuntimeError("poison")
        logits = self.bias + floats.sum(dim=1)
        rows = floats.size(0)
        logits = logits + self.bags(features["id_list_features.lengths"], (values % 101) / 101.0, rows)
        if "id_score_list_features.values" in features:
            scored = (features["id_score_list_features.values"] % 101) / 101.0
            scored = scored * features["id_score_list_features.weights"]
            logits = logits + self.bags(features["id_score_list_features.lengths"], scored, rows)
        for _ in range(self.work):
            self.square = self.square @ self.square
        return {"default": logits.sigmoid().float()}


def save_model(
    path: Path,
    bias: float = 0.0,
    work: int = 0,
    metadata: bool = True,
    floats: tuple[str, ...] = FLOATS,
    ids: tuple[str, ...] = IDS,
    scored: tuple[str, ...] = (),
) -> Path:
    """Writes the model beside `path` and renames it, as an exporter does."""
    fields = {
        "format_version": 1,
        "float_features": floats,
        "id_list_features": ids,
        "id_score_list_features": scored,
        "dtype": "fp32",
        "allocation_fingerprint": "none",
    }
    writing = path.with_suffix(".writing")
    extra = {"torchrec_lma.json": json.dumps(fields)} if metadata else {}
    torch.jit.save(torch.jit.script(Formula(bias, work)), str(writing), _extra_files=extra)
    writing.rename(path)
    return path


class Rows:
    """Random rows, their request, and what the model must say about them."""

    def __init__(
        self,
        rows: int,
        seed: int = 0,
        floats: int = len(FLOATS),
        ids: int = len(IDS),
        scored: int = 0,
        high: int = 2**31,
    ) -> None:
        random = np.random.default_rng(seed)
        self.rows = rows
        self.floats = random.normal(size=(rows, floats)).astype(np.float32)
        self.lengths = random.integers(0, 4, (ids, rows)).astype(np.int32)
        self.values = random.integers(0, high, self.lengths.sum())
        self.scored_lengths = random.integers(0, 4, (scored, rows)).astype(np.int32)
        self.scored_values = random.integers(0, high, self.scored_lengths.sum())
        self.weights = random.uniform(size=self.scored_lengths.sum()).astype(np.float32)

    def request(self, id_type: str = "<i4") -> PredictionRequest:
        return PredictionRequest(
            batch_size=self.rows,
            float_features=FloatFeatures(num_features=self.floats.shape[1], values=self.floats.tobytes()),
            id_list_features=SparseFeatures(
                num_features=len(self.lengths),
                lengths=self.lengths.tobytes(),
                values=self.values.astype(id_type).tobytes(),
            ),
            id_score_list_features=SparseFeatures(
                num_features=len(self.scored_lengths),
                lengths=self.scored_lengths.tobytes(),
                values=self.scored_values.astype(id_type).tobytes(),
                weights=self.weights.tobytes(),
            ),
        )

    def expected(self, bias: float = 0.0) -> np.ndarray:
        """float [rows], with loops over rows, features and ids."""
        logits = bias + self.floats.astype(np.float64).sum(axis=1)
        for lengths, values, weights in (
            (self.lengths, self.values, np.ones(len(self.values))),
            (self.scored_lengths, self.scored_values, self.weights),
        ):
            at = 0
            for feature in range(len(lengths)):
                for row in range(self.rows):
                    for _ in range(lengths[feature, row]):
                        logits[row] += (feature + 1) * (values[at] % 101) / 101 * weights[at]
                        at += 1
        return 1 / (1 + np.exp(-logits))


class Running:
    """A server in a thread of this process, and a stub of its own to talk to it."""

    def __init__(self, server: PredictionServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.address = f"127.0.0.1:{server.port}"
        self.channel = grpc.insecure_channel(self.address, [("grpc.max_send_message_length", -1)])
        self.send_bytes = self.channel.unary_unary("/predictor.Predictor/Predict")

    def run(self, coroutine, timeout: float = 30):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def send(self, request: PredictionRequest, metadata=(), timeout: float = 20) -> np.ndarray:
        answer = self.send_bytes(request.SerializeToString(), timeout=timeout, metadata=metadata)
        return np.array(PredictionResponse.FromString(answer).predictions["default"].data)

    def refusal(self, request: PredictionRequest | bytes, metadata=()) -> tuple[grpc.StatusCode, str]:
        """Status and message of a request that must fail."""
        data = request if isinstance(request, bytes) else request.SerializeToString()
        try:
            self.send_bytes(data, timeout=20, metadata=metadata)
        except grpc.RpcError as error:
            return error.code(), error.details()
        raise AssertionError("the request was answered")

    def metric(self, name: str, **labels: str) -> float:
        return self.server.metrics.registry.get_sample_value(f"torchrec_lma_{name}", labels) or 0.0


@contextmanager
def running(settings: Settings) -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = PredictionServer(settings)
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        served = Running(server, loop)
        try:
            yield served
        finally:
            served.channel.close()
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
