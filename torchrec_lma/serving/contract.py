"""What a served model takes, and the check of each request against it before it meets other requests in a batch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # an extra, which what only exports does without
    from torchrec_lma.serving.protos.predictor_pb2 import FloatFeatures, PredictionRequest, SparseFeatures

METADATA_FILE = "torchrec_lma.json"  # in the TorchScript archive: a model's `Contract`
FORMAT_VERSION = 1
NAME_FIELDS = ("float_features", "id_list_features", "id_score_list_features")
# What a request may say beside TorchRec's message, in gRPC metadata. Other servers take no notice of it.
ID_TYPE_KEY = "lma-id-type"  # a key of ID_TYPES: int64 where ids do not fit the protocol's int32
FEATURES_KEY = "lma-features"  # `fingerprint_names` of the features as the client orders them
ID_TYPES: dict[str, np.dtype[Any]] = {"int32": np.dtype("<i4"), "int64": np.dtype("<i8")}

_FLOAT, _LENGTH = np.dtype("<f4"), np.dtype("<i4")


@dataclass(frozen=True)
class Sparse:
    """Bags of ids of F features and B rows, feature-major: lengths int32 [F, B], values int32 or int64 [ids]."""

    lengths: np.ndarray
    values: np.ndarray
    weights: np.ndarray | None = None  # float32 [ids]


@dataclass(frozen=True)
class Inputs:
    """One request that fits the contract: float_features float32 [B, F] and the bags of both kinds of id features."""

    float_features: np.ndarray
    id_list_features: Sparse
    id_score_list_features: Sparse

    @property
    def rows(self) -> int:
        return len(self.float_features)

    @property
    def ids(self) -> int:
        return len(self.id_list_features.values) + len(self.id_score_list_features.values)


@dataclass(frozen=True)
class Contract:
    """Names of a model's features, in the order in which requests hold them.

    Args:
        float_features, id_list_features, id_score_list_features: as the keys of TorchRec's inference contract.
        string_features: those of them whose ids are hashes of strings: the same ids as integers are other ids.
        named: whether these are the names of columns, or only numbers, because the model does not carry names.
        dtype, allocation_fingerprint: of the tables, for the log; empty where the model does not say.

    Raises:
        ValueError: the model takes no feature at all.
    """

    float_features: tuple[str, ...]
    id_list_features: tuple[str, ...]
    id_score_list_features: tuple[str, ...] = ()
    string_features: tuple[str, ...] = ()
    named: bool = True
    dtype: str = ""
    allocation_fingerprint: str = ""

    def __post_init__(self) -> None:
        if not any(self.counts):
            raise ValueError("the model takes no features: a request would have no size; export it with its features")

    @property
    def counts(self) -> tuple[int, int, int]:
        return len(self.float_features), len(self.id_list_features), len(self.id_score_list_features)

    @classmethod
    def from_counts(cls, counts: Sequence[int]) -> "Contract":
        """Of a model that carries no names: the number of features of each of `NAME_FIELDS`."""
        floats, ids, scored = (tuple(f"#{i}" for i in range(count)) for count in counts)
        return cls(floats, ids, scored, named=False)

    @classmethod
    def from_json(cls, text: bytes | str) -> "Contract":
        """Reads `METADATA_FILE`.

        Raises:
            ValueError: it is not JSON, of another version, or a field is missing or of another type.
        """
        try:
            fields = json.loads(text)
        except ValueError as error:  # UnicodeDecodeError too
            raise ValueError(f"{METADATA_FILE} is not JSON ({error}): export the model again") from error
        if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
            version = fields.get("format_version") if isinstance(fields, dict) else None
            raise ValueError(f"{METADATA_FILE} has format_version {version!r}, not {FORMAT_VERSION}: export it again")
        for name in NAME_FIELDS:
            names = fields.get(name)
            if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
                raise ValueError(f"{METADATA_FILE}: {name}={names!r} must be a list of names: export the model again")
        floats, ids, scored = (tuple(fields[name]) for name in NAME_FIELDS)
        return cls(
            floats,
            ids,
            scored,
            tuple(map(str, fields.get("string_features") or ())),
            dtype=str(fields.get("dtype") or ""),
            allocation_fingerprint=str(fields.get("allocation_fingerprint") or ""),
        )

    def to_json(self) -> str:
        """The inverse of `from_json`."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in NAME_FIELDS}
        fields |= {
            "string_features": self.string_features,
            "dtype": self.dtype,
            "allocation_fingerprint": self.allocation_fingerprint,
        }
        return json.dumps({"format_version": FORMAT_VERSION, **fields})

    @property
    def fingerprint(self) -> str:
        """Of the names and their order, see `fingerprint_names`."""
        names = (self.float_features, self.id_list_features, self.id_score_list_features)
        return fingerprint_names(*names, string_features=self.string_features)

    def read(self, request: "PredictionRequest", id_type: str = "int32") -> Inputs:
        """The request's arrays, checked: sizes multiply out, lengths add up, floats are finite.

        Args:
            request: as it came.
            id_type: of the ids in it, a key of `ID_TYPES`; the protocol's own is int32.

        Raises:
            ValueError: the request does not fit, naming the field and, where there is one, feature and row.
        """
        if id_type not in ID_TYPES:
            raise ValueError(f"ids of type {id_type!r} are unknown: send {' or '.join(ID_TYPES)}")
        rows = request.batch_size
        if rows < 1:
            raise ValueError(f"batch_size is {rows}: send at least one row, and say how many")
        for name, unused in (
            ("embedding_features", request.embedding_features),
            ("unary_features", request.unary_features),
        ):
            if unused.num_features or unused.values:
                raise ValueError(f"{name} is not empty: the model takes none, leave it out")
        return Inputs(
            _read_floats("float_features", request.float_features, rows, self.float_features),
            _read_sparse("id_list_features", request.id_list_features, rows, self.id_list_features, id_type, False),
            _read_sparse(
                "id_score_list_features",
                request.id_score_list_features,
                rows,
                self.id_score_list_features,
                id_type,
                True,
            ),
        )


