"""The allocation as an artifact: saved, damaged, refused, compared, and read back from a checkpoint."""

import hashlib
import json
import os
import re
import resource
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_lma.allocation.artifact as artifact
from torchrec_lma import Allocation, AllocationBuilder, LMAConfig, LMAEmbeddingBagCollection
from torchrec_lma.allocation import MemoryAllocation, RowsMinHash
from torchrec_lma.allocation.artifact import FORMAT_VERSION
from torchrec_lma.allocation.layout import Level, TableSpec


def table(name: str, dim: int = 8, num_embeddings: int = 1000, **options: Any) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name, num_embeddings=num_embeddings, embedding_dim=dim, feature_names=[f"f_{name}"], **options
    )


# Vocabularies and raw ids, with own rows on several levels and signatures in both.
TABLES = [table("day", num_embeddings=7), table("user"), table("item", num_embeddings=700), table("url", dim=16)]
CONFIG = LMAConfig(memory_bytes=5000, skew=1, raw_ids=("url",))
SOURCE = RowsMinHash(power=1, num_values=2, min_support=1)


def rows(n: int = 2000) -> KeyedJaggedTensor:
    i = torch.arange(n)
    values = [i % 7, i * i % 997, i * 7 % (1 + i % 600), (i % (1 + i % 400)) << 40]
    return KeyedJaggedTensor(
        keys=[f"f_{t.name}" for t in TABLES],
        values=torch.cat(values),
        lengths=torch.ones(4 * n, dtype=torch.int32),
    )


def build(
    config: LMAConfig = CONFIG, tables: Sequence[EmbeddingBagConfig] = TABLES, n: int = 2000, **options: Any
) -> Allocation:
    options = {"source": {"user": SOURCE, "item": SOURCE, "url": SOURCE}, "signature_fraction": 0.4, **options}
    return AllocationBuilder(tables, config, **options).update(rows(n)).build()


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    made = build()
    for memory in made.memories:
        assert len(memory.levels) > 1 and memory.levels[1].own_rows and memory.levels[0].shared_rows
        kind = ("low", "starts") if memory.raw_ids else ("words",)
        names = {f"{of}.{part}" for of in ("owners.0", "signed") for part in kind} | {"signatures", "owners.1.words"}
        assert set(memory.tensors) >= names
    return made


@pytest.fixture
def saved(allocation: Allocation, tmp_path: Path) -> Path:
    path = tmp_path / "allocation.safetensors"
    allocation.save(path)
    return path


def level_rows(allocation: Allocation, name: str, tables: Sequence[EmbeddingBagConfig] = TABLES) -> torch.Tensor:
    ids = torch.cat([torch.arange(-5, 60), torch.arange(50) << 40])
    return torch.stack(list(LMAEmbeddingBagCollection(tables, allocation).rows(name, ids).values()))


def assert_equal_allocations(one: Allocation, other: Allocation) -> None:
    assert one.fingerprint == other.fingerprint and one.header == other.header
    assert one.config == other.config and one.tables == other.tables and one.nbytes == other.nbytes
    for a, b in zip(one.memories, other.memories, strict=True):
        assert a.header() == b.header() and set(a.tensors) == set(b.tensors)
        for name, tensor in a.tensors.items():
            assert tensor.dtype == b.tensors[name].dtype and torch.equal(tensor, b.tensors[name])


# The file.


def test_an_allocation_survives_its_file(allocation: Allocation, saved: Path) -> None:
    for path in (saved, str(saved)):
        loaded = Allocation.load(path)
        assert_equal_allocations(loaded, allocation)
        assert loaded.provenance == allocation.provenance
    for name in ("day", "user", "item", "url"):
        assert torch.equal(level_rows(loaded, name), level_rows(allocation, name))


def test_an_allocation_without_data_survives_its_file(tmp_path: Path) -> None:
    for config in (CONFIG, replace(CONFIG, widths={8: (4, 2, 1, 1), 16: (16,)}, data_type="BF16")):
        hashed = Allocation.hashed(TABLES, config)
        hashed.save(tmp_path / "a")
        assert_equal_allocations(Allocation.load(tmp_path / "a"), hashed)


