"""The prediction server over real gRPC on loopback, against models whose answers are known."""

import concurrent.futures
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pandas as pd
import pytest
import torch
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc  # type: ignore[import-untyped]
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from support.running_server import FLOATS, IDS, POISON, Rows, Running, running, save_model
from torchrec_lma.cli import main
from torchrec_lma.serving import protos
from torchrec_lma.serving.batching import Limits
from torchrec_lma.serving.client import PredictionClient
from torchrec_lma.serving.protos import predictor_pb2
from torchrec_lma.serving.service import _shortened
from torchrec_lma.serving.settings import Settings

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = save_model(tmp_path_factory.mktemp("model") / "model.pt")
    with running(Settings(model, port=0, limits=Limits(max_rows=64, max_delay_seconds=0.02))) as server:
        yield server


def test_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    folder = Path(protos.__file__).parent
    out = tmp_path / "descriptors"
    assert protoc.main(["protoc", f"-I{folder}", f"--descriptor_set_out={out}", "predictor.proto"]) == 0
    (compiled,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    generated = descriptor_pb2.FileDescriptorProto()
    predictor_pb2.DESCRIPTOR.CopyToProto(generated)
    for message in compiled.message_type:
        for field in [*message.field, *(field for nested in message.nested_type for field in nested.field)]:
            field.ClearField("json_name")  # protoc writes it out, the generated module leaves it to the default
    assert generated == compiled


def test_rows_get_the_predictions_of_the_formula(served: Running) -> None:
    for rows in (1, 2, 7, 64, 65, 300):
        data = Rows(rows, seed=rows)
        np.testing.assert_allclose(served.send(data.request()), data.expected(), rtol=1e-5)
    empty = Rows(3)
    empty.lengths[:], empty.values = 0, empty.values[:0]
    np.testing.assert_allclose(served.send(empty.request()), empty.expected(), rtol=1e-5)


def test_a_request_with_too_many_ids_is_refused(tmp_path: Path) -> None:
    settings = Settings(save_model(tmp_path / "model.pt"), port=0, limits=Limits(max_ids=20))
    with running(settings) as server:
        data = Rows(300)
        with pytest.raises(grpc.RpcError) as error:
            server.send(data.request())
        assert error.value.code() is INVALID and "ids, more than 20: send its rows" in error.value.details()


def test_a_request_with_too_many_rows_is_refused(tmp_path: Path) -> None:
    settings = Settings(save_model(tmp_path / "model.pt"), port=0, limits=Limits(max_request_rows=20))
    with running(settings) as server:
        code, message = server.refusal(Rows(21).request())
        assert code is INVALID and "21 rows, more than 20: send its rows" in message
        assert len(server.send(Rows(20).request())) == 20


def test_an_answer_for_other_rows_is_no_answer(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Rows(3)
    features = KeyedJaggedTensor(
        list(IDS), torch.from_numpy(data.values), lengths=torch.from_numpy(data.lengths.flatten())
    )
    model = served.server.models.current
    for answer, message in (
        ({"default": np.zeros(2, np.float32)}, "3 rows with 2 values"),
        ({"ctr": np.zeros(3, np.float32)}, r"3 rows with 0 values .* tasks \['ctr'\]"),
    ):
        monkeypatch.setattr(model, "predict", lambda batch, answer=answer: [answer] * len(batch))
        with PredictionClient(served.address) as client, pytest.raises(ValueError, match=message):
            client.predict(torch.from_numpy(data.floats), features)


def test_a_client_certificate_without_a_ca_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs root_certificate"):
        PredictionClient("127.0.0.1:1", certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    with pytest.raises(ValueError, match="go together"):
        PredictionClient("127.0.0.1:1", root_certificate=tmp_path / "ca.pem", key=tmp_path / "key.pem")


def test_a_long_refusal_still_has_its_status() -> None:
    message = _shortened("x" * 100_000)
    assert len(message) < 2000 and message.endswith("...")


def test_requests_that_meet_in_a_batch_get_their_own_predictions(served: Running) -> None:
    batches = served.metric("batch_rows_count")
    requests = [Rows(1 + seed % 5, seed) for seed in range(60)]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda rows: served.send(rows.request()), requests))
    for rows, answer in zip(requests, answers):
        np.testing.assert_allclose(answer, rows.expected(), rtol=1e-5)
    assert served.metric("batch_rows_count") - batches < len(requests)  # some did meet


def test_ids_of_64_bits_are_taken_when_announced_and_may_share_a_batch_with_others(served: Running) -> None:
    wide = [Rows(3, seed, high=2**62) for seed in range(10)]
    narrow = [Rows(3, seed) for seed in range(10)]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        wide_answers = [pool.submit(served.send, rows.request("<i8"), [("lma-id-type", "int64")]) for rows in wide]
        narrow_answers = [pool.submit(served.send, rows.request()) for rows in narrow]
    for rows, answer in zip(wide + narrow, wide_answers + narrow_answers):
        np.testing.assert_allclose(answer.result(), rows.expected(), rtol=1e-5)
    code, message = served.refusal(wide[0].request("<i8"))
    assert code == INVALID
    assert "int64" in message


def test_weighted_features_and_counts_given_in_python(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model.pt", metadata=False)
    with running(Settings(model, port=0, counts=(1, 2, 2))) as server:
        requests = [Rows(5, seed, 1, 2, 2) for seed in range(12)]
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda rows: server.send(rows.request()), requests))
        for rows, answer in zip(requests, answers):
            np.testing.assert_allclose(answer, rows.expected(), rtol=1e-5)


