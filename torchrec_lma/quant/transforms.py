"""From a trained float model to a quantized one, and from an eager model to TorchScript, as TorchRec does it."""

import warnings
from collections.abc import Mapping

import torch
from torch import nn
from torchrec.fx import Tracer
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.embedding_configs import DATA_TYPE_NUM_BITS, dtype_to_data_type
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.quant.embedding_modules import (
    quant_prep_customize_row_alignment,
    quant_prep_enable_quant_state_dict_split_scale_bias_for_types,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.allocation import Allocation
from torchrec_lma.collection import LMACollection, configs_of, tables_of

# What tables can be stored in, the most exact first (docs/serving.md has the measured errors).
DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "int8": torch.int8,
    "int4": torch.quint4x2,
    "int2": torch.quint2x4,
}
PLAIN_COLLECTIONS = (EmbeddingBagCollection, EmbeddingCollection)
# Modules that a trace calls and does not look into.
LEAF_MODULES = ["IntNBitTableBatchedEmbeddingBagsCodegen"]


def quantize(
    model: nn.Module,
    dtype: torch.dtype = torch.int8,
    per_table_weight_dtype: Mapping[str, torch.dtype] | None = None,
) -> nn.Module:
    """TorchRec's `quantize_inference_model` for models with LMA tables, full tables or both.

    That function alone quantizes LMA tables too: `levels` is a plain collection, or several. This one adds what it
    leaves out: BF16 weights, rows without padding on the CPU, dtypes by the names of logical tables, errors that say
    what to do, and a model that traces at once.

    Ids outside of a vocabulary are served as unseen, also where the model was `strict`.

    Args:
        model: trained, its weights loaded; its tables are replaced in place.
        dtype: of the weights, a value of DTYPES.
        per_table_weight_dtype: of single tables, by name: a level, a full table, or a logical table whose
            rows are in levels. Those levels are shared by all tables of its memory, so they get its dtype only if all
            of these tables are named with the same one.
    Returns:
        The model.
    Raises:
        ValueError: a dtype that a table cannot be stored in; a name of no table; tables of one memory with different
            dtypes; weights on the meta device, or loaded from a checkpoint of another allocation.
    """
    lma = [module for module in model.modules() if isinstance(module, LMACollection)]
    for collection in lma:
        _check_allocation(collection)
        collection.strict = False  # an error would depend on data, which a traced graph cannot
    dtypes = _by_stored_table(model, lma, per_table_weight_dtype or {})
    for module in model.modules():
        if type(module) in PLAIN_COLLECTIONS:
            _prepare(module, dtypes, dtype)
    quantize_inference_model(model, per_table_weight_dtype=dtypes, fp_weight_dtype=dtype, quantization_dtype=dtype)
    for collection in lma:
        # TorchRec's collections look up the order of their features at the first batch, which a trace cannot do.
        none = torch.empty(0, dtype=torch.int32, device=collection.device)
        for plain, keys in zip(collection.plain_collections(), collection.level_keys()):
            weights = none.float() if getattr(plain, "is_weighted", bool)() else None
            plain(KeyedJaggedTensor(keys=keys, values=none, lengths=none.new_zeros(len(keys)), weights=weights))
    return model


def _check_allocation(collection: LMACollection) -> None:
    """Raises ValueError unless the weights are those of the allocation that decides their rows, and both are there."""
    if any(weight.device.type == "meta" for weight in collection.parameters()):
        raise ValueError("an LMA collection is on the meta device: load its weights before it is quantized")
    collection.remap.check_not_overwritten()
    state = {key: tensor.cpu() for key, tensor in collection.remap.state_dict().items()}
    found = Allocation.from_state(state, {}).fingerprint
    if found != collection.allocation.fingerprint:
        raise ValueError(
            f"the collection states allocation {collection.allocation.fingerprint} and its buffers hold {found}: its "
            "weights would be read at the wrong rows. Load all keys of the checkpoint, those of `remap` too"
        )


def _by_stored_table(
    model: nn.Module, lma: list[LMACollection], given: Mapping[str, torch.dtype]
) -> dict[str, torch.dtype]:
    """Dtypes by the names of the tables that TorchRec stores, from those that may name logical tables."""
    dtypes = dict(given)
    logical: set[str] = set()
    for memory in (memory for collection in lma for memory in collection.allocation.memories):
        logical |= {*memory.tables}
        named = {table: given[table] for table in memory.tables if table in given}
        if not named:
            continue
        if len(named) < len(memory.tables) or len({*named.values()}) > 1:
            raise ValueError(
                f"per_table_weight_dtype has {named}, and tables {list(memory.tables)} share their rows: name them all "
                f"with one dtype, or name the levels, {memory.level_name(0)!r} and so on"
            )
        for k in range(len(memory.levels)):  # a level that is named itself keeps its own
            dtypes.setdefault(memory.level_name(k), next(iter(named.values())))
    stored = {
        table.name
        for module in model.modules()
        if not isinstance(module, LMACollection)
        and (hasattr(module, "embedding_bag_configs") or hasattr(module, "embedding_configs"))
        for table in configs_of(module)
    }
    if unknown := sorted(given.keys() - stored - logical):
        raise ValueError(f"per_table_weight_dtype names {unknown}, the model has {sorted(stored | logical)}")
    return {name: dtype for name, dtype in dtypes.items() if name in stored}


def _prepare(collection: nn.Module, dtypes: Mapping[str, torch.dtype], default: torch.dtype) -> None:
    """Makes a collection one that TorchRec quantizes. Raises ValueError where a table cannot have its dtype."""
    for table in configs_of(collection):
        dtype = dtypes.get(table.name, default)
        if dtype not in DTYPES.values():
            raise ValueError(f"tables cannot be quantized to {dtype}; choose one of {[*DTYPES.values()]}")
        bits = DATA_TYPE_NUM_BITS[dtype_to_data_type(dtype)]
        if bits <= 8 and table.embedding_dim % (16 // bits):  # FBGEMM keeps the float16 scale beside them aligned
            raise ValueError(
                f"table {table.name!r} has {table.embedding_dim} columns; {dtype} needs a multiple of {16 // bits}: "
                "choose a finer dtype, or one for this table by per_table_weight_dtype"
            )
        stored = tables_of(collection)[table.name]
        if stored.weight.dtype == torch.bfloat16:  # which TorchRec does not quantize; every BF16 is an FP32
            stored.weight = nn.Parameter(stored.weight.detach().float())
    types: list[type[nn.Module]] = [*PLAIN_COLLECTIONS]
    if all(weight.device.type == "cpu" for weight in collection.parameters()):
        quant_prep_customize_row_alignment(collection, types, 1)  # TorchRec pads rows to 16 bytes, as the GPU needs
    # With scales apart from values, the state_dict loads into collections under any sharding.
    quant_prep_enable_quant_state_dict_split_scale_bias_for_types(collection, types)


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """TorchScript of a quantized model, sharded or not, that loads where only fbgemm_gpu is imported.

    Collections that are sharded, and full tables, must have seen a batch before: they look at its keys, and make their
    output dist, at the first one.
    """
    model.eval()
    graph = Tracer(leaf_modules=LEAF_MODULES).trace(model)
    with warnings.catch_warnings():  # about annotations in TorchRec's and FBGEMM's classes
        warnings.filterwarnings("ignore", "The TorchScript type system|TorchScript will treat type", UserWarning)
        return torch.jit.script(torch.fx.GraphModule(model, graph))