def test_a_loaded_allocation_does_not_depend_on_its_file(allocation: Allocation, saved: Path) -> None:
    loaded = Allocation.load(saved)
    saved.write_bytes(b"\0" * saved.stat().st_size)
    assert_equal_allocations(loaded, allocation)
    loaded.save(saved)
    assert_equal_allocations(Allocation.load(saved), allocation)


def test_others_may_read_a_saved_allocation_as_any_new_file(saved: Path) -> None:
    ordinary = saved.with_name("ordinary")
    ordinary.write_bytes(b"")
    assert oct(saved.stat().st_mode) == oct(ordinary.stat().st_mode)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.99])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=re.escape(str(saved))):
        Allocation.load(saved)


@pytest.mark.parametrize("content", [b"\0" * 5000, b"not an allocation\n" * 100, b"{}", b"\xff" * 64])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*Build it again"):
        Allocation.load(path)


def test_no_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no allocation file at .*nowhere"):
        Allocation.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        Allocation.load(tmp_path)


def write_safetensors(path: Path, metadata: dict[str, str]) -> None:
    """The format in six lines: length of the header, JSON header, data (none here)."""
    header = json.dumps(
        {"__metadata__": metadata, "x": {"dtype": "I32", "shape": [0], "data_offsets": [0, 0]}}
    ).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "weights", {"format": "pt"})
    with pytest.raises(ValueError, match="weights is a safetensors file but not an allocation"):
        Allocation.load(tmp_path / "weights")


def test_another_format_version_is_named(tmp_path: Path) -> None:
    said = "version 9, this torchrec_lma reads version 5; build it again"
    write_safetensors(tmp_path / "old", {"format": "torchrec_lma.allocation", "format_version": "9"})
    with pytest.raises(ValueError, match=said):
        Allocation.load(tmp_path / "old")


def test_a_file_with_a_flipped_byte_never_loads(allocation: Allocation, saved: Path) -> None:
    whole = saved.read_bytes()
    (header_length,) = struct.unpack("<Q", whole[:8])
    positions = [*range(0, 8 + header_length, 3), *range(8 + header_length, len(whole), 7), len(whole) - 1]
    undetected, other_errors = [], []
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 7)
        saved.write_bytes(damaged)
        where = f"byte {position} after {whole[max(0, position - 20) : position]!r}"
        try:
            loaded = Allocation.load(saved)
        except Exception as error:
            if type(error) is not ValueError or str(saved) not in str(error):
                other_errors.append(f"{where}: {error!r}")
            continue
        if (loaded.header, loaded.provenance, loaded.fingerprint) != (
            allocation.header,
            allocation.provenance,
            allocation.fingerprint,
        ):
            undetected.append(where)
    assert not undetected, f"{len(undetected)} damaged files were loaded: {undetected[:3]}"
    assert not other_errors, f"{len(other_errors)} do not say which file is damaged: {other_errors[:3]}"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails", ["save_file", "os.replace"])
def test_a_failed_save_leaves_what_was_there(
    allocation: Allocation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, existing: bool
) -> None:
    path = tmp_path / "allocation.safetensors"
    if existing:
        Allocation.hashed(TABLES, CONFIG).save(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def no_space(tensors: object, filename: str, *args: object) -> None:
        if fails == "save_file":
            Path(filename).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((artifact, "save_file") if fails == "save_file" else (os, "replace")), no_space)
    with pytest.raises(OSError, match="No space left"):
        allocation.save(path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As a disk that is full after that many bytes of a file, to the real writer."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [0, 1000, 10_000])
def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path, size: int) -> None:
    ids = torch.arange(4000)
    one = KeyedJaggedTensor(keys=["f_user"], values=ids, lengths=torch.ones_like(ids))
    config = LMAConfig(compression=4, raw_ids=True)
    allocation = AllocationBuilder([table("user", num_embeddings=60_000)], config).update(one).build()
    assert allocation.nbytes > 11_000
    with files_of_at_most(size), pytest.raises(OSError, match=f"{tmp_path}/a was not written .*make room for"):
        allocation.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    allocation.save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with files_of_at_most(size), pytest.raises(OSError, match="was not written"):
        allocation.save(tmp_path / "a")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": before}


