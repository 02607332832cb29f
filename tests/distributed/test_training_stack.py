"""What of TorchRec stands around an EmbeddingBagCollection in training: pipelines, optimizer wrappers, metrics.

TrainPipelineSemiSync and PrefetchTrainPipelineSparseDist use CUDA streams and do not run on CPU, for any table.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline import (
    EvalPipelineSparseDist,
    TrainPipelineBase,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.train_pipelines import TrainPipelineSparseDistLite
from torchrec.metrics.metric_module import RecMetricModule, generate_metric_module
from torchrec.metrics.metrics_config import MetricsConfig, RecMetricDef, RecMetricEnum, RecTaskInfo
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.optim.warmup import WarmupOptimizer, WarmupPolicy, WarmupStage

from support.ranks import run
from support.sharded_model import BATCH, CPU, LR, assert_close, batch, build, build_allocation, train_reference, whole
from torchrec_lma import Allocation

STEPS = 4


@pytest.fixture(scope="module")
def allocation() -> Allocation:
    return build_allocation()


def train(dmp: torch.nn.Module, optimizer: KeyedOptimizer) -> dict[str, Tensor]:
    for step in range(STEPS):
        optimizer.zero_grad()
        dmp(batch(step, dist.get_rank()))[0].backward()
        optimizer.step()
    return whole(dmp.state_dict())


def run_pipeline(allocation: Allocation, pipeline_class: type[Any], sharding: str) -> tuple[dict[str, Tensor], int]:
    dmp, optimizer, _ = build(allocation, sharding, "rowwise_adagrad")
    pipeline = pipeline_class(dmp, optimizer, CPU)
    batches = iter([batch(step, dist.get_rank()) for step in range(STEPS)])
    steps = 0
    while True:
        try:
            pipeline.progress(batches)
        except StopIteration:
            return whole(dmp.state_dict()), steps
        steps += 1


@pytest.mark.parametrize("pipeline", [TrainPipelineBase, TrainPipelineSparseDist, TrainPipelineSparseDistLite])
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_training_through_a_pipeline_equals_one_process(
    allocation: Allocation, pipeline: type[Any], sharding: str
) -> None:
    weights, steps = run(run_pipeline, 2, allocation, pipeline, sharding)[0]
    assert steps == STEPS
    assert_close(weights, train_reference(allocation, 2, "rowwise_adagrad", steps=STEPS)[0])


def evaluate(allocation: Allocation) -> tuple[list[Tensor], list[Tensor]]:
    dmp, optimizer, _ = build(allocation, "row_wise", "sgd")
    dmp.eval()
    batches = [batch(step, dist.get_rank()) for step in range(STEPS)]
    pipeline = EvalPipelineSparseDist(dmp, optimizer, CPU)
    iterator = iter(batches)
    through_pipeline = [pipeline.progress(iterator) for _ in batches]
    dmp, _, _ = build(allocation, "row_wise", "sgd")
    return through_pipeline, [dmp(one)[1] for one in batches]


def test_evaluating_through_a_pipeline_equals_calling_the_model(allocation: Allocation) -> None:
    through_pipeline, directly = run(evaluate, 2, allocation)[0]
    torch.testing.assert_close(through_pipeline, directly)


def warm_up(allocation: Allocation, sharding: str, optimizer: str) -> dict[str, Tensor]:
    dmp, combined, _ = build(allocation, sharding, optimizer)
    stages = [WarmupStage(WarmupPolicy.LINEAR, max_iters=3, value=0.1)]
    return train(dmp, WarmupOptimizer(combined, stages, lr=LR))


@pytest.mark.parametrize(
    ("sharding", "optimizer"), [("row_wise", "rowwise_adagrad"), ("column_wise", "sgd"), ("data_parallel", "sgd")]
)
def test_warm_up_reaches_fused_and_dense_optimizers(allocation: Allocation, sharding: str, optimizer: str) -> None:
    weights = run(warm_up, 2, allocation, sharding, optimizer)[0]
    expected, _ = train_reference(
        allocation, 2, optimizer, steps=STEPS, lr_of_step=lambda step: LR * min(1.0, 0.1 + 0.9 * step / 3)
    )
    assert_close(weights, expected)


MAX_NORM = 0.2


def clip(allocation: Allocation) -> tuple[dict[str, Tensor], list[str]]:
    dmp, combined, _ = build(allocation, "data_parallel", "sgd")
    optimizer = GradientClippingOptimizer(combined, GradientClipping.NORM, max_gradient=MAX_NORM)
    return train(dmp, optimizer), list(optimizer.params)


def test_gradients_of_replicated_levels_are_clipped_with_the_others(allocation: Allocation) -> None:
    weights, names = run(clip, 2, allocation)[0]
    assert {name for name in weights if ".embedding_bags." in name} <= set(names)
    unclipped = train_reference(allocation, 2, "sgd", steps=STEPS)[0]
    clipped = train_reference(allocation, 2, "sgd", steps=STEPS, max_norm=MAX_NORM)[0]
    assert any((clipped[name] - unclipped[name]).abs().max() > 1e-3 for name in clipped), "nothing to clip"
    assert_close(weights, clipped)


def measure(allocation: Allocation) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """What torchrec.metrics says of the predictions of all ranks, this rank's predictions, and its labels."""
    dmp, _, _ = build(allocation, "row_wise", "sgd")
    task = RecTaskInfo(name="click", label_name="label", prediction_name="prediction", weight_name="weight")
    metrics = generate_metric_module(
        RecMetricModule,
        MetricsConfig(
            rec_tasks=[task],
            rec_metrics={
                metric: RecMetricDef(rec_tasks=[task], window_size=1000)
                for metric in (RecMetricEnum.AUC, RecMetricEnum.NE)
            },
            throughput_metric=None,
            state_metrics=[],
        ),
        BATCH,
        dist.get_world_size(),
        dist.get_rank(),
        {},
        CPU,
    )
    predictions, labels = [], []
    for step in range(STEPS):
        one = batch(step, dist.get_rank())
        predictions.append(torch.sigmoid(dmp(one)[1]))
        labels.append(one.labels)
        model_out = {"prediction": predictions[-1], "label": labels[-1], "weight": torch.ones(BATCH)}
        metrics.update(model_out)
    return metrics.compute(), torch.cat(predictions), torch.cat(labels)


def test_metrics_of_sharded_predictions(allocation: Allocation) -> None:
    results = run(measure, 2, allocation)
    predictions = torch.cat([result[1] for result in results]).double()
    labels = torch.cat([result[2] for result in results])
    order = predictions[labels == 1].unsqueeze(1) - predictions[labels == 0]
    auc = ((order > 0).double() + 0.5 * (order == 0)).mean()
    entropy = torch.nn.functional.binary_cross_entropy(predictions, labels.double())
    base_rate = labels.double().mean()
    of_base_rate = -(base_rate * base_rate.log() + (1 - base_rate) * (1 - base_rate).log())
    reported = {name: float(value) for name, value in results[0][0].items()}
    assert reported["auc-click|window_auc"] == pytest.approx(float(auc), abs=1e-5)
    assert reported["ne-click|window_ne"] == pytest.approx(float(entropy / of_base_rate), rel=1e-5)
