"""From a float model to a file that TorchRec's inference server loads, checked before it has its name."""

import io
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torchrec.inference.modules import PredictModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.checkpoint import CheckpointReader, load
from torchrec_lma.collection import LMACollection
from torchrec_lma.files import replacing
from torchrec_lma.quant.transforms import DTYPES, quantize, script
from torchrec_lma.serving.contract import METADATA_FILE, Contract

DEVICES = ("cpu", "cuda")
# Largest difference of a probability from the float model's that is taken for rounding and not for a fault.
TOLERANCES = {"fp32": 0.001, "fp16": 0.01, "int8": 0.05, "int4": 0.2, "int2": 0.5}
ID_LIST, ID_SCORE_LIST = "id_list_features", "id_score_list_features"

# Runs where nothing but torch and fbgemm_gpu is imported, as in a server.
_PREDICT = """
import io, sys, torch, fbgemm_gpu
torch.set_num_threads(int(sys.argv[2]))
model = torch.jit.load(sys.argv[1])
requests = torch.load(io.BytesIO(sys.stdin.buffer.read()))
predictions = io.BytesIO()
torch.save([model(request)["default"] for request in requests], predictions)
assert not {"torchrec", "torchrec_lma"} & set(sys.modules), "it needs more than fbgemm_gpu"
sys.stdout.buffer.write(predictions.getvalue())
"""


class CheckFailed(RuntimeError):
    """The exported model does not predict what it should."""


@dataclass(frozen=True)
class ServableModel:
    """What a factory for `torchrec-lma export` returns: a trained float model on the CPU, and how its requests look.

    Attributes:
        model: called with float_features, float32 [B, len(float_features)]; then with the KeyedJaggedTensor of
            id_list_features if there are any; then with the weighted one of id_score_list_features if there are any.
            Returns logits [B] or [B, 1]. It must trace with `torchrec.fx.Tracer`: annotate KeyedJaggedTensor arguments.
        float_features, id_list_features, id_score_list_features: names in the order in which requests hold them.
        sample: real rows that the export is checked on, under the keys of `request`.
        string_features: those whose ids are hashes of strings; clients then have to say the same.
    """

    model: nn.Module
    float_features: Sequence[str]
    id_list_features: Sequence[str]
    id_score_list_features: Sequence[str]
    sample: dict[str, Tensor]
    string_features: Sequence[str] = ()


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        path: of the model.
        nbytes: of the file.
        rows: sample rows that it was checked on.
        difference: largest difference of a probability from the float model's.
        tolerance: that difference was allowed to be.
    """

    path: Path
    nbytes: int
    rows: int
    difference: float
    tolerance: float


def request(
    float_features: Tensor, id_list: KeyedJaggedTensor | None = None, id_score_list: KeyedJaggedTensor | None = None
) -> dict[str, Tensor]:
    """Rows as TorchRec's inference contract has them.

    Args:
        float_features: float32 [B, F].
        id_list: bags of ids, in the order of the model's id_list_features.
        id_score_list: weighted ones.
    Returns:
        float_features; id_list_features.lengths [F * B], feature-major, and .values; id_score_list_features.lengths,
        .values and .weights.
    """
    rows = {"float_features": float_features}
    for prefix, features in ((ID_LIST, id_list), (ID_SCORE_LIST, id_score_list)):
        if features is not None:
            rows |= {f"{prefix}.lengths": features.lengths(), f"{prefix}.values": features.values()}
    if id_score_list is not None:
        rows[f"{ID_SCORE_LIST}.weights"] = id_score_list.weights()
    return rows


class ContractModule(PredictModule):
    """A model behind TorchRec's inference contract: a dict of tensors in, {"default": probabilities [B] on CPU} out."""

    def __init__(self, servable: ServableModel, device: str = "cpu") -> None:
        super().__init__(servable.model.to(device), device)
        self.id_list_features = list(servable.id_list_features)
        self.id_score_list_features = list(servable.id_score_list_features)

    def predict_forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = []
        if self.id_list_features:
            features.append(
                KeyedJaggedTensor(
                    keys=self.id_list_features, lengths=batch[f"{ID_LIST}.lengths"], values=batch[f"{ID_LIST}.values"]
                )
            )
        if self.id_score_list_features:
            features.append(
                KeyedJaggedTensor(
                    keys=self.id_score_list_features,
                    lengths=batch[f"{ID_SCORE_LIST}.lengths"],
                    values=batch[f"{ID_SCORE_LIST}.values"],
                    weights=batch[f"{ID_SCORE_LIST}.weights"],
                )
            )
        logits = self.predict_module(batch["float_features"], *features)
        return {"default": logits.reshape(-1).sigmoid().to("cpu").float()}


