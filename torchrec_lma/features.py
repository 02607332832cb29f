"""Which features a collection takes, and the checks of a batch that both the unsharded and the sharded one make."""

from collections.abc import Collection, Sequence

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
    if len(keys) != len(expected) or any(key not in expected for key in keys):
        raise ValueError(
            f"the KeyedJaggedTensor has features {list(keys)}, expected each of {list(expected)} once; "
            f"missing {sorted(set(expected) - set(keys))}, unknown {sorted(set(keys) - set(expected))}"
        )
    if features.variable_stride_per_key():
        raise ValueError(
            "the KeyedJaggedTensor has a variable batch size per feature (VBE), which LMA tables do not support yet; "
            "give every feature the same number of bags"
        )


def check_weights(features: KeyedJaggedTensor, is_weighted: bool) -> None:
    """Raises ValueError if a weighted collection gets no per-sample weights."""
    if is_weighted and features.weights_or_none() is None:
        raise ValueError(
            "the collection was made with is_weighted=True but the KeyedJaggedTensor has no weights; give "
            "KeyedJaggedTensor(weights=...) or make the collection unweighted"
        )
