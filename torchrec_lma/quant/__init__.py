"""Quantized LMA tables, and their export for serving.

Training's three parts stay: the remap from raw ids to rows, the level tables, the regroup. Only the middle one changes:
`levels` is a plain EmbeddingBagCollection, or plain EmbeddingCollections, which TorchRec's `quantize_inference_model`
swaps for its own quantized ones, `shard_quant_model` shards with its own sharders, and its tracer traces. So ids have
the rows of training, and there is no quantized module of this library.

* `quantize(model, dtype)`: that function, with what it leaves out.
* `script(model)`: TorchScript of a quantized model.
* `export(servable, path, dtype)`: both, checked on real rows in a new process, written for TorchRec's inference server
  and for `torchrec_lma.serving`. The command is `torchrec-lma export`.
* `ServableModel`, `load_checkpoint`, `request`: what a factory for that command is made of.

Example::

    model = quantize(model, torch.int8)
    # TorchRec leaves the weights to be copied. What is under tbes is the same weights once more, in another layout.
    weights = {key: value for key, value in model.state_dict().items() if ".tbes." not in key}
    sharded, plan = shard_quant_model(model, world_size=2, compute_device="cuda", sharding_device="cuda")
    sharded.load_state_dict(weights, strict=False)

What was found of `shard_quant_model` on the CPU with torchrec 1.8 and 1.9, for full tables as for levels:

* It needs `torchrec.distributed.global_settings.set_propogate_device(True)`.
* Table-wise, row-wise and column-wise give what the unsharded module gives, in INT8 and INT4, weighted or not, eager
  and scripted. Row-wise adds the parts of a bag in another order.
* Constraints name level tables, as `levels.embedding_bags` does.
* FP32 and FP16 tables are sharded table-wise only, by a QuantEmbeddingBagCollectionSharder that does not split scales
  from values, which they do not have; their weights go across by TorchRec's `get_table_to_weights_from_tbe` and
  `assign_weights_to_tbe`.
* An INT4 table of a single row does not load row-wise: TorchRec's UInt4Tensor lacks an operator.
"""

from torchrec_lma.quant.export import Exported, ServableModel, export, load_checkpoint, request
from torchrec_lma.quant.transforms import DTYPES, quantize, script

__all__ = ["DTYPES", "Exported", "ServableModel", "export", "load_checkpoint", "quantize", "request", "script"]