def test_saving_over_a_file_replaces_it(allocation: Allocation, tmp_path: Path) -> None:
    path = tmp_path / "a"
    Allocation.hashed(TABLES, CONFIG).save(path)
    allocation.save(path)
    assert Allocation.load(path).fingerprint == allocation.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# Contents that no builder makes, under a right checksum.


def changed(tensor: torch.Tensor, at: int, value: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[at] = value
    return tensor


Change = Callable[[MemoryAllocation], dict[str, Any]]


def of_level(k: int, **fields: Any) -> Change:
    def change(memory: MemoryAllocation) -> dict[str, Any]:
        levels = list(memory.levels)
        levels[k] = replace(levels[k], **fields)
        return {"levels": tuple(levels)}

    return change


def of_tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Change:
    def change(memory: MemoryAllocation) -> dict[str, Any]:
        tensors = {**memory.tensors, name: make(memory.tensors.get(name, torch.zeros(1)))}
        return {"tensors": {name: tensor for name, tensor in tensors.items() if tensor is not None}}

    return change


IMPOSSIBLE: dict[str, tuple[int, Change, str]] = {
    "negative rows": (0, of_level(0, own_rows=-1), "number of rows of level 0 .*>= 0, got -1"),
    "negative shared rows": (0, of_level(0, shared_rows=-5), "number of rows of level 0.*-5"),
    "fractions of rows": (0, of_level(0, shared_rows=2.5), "number of rows.*2.5"),
    "too many rows": (0, of_level(0, shared_rows=2**31), "rows of level 0.*most is 2147483647"),
    "no rows at all": (0, lambda m: {"levels": tuple(Level(x.width, 0, 0) for x in m.levels)}, "no rows"),
    "no columns": (0, of_level(0, width=0), "width of level 0.*>= 1"),
    "columns that no kernel takes": (0, of_level(0, width=3), "width 3 of level 0.*no kernel"),
    "columns that do not add up": (0, of_level(0, width=16), "do not add up to 8"),
    "more own rows than ids": (0, of_level(0, own_rows=1708), "1708 own rows of level 0.*most is 1707"),
    "more own rows than on the level before": (0, of_level(1, own_rows=1500), "own rows of level 1"),
    "fewer own rows than members": (0, of_level(0, own_rows=99), "owners.0.words.*expected 99"),
    "fewer keys than own rows": (1, of_level(0, own_rows=30), "owners.0.low.*expected 30"),
    "another dim": (0, lambda m: {"dim": 16}, "dim 16"),
    "another kind of ids": (0, lambda m: {"raw_ids": True}, "raw_ids True"),
    "a table that is not": (0, lambda m: {"tables": ("user", "nobody")}, "nobody"),
    "a table twice": (0, lambda m: {"tables": ("user", "item", "user")}, "tables"),
    "a name twice": (0, lambda m: {"name": "url_lma16"}, "name twice"),
    "no bitmap": (0, of_tensor("owners.0.words", lambda t: None), "lacks owners.0.words"),
    "a short bitmap": (0, of_tensor("owners.0.words", lambda t: t[:-1]), "owners.0.words.*53 words for 1707 ids"),
    "a bitmap of bytes": (0, of_tensor("owners.0.words", lambda t: t.view(torch.int8)), "owners.0.words.*int8"),
    "a member beyond": (
        0,
        of_tensor("owners.0.words", lambda t: changed(changed(t, -1, -(2**31)), 0, int(t[0]) & (int(t[0]) - 1))),
        "owners.0.words.*beyond",
    ),
    "a later bitmap that is full": (0, of_tensor("owners.1.words", lambda t: torch.full_like(t, -1)), "owners.1.words"),
    "no keys": (1, of_tensor("owners.0.low", lambda t: None), "lacks owners.0.low"),
    "a key less": (1, of_tensor("owners.0.low", lambda t: t[1:]), "owners.0.low.*keys"),
    "keys of 8 bytes": (1, of_tensor("owners.0.low", lambda t: t.long()), "owners.0.low.*int64"),
    "starts out of range": (1, of_tensor("owners.0.starts", lambda t: changed(t, 1, 9999)), "owners.0.starts"),
    "a negative start": (1, of_tensor("owners.0.starts", lambda t: changed(t, 0, -1)), "owners.0.starts"),
    "starts that go back": (1, of_tensor("owners.0.starts", lambda t: changed(t, 1, int(t[2]) + 1)), "owners.0.starts"),
    "an end too late": (1, of_tensor("owners.0.starts", lambda t: changed(t, -1, 9999)), "owners.0.starts"),
    "3 buckets": (1, of_tensor("owners.0.starts", lambda t: t[[0, 1, 2, -1]]), "owners.0.starts"),
    "keys out of order": (1, of_tensor("owners.0.low", lambda t: t.flip(0)), "owners.0.low.* not sorted"),
    "a key twice": (1, of_tensor("owners.0.low", lambda t: t[:1].expand_as(t)), "owners.0.low.* not sorted"),
    "no starts": (1, of_tensor("owners.0.starts", lambda t: t[:0]), "owners.0.starts"),
    "signatures of nobody": (0, of_tensor("signed.words", lambda t: None), "lacks signed.words"),
    "a signature less": (0, of_tensor("signatures", lambda t: t[1:]), "signed.words.*members"),
    "signatures in a line": (1, of_tensor("signatures", lambda t: t.flatten()), "signatures.*2 dimensions"),
    "signatures without values": (1, of_tensor("signatures", lambda t: t[:, :0]), "signatures"),
    "one more tensor": (0, of_tensor("extra", lambda t: t), r"does not need|do not need: \['extra'\]"),
}


@pytest.mark.parametrize("which, change, said", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_contents_are_refused(
    allocation: Allocation, tmp_path: Path, which: int, change: Change, said: str
) -> None:
    memories = list(allocation.memories)
    memories[which] = replace(memories[which], **change(memories[which]))
    replace(allocation, memories=tuple(memories)).save(tmp_path / "a")  # with the checksum of these contents
    with pytest.raises(ValueError, match=rf"(?s){tmp_path}/a holds what no builder makes.*{said}.*Build it again"):
        Allocation.load(tmp_path / "a")


@pytest.mark.parametrize(
    "ranges",
    [
        [[0, 100]],
        [[0, 101], [200, 250]],
        [[0, 100], [99, 149]],
        [[0, 100], [250, 301]],
        [[-1, 99], [200, 250]],
        [[50, 0], [100, 300]],
    ],
)
def test_impossible_ranges_are_refused(tmp_path: Path, ranges: list[list[int]]) -> None:
    config = LMAConfig(memory_bytes=1)
    tables = tuple(TableSpec(name, size, 4, "FP32", False) for name, size in (("a", 200), ("b", 100)))
    levels = (Level(4, 150, 10),)

    def save(ranges: list[list[int]]) -> None:
        tensors = {"owners.0.ranges": torch.tensor(ranges)}
        memory = MemoryAllocation("a_lma4", 4, False, ("a", "b"), levels, tensors)
        Allocation(config, tables, (memory,)).save(tmp_path / "a")

    save([[0, 100], [200, 250]])
    Allocation.load(tmp_path / "a")
    save(ranges)
    with pytest.raises(ValueError, match=r"(?s)owners.0.ranges.*expected for each of 2 tables.*150 ids"):
        Allocation.load(tmp_path / "a")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: {"memories": a.memories[:1]}, "url"),
        (lambda a: {"tables": a.tables[:-1]}, "url"),
        (lambda a: {"tables": (*a.tables, a.tables[0])}, "name twice"),
        (lambda a: {"tables": (*a.tables[:-1], replace(a.tables[-1], num_embeddings=0))}, "num_embeddings.*>= 1"),
        (lambda a: {"tables": (*a.tables[:-1], replace(a.tables[-1], data_type="FP99"))}, "FP99"),
    ],
)
def test_tables_that_are_not_placed_are_refused(
    allocation: Allocation, tmp_path: Path, change: Callable[[Allocation], dict[str, Any]], said: str
) -> None:
    replace(allocation, **change(allocation)).save(tmp_path / "a")
    with pytest.raises(ValueError, match=f"a holds what no builder makes.*{said}"):
        Allocation.load(tmp_path / "a")


