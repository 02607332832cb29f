"""LMAEmbeddingBagCollection: what an EmbeddingBagCollection does, with tables that share compressed memories."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_lma.allocation.artifact import Allocation
from torchrec_lma.collection import LMACollection, warn_of_missing_sharder
from torchrec_lma.conversion import check_plain, compress, decompress, device_of
from torchrec_lma.features import bag_lengths, cast_weights, checked
from torchrec_lma.regroup import Pieces, regroup

# torch.fx leaves alone what is wrapped in the module that calls it.
for _function in ("bag_lengths", "cast_weights", "checked", "regroup"):
    torch.fx.wrap(_function)


class LMAEmbeddingBagCollection(LMACollection, EmbeddingBagCollectionInterface):
    """What an EmbeddingBagCollection does, in a fixed memory (LMA, arXiv 2103.06124).

    Three parts in a row: `remap` turns raw ids into rows, `levels`, a plain EmbeddingBagCollection, looks them up, and
    regroup puts the pooled levels side by side. Logical tables of one embedding dim share a memory, a list of levels
    whose widths add up to the dim; each level is an ordinary TorchRec table, `levels.embedding_bags.<name>`. What a
    frequent id has for itself on many levels, a rare one has on the first only, or shares.

    Output keys, dims and their order are those of an EmbeddingBagCollection of the same tables, which this class
    contains and is not: TorchRec's functions that wrap, fuse or shard plain collections find `levels`.

    Args:
        tables: the logical tables, SUM or MEAN. With weighted MEAN pooling a bag's embedding is sum(w_i * e_i) /
            length, as FBGEMM defines it. Their weight_init_min, weight_init_max and init_fn initialise the levels where
            all tables of a memory agree.
        allocation: who has which row: from AllocationBuilder, Allocation.load or Allocation.hashed. The config is its.
        is_weighted: whether the input KeyedJaggedTensor carries per-sample weights.
        device: of the parameters; the allocation stays on the CPU while this is "meta".
        strict: an id outside of its table's [0, num_embeddings) is an error. Without it such ids are treated as unseen,
            where all ids own a row as id 0, and counted in `remap.out_of_vocabulary`. Tables of raw ids
            (`LMAConfig.raw_ids`) take any integer.
    Raises:
        ValueError: an allocation made for other tables.

    Example::

        tables = [EmbeddingBagConfig(name="t_user", num_embeddings=1_000_000, embedding_dim=32, feature_names=["user"]),
                  EmbeddingBagConfig(name="t_item", num_embeddings=50_000, embedding_dim=32, feature_names=["item"])]
        builder = AllocationBuilder(tables, LMAConfig(compression=16))
        for batch in loader:
            builder.update(batch.sparse_features)
        ebc = LMAEmbeddingBagCollection(tables, builder.build())
        features = KeyedJaggedTensor(keys=["user", "item"], values=torch.tensor([7, 3, 41]),
                                     lengths=torch.tensor([1, 1, 1, 0]))
        ebc(features)["user"]  # float [2, 32]
    """

    if TYPE_CHECKING:  # TorchScript reads annotations of classes, and takes this one for an interface
        levels: EmbeddingBagCollection

    _config_type = EmbeddingBagConfig

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        allocation: Allocation,
        is_weighted: bool = False,
        device: torch.device | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(tables, allocation, is_weighted, device, strict)
        slots = list(self._slots.values())
        self._dims = [slot.dim for slot in slots]
        means = {table.name for table in tables if table.pooling is PoolingType.MEAN}
        self._has_mean = bool(means)
        self._pieces = pieces = Pieces.of(slots, allocation, self.remap, means)
        # TorchScript takes lists, and no dataclass.
        self._level_tables, self._level_slots = pieces.tables, pieces.slots
        self._levels, self._cuts, self._runs = pieces.levels, pieces.cuts, pieces.runs

    def _make_levels(self, configs: list[EmbeddingBagConfig], device: torch.device | None) -> EmbeddingBagCollection:
        return EmbeddingBagCollection(configs, self._is_weighted, device)

    def plain_collections(self) -> list[EmbeddingBagCollection]:
        return [self.levels]

    def like_this(
        self, tables: Sequence[EmbeddingBagConfig], allocation: Allocation, device: torch.device
    ) -> "LMAEmbeddingBagCollection":
        return LMAEmbeddingBagCollection(tables, allocation, self._is_weighted, device, self.strict)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled embeddings.

        Args:
            features: has the features of the tables, and maybe others, which are ignored; ids are integers of any width
                and empty bags give zeros. With a variable batch size per feature (VBE), inverse indices say which bag
                each of the B rows has, as in TorchRec.
        Returns:
            KeyedTensor, float32 [B, sum of dims], with the keys of an EmbeddingBagCollection of the same tables.
        Raises:
            TypeError: ids that are not integers.
            ValueError: a feature, weights or the inverse indices of VBE are missing; lengths that do not add up to the
                values; with `strict`, an id outside of its vocabulary; the weights were loaded from a checkpoint of
                another allocation.
        """
        features = checked(features, self._features, self._is_weighted)
        rows = self.remap(features)
        if not torch.jit.is_scripting():
            self.remap.check_not_overwritten()
            if isinstance(self.levels, ShardedModule):
                warn_of_missing_sharder(self)
            # nn.EmbeddingBag wants weights of its own type; FBGEMM's kernels take float32.
            if self._is_weighted and type(self.levels) is EmbeddingBagCollection:
                rows = cast_weights(rows, next(self.levels.parameters()).dtype)
        pooled = self.levels(rows)
        lengths: Tensor | None = None
        if self._has_mean:
            lengths = bag_lengths(features, self._features)
        values = regroup(pooled, self._level_tables, self._level_slots, self._levels, self._cuts, self._runs, lengths)
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=values)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """The logical tables, as given; `levels.embedding_bag_configs()` has what TorchRec stores and shards."""
        return self._tables

    def is_weighted(self) -> bool:
        return self._is_weighted

    def __getattr__(self, name: str) -> Any:
        # A property cannot say this: torch.nn.Module puts its own words in place of an AttributeError's.
        if name == "embedding_bags":
            raise AttributeError(
                "an LMAEmbeddingBagCollection has no embedding_bags of its logical tables: `levels.embedding_bags` has "
                "the tables that TorchRec stores, `materialize` gives embeddings. TorchRec's sharders of modules that "
                "hold a collection cannot shard it: give sharders=torchrec_lma.get_default_sharders()"
            )
        if name == "embedding_configs":
            raise AttributeError(
                "an LMAEmbeddingBagCollection has no embedding_configs, which ManagedCollisionEmbeddingBagCollection "
                "asks for: it needs no managed collisions, LMAConfig(raw_ids=True) takes any ids"
            )
        return super().__getattr__(name)

    @classmethod
    def from_embedding_bag_collection(
        cls,
        ebc: EmbeddingBagCollection,
        allocation: Allocation,
        id_weights: Mapping[str, Tensor] | None = None,
        ids: Mapping[str, Tensor] | None = None,
    ) -> "LMAEmbeddingBagCollection":
        """Compresses trained tables: the weights whose embeddings are closest to theirs (see `least_squares`).

        An id's own rows get its columns, a row that ids share the weighted mean of theirs; rows that no id has keep
        their initial values. Columns on which an id has no row are lost: they become zeros, which is a harder cut than
        training compressed tables from the start. Weights are rounded to the allocation's data type.

        Args:
            ebc: unsharded, with values (not on the meta device).
            allocation: for the tables of `ebc`.
            id_weights: for any of the tables, [num_embeddings] >= 0, how much each id's error counts where ids share;
                how often the id occurs, plus 1, is a good weight. Without them all ids count alike.
            ids: for each table, integer [num_embeddings], the id that each row of the full table stands for where the
                model is fed other ids from now on, such as raw ones. Without it row r is id r.
        Returns:
            A collection on the device of `ebc`.
        Raises:
            TypeError: `ebc` is no plain EmbeddingBagCollection; ids that are not integers. ValueError: as the
                constructor; weights or ids that do not fit the tables; weights on the meta device.

        Example::

            lma = LMAEmbeddingBagCollection.from_embedding_bag_collection(ebc, Allocation.load(path))
        """
        check_plain("ebc", ebc, EmbeddingBagCollection)
        tables = [copy.copy(table) for table in ebc.embedding_bag_configs()]
        lma = LMAEmbeddingBagCollection(tables, allocation, ebc.is_weighted(), device_of(ebc))
        return compress(ebc, lma, id_weights, ids)

    def to_embedding_bag_collection(self, ids: Mapping[str, Tensor] | None = None) -> EmbeddingBagCollection:
        """Full tables with the embeddings of this collection, for any stack that takes a plain one.

        Args:
            ids: for each table, integer [num_embeddings], the id that each row stands for; without it row r is id r.
        Returns:
            An EmbeddingBagCollection of the logical tables, in their data types, on the same device, filled chunk by
            chunk.
        Raises:
            ValueError: ids that do not fit the tables; weights on the meta device. TypeError: ids that are not
                integers.
        """
        device, tables = device_of(self), [copy.copy(table) for table in self.tables]
        return decompress(self, EmbeddingBagCollection(tables, self.is_weighted(), device), ids)
