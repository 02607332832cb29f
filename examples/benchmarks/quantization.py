"""What each dtype of quantized tables costs and gives, on a trained DLRM.

    python examples/benchmarks/quantization.py --checkpoint runs/demo/lma-seed0

Scores the test rows of the run's data with the float model and with its tables in every dtype, and prints bytes, AUC,
log-loss and the largest difference of a probability; then the error of the formats themselves on normal weights.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryAUROC

from torchrec_lma.inference import DTYPES, QuantLMAEmbeddingBagCollection, chunk_bytes, quantize, request
from torchrec_lma.inference.export import ContractModule
from torchrec_lma.inference.rows import fp8_exponent_bias, quantize_chunks, sparse_type
from torchrec_lma.options import open_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dlrm"))
from checkpointing import read_settings  # noqa: E402
from serving import dlrm, find_checkpoint  # noqa: E402


def score(model: nn.Module, batches: list[Any]) -> Tensor:
    """Probabilities, float32 [rows]."""
    return torch.cat([model(request(batch.dense_features, batch.sparse_features))["default"] for batch in batches])


def measure(checkpoint: Path) -> list[dict[str, Any]]:
    dataset = open_dataset(argparse.Namespace(**read_settings(checkpoint)["arguments"]))
    batches = [batch for batch in dataset.batches("test", batch_size=4096) if len(batch.labels)]
    labels = torch.cat([batch.labels for batch in batches])
    in_float, results = score(ContractModule(dlrm(checkpoint)), batches), []
    for name in ("float", *DTYPES):
        probabilities, row_bytes = in_float, None
        if name != "float":
            model = ContractModule(dlrm(checkpoint))
            try:
                quantize(model, DTYPES[name])
            except ValueError as error:
                print(f"{name}: {error}")
                continue
            probabilities = score(model, batches)
            lma = [module for module in model.modules() if isinstance(module, QuantLMAEmbeddingBagCollection)]
            row_bytes = {memory: nbytes for module in lma for memory, nbytes in module.row_bytes().items()}
        results.append(
            {
                "dtype": name,
                "row_bytes": row_bytes,
                "auc": BinaryAUROC()(probabilities, labels.int()).item(),
                "log_loss": nn.functional.binary_cross_entropy(probabilities, labels).item(),
                "largest_difference": (probabilities - in_float).abs().max().item(),
            }
        )
    return results


def format_errors(chunk_dims: tuple[int, ...]) -> list[dict[str, Any]]:
    """Bytes and relative root-mean-square error of 10,000 chunks of standard normal weights."""
    results = []
    for name, dtype in DTYPES.items():
        for chunk_dim in chunk_dims:
            weight = torch.randn(10_000, chunk_dim, generator=torch.Generator().manual_seed(0))
            try:
                on_cpu, on_cuda = chunk_bytes(dtype, chunk_dim), chunk_bytes(dtype, chunk_dim, "cuda")
            except ValueError:
                continue
            restored = restore(weight, dtype)
            error = (restored - weight).norm().item() / weight.norm().item()
            results.append(
                {"dtype": name, "chunk_dim": chunk_dim, "cpu_bytes": on_cpu, "cuda_bytes": on_cuda, "error": error}
            )
    return results


def restore(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantized and read back by FBGEMM."""
    kind, bias = sparse_type(dtype), fp8_exponent_bias(weight)
    values, scale_bias = quantize_chunks(weight, kind, bias)
    if dtype in (torch.float32, torch.float16):
        return values.view(dtype).float()
    if scale_bias is None:
        return torch.ops.fbgemm.HFP8QuantizedToFloat(values, 4, bias)
    rows = torch.cat([values, scale_bias], dim=1)
    return torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(rows, kind.bit_rate())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="of examples/dlrm/train.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args()
    trained, formats = measure(find_checkpoint(args.checkpoint)), format_errors((4, 8, 16))
    print(f"{'tables':<8}{'test AUC':>10}{'log-loss':>10}{'largest difference':>20}  bytes of a memory row")
    for row in trained:
        nbytes = ", ".join(f"{memory} {n}" for memory, n in (row["row_bytes"] or {}).items())
        print(
            f"{row['dtype']:<8}{row['auc']:>10.4f}{row['log_loss']:>10.4f}{row['largest_difference']:>20.2g}  {nbytes}"
        )
    print(f"\n{'dtype':<8}{'chunk_dim':>10}{'bytes, CPU':>12}{'bytes, GPU':>12}{'relative error':>16}")
    for row in formats:
        print(
            f"{row['dtype']:<8}{row['chunk_dim']:>10}{row['cpu_bytes']:>12}{row['cuda_bytes']:>12}{row['error']:>16.4f}"
        )
    if args.json is not None:
        args.json.write_text(json.dumps({"trained": trained, "formats": formats}, indent=1))


if __name__ == "__main__":
    main()