@pytest.mark.parametrize(
    "header", ["{}", "[]", "null", "{", '{"format_version": 2}', f'{{"format_version": {FORMAT_VERSION}, "tables": 5}}']
)
def test_a_header_of_something_else_is_refused(tmp_path: Path, header: str) -> None:
    metadata = {"format": artifact.FORMAT, "format_version": str(FORMAT_VERSION), "header": header, "provenance": "{}"}
    metadata["checksum"] = hashlib.sha256(json.dumps({**metadata, "checksum": ""}, sort_keys=True).encode()).hexdigest()
    write_safetensors(tmp_path / "a", metadata)
    with pytest.raises(ValueError, match="a holds what no builder makes"):
        Allocation.load(tmp_path / "a")


# What it was made for.


@pytest.mark.parametrize(
    "tables, said",
    [
        (TABLES[:-1], "other tables.*url.*none"),
        ([*TABLES, table("color")], "other tables.*color.*no such table"),
        ([*TABLES[:1], table("user", num_embeddings=7), *TABLES[2:]], "other tables.*user.*1000.*7"),
        ([*TABLES[:1], table("user", dim=16), *TABLES[2:]], "other tables.*user"),
        ([table(t.name, t.embedding_dim, t.num_embeddings, data_type=DataType.FP16) for t in TABLES], "FP16"),
        (TABLES[::-1], r"order \['day', 'user', 'item', 'url'\]"),
    ],
)
def test_an_allocation_made_for_other_tables_is_refused(saved: Path, tables, said: str) -> None:
    if "url" not in [t.name for t in tables]:
        said = "raw_ids.*url"  # the configuration names it
    with pytest.raises(ValueError, match=said):
        LMAEmbeddingBagCollection(tables, Allocation.load(saved))


