"""Dense rows for raw ids."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.datasets.schema import Path
from torchrec_lma.features import to_int64
from torchrec_lma.files import replacing


class Vocabulary:
    """Dense rows for raw ids: the distinct ids of each feature become 1..n in ascending order, any other id 0.

    Full (uncompressed) tables need it, with `num_embeddings=vocabulary.num_embeddings[feature]`. LMA needs none: its
    tables take raw ids as they are.

    Args:
        ids: for each feature int64 [n], in any order, such as `dataset.distinct_ids("train")`.

    Example:
        vocabulary = Vocabulary(dataset.distinct_ids("train"))
        batch.sparse_features = vocabulary(batch.sparse_features)
    """

    def __init__(self, ids: Mapping[str, np.ndarray]) -> None:
        self.ids = {feature: torch.from_numpy(np.unique(values)) for feature, values in ids.items()}
        self.num_embeddings = {feature: len(known) + 1 for feature, known in self.ids.items()}

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Raw ids -> rows: a new KeyedJaggedTensor of the same keys, lengths and weights; values int64 [ids].

        Raises:
            ValueError: a key has no vocabulary.
        """
        unknown = [key for key in features.keys() if key not in self.ids]
        if unknown:
            raise ValueError(f"no vocabulary for {unknown}, only for {list(self.ids)}: give the ids of every feature")
        ends = features.offset_per_key()
        rows = [
            self._rows(key, features.values()[start:end])
            for key, start, end in zip(features.keys(), ends[:-1], ends[1:], strict=True)
        ]
        return KeyedJaggedTensor(
            keys=features.keys(),
            values=torch.cat(rows),
            weights=features.weights_or_none(),
            lengths=features.lengths(),
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the ids of each feature."""
        digest = hashlib.sha256()
        for feature, ids in sorted(self.ids.items()):
            digest.update(f"{feature}\0{len(ids)}\0".encode())
            digest.update(ids.contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the ids of each feature as one safetensors file."""
        with replacing(path) as temporary:
            save_file(self.ids, temporary)

    @classmethod
    def load(cls, path: Path) -> "Vocabulary":
        """Reads what `save` wrote."""
        return cls({feature: ids.numpy() for feature, ids in load_file(path).items()})

    def _rows(self, feature: str, values: torch.Tensor) -> torch.Tensor:
        known = self.ids[feature].to(values.device)
        values = to_int64(values, f"feature {feature!r}")
        if not len(known):
            return torch.zeros_like(values)
        found = torch.searchsorted(known, values).clamp(max=len(known) - 1)
        return torch.where(known[found] == values, found + 1, 0)
