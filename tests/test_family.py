"""The family contains its rivals: settings that are the smaller dim, the hashing trick, hot ids with rows of their own,
and the paper's LMA; each equal in forward and in one SGD step to plain torch with an explicit index."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.integer_reference import reference_key, reference_mix64, reference_salt, reference_to_row
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import RowsMinHash

N, DIM, SEED = {"user": 300, "item": 120}, 16, 5
TABLES = [
    EmbeddingBagConfig(name=f"t_{name}", num_embeddings=n, embedding_dim=DIM, feature_names=[name])
    for name, n in N.items()
]


def batch(rows: int, seed: int, items: int = 3) -> KeyedJaggedTensor:
    """A user and up to some items in each row, the smaller ids more often; some bags are empty."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.cat([torch.ones(rows, dtype=torch.int64), torch.randint(0, items + 1, (rows,), generator=random)])
    sizes = torch.tensor(list(N.values())).repeat_interleave(torch.stack([part.sum() for part in lengths.split(rows)]))
    ids = (torch.rand(sizes.numel(), generator=random) ** 3 * sizes).long()
    return KeyedJaggedTensor(keys=list(N), values=ids, lengths=lengths)


DATA = batch(600, seed=0)
CONFIG = LMAConfig(compression=16, data_type="FP32", seed=SEED)


def occurrences(raw_ids: bool = False) -> list[tuple[str, int]]:
    """(table, id), most frequent first; equally frequent ones in the order of their keys, or of a vocabulary of their
    values and then of the tables."""
    count = Counter((f"t_{name}", id) for name in N for id in DATA[name].values().tolist())
    tables = [table.name for table in TABLES]

    def place(entry: tuple[str, int]) -> tuple[int, int, int]:
        table, id = entry
        return -count[entry], reference_key(SEED, entry) if raw_ids else id, tables.index(table)

    return sorted(count, key=place)


class Reference(nn.Module):
    """Embeddings from explicit indices: for each level weights [rows + 1, width], of which the last row is zero and the
    index of those who are absent, and for each table and level int64 [num_embeddings]."""

    def __init__(self, ebc: LMAEmbeddingBagCollection, index: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self.index = index
        self.tables = nn.ModuleList()
        for _, weights in ebc.level_weights("t_user"):
            assert weights is not None
            # Each level is its own copy, with the zero row that nn.Embedding does not train.
            padded = torch.cat([weights.detach(), torch.zeros(1, weights.size(1))])
            self.tables.append(nn.Embedding.from_pretrained(padded, freeze=False, padding_idx=weights.size(0)))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """[B, DIM * features], pooled by SUM."""
        pooled = []
        for name in N:
            one = features[name]
            vectors = torch.cat([t(i[one.values()]) for t, i in zip(self.tables, self.index[f"t_{name}"])], dim=1)
            bag = torch.repeat_interleave(torch.arange(one.lengths().numel()), one.lengths())
            pooled.append(torch.zeros(one.lengths().numel(), DIM).index_add(0, bag, vectors))
        return torch.cat(pooled, dim=1)


def assert_same(allocation: Allocation, index: dict[str, list[Tensor]]) -> None:
    """Forward, and weights after one step of SGD."""
    torch.manual_seed(1)
    ebc = LMAEmbeddingBagCollection(TABLES, allocation)
    reference = Reference(ebc, index)
    target = torch.randn(40, DIM * len(N))
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.5) for module in (ebc, reference)]
    features = batch(40, seed=2)
    untrained = ebc(features).values()
    for _ in range(2):
        outputs = ebc(features).values(), reference(features)
        torch.testing.assert_close(*outputs)
        for optimizer, output in zip(optimizers, outputs):
            optimizer.zero_grad()
            (output - target).square().mean().backward()
            optimizer.step()
    for (_, weights), table in zip(ebc.level_weights("t_user"), reference.tables, strict=True):
        assert weights is not None
        torch.testing.assert_close(weights, table.weight[: weights.size(0)])
    assert not torch.equal(ebc(features).values(), untrained)


def hashed(table: str, id: int, level: int, rows: int) -> int:
    return reference_to_row(reference_key(SEED, (table, id)), reference_salt("level", SEED, level) | 1, rows)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_setting_is_the_smaller_dim(width: int) -> None:
    """All ids own the first columns and nobody owns others: a table of that dim, padded with zeros."""
    rows = sum(N.values()) + 1  # one for ids of no vocabulary
    widths = (width, *{1: (1, 2, 12), 2: (2, 12), 4: (12,), 8: (8,)}[width])
    padding = {1: 3 + 3 + 2, 2: 2 + 2}.get(width, 0)  # values that fill packed tables up to rows of 4
    bytes_ = (rows * width + padding) * 4
    builder = AllocationBuilder(
        TABLES,
        LMAConfig(memory_bytes=bytes_, widths=widths, skew=0, data_type="FP32", seed=SEED),
        shared_fraction=0.0,
    )
    everybody = torch.cat([torch.arange(n) for n in N.values()])
    lengths = torch.tensor([300] + [0] * 1 + [120, 0])
    builder.update(KeyedJaggedTensor(keys=list(N), values=everybody, lengths=lengths))
    allocation = builder.build()
    (memory,) = allocation.memories
    assert [(level.width, level.own_rows, level.shared_rows) for level in memory.levels] == [
        (width, rows - 1, 1),
        *((w, 0, 0) for w in widths[1:]),
    ]
    assert allocation.nbytes == 0
    ebc = LMAEmbeddingBagCollection(TABLES, allocation)
    (level,) = ebc.levels.embedding_bags.values()
    smaller = {name: nn.Embedding(n, width) for name, n in N.items()}
    own = level.weight.detach().view(-1, width)
    with torch.no_grad():
        smaller["user"].weight.copy_(own[:300])
        smaller["item"].weight.copy_(own[300:420])
    features = batch(40, seed=2)
    optimizers = [
        torch.optim.SGD(ebc.parameters(), lr=0.5),
        torch.optim.SGD([w for one in smaller.values() for w in one.parameters()], lr=0.5),
    ]
    target = torch.randn(40, DIM * 2)

    def pooled(name: str) -> Tensor:
        one = features[name]
        bag = torch.repeat_interleave(torch.arange(40), one.lengths())
        sums = torch.zeros(40, width).index_add(0, bag, smaller[name](one.values()))
        return torch.cat([sums, torch.zeros(40, DIM - width)], dim=1)

    outputs = ebc(features).values(), torch.cat([pooled(name) for name in N], dim=1)
    torch.testing.assert_close(*outputs)
    for optimizer, output in zip(optimizers, outputs):
        (output - target).square().mean().backward()
        optimizer.step()
    own = level.weight.detach().view(-1, width)
    torch.testing.assert_close(own[:300], smaller["user"].weight)
    torch.testing.assert_close(own[300:420], smaller["item"].weight)