def test_client_sends_torchrec_batches(served: Running, tmp_path: Path) -> None:
    data = Rows(6, seed=3)
    features = KeyedJaggedTensor(
        list(IDS), torch.from_numpy(data.values), lengths=torch.from_numpy(data.lengths.flatten())
    )
    floats = torch.from_numpy(data.floats)
    with PredictionClient(served.address) as client:
        np.testing.assert_allclose(client.predict(floats, features), data.expected(), rtol=1e-5)
        np.testing.assert_allclose(client.predict(floats, features, float_names=FLOATS), data.expected(), rtol=1e-5)
        with pytest.raises(grpc.RpcError, match="in another order.*price"):
            client.predict(floats, features, float_names=FLOATS[::-1])
        features.values()[-1] = 2**40
        row = int(np.flatnonzero(data.lengths[-1])[-1])
        with pytest.raises(ValueError, match=rf"id {2**40} of 'tags', row {row}, .* \(1 ids of"):
            client.predict(floats, features)
    with PredictionClient(served.address, id_type="int64") as client:
        data.values[-1] = 2**40
        np.testing.assert_allclose(client.predict(floats, features), data.expected(), rtol=1e-5)


def test_health_and_reflection_services_answer(served: Running) -> None:
    stub = health_pb2_grpc.HealthStub(served.channel)
    for service in ("", "predictor.Predictor"):
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    database = ProtoReflectionDescriptorDatabase(served.channel)
    assert "predictor.Predictor" in database.get_services()
    assert database.FindFileByName("predictor.proto").package == "predictor"


def broken(change) -> predictor_pb2.PredictionRequest:
    request = Rows(4, seed=1).request()
    change(request)
    return request


def set_float(request: predictor_pb2.PredictionRequest, value: float) -> None:
    floats = np.frombuffer(request.float_features.values, np.float32).copy()
    floats[3] = value  # column 1 of row 1
    request.float_features.values = floats.tobytes()