# The fingerprint.


def test_the_fingerprint_is_of_what_decides_rows() -> None:
    others = {
        "base": build(),
        "seed": build(replace(CONFIG, seed=1)),
        "rows of data": build(n=1500),
        "skew": build(replace(CONFIG, skew=2)),
        "widths": build(replace(CONFIG, widths={8: (4, 4), 16: (4, 12)})),
        "kind of ids": build(replace(CONFIG, raw_ids=())),
        "power": build(source={"user": replace(SOURCE, power=2)}),
        "within a table": build(source={"user": replace(SOURCE, within_table=True)}),
        "no source": build(source=None),
        "shared": build(shared_fraction=0.5),
        "signatures": build(signature_fraction=0.35),
        "vocabulary": build(tables=[*TABLES[:1], table("user", num_embeddings=1001), *TABLES[2:]]),
        "hashed": Allocation.hashed(TABLES, CONFIG),
    }
    assert len({other.fingerprint for other in others.values()}) == len(others)
    assert all(re.fullmatch("[0-9a-f]{64}", other.fingerprint) for other in others.values())


def test_the_fingerprint_changes_with_every_part_of_a_memory(allocation: Allocation) -> None:
    for at, memory in enumerate(allocation.memories):
        parts: list[dict[str, Any]] = [
            {"tables": (*memory.tables[::-1], "x")},
            {"name": "another"},
            *({"levels": (*memory.levels[:k], replace(memory.levels[k], shared_rows=77), *memory.levels[k + 1 :])}
              for k in range(len(memory.levels))),
        ]  # fmt: skip
        for name, tensor in memory.tensors.items():
            flipped = tensor.clone()
            flipped.view(-1)[-1] ^= 1
            # The same bytes as another type or in another shape are another thing.
            for other in (flipped, tensor.view(torch.int16), tensor.view(*tensor.shape, 1)):
                parts.append({"tensors": {**memory.tensors, name: other}})
        memories = [
            (*allocation.memories[:at], replace(memory, **part), *allocation.memories[at + 1 :]) for part in parts
        ]
        fingerprints = {replace(allocation, memories=one).fingerprint for one in memories}
        assert len(fingerprints | {allocation.fingerprint}) == len(parts) + 1


