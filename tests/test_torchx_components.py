"""The torchx components: what torchx's linter and parser say of them, the jobs they describe, and real local runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from torchx import specs
from torchx.components.component_test_base import ComponentTestCase

import torchx_components.lma as lma
from support.paths import REPOSITORY
from torchrec_lma import Allocation

COMPONENTS = REPOSITORY / "torchx_components" / "lma.py"

WRITE_RANK = """\
import os, sys
from pathlib import Path
Path(sys.argv[1], f"rank{os.environ['RANK']}").write_text(" ".join([os.environ["WORLD_SIZE"], *sys.argv[2:]]))
"""


class ComponentsAreValid(ComponentTestCase):
    def test_train(self) -> None:
        self.validate(lma, "train")

    def test_allocate(self) -> None:
        self.validate(lma, "allocate")

    def test_export(self) -> None:
        self.validate(lma, "export")

    def test_serve(self) -> None:
        self.validate(lma, "serve")


def torchx_run(*command: str, log_dir: Path, cwd: Path, timeout_seconds: float = 180) -> tuple[int, str]:
    """`torchx run --scheduler local_cwd ...` to its end: exit status and all its output, the job's included."""
    run = [sys.executable, "-m", "torchx.cli.main", "run", "--scheduler", "local_cwd", "-cfg", f"log_dir={log_dir}"]
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        [*run, *command], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # on SIGTERM torchx ends the job's processes, on SIGKILL it could not
        output, _ = process.communicate()
        pytest.fail(f"torchx run did not end in {timeout_seconds} seconds:\n{output}")
    return process.returncode, output


def test_command_line_help_describes_every_option() -> None:
    for function in (lma.train, lma.allocate, lma.export, lma.serve):
        options = set(function.__annotations__) - {"return"}
        described = function.__doc__.split("Args:")[1]
        assert {option for option in options if f" {option}: " not in described} == set()


def test_train_describes_one_torchrun_role() -> None:
    app = lma.train(
        "--epochs",
        "2",
        "--out",
        "a b",
        j="2x4",
        gpu=4,
        image="registry/lma:1",
        env={"OMP_NUM_THREADS": "4"},
        max_retries=3,
        mounts=["type=bind", "src=/data", "dst=/data", "readonly"],
        rdzv_port=29511,
    )
    (role,) = app.roles
    assert (app.name, role.name, role.image, role.num_replicas, role.max_retries) == (
        "train",
        "train",
        "registry/lma:1",
        2,
        3,
    )
    assert role.resource == specs.Resource(cpu=2, gpu=4, memMB=4096)
    assert role.env["OMP_NUM_THREADS"] == "4"
    assert role.mounts == [specs.BindMount(src_path="/data", dst_path="/data", read_only=True)]
    assert role.entrypoint == "bash"
    flag, line = role.args
    assert flag == "-c"
    assert line.startswith("torchrun ")
    assert "--nnodes 2 --nproc_per_node 4 " in line
    assert ":29511 " in line
    assert line.endswith(" examples/dlrm/train.py --epochs 2 --out 'a b'")


def test_train_runs_the_example_trainer_unless_told_otherwise() -> None:
    assert lma.train().roles[0].args[1].endswith(" examples/dlrm/train.py")
    assert lma.train(script="other.py").roles[0].args[1].endswith(" other.py")


def test_export_describes_one_process_of_the_command_line() -> None:
    app = lma.export("--out", "a b", image="registry/lma:1", cpu=8, memMB=16384, env={"OMP_NUM_THREADS": "8"})
    (role,) = app.roles
    assert (app.name, role.name, role.image, role.num_replicas) == ("lma-export", "export", "registry/lma:1", 1)
    assert [role.entrypoint, *role.args] == ["python", "-m", "torchrec_lma.cli", "export", "--out", "a b"]
    assert role.resource == specs.Resource(cpu=8, gpu=0, memMB=16384)
    assert role.env == {"OMP_NUM_THREADS": "8"}


def test_serve_describes_servers_of_one_port() -> None:
    app = lma.serve("model.pt", "--host", "0.0.0.0", port=50052, replicas=3, image="registry/lma:1", cpu=8)
    (role,) = app.roles
    assert (app.name, role.name, role.image, role.num_replicas) == ("lma-serve", "serve", "registry/lma:1", 3)
    command = ["python", "-m", "torchrec_lma.cli", "serve", "model.pt", "--host", "0.0.0.0", "--port", "50052"]
    assert [role.entrypoint, *role.args] == command
    assert role.port_map == {"grpc": 50052}
    assert (role.resource.cpu, role.max_retries) == (8, 3)


