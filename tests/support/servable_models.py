"""Small servable models: `module:function` factories for the export command."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection, LMAEmbeddingCollection
from torchrec_lma.quant import ServableModel, load_checkpoint, request

ROWS = 20
IDS, SCORED = ["user", "item"], ["tag"]
CONFIG = LMAConfig(compression=4, raw_ids=True)


def make_tables(features: list[str], dim: int = 8) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(name=f"t_{f}", num_embeddings=500, embedding_dim=dim, feature_names=[f]) for f in features
    ]


def make_features(keys: list[str], is_weighted: bool = False, largest: int = 500) -> KeyedJaggedTensor:
    lengths = torch.randint(0, 4, (len(keys) * ROWS,), dtype=torch.int32)
    values = torch.randint(largest, (int(lengths.sum()),))
    weights = torch.rand(len(values)) if is_weighted else None
    return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths, weights=weights)


def make_allocation(tables: Sequence[EmbeddingBagConfig], config: LMAConfig = CONFIG) -> Allocation:
    """Half of the ids were seen, the smaller the more often."""
    builder = AllocationBuilder(tables, config)
    names = [name for table in tables for name in table.feature_names]
    ids = torch.arange(250).repeat_interleave(torch.arange(250, 0, -1) // 25 + 1).repeat(len(names))
    return builder.update(KeyedJaggedTensor(keys=names, values=ids, lengths=torch.ones_like(ids))).build()


def make_lma(tables: list[EmbeddingBagConfig], is_weighted: bool = False) -> LMAEmbeddingBagCollection:
    return LMAEmbeddingBagCollection(tables, make_allocation(tables), is_weighted)


def make_dlrm(table: str, allocation: Allocation | None = None) -> DLRM:
    tables = make_tables(IDS)
    if table == "lma":
        ebc: EmbeddingBagCollectionInterface = LMAEmbeddingBagCollection(tables, allocation or make_allocation(tables))
    else:
        ebc = EmbeddingBagCollection(tables=tables)
    return DLRM(ebc, dense_in_features=3, dense_arch_layer_sizes=[8], over_arch_layer_sizes=[8, 1])


def stored_tables(model: DLRM) -> EmbeddingBagCollection:
    """What TorchRec stores: full tables, or the levels of LMA tables."""
    ebc = model.sparse_arch.embedding_bag_collection
    return getattr(ebc, "levels", ebc)


def of_dlrm(model: nn.Module, largest: int = 500) -> ServableModel:
    torch.manual_seed(5)
    sample = request(torch.randn(ROWS, 3), make_features(IDS, largest=largest))
    return ServableModel(model, ["a", "b", "c"], IDS, [], sample)


class Mixed(nn.Module):
    """LMA tables for plain features, LMA tables of another dim for weighted ones."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = make_lma(make_tables(IDS))
        self.scored = make_lma(make_tables(SCORED, 16), is_weighted=True)
        self.over = nn.Linear(3 + 2 * 8 + 16, 1)

    def forward(
        self, float_features: Tensor, features: KeyedJaggedTensor, scored_features: KeyedJaggedTensor
    ) -> Tensor:
        pooled = [self.plain(features).values(), self.scored(scored_features).values()]
        return self.over(torch.cat([float_features, *pooled], dim=1))


class SequenceSums(nn.Module):
    """A vector for each id, summed over its bag in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        tables = [EmbeddingConfig(name=f"t_{f}", num_embeddings=500, embedding_dim=8, feature_names=[f]) for f in IDS]
        self.ec = LMAEmbeddingCollection(tables, make_allocation(make_tables(IDS)))
        self.over = nn.Linear(3 + 2 * 8, 1)

    def forward(self, float_features: Tensor, features: KeyedJaggedTensor) -> Tensor:
        found: dict[str, JaggedTensor] = self.ec(features)
        sums = [
            torch.segment_reduce(found[name].values(), "sum", lengths=found[name].lengths().long(), initial=0.0)
            for name in list(IDS)
        ]
        return self.over(torch.cat([float_features] + sums, dim=1))  # noqa: RUF005  torch.fx traces no starred lists


def mixed(checkpoint: Path, allocation: Allocation | None) -> ServableModel:
    torch.manual_seed(5)
    sample = request(torch.randn(ROWS, 3), make_features(IDS), make_features(SCORED, is_weighted=True))
    return ServableModel(Mixed(), ["a", "b", "c"], IDS, SCORED, sample)


def lma_dlrm(checkpoint: Path, allocation: Allocation | None) -> ServableModel:
    model = make_dlrm("lma", allocation)
    load_checkpoint(model, checkpoint, "model.")
    return of_dlrm(model)


def criteo_sized() -> ServableModel:
    """13 numbers and 26 ids, which the start-up check of TorchRec's server sends."""
    torch.manual_seed(5)
    numbers, ids = [f"int_{i}" for i in range(13)], [f"cat_{i}" for i in range(26)]
    ebc = make_lma(make_tables(ids))
    model = DLRM(ebc, dense_in_features=13, dense_arch_layer_sizes=[8], over_arch_layer_sizes=[8, 1])
    return ServableModel(model, numbers, ids, [], request(torch.randn(ROWS, 13), make_features(ids)))


not_a_factory = 3
