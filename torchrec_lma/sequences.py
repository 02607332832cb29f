"""LMAEmbeddingCollection: what an EmbeddingCollection does, with tables that share compressed memories."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torchrec.distributed.types import LazyAwaitable
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import (
    EmbeddingCollection,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.collection import LMACollection, warn_of_missing_sharder
from torchrec_lma.conversion import check_plain, compress, decompress, device_of
from torchrec_lma.features import checked, take_features
from torchrec_lma.regroup import Pieces, for_plain_collections, numbered

# torch.fx leaves alone what is wrapped in the module that calls it.
for _function in ("checked", "for_plain_collections", "numbered", "take_features"):
    torch.fx.wrap(_function)


class LMAEmbeddingCollection(LMACollection, EmbeddingCollectionInterface):
    """What an EmbeddingCollection does, a vector for each id, in a fixed memory (LMA, arXiv 2103.06124).

    As in LMAEmbeddingBagCollection, `remap` turns raw ids into rows and `levels` looks them up; then the rows of each
    level go to the ids that have them, and zeros to the others. A plain EmbeddingCollection has tables of one width, so
    `levels` has one for each width: `levels["4"].embeddings.<name>`.

    Output keys, their order and shapes are those of an EmbeddingCollection of the same tables.

    Args:
        tables: the logical tables, of one embedding dim. Their weight_init_min, weight_init_max and init_fn initialise
            the levels where all tables of a memory agree.
        allocation: who has which row: from AllocationBuilder, Allocation.load or Allocation.hashed. The one of an
            LMAEmbeddingBagCollection of the same tables will do.
        need_indices: whether the ids are in the output, as weights of the JaggedTensors.
        device: of the parameters; the allocation stays on the CPU while this is "meta".
        strict: an id outside of its table's [0, num_embeddings) is an error. Without it such ids are treated as unseen,
            where all ids own a row as id 0, and counted in `remap.out_of_vocabulary`. Tables of raw ids
            (`LMAConfig.raw_ids`) take any integer.
    Raises:
        ValueError: tables of several dims; an allocation made for other tables.

    Example::

        tables = [EmbeddingConfig(name="t_item", num_embeddings=50_000, embedding_dim=32, feature_names=["history"])]
        builder = AllocationBuilder(tables, LMAConfig(compression=16))
        for batch in loader:
            builder.update(batch.sparse_features)
        ec = LMAEmbeddingCollection(tables, builder.build())
        histories = KeyedJaggedTensor(keys=["history"], values=torch.tensor([7, 3, 41]), lengths=torch.tensor([2, 1]))
        ec(histories)["history"].to_padded_dense(2)  # float [2, 2, 32]
    """

    if TYPE_CHECKING:  # TorchScript reads annotations of classes, and takes this one for an interface
        levels: nn.ModuleDict

    _config_type = EmbeddingConfig

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig],
        allocation: Allocation,
        need_indices: bool = False,
        device: torch.device | None = None,
        strict: bool = False,
    ) -> None:
        dims = {table.name: table.embedding_dim for table in tables}
        if len(set(dims.values())) > 1:
            raise ValueError(
                f"the tables of an LMAEmbeddingCollection must have one embedding_dim, as those of an "
                f"EmbeddingCollection, got {dims}; make a collection for each dim"
            )
        # Rows carry the places of their ids, in the place of per-sample weights.
        super().__init__(tables, allocation, True, device, strict)
        self._need_indices = need_indices
        self._level_keys = [
            [key for config in plain.embedding_configs() for key in config.feature_names]
            for plain in self.plain_collections()
        ]
        self._pieces = Pieces.of(list(self._slots.values()), allocation, self.remap)

    def _make_levels(self, configs: list[EmbeddingConfig], device: torch.device | None) -> nn.ModuleDict:
        of_width: dict[str, list[EmbeddingConfig]] = {}
        for config in configs:
            of_width.setdefault(str(config.embedding_dim), []).append(config)
        return nn.ModuleDict({width: EmbeddingCollection(of_one, device) for width, of_one in of_width.items()})

    def plain_collections(self) -> list[EmbeddingCollection]:
        return list(self.levels.values())

    def level_keys(self) -> list[list[str]]:
        return self._level_keys

    def like_this(
        self, tables: Sequence[EmbeddingConfig], allocation: Allocation, device: torch.device
    ) -> "LMAEmbeddingCollection":
        return LMAEmbeddingCollection(tables, allocation, self._need_indices, device, self.strict)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """A vector for each id.

        Args:
            features: has the features of the tables, and maybe others, which are ignored; ids are integers of any
                width.
        Returns:
            By feature (or `feature@table` where it feeds several tables): values float32 [ids, dim], the lengths of the
            feature and, with `need_indices`, its ids as weights.
        Raises:
            TypeError: ids that are not integers.
            ValueError: a feature is missing; a variable batch size per feature (VBE); lengths that do not add up to the
                values; with `strict`, an id outside of its vocabulary; the weights were loaded from a checkpoint of
                another allocation.
        """
        batch = numbered(checked(features, self._features, False), self.remap.features)
        rows = self.remap(batch)
        plain = for_plain_collections(rows)
        # Only what each takes, so that TorchRec's quantized ones split it at no place that torch.export does not know.
        found = [levels(take_features(plain, keys)) for levels, keys in zip(self.levels.values(), self._level_keys)]
        if not torch.jit.is_scripting():
            self.remap.check_not_overwritten()
            if isinstance(found[0], LazyAwaitable):
                warn_of_missing_sharder(self)
                found = [each.wait() for each in found]
        return self._pieces.regroup(found, rows.weights(), batch, self._need_indices)

    def embedding_configs(self) -> list[EmbeddingConfig]:
        """The logical tables, as given; `level_configs()` has what TorchRec stores and shards."""
        return self._tables

    def need_indices(self) -> bool:
        return self._need_indices

    def embedding_dim(self) -> int:
        return self._tables[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return get_embedding_names_by_table(self._tables)

    @classmethod
    def from_embedding_collection(
        cls,
        ec: EmbeddingCollection,
        allocation: Allocation,
        id_weights: Mapping[str, Tensor] | None = None,
        ids: Mapping[str, Tensor] | None = None,
    ) -> "LMAEmbeddingCollection":
        """Compresses trained tables: see LMAEmbeddingBagCollection.from_embedding_bag_collection.

        Args:
            ec: unsharded, with values (not on the meta device).
            allocation: as there.
            id_weights: as there.
            ids: as there.
        Returns:
            A collection on the device of `ec`.
        Raises:
            TypeError: `ec` is no plain EmbeddingCollection; ids that are not integers. ValueError: as there.
        """
        check_plain("ec", ec, EmbeddingCollection)
        tables = [copy.copy(table) for table in ec.embedding_configs()]
        lma = LMAEmbeddingCollection(tables, allocation, ec.need_indices(), device_of(ec))
        return compress(ec, lma, id_weights, ids)

    def to_embedding_collection(self, ids: Mapping[str, Tensor] | None = None) -> EmbeddingCollection:
        """Full tables with the embeddings of this collection: see `to_embedding_bag_collection`."""
        device, tables = device_of(self), [copy.copy(table) for table in self.tables]
        return decompress(self, EmbeddingCollection(tables, device, self.need_indices()), ids)