def set_lengths(request: predictor_pb2.PredictionRequest, *values: int) -> None:
    lengths = np.frombuffer(request.id_list_features.lengths, np.int32).copy()
    lengths[4 : 4 + len(values)] = values  # of feature 1, from row 0 on
    request.id_list_features.lengths = lengths.tobytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: setattr(r, "batch_size", 0), "batch_size is 0"),
        (lambda r: setattr(r, "batch_size", -4), "batch_size is -4"),
        (lambda r: setattr(r, "batch_size", 5), "float_features.values has 32 bytes: 10 values of 4 bytes"),
        (lambda r: setattr(r, "batch_size", 2**31 - 1), "float_features.values has 32 bytes"),
        (
            lambda r: r.ClearField("float_features"),
            r"float_features.num_features is 0: the model takes 2 \(price, age\)",
        ),
        (lambda r: setattr(r.float_features, "num_features", 3), "float_features.num_features is 3"),
        (lambda r: setattr(r.float_features, "values", r.float_features.values[:-1]), "has 31 bytes"),
        (lambda r: set_float(r, float("nan")), "float_features 'age' of row 1 is nan"),
        (lambda r: set_float(r, float("-inf")), "float_features 'age' of row 1 is -inf"),
        (lambda r: setattr(r.id_list_features, "num_features", -1), "id_list_features.num_features is -1"),
        (lambda r: setattr(r.id_list_features, "lengths", b""), "id_list_features.lengths has 0 bytes"),
        (lambda r: set_lengths(r, 1, -7), "lengths of 'item', row 1, is -7"),
        (lambda r: set_lengths(r, *[2**31 - 1] * 4), "id_list_features.values has"),
        (
            lambda r: setattr(r.id_list_features, "values", r.id_list_features.values[4:]),
            "the sum of the lengths, int32",
        ),
        (lambda r: setattr(r.id_list_features, "values", r.id_list_features.values * 2), "look like int64"),
        (lambda r: setattr(r.id_list_features, "weights", b"1234"), "id_list_features.weights is not empty"),
        (lambda r: setattr(r.id_score_list_features, "num_features", 1), "id_score_list_features.num_features is 1"),
        (lambda r: setattr(r.embedding_features, "num_features", 1), "embedding_features is not empty"),
        (lambda r: setattr(r.unary_features, "values", b"1"), "unary_features is not empty"),
    ],
)
def test_bad_requests_are_invalid_arguments_that_say_what_is_wrong(served: Running, change, message: str) -> None:
    code, details = served.refusal(broken(change))
    assert code == INVALID
    with pytest.raises(ValueError, match=message):
        raise ValueError(details)
    good = Rows(2)
    np.testing.assert_allclose(served.send(good.request()), good.expected(), rtol=1e-5)


def test_bytes_that_are_no_message_are_invalid_arguments(served: Running) -> None:
    for data in (b"\xff", b"\x12\xff\xff\xff\xff\x0f", Rows(2).request().SerializeToString()[:-3]):
        code, details = served.refusal(data)
        assert code == INVALID, details
    assert served.refusal(b"")[0] == INVALID  # a message without rows
    assert served.refusal(Rows(1).request(), [("lma-id-type", "int8")])[0] == INVALID


def test_message_over_the_limit_is_refused_and_the_server_goes_on(served: Running) -> None:
    code, _ = served.refusal(bytes((16 << 20) + 1))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    good = Rows(2)
    np.testing.assert_allclose(served.send(good.request()), good.expected(), rtol=1e-5)


def test_request_that_fails_in_the_model_fails_alone(served: Running) -> None:
    requests = [Rows(2, seed) for seed in range(12)]
    requests[5].values[0] = POISON
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(served.send, rows.request()) for rows in requests]
    for index, (rows, answer) in enumerate(zip(requests, answers)):
        if index == 5:
            error = answer.exception()
            assert isinstance(error, grpc.RpcError)
            assert error.code() == grpc.StatusCode.INTERNAL
            assert "poison" in error.details()
        else:
            np.testing.assert_allclose(answer.result(), rows.expected(), rtol=1e-5)


