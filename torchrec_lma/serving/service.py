"""The service `predictor.Predictor`: how a request becomes an answer or a refusal."""

import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from torchrec_lma.serving.arrivals import Arrivals, TooSlow
from torchrec_lma.serving.batching import Batcher, QueueFull, Stopped
from torchrec_lma.serving.contract import FEATURES_KEY, ID_TYPE_KEY, Inputs
from torchrec_lma.serving.metrics import Metrics
from torchrec_lma.serving.model import Model
from torchrec_lma.serving.model_store import ModelStore
from torchrec_lma.serving.protos.predictor_pb2 import DESCRIPTOR, FloatVec, PredictionRequest, PredictionResponse
from torchrec_lma.serving.settings import Settings

MAX_STATUS_CHARACTERS = 1000  # clients refuse long ones, and then see another status
STOPPING = "the server is stopping: try another"
SERVICE = DESCRIPTOR.services_by_name["Predictor"].full_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Request:
    """What waits in the queue: checked inputs, the model whose contract they fit, and the size of the message."""

    inputs: Inputs
    model: Model
    nbytes: int

    @property
    def rows(self) -> int:
        return self.inputs.rows

    @property
    def ids(self) -> int:
        return self.inputs.ids


@dataclass
class _Outcome:
    code: grpc.StatusCode = grpc.StatusCode.CANCELLED


class _Refused(Exception):
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class PredictionService:
    """Answers requests with the current model.

    Args:
        settings: for its bounds.
        models: where the current model is.
        metrics: where requests are counted.

    Attributes:
        in_flight: calls that were taken and whose answer has not left yet.
        batcher: where requests wait, to be started and stopped.
        arrivals: where they are received, an interceptor for gRPC.
    """

    def __init__(self, settings: Settings, models: ModelStore, metrics: Metrics) -> None:
        self._stopping = False
        self.in_flight = 0
        self.batcher = Batcher(self._compute, settings.limits)
        self.arrivals = Arrivals(settings.messages_at_once, f"/{SERVICE}/Predict")
        self._settings = settings
        self._models = models
        self._metrics = metrics
        metrics.queue.set_function(lambda: len(self.batcher))
        metrics.arriving.set_function(lambda: self.arrivals.count)

    def refuse_new(self) -> None:
        """From now on; what is still arriving is refused too if it does not come soon."""
        self._stopping = True
        self.arrivals.hurry()

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        """On the wire the method is unary. As a streaming one it gets the call before its message: it may refuse it
        unread, and the message is bytes, so that what is no message is the client's error and not ours."""
        predict = grpc.stream_unary_rpc_method_handler(
            self._predict, response_serializer=PredictionResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Predict": predict})

    async def _predict(self, _: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> PredictionResponse:
        with self._counting() as outcome:
            try:
                response = await self._answer(context)
                outcome.code = grpc.StatusCode.OK
                return response
            except _Refused as refused:
                outcome.code, message = refused.code, str(refused)
            # gRPC keeps the exception that this raises, and so this frame, in a reference cycle. Here, outside `except`
            # and with the request in another frame, that does not hold on to the model when it is exchanged.
            await context.abort(outcome.code, _shortened(message))
            raise AssertionError("abort raises")

    @contextmanager
    def _counting(self) -> Iterator[_Outcome]:
        """Counts a request by how it ended; if nothing is said, it was cancelled: its client left or its time is up."""
        outcome = _Outcome()
        started = time.monotonic()
        try:
            yield outcome
        finally:
            self._metrics.requests.labels(outcome.code.name).inc()
            self._metrics.request_seconds.observe(time.monotonic() - started)

    async def _answer(self, context: grpc.aio.ServicerContext) -> PredictionResponse:
        self._admit(context)
        metadata = dict(context.invocation_metadata() or ())
        request = self._read(await self._receive(context), metadata)
        predictions = await self._submit(request)
        self._metrics.rows.inc(request.rows)
        return PredictionResponse(
            predictions={task: FloatVec(data=values.tolist()) for task, values in predictions.items()}
        )

    def _admit(self, context: grpc.aio.ServicerContext) -> None:
        if self._stopping:
            raise _Refused(grpc.StatusCode.UNAVAILABLE, STOPPING)
        most = self._settings.limits.max_queue
        if len(self.batcher) + self.arrivals.count >= most:
            raise _full(f"{most} requests are waiting")
        self.in_flight += 1
        context.add_done_callback(self._done)

    def _done(self, _: grpc.aio.ServicerContext) -> None:
        self.in_flight -= 1

    async def _receive(self, context: grpc.aio.ServicerContext) -> bytes:
        try:
            message = await self.arrivals.receive(context)
        except TooSlow as error:
            if self._stopping:
                raise _Refused(grpc.StatusCode.UNAVAILABLE, STOPPING) from None
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
        if message is grpc.aio.EOF:
            most = self._settings.max_message_bytes
            raise _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"no message, or one of more than {most:,} bytes")
        return message

    def _read(self, data: bytes, metadata: dict[str, str | bytes]) -> _Request:
        model = self._models.current
        try:
            features = metadata.get(FEATURES_KEY)
            if features is not None and model.contract.named and features != model.contract.fingerprint:
                raise ValueError(
                    "the client's features are not those of the model, or in another order. The model takes "
                    f"float_features {list(model.contract.float_features)}, "
                    f"id_list_features {list(model.contract.id_list_features)}, "
                    f"id_score_list_features {list(model.contract.id_score_list_features)}; of strings are the ids of "
                    f"{list(model.contract.string_features)}"
                )
            message = PredictionRequest.FromString(data)
            inputs = model.contract.read(message, str(metadata.get(ID_TYPE_KEY, "int32")))
            limits = self._settings.limits
            for number, what, most in (
                (inputs.rows, "rows", limits.max_request_rows),
                (inputs.ids, "ids", limits.max_ids),
            ):
                if number > most:
                    raise ValueError(
                        f"the request has {number:,} {what}, more than {most:,}: send its rows in several requests"
                    )
            return _Request(inputs, model, len(data))
        except DecodeError as error:
            raise _Refused(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{len(data)} bytes are not a predictor.PredictionRequest ({error})",
            ) from error
        except ValueError as error:
            raise _Refused(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error

    async def _submit(self, request: _Request) -> dict[str, Any]:
        try:
            return await self.batcher.submit(request)
        except QueueFull as full:
            raise _full(str(full)) from None
        except Stopped:
            raise _Refused(grpc.StatusCode.UNAVAILABLE, STOPPING) from None
        except Exception as error:
            log.exception("the model failed on a request", extra={"fields": {"rows": request.rows}})
            cause = str(error).strip().split("\n")[-1]
            raise _Refused(grpc.StatusCode.INTERNAL, f"the model failed on this request: {cause}") from error

    def _compute(self, requests: Sequence[_Request]) -> Sequence[dict[str, Any]]:
        self._metrics.batch_rows.observe(sum(request.rows for request in requests))
        with self._metrics.compute_seconds.time():
            return requests[0].model.predict([request.inputs for request in requests])


def _full(what: str) -> _Refused:
    return _Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{what}: try again later, or add servers")


def _shortened(message: str) -> str:
    return message if len(message) <= MAX_STATUS_CHARACTERS else f"{message[:MAX_STATUS_CHARACTERS]}..."