def test_the_fingerprint_is_not_of_provenance_or_of_the_way_to_the_rows() -> None:
    tables = [table("user")]
    by_ratio, by_bytes = LMAConfig(compression=10, data_type="FP32"), LMAConfig(memory_bytes=1600, skew=2)
    one, other = Allocation.hashed(tables, by_ratio), Allocation.hashed(tables, by_bytes)
    assert one.memories[0].levels == (Level(8, 0, 100),)
    assert one.fingerprint == other.fingerprint
    assert replace(one, provenance={"note": "x"}).fingerprint == one.fingerprint


def test_the_fingerprint_of_a_hashed_allocation_never_changes() -> None:
    """Checkpoints carry it: if this fails, they are refused by this version."""
    tables = [EmbeddingBagConfig(name="t_user", num_embeddings=1000, embedding_dim=8, feature_names=["user"])]
    fingerprint = Allocation.hashed(tables, LMAConfig(compression=4)).fingerprint
    assert fingerprint == "5c46735dce372b58c75d3623fe8ff097b65d2365a05abcb64916630892ebec08"


# From a checkpoint.


class Model(nn.Module):
    def __init__(self, *collections: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 2)
        self.sparse = nn.ModuleList(collections)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["built", "hashed"])
def test_a_checkpoint_holds_its_allocation(allocation: Allocation, tmp_path: Path, nested: bool, kind: str) -> None:
    if kind == "hashed":
        allocation = Allocation.hashed(TABLES, CONFIG)
    ebc = LMAEmbeddingBagCollection(TABLES, allocation)
    model = Model(ebc) if nested else ebc
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    restored = Allocation.from_checkpoint(tmp_path)
    assert_equal_allocations(restored, allocation)
    assert torch.equal(level_rows(restored, "user"), level_rows(allocation, "user"))


def test_a_checkpoint_inside_an_application_state_holds_its_allocation(allocation: Allocation, tmp_path: Path) -> None:
    model = Model(LMAEmbeddingBagCollection(TABLES, allocation))
    dcp.save({"model": model.state_dict(), "step": 7}, checkpoint_id=tmp_path, no_dist=True)
    assert_equal_allocations(Allocation.from_checkpoint(tmp_path), allocation)


def test_a_checkpoint_with_no_or_several_collections_is_refused(allocation: Allocation, tmp_path: Path) -> None:
    dcp.save(Model().state_dict(), checkpoint_id=tmp_path / "none", no_dist=True)
    with pytest.raises(ValueError, match="none holds 0 LMA collections"):
        Allocation.from_checkpoint(tmp_path / "none")
    several = Model(*(LMAEmbeddingBagCollection(TABLES, allocation) for _ in range(2)))
    dcp.save(several.state_dict(), checkpoint_id=tmp_path / "two", no_dist=True)
    with pytest.raises(ValueError, match="two holds 2 LMA collections.*sparse.0.*sparse.1"):
        Allocation.from_checkpoint(tmp_path / "two")


@pytest.mark.parametrize("name", ["signatures", "owners.0.words"])
def test_a_checkpoint_with_a_damaged_allocation_is_refused(allocation: Allocation, tmp_path: Path, name: str) -> None:
    state = LMAEmbeddingBagCollection(TABLES, allocation).state_dict()
    (key,) = (key for key in state if key.startswith("remap.memories.day") and key.endswith(name))
    state[key] = state[key] ^ 1
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match=f"states allocation {allocation.fingerprint} but holds|no builder makes"):
        Allocation.from_checkpoint(tmp_path)


def test_weights_of_another_allocation_are_refused(allocation: Allocation) -> None:
    ebc, other = (LMAEmbeddingBagCollection(TABLES, a) for a in (allocation, Allocation.hashed(TABLES, CONFIG)))
    with pytest.raises(ValueError, match=f"written with allocation {allocation.fingerprint}.*from_checkpoint"):
        other.load_state_dict(ebc.state_dict(), strict=False)