def test_allocate_describes_torchrun_of_the_command_line() -> None:
    app = lma.allocate(
        "--out", "a b", j="1x3", image="registry/lma:1", cpu=8, memMB=16384, env={"OMP_NUM_THREADS": "8"}
    )
    (role,) = app.roles
    assert (app.name, role.image, role.num_replicas) == ("allocate", "registry/lma:1", 1)
    assert role.args[1].endswith(" -m torchrec_lma.cli allocate --out 'a b'")
    assert "--nnodes 1 --nproc_per_node 3 " in role.args[1]
    assert role.resource == specs.Resource(cpu=8, gpu=0, memMB=16384)
    assert role.env["OMP_NUM_THREADS"] == "8"


@pytest.mark.parametrize("name", ["train", "allocate", "export", "serve"])
def test_named_resource_takes_the_place_of_cpu_and_memory(name: str) -> None:
    component = getattr(lma, name)
    assert component(h="aws_p4d.24xlarge").roles[0].resource == specs.resource(h="aws_p4d.24xlarge")


def test_train_passes_script_arguments_to_every_rank(tmp_path: Path) -> None:
    (tmp_path / "write_rank.py").write_text(WRITE_RANK)
    command = [f"{COMPONENTS}:train", "-j", "1x2", "--script", "write_rank.py"]  # relative to the working directory
    status, output = torchx_run(
        *command, "--", str(tmp_path), "--epochs", "a b", log_dir=tmp_path / "logs", cwd=tmp_path
    )
    assert status == 0, output
    written = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert written == {"rank0": "2 --epochs a b", "rank1": "2 --epochs a b"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_train_joins_the_processes_of_two_nodes(tmp_path: Path) -> None:
    (tmp_path / "write_rank.py").write_text(WRITE_RANK)
    command = [f"{COMPONENTS}:train", "-j", "2x2", "--script", "write_rank.py", "--rdzv_port", str(free_port())]
    status, output = torchx_run(*command, "--", str(tmp_path), log_dir=tmp_path / "logs", cwd=tmp_path)
    assert status == 0, output
    assert {path.name: path.read_text() for path in tmp_path.glob("rank*")} == {f"rank{rank}": "4" for rank in range(4)}


def test_a_script_that_dies_once_is_restarted(tmp_path: Path) -> None:
    script = tmp_path / "die_once.py"
    script.write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "Path(sys.argv[1], 'restart' + os.environ['TORCHELASTIC_RESTART_COUNT']).touch()\n"
        "sys.exit(os.environ['TORCHELASTIC_RESTART_COUNT'] == '0')\n"
    )
    command = [f"{COMPONENTS}:train", "-j", "1x1", "--script", str(script), "--max_restarts", "1", "--", str(tmp_path)]
    status, output = torchx_run(*command, log_dir=tmp_path / "logs", cwd=tmp_path)
    assert status == 0, output
    assert sorted(path.name for path in tmp_path.glob("restart*")) == ["restart0", "restart1"]


def test_failing_script_fails_the_job(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("raise ValueError('this script fails')\n")
    status, output = torchx_run(
        f"{COMPONENTS}:train", "-j", "1x2", "--script", str(script), log_dir=tmp_path / "logs", cwd=tmp_path
    )
    assert status != 0
    assert "Job finished: FAILED" in output
    assert "ValueError: this script fails" in output


@pytest.mark.slow
def test_allocate_runs_on_several_workers(tmp_path: Path) -> None:
    frame = pd.DataFrame({"click": [0, 1] * 50, "item": range(100)})
    frame.to_parquet(tmp_path / "clicks.parquet")
    data = ["--data", str(tmp_path / "clicks.parquet"), "--label", "click", "--categorical", "item", "--dim", "8"]
    for j in ("1x1", "1x2"):
        out = ["--out", str(tmp_path / j), "--compression", "2"]
        status, output = torchx_run(
            f"{COMPONENTS}:allocate", "-j", j, "--", *data, *out, log_dir=tmp_path / "logs", cwd=REPOSITORY
        )
        assert status == 0, output
    one, two = (Allocation.load(tmp_path / j) for j in ("1x1", "1x2"))
    assert one.fingerprint == two.fingerprint and one.provenance == two.provenance
