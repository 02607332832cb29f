"""Which features a collection takes, and the checks of a batch that both the unsharded and the sharded one make."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def feature_tables(tables: Sequence[EmbeddingBagConfig]) -> dict[str, str]:
    """The table of each feature, in table order. A table without feature names is fed by a feature of its own name.

    Raises ValueError if one feature feeds two tables.
    """
    table_of: dict[str, str] = {}
    for table in tables:
        for feature in table.feature_names or [table.name]:
            if feature in table_of:
                raise ValueError(
                    f"feature {feature!r} feeds tables {table_of[feature]!r} and {table.name!r}; LMA tables take each "
                    "feature once: repeat it in the KeyedJaggedTensor under a second name"
                )
            table_of[feature] = table.name
    return table_of


def check_features(features: KeyedJaggedTensor, expected: Collection[str]) -> None:
    """Raises ValueError if a feature is missing, unknown or given twice, or if a VBE batch lacks inverse indices."""
    keys = features.keys()
    if len(keys) != len(expected) or set(keys) != set(expected):
        raise ValueError(
            f"the KeyedJaggedTensor has features {list(keys)}, expected each of {list(expected)} once; "
            f"missing {sorted(set(expected) - set(keys))}, unknown {sorted(set(keys) - set(expected))}"
        )
    if features.variable_stride_per_key():
        inverse_indices = features.inverse_indices_or_none()
        if inverse_indices is None or set(inverse_indices[0]) != set(keys):
            given = None if inverse_indices is None else inverse_indices[0]
            raise ValueError(
                "the KeyedJaggedTensor has a variable batch size per feature (VBE) and inverse_indices for "
                f"{given}, expected them for each of {list(keys)}: they say which bag every row of the batch has; "
                "give KeyedJaggedTensor(inverse_indices=(keys, indices [features, B]))"
            )


def normalize_weights(features: KeyedJaggedTensor, mean_features: Collection[str]) -> KeyedJaggedTensor:
    """Turns weighted MEAN pooling into weighted SUM pooling, by dividing weights by the length of their bag.

    A bag's embedding is then sum(w_i * e_i) / length under every sharding and on every device. Left to the libraries
    it is not: FBGEMM's CPU backward of weighted MEAN lacks the division, and TorchRec's row-wise sharding divides by
    the sum of the weights instead.

    Args:
        features: of a weighted collection.
        mean_features: the features with MEAN pooling.
    Raises:
        ValueError: there are no weights.
    """
    weights = features.weights_or_none()
    if weights is None:
        raise ValueError(
            "the collection was made with is_weighted=True but the KeyedJaggedTensor has no weights; give "
            "KeyedJaggedTensor(weights=...) or make the collection unweighted"
        )
    if not mean_features:
        return features
    lengths = features.lengths()
    is_mean = torch.tensor([key in mean_features for key in features.keys()]).to(lengths.device, non_blocking=True)
    bags = torch.tensor(features.stride_per_key()).to(lengths.device, non_blocking=True)
    is_mean = is_mean.repeat_interleave(bags, output_size=lengths.numel())
    divisors = torch.where(is_mean, lengths, 1).repeat_interleave(lengths, output_size=weights.numel())
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=weights / divisors,
        lengths=lengths,
        offsets=features.offsets(),
        **_strides(features),
    )


def reorder_inverse_indices(features: KeyedJaggedTensor, order: Sequence[str]) -> KeyedJaggedTensor:
    """The same VBE batch with its inverse indices in the order of these keys."""
    names, indices = features.inverse_indices()
    places = torch.tensor([names.index(key) for key in order]).to(indices.device, non_blocking=True)
    return _with_inverse_indices(features, (list(order), indices[places]))


def permute(features: KeyedJaggedTensor, order: Sequence[str]) -> KeyedJaggedTensor:
    """The same batch with its features in this order; KeyedJaggedTensor.permute itself drops the inverse indices."""
    permuted = features.permute([features.keys().index(key) for key in order])
    inverse_indices = features.inverse_indices_or_none()
    return permuted if inverse_indices is None else _with_inverse_indices(permuted, inverse_indices)


def _with_inverse_indices(
    features: KeyedJaggedTensor, inverse_indices: tuple[list[str], torch.Tensor]
) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=features.weights_or_none(),
        lengths=features.lengths(),
        offsets=features.offsets(),
        **(_strides(features) | {"inverse_indices": inverse_indices}),
    )


def _strides(features: KeyedJaggedTensor) -> dict[str, Any]:
    if not features.variable_stride_per_key():
        return {"stride": features.stride()}
    return {
        "stride_per_key_per_rank": features.stride_per_key_per_rank(),
        "inverse_indices": features.inverse_indices_or_none(),
    }
