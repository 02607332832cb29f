"""Requests nobody meant to send, over real gRPC: each is answered rightly or refused, and the server goes on.

`corpus/requests` holds messages that once went wrong, or that are likely to; each is sent in every run. Add the bytes
that a failing run prints.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from support.running_server import FLOATS, IDS, SCORED, Rows, Running, running, save_model
from torchrec_lma.serving.protos.predictor_pb2 import PredictionRequest
from torchrec_lma.serving.settings import Settings

CORPUS = sorted((Path(__file__).parent / "corpus" / "requests").glob("*"))
EDGES = (0, 1, -1, 2, 3, 127, 2**16, 2**31 - 1, -(2**31))
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = save_model(tmp_path_factory.mktemp("model") / "model.pt", scored=SCORED)
    with running(Settings(model, port=0)) as server:
        yield server


def right_answer(data: bytes) -> np.ndarray | None:
    """What the model says to a request, [rows], read with loops and struct; None if the request is not well-formed."""
    try:
        request = PredictionRequest.FromString(data)
    except DecodeError:
        return None
    rows = request.batch_size
    counts = (request.float_features.num_features, request.id_list_features.num_features)
    if (*counts, request.id_score_list_features.num_features) != (len(FLOATS), len(IDS), len(SCORED)):
        return None
    unused = (request.embedding_features, request.unary_features)
    if any(part.num_features or part.values for part in unused) or request.id_list_features.weights:
        return None
    if not 1 <= rows <= 10**6 or len(request.float_features.values) != 4 * len(FLOATS) * rows:
        return None
    floats = struct.unpack(f"<{len(FLOATS) * rows}f", request.float_features.values)
    logits = [sum(floats[row * len(FLOATS) : (row + 1) * len(FLOATS)]) for row in range(rows)]
    if not np.isfinite(floats).all():
        return None
    for part, names, weighted in (
        (request.id_list_features, IDS, False),
        (request.id_score_list_features, SCORED, True),
    ):
        if len(part.lengths) != 4 * len(names) * rows:
            return None
        lengths = struct.unpack(f"<{len(names) * rows}i", part.lengths)
        total = sum(lengths)
        if min(lengths) < 0 or len(part.values) != 4 * total or (weighted and len(part.weights) != 4 * total):
            return None
        ids = struct.unpack(f"<{total}i", part.values)
        weights = struct.unpack(f"<{total}f", part.weights) if weighted else [1.0] * total
        if not np.isfinite(weights).all():
            return None
        at = 0
        for bag, length in enumerate(lengths):
            for _ in range(length):
                # torch's % has the sign of the divisor, as Python's
                logits[bag % rows] += (bag // rows + 1) * (ids[at] % 101) / 101 * weights[at]
                at += 1
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-np.array(logits)))


def check(server: Running, data: bytes) -> None:
    answer = right_answer(data)
    if answer is None:
        code, message = server.refusal(data)
        assert code == grpc.StatusCode.INVALID_ARGUMENT, message
        assert message
    else:
        np.testing.assert_allclose(server.send(PredictionRequest.FromString(data)), answer, rtol=1e-4, atol=1e-6)


VALID = st.builds(
    lambda rows, seed: Rows(rows, seed, scored=len(SCORED)).request(), st.integers(1, 4), st.integers(0, 1000)
)


@st.composite
def changed_requests(draw: st.DrawFn) -> bytes:
    """A valid request with some of its fields, or of the numbers inside them, replaced."""
    request = draw(VALID)
    for _ in range(draw(st.integers(0, 3))):
        parts = ["float_features", "id_list_features", "id_score_list_features", "embedding_features", "unary_features"]
        name = draw(st.sampled_from(["batch_size", *parts]))
        if name == "batch_size":
            request.batch_size = draw(st.sampled_from(EDGES) | st.integers(-3, 8))
            continue
        part = getattr(request, name)
        field = draw(st.sampled_from([field.name for field in part.DESCRIPTOR.fields]))
        if field == "num_features":
            part.num_features = draw(st.sampled_from(EDGES) | st.integers(-3, 8))
            continue
        data = bytearray(getattr(part, field))
        change = draw(st.sampled_from(["number", "cut", "append", "repeat", "replace"]))
        if change == "number" and len(data) >= 4:
            at = 4 * draw(st.integers(0, len(data) // 4 - 1))
            number = draw(
                st.sampled_from(EDGES).map(lambda value: struct.pack("<i", value))
                | st.sampled_from([float("nan"), float("inf"), 1e38, -0.0]).map(lambda value: struct.pack("<f", value))
                | st.binary(min_size=4, max_size=4)
            )
            data[at : at + 4] = number
        elif change == "cut":
            del data[draw(st.integers(0, len(data))) :]
        elif change == "append":
            data += draw(st.binary(max_size=16))
        elif change == "repeat":
            data *= 2
        else:
            data = bytearray(draw(st.binary(max_size=32)))
        setattr(part, field, bytes(data))
    return request.SerializeToString()


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(served: Running, path: Path) -> None:
    check(served, path.read_bytes())


@FUZZ
@given(changed_requests())
def test_changed_requests(served: Running, data: bytes) -> None:
    check(served, data)


@FUZZ
@given(st.binary(max_size=200))
@example(b"")
def test_any_bytes(served: Running, data: bytes) -> None:
    check(served, data)


@FUZZ
@given(VALID, st.data())
def test_damaged_bytes_of_a_request(served: Running, request: PredictionRequest, data: st.DataObject) -> None:
    content = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    check(served, bytes(content[: data.draw(st.integers(0, len(content)))]))