def load_checkpoint(model: nn.Module, checkpoint: Path, prefix: str = "") -> None:
    """Loads the weights of an unsharded model from a torch.distributed.checkpoint of any plan and world size.

    Args:
        model: on the CPU.
        checkpoint: folder that torch.distributed.checkpoint wrote.
        prefix: what the checkpoint's keys have before the model's own: "model.model." where the state_dict of
            DistributedModelParallel(DLRMTrain(model)) was saved under "model".
    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: the checkpoint lacks keys of the model, holds them in other sizes, or holds what
            torch.distributed.checkpoint does not write.
    """
    reader = CheckpointReader(checkpoint)
    saved = reader.read_metadata().state_dict_metadata
    state = {prefix + key: value for key, value in model.state_dict().items()}
    for key, value in state.items():
        stored = saved.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"{checkpoint} has no tensor {key!r}; is it the checkpoint of another model?")
        if stored.size != value.shape:
            raise ValueError(
                f"{checkpoint} has {key!r} in size {list(stored.size)}, the model in {list(value.shape)}; build the "
                "model with the settings (and the allocation) that it was trained with"
            )
    with warnings.catch_warnings():  # that it loads in a single process, which is what it is asked to
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, reader, no_dist=True)
    model.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})


def export(
    servable: ServableModel,
    path: Path,
    dtype: str,
    tolerance: float | None = None,
    device: str = "cpu",
) -> Exported:
    """Quantizes, scripts, checks and writes a model. `path` is replaced last, so it is a whole model at any time.

    The check: the sample rows, with ids and lengths as int32 and int64, must give in a new process exactly what the
    quantized model gives here, and what the float model gives within `tolerance`.

    Args:
        servable: its model is quantized in place.
        path: where to write the TorchScript archive.
        dtype: of the tables, a key of DTYPES.
        tolerance: on probabilities; TOLERANCES[dtype] if None.
        device: what the file is for; "cuda" needs a GPU here. A script stays on the device it was made for, since
            FBGEMM lays tables out for one.
    Raises:
        ValueError: a dtype that the tables cannot be stored in, weights loaded from a checkpoint of another allocation,
            a sample that does not fit the names, no feature at all, or a device that is not there.
        CheckFailed: the model does not predict what it should; `path` is as it was.
        OSError: it cannot be written, for want of space, say; `path` is as it was.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {list(DTYPES)}")
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {device!r} is not here; export for one of {list(DEVICES)} that is")
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    _check_sample(servable)
    model = ContractModule(servable, device).requires_grad_(False)
    contract = _contract(servable, dtype)
    sample = {key: value.to(device) for key, value in servable.sample.items()}
    in_float = model(sample)["default"]
    quantize(model, DTYPES[dtype])
    requests = _in_id_types(sample)
    expected = [model(request)["default"] for request in requests]
    difference = max(_difference(wanted, in_float) for wanted in expected)
    if not difference <= tolerance:
        raise CheckFailed(
            f"quantized to {dtype}, a probability differs by {difference:.3g} from the float model's, more than "
            f"the tolerance of {tolerance}; choose a finer dtype or, if that is fine, a larger tolerance"
        )
    scripted = script(model)
    with replacing(path) as script_file:
        # Not torch.jit.save, whose writer aborts the process where the disk is full.
        content = scripted.save_to_buffer(_extra_files={METADATA_FILE: contract.to_json()})
        try:
            script_file.write_bytes(content)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} for {len(content):,} bytes", str(path)) from error
        _check_in_new_process(script_file, requests, expected)
    return Exported(path, path.stat().st_size, len(in_float), difference, tolerance)


def _contract(servable: ServableModel, dtype: str) -> Contract:
    """What the file says of itself, for the log of a server and for its clients."""
    collections = [module for module in servable.model.modules() if isinstance(module, LMACollection)]
    return Contract(
        tuple(servable.float_features),
        tuple(servable.id_list_features),
        tuple(servable.id_score_list_features),
        tuple(servable.string_features),
        dtype=dtype,
        allocation_fingerprint=",".join(dict.fromkeys(each.allocation.fingerprint for each in collections)),
    )


def _check_in_new_process(path: Path, requests: list[dict[str, Tensor]], expected: list[Tensor]) -> None:
    """Raises CheckFailed where an exported model does not predict exactly what is expected."""
    for request, served, wanted in zip(requests, predict_in_new_process(path, requests), expected):
        if not torch.equal(served, wanted):
            ids = {key: str(value.dtype) for key, value in request.items() if key.startswith("id_")}
            raise CheckFailed(
                f"the scripted model gives other predictions in a new process than the quantized model here: largest "
                f"difference {_difference(served, wanted)} on {len(wanted)} rows with {ids}"
            )


def predict_in_new_process(path: Path, requests: list[dict[str, Tensor]]) -> list[Tensor]:
    """Predictions of an exported model where only torch and fbgemm_gpu are imported.

    Raises CheckFailed with the output of the process if it fails.
    """
    inputs = io.BytesIO()
    torch.save(requests, inputs)
    command = [sys.executable, "-W", "ignore", "-c", _PREDICT, str(path)]
    command.append(str(torch.get_num_threads()))  # matrix products are cut, and so rounded, by threads
    done = subprocess.run(command, input=inputs.getvalue(), capture_output=True)
    if done.returncode != 0:
        raise CheckFailed(f"{path.name} does not run in a new process:\n{done.stderr.decode()[-3000:]}")
    return torch.load(io.BytesIO(done.stdout))


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _in_id_types(rows: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The request with 64-bit ids and lengths and, where the ids fit, with 32-bit ones, as TorchRec's server sends."""

    def cast_to(dtype: torch.dtype) -> dict[str, Tensor]:
        return {key: value if value.is_floating_point() else value.to(dtype) for key, value in rows.items()}

    wide, narrow = cast_to(torch.int64), cast_to(torch.int32)
    if all(torch.equal(wide[key], narrow[key]) for key in rows if key.endswith(".values")):
        return [wide, narrow]
    return [wide, {key: narrow[key] if key.endswith(".lengths") else value for key, value in wide.items()}]


