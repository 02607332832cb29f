"""What each dtype of quantized tables costs and gives, on a trained DLRM.

    python examples/benchmarks/quantization.py --checkpoint runs/demo/lma-seed0

Scores the test rows of the run's data with the float model and with its tables in every dtype, and prints bytes, AUC,
log-loss and the largest difference of a probability; then bytes and error of rows of normal weights by their width.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_lma.files import replacing
from torchrec_lma.options import open_dataset
from torchrec_lma.quant import DTYPES, quantize, request
from torchrec_lma.quant.export import ContractModule

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dlrm"))
from checkpointing import read_settings
from serving import dlrm, find_checkpoint

ROWS = 10_000


def score(model: nn.Module, batches: list[Any]) -> Tensor:
    """Probabilities, float32 [rows]."""
    return torch.cat([model(request(batch.dense_features, batch.sparse_features))["default"] for batch in batches])


def stored_bytes(model: nn.Module) -> int:
    """Of quantized tables: values, scales, biases and padding."""
    return sum(
        rows.numel()
        for tbe in model.modules()
        if isinstance(tbe, IntNBitTableBatchedEmbeddingBagsCodegen)
        for rows, _ in tbe.split_embedding_weights(split_scale_shifts=False)
    )


def float_bytes(model: nn.Module) -> int:
    return sum(
        weight.nbytes
        for module in model.modules()
        if isinstance(module, EmbeddingBagCollection)
        for weight in module.parameters()
    )


def measure(checkpoint: Path) -> list[dict[str, Any]]:
    dataset = open_dataset(argparse.Namespace(**read_settings(checkpoint)["arguments"]))
    batches = [batch for batch in dataset.batches("test", batch_size=4096) if len(batch.labels)]
    labels = torch.cat([batch.labels for batch in batches])
    model = ContractModule(dlrm(checkpoint))
    in_float = score(model, batches)
    results = [result("float", float_bytes(model), in_float, labels, in_float)]
    for name, dtype in DTYPES.items():
        model = ContractModule(dlrm(checkpoint))
        try:
            quantize(model, dtype)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        results.append(result(name, stored_bytes(model), score(model, batches), labels, in_float))
    return results


def result(name: str, nbytes: int, probabilities: Tensor, labels: Tensor, in_float: Tensor) -> dict[str, Any]:
    return {
        "dtype": name,
        "bytes": nbytes,
        "auc": BinaryAUROC()(probabilities, labels.int()).item(),
        "log_loss": nn.functional.binary_cross_entropy(probabilities, labels).item(),
        "largest_difference": (probabilities - in_float).abs().max().item(),
    }


def format_errors(widths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Bytes and relative root-mean-square error of rows of standard normal weights."""
    every_row = KeyedJaggedTensor(keys=["f"], values=torch.arange(ROWS), lengths=torch.ones(ROWS, dtype=torch.int64))
    for name, dtype in DTYPES.items():
        for width in widths:
            config = EmbeddingBagConfig(name="t", num_embeddings=ROWS, embedding_dim=width, feature_names=["f"])
            full = EmbeddingBagCollection([config])
            weight = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
            full.embedding_bags["t"].weight.data.copy_(weight)
            try:
                on_cpu = quantize(nn.Sequential(full), dtype)
            except ValueError:  # rows of this width cannot be stored so
                continue
            error = on_cpu(every_row).values() - weight
            # TorchRec pads rows for the GPU everywhere, unless it is asked not to.
            on_gpu = quantize_inference_model(nn.Sequential(EmbeddingBagCollection([config])), quantization_dtype=dtype)
            yield {
                "dtype": name,
                "width": width,
                "cpu_bytes": stored_bytes(on_cpu) // ROWS,
                "gpu_bytes": stored_bytes(on_gpu) // ROWS,
                "error": (error.norm() / weight.norm()).item(),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="of examples/dlrm/train.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args()
    trained, formats = measure(find_checkpoint(args.checkpoint)), list(format_errors((4, 8, 16, 32)))
    print(f"{'tables':<8}{'bytes':>12}{'test AUC':>10}{'log-loss':>10}{'largest difference':>20}")
    for row in trained:
        print(
            f"{row['dtype']:<8}{row['bytes']:>12,}{row['auc']:>10.4f}{row['log_loss']:>10.4f}"
            f"{row['largest_difference']:>20.2g}"
        )
    print(f"\n{'dtype':<8}{'width':>6}{'bytes, CPU':>12}{'bytes, GPU':>12}{'relative error':>16}")
    for row in formats:
        print(f"{row['dtype']:<8}{row['width']:>6}{row['cpu_bytes']:>12}{row['gpu_bytes']:>12}{row['error']:>16.4f}")
    if args.json is not None:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps({"trained": trained, "formats": formats}, indent=1))


if __name__ == "__main__":
    main()