def fingerprint_names(*names: Sequence[str], string_features: Iterable[str] = ()) -> str:
    """32 hex digits of the names of float, id-list and id-score-list features in their order, and of which of them the
    ids are hashes of strings, in the order of names, where any are.

    A client that knows names sends it; otherwise columns in another order, or ids that are integers here and strings
    there, would be scored without an error.
    """
    groups = [list(group) for group in names] + [strings for strings in [sorted(string_features)] if strings]
    return hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:32]


def _read_floats(field: str, message: "FloatFeatures", rows: int, names: Sequence[str]) -> np.ndarray:
    """float32 [rows, names]"""
    _check_count(field, message.num_features, names)
    values = _array(f"{field}.values", message.values, _FLOAT, rows * len(names), f"{len(names)} floats x {rows} rows")
    values = values.reshape(rows, len(names))
    finite = np.isfinite(values)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"{field} {names[column]!r} of row {row} is {values[row, column]}: send finite numbers")
    return values


def _read_sparse(
    field: str, message: "SparseFeatures", rows: int, names: Sequence[str], id_type: str, weighted: bool
) -> Sparse:
    _check_count(field, message.num_features, names)
    lengths = _array(
        f"{field}.lengths", message.lengths, _LENGTH, rows * len(names), f"{len(names)} features x {rows} rows"
    ).reshape(len(names), rows)
    if (lengths < 0).any():
        feature, row = np.argwhere(lengths < 0)[0]
        raise ValueError(
            f"{field}.lengths of {names[feature]!r}, row {row}, is {lengths[feature, row]}: a bag has 0 ids or more"
        )
    ids = int(lengths.sum(dtype=np.int64))  # 32 bits would overflow
    values = _array(f"{field}.values", message.values, ID_TYPES[id_type], ids, f"the sum of the lengths, {id_type}")
    if not weighted:
        if message.weights:
            raise ValueError(f"{field}.weights is not empty: weighted features go into id_score_list_features")
        return Sparse(lengths, values)
    weights = _array(f"{field}.weights", message.weights, _FLOAT, ids, "one for each id")
    if not np.isfinite(weights).all():
        at = int(np.flatnonzero(~np.isfinite(weights))[0])
        raise ValueError(f"{field}.weights[{at}] is {weights[at]}: send finite numbers")
    return Sparse(lengths, values, weights)


def _check_count(field: str, count: int, names: Sequence[str]) -> None:
    if count != len(names):
        raise ValueError(f"{field}.num_features is {count}: the model takes {len(names)}{_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    if not names or names[0].startswith("#"):
        return ""
    return f" ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"


def _array(field: str, data: bytes, dtype: np.dtype[Any], count: int, why: str) -> np.ndarray:
    """`count` numbers of `dtype`, a view of `data`."""
    if len(data) == count * dtype.itemsize:
        return np.frombuffer(data, dtype)
    hint = ""
    if dtype == ID_TYPES["int32"] and len(data) == 2 * count * dtype.itemsize:
        hint = "; these look like int64, the protocol has int32: cast them"
    raise ValueError(
        f"{field} has {len(data)} bytes: {count} values of {dtype.itemsize} bytes were expected ({why}){hint}"
    )