def test_a_setting_is_the_hashing_trick() -> None:
    allocation = Allocation.hashed(TABLES, CONFIG)
    (memory,) = allocation.memories
    (level,) = memory.levels
    assert (level.width, level.own_rows, level.shared_rows) == (DIM, 0, 420 // 16)
    index = {
        f"t_{name}": [torch.tensor([hashed(f"t_{name}", id, 0, level.shared_rows) for id in range(n)])]
        for name, n in N.items()
    }
    assert_same(allocation, index)


@pytest.mark.parametrize("raw_ids", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_setting_is_hot_ids_with_rows_of_their_own(raw_ids: bool, share: float) -> None:
    config = LMAConfig(compression=6, widths=(DIM,), data_type="FP32", seed=SEED, raw_ids=raw_ids)
    allocation = AllocationBuilder(TABLES, config, shared_fraction=share).update(DATA).build()
    (memory,) = allocation.memories
    (level,) = memory.levels
    assert level.own_rows > 5 and abs(level.shared_rows * DIM * 4 / (420 * DIM * 4 / 6) - share) < 0.02
    hot = occurrences(raw_ids)[: level.own_rows]
    ebc = LMAEmbeddingBagCollection(TABLES, allocation)
    rows = {t.name: ebc.rows(t.name, torch.arange(t.num_embeddings))[memory.level_name(0)] for t in TABLES}
    assert sorted(int(rows[table][id]) for table, id in hot) == list(range(level.own_rows))
    index = {}
    for name, n in N.items():
        table = f"t_{name}"
        of_table = [level.own_rows + hashed(table, id, 0, level.shared_rows) for id in range(n)]
        for hot_table, id in hot:
            if hot_table == table:
                of_table[id] = int(rows[table][id])
        index[table] = [torch.tensor(of_table)]
    assert_same(allocation, index)


def test_a_setting_is_the_papers_lma() -> None:
    """Levels of equal width, all rows shared: by MinHash of training rows where an id has a signature, else by hash."""
    power, num_values, widths = 2, 2, (4,) * 4
    config = LMAConfig(compression=8, widths=widths, data_type="FP32", seed=SEED)
    source = RowsMinHash(power=power, num_values=num_values, min_support=1)
    builder = AllocationBuilder(TABLES, config, source, shared_fraction=1.0, signature_fraction=0.7)
    allocation = builder.update(DATA).build()
    (memory,) = allocation.memories
    (rows,) = {level.shared_rows for level in memory.levels}
    assert [(level.width, level.own_rows) for level in memory.levels] == [(4, 0)] * 4

    bags = {name: [bag.tolist() for bag in DATA[name].to_dense()] for name in N}
    rows_with: dict[tuple[str, int], set[int]] = {}
    for row in range(600):
        ids = [(f"t_{name}", id) for name in N for id in bags[name][row]]
        content = reference_mix64(sum(reference_mix64(reference_key(SEED, id)) for id in ids))
        for id in ids:
            rows_with.setdefault(id, set()).add(content)

    def value(id: tuple[str, int], k: int) -> int:
        folded = 0
        for p in range(power):
            salt = reference_salt("minhash", SEED, k, p)
            folded = reference_mix64(folded ^ min(reference_mix64(row ^ salt) for row in rows_with[id]))
        return folded >> 32

    signatures = memory.tensors["signatures"]
    with_signature = set(occurrences()[: signatures.size(0)])  # the most frequent ones
    assert signatures.size(1) == num_values and 20 < len(with_signature) < len(occurrences())
    index = {}
    for name, n in N.items():
        of_levels = []
        for level in range(4):
            of_level = []
            for id in range(n):
                entry = (f"t_{name}", id)
                key = reference_key(SEED, entry)
                if entry in with_signature:
                    key = reference_mix64(value(entry, level % num_values) ^ reference_salt("signature", SEED))
                of_level.append(reference_to_row(key, reference_salt("level", SEED, level) | 1, rows))
            of_levels.append(torch.tensor(of_level))
        index[f"t_{name}"] = of_levels
    assert_same(allocation, index)