def write_parquet(path: Path, data: Rows) -> list[str]:
    """`data`'s rows with a label, and the options that read them."""
    columns: dict[str, object] = {"label": [row % 2 for row in range(data.rows)]}
    ends = np.cumsum(data.lengths.flatten()).reshape(data.lengths.shape)
    for feature, name in enumerate(IDS):
        starts = ends[feature] - data.lengths[feature]
        columns[name] = [data.values[start:end] for start, end in zip(starts, ends[feature])]
    # The readers take sign(x) * log1p(|x|): write what becomes the floats that `data` has.
    for column, name in enumerate(FLOATS):
        columns[name] = np.sign(data.floats[:, column]) * np.expm1(np.abs(data.floats[:, column]))
    pd.DataFrame(columns).to_parquet(path)
    return ["--data", str(path), "--label", "label", "--categorical", *IDS, "--numeric", *FLOATS]


def test_predict_command_prints_probabilities_and_auc(
    served: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Rows(20, seed=11)
    options = ["predict", "--address", served.address, "--batch-size", "7"]
    options += write_parquet(tmp_path / "rows.parquet", data)
    assert main([*options, "--auc"]) == 0
    output = capsys.readouterr()
    np.testing.assert_allclose([float(line) for line in output.out.split()], data.expected(), atol=1e-5)
    positive, negative = data.expected()[1::2], data.expected()[::2]
    auc = np.mean([p > n for p in positive for n in negative])
    assert f"AUC {auc:.6f} over 20 rows" in output.err

    del options[options.index("--label") : options.index("--label") + 2]  # rows without labels can be predicted
    assert main([*options, "--limit", "9", "--out", str(tmp_path / "out.txt")]) == 0
    assert main([*options, "--auc"]) == 2
    assert "--label" in capsys.readouterr().err
    lines = (tmp_path / "out.txt").read_text().split()
    np.testing.assert_allclose([float(line) for line in lines], data.expected()[:9], atol=1e-5)


def test_predict_command_says_what_is_wrong(
    served: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Rows(20, seed=12)
    data.values[0] = 2**31
    options = ["predict", "--address", served.address, *write_parquet(tmp_path / "rows.parquet", data)]
    assert main(options) == 2
    row = int(np.flatnonzero(data.lengths[0])[0])
    assert f"id {2**31} of 'user', row {row}," in capsys.readouterr().err
    assert main([*options, "--id-type", "int64"]) == 0
    assert main([*options, "--id-type", "int64", "--categorical", "item", "user", "tags"]) == 2
    assert "in another order" in capsys.readouterr().err
    unreachable = ["--id-type", "int64", "--address", "127.0.0.1:1", "--out", str(tmp_path / "out.txt")]
    assert main([*options, *unreachable]) == 2
    assert "UNAVAILABLE" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_server_imports_nothing_that_only_training_needs() -> None:
    code = "import sys; import torchrec_lma.serving.server; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "torch" in modules and not modules & {"torchrec", "pandas", "pyarrow", "torch.distributed.checkpoint"}
    own = {module for module in modules if module.startswith("torchrec_lma.")}
    own -= {"torchrec_lma.requirements"}  # what the package itself checks
    assert own and all(module.startswith("torchrec_lma.serving") for module in own)


def test_the_help_of_serve_needs_no_torch() -> None:
    code = "import sys; from torchrec_lma.cli import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--max-batch ROWS" in done.stdout, done.stderr


@pytest.mark.parametrize("command", ["serve", "predict"])
def test_without_the_serve_extra_its_name_is_said(command: str, tmp_path: Path) -> None:
    options = ["model.pt"] if command == "serve" else write_parquet(tmp_path / "rows.parquet", Rows(2))
    code = "import sys; sys.modules['grpc'] = sys.modules['prometheus_client'] = None\n"  # as if not installed
    code += "from torchrec_lma.cli import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-W", "ignore", "-c", code, command, *options]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'torchrec_lma[serve]'" in done.stderr