def _check_sample(servable: ServableModel) -> None:
    """Raises ValueError where the sample's sizes do not multiply out."""
    rows = servable.sample
    names_of = {ID_LIST: servable.id_list_features, ID_SCORE_LIST: servable.id_score_list_features}
    wanted = ["float_features"]
    for prefix, names in names_of.items():
        parts = ("lengths", "values", "weights") if prefix == ID_SCORE_LIST else ("lengths", "values")
        wanted += [f"{prefix}.{part}" for part in parts if names]
    if missing := [key for key in wanted if key not in rows]:
        raise ValueError(f"the sample of the model lacks {missing}; make it with torchrec_lma.quant.request")
    floats = rows["float_features"]
    if floats.dim() != 2 or floats.size(1) != len(servable.float_features) or not len(floats):
        raise ValueError(
            f"the sample's float_features are {list(floats.shape)}, expected [B, {len(servable.float_features)}] of at "
            "least one row"
        )
    for prefix, names in names_of.items():
        if not names:
            continue
        lengths, values = rows[f"{prefix}.lengths"], rows[f"{prefix}.values"]
        bags = len(names) * len(floats)
        if lengths.numel() != bags or int(lengths.sum()) != values.numel():
            raise ValueError(
                f"the sample has {lengths.numel()} {prefix}.lengths that sum to {int(lengths.sum())} and "
                f"{values.numel()} values; {len(names)} features of {len(floats)} rows need {bags} lengths"
            )
