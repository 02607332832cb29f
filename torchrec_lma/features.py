"""Which features a collection takes, and the checks of a batch that both the unsharded and the sharded one make."""

from collections.abc import Collection, Sequence

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
    """Raises ValueError if a feature is missing, unknown or given twice, or if batch sizes differ between features."""
    keys = features.keys()
    if len(keys) != len(expected) or set(keys) != set(expected):
        raise ValueError(
            f"the KeyedJaggedTensor has features {list(keys)}, expected each of {list(expected)} once; "
            f"missing {sorted(set(expected) - set(keys))}, unknown {sorted(set(keys) - set(expected))}"
        )
    if features.variable_stride_per_key():
        raise ValueError(
            "the KeyedJaggedTensor has a variable batch size per feature (VBE), which LMA tables do not support yet; "
            "give every feature the same number of bags"
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
    lengths = features.lengths().view(len(features.keys()), -1)
    is_mean = torch.tensor([key in mean_features for key in features.keys()], device=lengths.device)  # noqa: SIM118
    divisors = torch.where(is_mean.unsqueeze(1), lengths, 1).reshape(-1)
    divisors = torch.repeat_interleave(divisors, lengths.reshape(-1), output_size=weights.numel())
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        weights=weights / divisors,
        lengths=features.lengths(),
        offsets=features.offsets(),
    )
