"""The features of a collection, and the checks of a batch that come before any look-up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass(frozen=True)
class Slot:
    """A feature of a logical table, which is one key of the output.

    Attributes:
        name: the key: the feature, or `feature@table` where a feature feeds several tables, as TorchRec names it.
        feature: of the input.
        table: the logical table.
        dim: its embedding dim.
    """

    name: str
    feature: str
    table: str
    dim: int


def slots_of(tables: Sequence[BaseEmbeddingConfig]) -> list[Slot]:
    """Of all tables in order. A table without feature names is fed by a feature of its own name, as in TorchRec.

    Raises ValueError where two would have one name, as a feature "item@t" and a shared feature "item" of table "t".
    """
    for table in tables:
        if not table.feature_names:
            table.feature_names = [table.name]
    slots = [
        Slot(name, feature, table.name, table.embedding_dim)
        for table, names in zip(tables, get_embedding_names_by_table(list(tables)))
        for name, feature in zip(names, table.feature_names)
    ]
    names = [slot.name for slot in slots]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"keys {twice} of the output would stand there twice: rename the features")
    return slots


def to_int64(ids: Tensor, where: str) -> Tensor:
    """Integer ids of any width and sign as int64, by their values. Scripts.

    Raises:
        TypeError: ids that are not integers. ValueError: a uint64 beyond int64.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(
            f"{where} has ids of {ids.dtype}; expected integers: cast them where the data is read, so that none is cut"
        )
    wide = ids.to(torch.int64)
    if ids.dtype == torch.uint64 and (torch.jit.is_scripting() or not torch.compiler.is_compiling()):
        if bool((wide < 0).any()):
            which = ""
            if not torch.jit.is_scripting():  # which has no integers of that size
                which = f" {int(wide[wide < 0].max()) + 2**64},"
            raise ValueError(f"{where} has id{which} beyond int64; view uint64 hashes as int64, every int64 is an id")
    return wide


def check_batch(features: KeyedJaggedTensor, needed: Sequence[str], is_weighted: bool) -> None:
    """Raises ValueError or TypeError where looking up a batch would read the wrong ids or past their end.

    Features that are not needed are not looked at, as in TorchRec.
    """
    keys = features.keys()
    missing = sorted(set(needed) - set(keys))
    if missing:
        raise ValueError(f"the KeyedJaggedTensor lacks features {missing}; it has {list(keys)}")
    if len(set(keys)) != len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the KeyedJaggedTensor has features {twice} twice; give each one once")
    _check_lengths(features)
    if is_weighted:
        weights = features.weights_or_none()
        if weights is None:
            raise ValueError(
                "the collection was made with is_weighted=True but the KeyedJaggedTensor has no weights; give "
                "KeyedJaggedTensor(weights=...) or make the collection unweighted"
            )
        n_ids = features.values().numel()
        if weights.numel() != n_ids:
            raise ValueError(f"the KeyedJaggedTensor has {n_ids} values and {weights.numel()} weights; give one each")
    if features.variable_stride_per_key():
        inverse_indices = features.inverse_indices_or_none()
        if inverse_indices is None or not set(needed) <= set(inverse_indices[0]):
            given = None if inverse_indices is None else inverse_indices[0]
            raise ValueError(
                "the KeyedJaggedTensor has a variable batch size per feature (VBE) and inverse_indices for "
                f"{given}, expected them for each of {list(needed)}: they say which bag every row of the batch has; "
                "give KeyedJaggedTensor(inverse_indices=(keys, indices [features, B]))"
            )


def _check_lengths(features: KeyedJaggedTensor) -> None:
    """Raises ValueError unless lengths are >= 0 and add up to the values. Scripts."""
    lengths, n_ids = features.lengths(), features.values().numel()
    if not lengths.is_cpu:  # it would wait for the device; FBGEMM checks offsets there
        return
    if lengths.numel() > 0 and int(lengths.min()) < 0:
        raise ValueError(f"the KeyedJaggedTensor has a negative length, {int(lengths.min())}; lengths are >= 0")
    if int(lengths.sum()) != n_ids:
        raise ValueError(
            f"the KeyedJaggedTensor has lengths that add up to {int(lengths.sum())} and {n_ids} values; they must be "
            "equal: check how the batch was cut"
        )


# The functions below are wrapped for torch.fx, which cannot look at keys while it traces, and they script.


@torch.fx.wrap
def checked(features: KeyedJaggedTensor, needed: list[str], is_weighted: bool) -> KeyedJaggedTensor:
    """The batch with ids of type int64, after `check_batch` where Python runs, and of its lengths in TorchScript.

    int32 ones stay, which FBGEMM permutes as well.
    """
    if torch.jit.is_scripting():
        _check_lengths(features)
    elif not torch.compiler.is_compiling():
        check_batch(features, needed, is_weighted)
    if features.values().dtype == torch.int32 or features.values().dtype == torch.int64:
        return features
    return _replaced(features, to_int64(features.values(), "the KeyedJaggedTensor"), features.weights_or_none())


@torch.fx.wrap
def take_features(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """The named features in that order; a name may stand there twice. Inverse indices (VBE) are dropped."""
    keys = features.keys()
    if keys == names:
        return features
    order: list[int] = []
    for name in names:
        if name not in keys:
            raise ValueError(f"the KeyedJaggedTensor lacks feature {name}; it has {keys}")
        order.append(keys.index(name))
    return features.permute(order)


@torch.fx.wrap
def ids_per_feature(features: KeyedJaggedTensor) -> Tensor:
    """int64 [F]."""
    return torch.tensor(features.length_per_key(), dtype=torch.int64).to(features.values().device, non_blocking=True)


@torch.fx.wrap
def bag_ends(features: KeyedJaggedTensor) -> list[int]:
    """Where the bags of each feature begin and end among all bags, [F + 1]."""
    ends = [0]
    for bags in features.stride_per_key():
        ends.append(ends[-1] + bags)
    return ends


@torch.fx.wrap
def bag_lengths(features: KeyedJaggedTensor, names: list[str]) -> Tensor:
    """How many ids the bags of each named feature have, [B, F]; with VBE of the B rows that inverse indices spread."""
    chosen = take_features(features, names)
    if not torch.jit.is_scripting() and features.variable_stride_per_key():
        keys, indices = features.inverse_indices()
        of_feature = chosen.lengths().split(chosen.stride_per_key())
        return torch.stack([bags[indices[keys.index(name)]] for name, bags in zip(names, of_feature)], dim=1)
    return chosen.lengths().view(len(names), -1).t()


@torch.fx.wrap
def cast_weights(features: KeyedJaggedTensor, dtype: torch.dtype) -> KeyedJaggedTensor:
    """The same batch with per-sample weights of this type."""
    if features.weights().dtype == dtype:
        return features
    return _replaced(features, features.values(), features.weights().to(dtype))


def _replaced(features: KeyedJaggedTensor, values: Tensor, weights: Tensor | None) -> KeyedJaggedTensor:
    """The batch with other values and weights."""
    if not torch.jit.is_scripting() and features.variable_stride_per_key():
        return KeyedJaggedTensor(
            keys=features.keys(),
            values=values,
            weights=weights,
            lengths=features.lengths(),
            stride_per_key_per_rank=features.stride_per_key_per_rank(),
            inverse_indices=features.inverse_indices_or_none(),
        )
    return KeyedJaggedTensor(
        keys=features.keys(), values=values, weights=weights, lengths=features.lengths(), stride=features.stride()
    )
