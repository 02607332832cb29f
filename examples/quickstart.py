"""MovieLens-100K in a minute: full tables, and in a 16th of their bytes a smaller dim in FP16 and LMA tables.

Run it as `python examples/quickstart.py`; docs/concepts.md says what LMA tables are.
"""

import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torchmetrics.classification import BinaryAUROC
from torchrec import DataType, EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_lma import AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection, get_default_sharders
from torchrec_lma.datasets import ParquetDataset, Split, Vocabulary, movielens

torch.manual_seed(0)
torch.set_num_threads(1)  # these batches are too small for more
logging.disable(logging.WARNING)  # TorchRec's planner has much to say
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dataset = ParquetDataset(movielens.prepare(), movielens.SCHEMA, Split())
vocabulary = Vocabulary(dataset.distinct_ids())  # any ids -> 0 <= id < num_embeddings


def batches(split: str, epoch: int | None = None) -> Iterator[Batch]:
    for batch in dataset.batches(split, batch_size=512, shuffle_seed=epoch):
        batch.sparse_features = vocabulary(batch.sparse_features)
        yield batch


def tables(dim: int, data_type: DataType = DataType.FP32) -> list[EmbeddingBagConfig]:
    return [
        EmbeddingBagConfig(
            name=f"t_{key}", feature_names=[key], num_embeddings=rows, embedding_dim=dim, data_type=data_type
        )
        for key, rows in vocabulary.num_embeddings.items()
    ]


def train(ebc: EmbeddingBagCollection | LMAEmbeddingBagCollection, dim: int, lr: float) -> float:
    """The test AUC after the epoch with the best validation AUC. Nothing in here depends on the type of the tables."""
    dlrm = DLRMTrain(
        DLRM(ebc, dense_in_features=1, dense_arch_layer_sizes=[64, dim], over_arch_layer_sizes=[128, 64, 1])
    )
    apply_optimizer_in_backward(RowWiseAdagrad, ebc.parameters(), {"lr": lr})
    fused = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    names = [name.split(".")[-2] for name, _ in ebc.named_parameters()]
    planner = EmbeddingShardingPlanner(Topology(1, "cpu"), constraints=dict.fromkeys(names, fused))
    plan = planner.plan(dlrm, get_default_sharders())
    model = DistributedModelParallel(dlrm, device=torch.device("cpu"), plan=plan, sharders=get_default_sharders())
    layers = torch.optim.Adam(weight for _, weight in in_backward_optimizer_filter(model.named_parameters()))

    @torch.no_grad()
    def auc(split: str) -> float:
        metric = BinaryAUROC()
        for batch in batches(split):
            _, (_, logits, labels) = model(batch)
            metric.update(logits.sigmoid(), labels.int())
        return metric.compute().item()

    aucs = []
    for epoch in range(4):
        for batch in batches("train", epoch):
            layers.zero_grad()
            loss, _ = model(batch)
            loss.backward()
            layers.step()
        aucs.append((auc("validation"), auc("test")))
    return max(aucs)[1]


def show(name: str, ebc: EmbeddingBagCollection | LMAEmbeddingBagCollection, dim: int, lr: float) -> None:
    size = sum(weights.nbytes for weights in ebc.parameters())
    if isinstance(ebc, LMAEmbeddingBagCollection):
        size += ebc.allocation.nbytes
    print(f"{name:<20}{size:>10,} bytes   test AUC {train(ebc, dim, lr):.4f}", flush=True)


print("Half a minute on 2 cores. Another seed moves an AUC by .003.")
show("full, dim 64", EmbeddingBagCollection(tables(64)), 64, lr=0.05)
show("full, dim 8, FP16", EmbeddingBagCollection(tables(8, DataType.FP16)), 8, lr=0.1)
builder = AllocationBuilder(tables(64), LMAConfig(compression=16))
for batch in batches("train"):
    builder.update(batch.sparse_features)  # counts which ids are frequent
lma = LMAEmbeddingBagCollection(tables(64), builder.build())
show("LMA, dim 64, FP16", lma, 64, lr=0.2)
print(lma.memory_report())
