"""A client of the prediction service, for TorchRec batches; works with TorchRec's own server too."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

import grpc
import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.serving.contract import FEATURES_KEY, ID_TYPE_KEY, ID_TYPES, fingerprint_names
from torchrec_lma.serving.protos.predictor_pb2 import (
    FloatFeatures,
    PredictionRequest,
    PredictionResponse,
    SparseFeatures,
)

PREDICT = "/predictor.Predictor/Predict"


def make_request(
    float_features: torch.Tensor,
    id_list_features: KeyedJaggedTensor,
    id_score_list_features: KeyedJaggedTensor | None = None,
    id_type: str = "int32",
) -> PredictionRequest:
    """The message for B rows.

    Args:
        float_features: float [B, float features].
        id_list_features: features in the model's order; values of any integer type.
        id_score_list_features: weighted ones, if the model has any.
        id_type: int32 as the protocol says, or int64.

    Raises:
        TypeError: ids that are not integers.
        ValueError: an id does not fit, naming feature, row and id; or the parts differ in the number of rows.
    """
    if id_type not in ID_TYPES:
        raise ValueError(f"id_type={id_type!r} must be one of {', '.join(ID_TYPES)}")
    rows = len(float_features)
    for name, features in (("id_list_features", id_list_features), ("id_score_list_features", id_score_list_features)):
        if features is not None and features.keys() and features.stride() != rows:
            raise ValueError(f"{name} has {features.stride()} rows and float_features {rows}: give the same rows")
    return PredictionRequest(
        batch_size=rows,
        float_features=FloatFeatures(
            num_features=float_features.shape[1], values=float_features.numpy(force=True).astype("<f4").tobytes()
        ),
        id_list_features=_sparse(id_list_features, id_type),
        id_score_list_features=_sparse(id_score_list_features, id_type) if id_score_list_features is not None else None,
    )


def _sparse(features: KeyedJaggedTensor, id_type: str) -> SparseFeatures:
    values = features.values().numpy(force=True)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"ids of {features.keys()} are {values.dtype}; expected integers, so that none is cut")
    range_ = np.iinfo(ID_TYPES[id_type])
    outside = np.flatnonzero((values < range_.min) | (values > range_.max))
    if outside.size:
        at = int(outside[0])
        bag = int(torch.searchsorted(features.offsets().cpu(), at, right=True)) - 1
        feature, row = divmod(bag, features.stride())
        raise ValueError(
            f"id {values[at]} of {features.keys()[feature]!r}, row {row}, does not fit the protocol's {id_type} "
            f"({outside.size} ids of {values.size} do not): number the ids within 31 bits before training, or, if the "
            "server is torchrec-lma's, send int64 (id_type='int64')"
        )
    return SparseFeatures(
        num_features=len(features.keys()),
        lengths=features.lengths().numpy(force=True).astype("<i4").tobytes(),
        values=values.astype(ID_TYPES[id_type]).tobytes(),
        weights=features.weights().numpy(force=True).astype("<f4").tobytes()
        if features.weights_or_none() is not None
        else b"",
    )


class PredictionClient:
    """Predictions over gRPC. Use it as a context manager, or `close` it; threads may share it.

    Args:
        address: host:port.
        id_type: int32 fits every server of TorchRec's protocol; int64 is understood by torchrec-lma's.
        timeout_seconds: of a call; the server does not compute what is later than that.
        root_certificate: PEM file that signed the server's certificate; with it the connection is TLS.
        certificate: PEM file of this client, where the server asks for one (mTLS).
        key: PEM file of the certificate's key.

    Raises:
        ValueError: a certificate without its key or without root_certificate.

    Example::

        with PredictionClient("127.0.0.1:50051") as client:
            probabilities = client.predict(batch.dense_features, batch.sparse_features)
    """

    def __init__(
        self,
        address: str,
        id_type: str = "int32",
        timeout_seconds: float = 10.0,
        root_certificate: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        if (certificate is None) != (key is None):
            raise ValueError("certificate and key go together: give both or neither")
        if certificate is not None and root_certificate is None:
            raise ValueError("a client certificate needs root_certificate: without it nothing would be encrypted")
        self._id_type = id_type
        self._timeout_seconds = timeout_seconds
        options = [("grpc.max_receive_message_length", -1)]
        if re.fullmatch(r"(localhost|\[::1\]|127(\.\d+){3}):\d+", address):
            options.append(("grpc.enable_http_proxy", 0))  # a proxy has a loopback of its own
        if root_certificate is not None:
            credentials = grpc.ssl_channel_credentials(
                root_certificate.read_bytes(),
                key.read_bytes() if key is not None else None,
                certificate.read_bytes() if certificate is not None else None,
            )
            self._channel = grpc.secure_channel(address, credentials, options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._call = self._channel.unary_unary(
            PREDICT,
            request_serializer=PredictionRequest.SerializeToString,
            response_deserializer=PredictionResponse.FromString,
        )

    def predict(
        self,
        float_features: torch.Tensor,
        id_list_features: KeyedJaggedTensor,
        id_score_list_features: KeyedJaggedTensor | None = None,
        float_names: Sequence[str] | None = None,
        string_features: Iterable[str] = (),
    ) -> np.ndarray:
        """float32 [B], the probabilities of B rows.

        Args: as `make_request`, and
            float_names: of the columns of float_features. With them the server checks that all features are the
                model's, in its order; without them only their number is checked.
            string_features: those whose ids are hashes of strings, which the server then checks too.

        Raises:
            ValueError: as `make_request`; or the server gave another number of predictions.
            grpc.RpcError: the server refused or cannot be reached; `.code()` and `.details()` say why.
        """
        request = make_request(float_features, id_list_features, id_score_list_features, self._id_type)
        metadata = [(ID_TYPE_KEY, self._id_type)]
        if float_names is not None:
            scored = id_score_list_features.keys() if id_score_list_features is not None else ()
            names = (float_names, id_list_features.keys(), scored)
            metadata.append((FEATURES_KEY, fingerprint_names(*names, string_features=string_features)))
        response = self._call(request, timeout=self._timeout_seconds, metadata=metadata)
        tasks = sorted(response.predictions)  # before the next line, which would make a "default" one
        predictions = np.array(response.predictions["default"].data, np.float32)
        if len(predictions) != request.batch_size:
            raise ValueError(
                f'the server answered {request.batch_size} rows with {len(predictions)} values of the task "default" '
                f"(it has the tasks {tasks}): is it a server of the predictor.Predictor protocol?"
            )
        return predictions

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> "PredictionClient":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
