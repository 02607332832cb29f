"""From a float LMA model through its export and a running server to a client's predictions."""

import concurrent.futures
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.running_server import running
from support.servable_models import IDS, ROWS, SCORED, mixed
from torchrec_lma.quant import export
from torchrec_lma.serving.batching import Limits
from torchrec_lma.serving.client import PredictionClient
from torchrec_lma.serving.settings import Settings


def one_row(features: KeyedJaggedTensor, row: int) -> KeyedJaggedTensor:
    tensors = [features[key] for key in features.keys()]
    weights = None
    if features.weights_or_none() is not None:
        weights = torch.cat([tensor.to_dense_weights()[row] for tensor in tensors])
    values = [tensor.to_dense()[row] for tensor in tensors]
    lengths = torch.tensor([len(bag) for bag in values], dtype=torch.int32)
    return KeyedJaggedTensor(features.keys(), torch.cat(values), weights, lengths)


@pytest.mark.parametrize("id_type", ["int32", "int64"])
def test_served_predictions_are_those_of_the_float_model(tmp_path: Path, id_type: str) -> None:
    servable = mixed(tmp_path, None)
    floats = servable.sample["float_features"]
    ids, scored = (
        KeyedJaggedTensor(
            keys=names,
            values=servable.sample[f"{kind}.values"],
            lengths=servable.sample[f"{kind}.lengths"],
            weights=servable.sample.get(f"{kind}.weights"),
        )
        for kind, names in (("id_list_features", IDS), ("id_score_list_features", SCORED))
    )
    with torch.no_grad():
        expected = servable.model(floats, ids, scored).reshape(-1).sigmoid().numpy()
    assert expected.std() > 0.01
    path = export(servable, tmp_path / "model.pt", "int8").path
    scripted = torch.jit.load(path)(servable.sample)["default"].numpy()

    settings = Settings(path, port=0, limits=Limits(max_rows=8, replicas=2))
    with running(settings) as server, PredictionClient(server.address, id_type) as client:

        def predict(row: int) -> float:
            names = servable.float_features
            return client.predict(floats[row : row + 1], one_row(ids, row), one_row(scored, row), float_names=names)[0]

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            alone = np.array(list(pool.map(predict, range(ROWS))))
        together = client.predict(floats, ids, scored)
    np.testing.assert_allclose(together, scripted, atol=1e-6)
    np.testing.assert_allclose(alone, scripted, atol=1e-6)
    np.testing.assert_allclose(together, expected, atol=5e-3)
