"""The torchx components: what torchx's linter and parser say of them, the jobs they describe, and real local runs."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torchx import specs
from torchx.components.component_test_base import ComponentTestCase

import torchx_components.lma as lma

COMPONENTS = Path(__file__).resolve().parents[1] / "torchx_components" / "lma.py"

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
    for function in (lma.train, lma.allocate):
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


def test_allocate_describes_one_process_of_the_command_line() -> None:
    app = lma.allocate("--out", "a b", image="registry/lma:1", cpu=8, memMB=16384, env={"OMP_NUM_THREADS": "8"})
    (role,) = app.roles
    assert (app.name, role.name, role.image, role.num_replicas) == ("lma-allocate", "allocate", "registry/lma:1", 1)
    assert [role.entrypoint, *role.args] == ["python", "-m", "torchrec_lma.cli", "allocate", "--out", "a b"]
    assert role.resource == specs.Resource(cpu=8, gpu=0, memMB=16384)
    assert role.env == {"OMP_NUM_THREADS": "8"}


@pytest.mark.parametrize("name", ["train", "allocate"])
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


def test_failing_script_fails_the_job(tmp_path: Path) -> None:
    script = tmp_path / "fail.py"
    script.write_text("raise ValueError('this script fails')\n")
    status, output = torchx_run(
        f"{COMPONENTS}:train", "-j", "1x2", "--script", str(script), log_dir=tmp_path / "logs", cwd=tmp_path
    )
    assert status != 0
    assert "Job finished: FAILED" in output
    assert "ValueError: this script fails" in output
