"""TorchX components: each function is one job, and its docstring is its command line help.

TorchX finds them where the package is installed, elsewhere by path (``torchx_components/lma.py:train``). Run them
locally, on Slurm or on Kubernetes; only ``--scheduler`` and its ``-cfg`` change::

    torchx run --scheduler local_cwd lma.allocate -- --help
    torchx run --scheduler local_cwd lma.allocate -j 1x2 -- --out allocation.safetensors
    torchx run --scheduler local_cwd lma.train -j 1x2 -- --epochs 1
    torchx run --scheduler slurm -cfg partition=gpu lma.train -j 4x8 --gpu 8 -- --epochs 1
    torchx run --scheduler kubernetes -cfg queue=default lma.train --image IMAGE -j 4x8 --gpu 8

``lma.train`` runs ``examples/dlrm/train.py`` of the repository, in whose root the job then starts; ``--script`` names
another one. What follows ``--`` goes to the program. ``python`` and ``torchrun`` are taken from PATH (locally: activate
the environment first) and relative paths from the working directory of the job: the current directory with local_cwd,
the current directory or ``job_dir`` with Slurm, the image's WORKDIR with Docker and Kubernetes, where TorchX copies the
workspace.

TorchX executes this file inside a module of its own when it is given by path: ``__file__`` is not this file, imports
must be absolute, and helpers need names that TorchX does not use. Its linter reads the annotations and knows only
``typing``'s Dict, List and Optional of plain types.
"""

from typing import Dict, List, Optional, Sequence

import torchx
import torchx.specs as specs
from torchx.components import dist


def train(
    *script_args: str,
    script: str = "examples/dlrm/train.py",
    j: str = "1x2",
    image: str = torchx.IMAGE,
    name: str = "lma/train",
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_restarts: int = 3,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains a DLRM with LMA embedding tables, one process per device, with torchrun.

    A process that dies is restarted with all others by torchrun, which is quick; a node that dies, by the scheduler.
    The trainer resumes from its newest checkpoint: see docs/restart.md.

    Args:
        script_args: arguments of the training script, after --
        script: training script, relative to the job's working directory or absolute
        j: nodes x processes per node, for example 4x8; min:max nodes for an elastic job, for example 2:4x8
        image: image of a Docker or Kubernetes job; must contain torchrec_lma with its dependencies
        name: experiment/run
        cpu: CPU cores per node
        gpu: GPUs per node
        memMB: RAM per node, in MB
        h: named resource of a node, instead of cpu, gpu and memMB
        env: environment variables, for example OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        max_restarts: how often torchrun restarts the processes of a job, after one has died
        max_retries: how often the scheduler restarts a failed job; the trainer then needs --resume auto
        mounts: mounts of a Docker or Kubernetes job, for example type=bind,src=/data,dst=/data,readonly
        rdzv_port: port of the first node where the nodes of a multi-node job meet
    """
    env = {"PET_MAX_RESTARTS": str(max_restarts), **(env or {})}  # torchrun's --max-restarts; dist.ddp has no argument
    if j.split("x")[0] not in ("1", "1:1"):
        # A new store for each attempt. Else the ranks find the addresses there that those of the attempt before left;
        # and nodes count their restarts each for itself, so the trainer could not keep the attempts apart.
        env.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    return dist.ddp(
        *script_args,
        script=script,
        j=j,
        image=image,
        name=name,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        h=h,
        env=env,
        max_retries=max_retries,
        mounts=mounts,
        rdzv_port=rdzv_port,
    )


def allocate(
    *args: str,
    j: str = "1x1",
    image: str = torchx.IMAGE,
    name: str = "lma/allocate",
    cpu: int = 2,
    memMB: int = 4096,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Builds the allocation of LMA tables from data with torchrun: torchrec-lma allocate.

    Args:
        args: arguments of torchrec-lma allocate, after --
        j: nodes x workers per node, for example 1x8; each reads its share of the rows, the result is the same
        image: image of a Docker or Kubernetes job; must contain torchrec_lma with its dependencies
        name: experiment/run
        cpu: CPU cores per node
        memMB: RAM per node, in MB
        h: named resource of a node, instead of cpu and memMB
        env: environment variables, for example OMP_NUM_THREADS=4
        max_retries: how often the scheduler restarts a failed job
        mounts: mounts of a Docker or Kubernetes job, for example type=bind,src=/data,dst=/data,readonly
        rdzv_port: port of the first node where the nodes of a multi-node job meet
    """
    return dist.ddp(
        "allocate",
        *args,
        m="torchrec_lma.cli",
        j=j,
        image=image,
        name=name,
        cpu=cpu,
        memMB=memMB,
        h=h,
        env=env,
        max_retries=max_retries,
        mounts=mounts,
        rdzv_port=rdzv_port,
    )


def export(
    *args: str,
    image: str = torchx.IMAGE,
    name: str = "lma-export",
    cpu: int = 2,
    memMB: int = 8192,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Makes a quantized TorchScript model of a checkpoint, in one process: torchrec-lma export.

    Args:
        args: arguments of torchrec-lma export, after --
        image: image of a Docker or Kubernetes job; must contain torchrec_lma with its dependencies
        name: name of the job
        cpu: CPU cores
        memMB: RAM, in MB; the model is there once in float and once quantized
        h: named resource, instead of cpu and memMB
        env: environment variables, for example OMP_NUM_THREADS=4
        max_retries: how often the scheduler restarts a failed job
        mounts: mounts of a Docker or Kubernetes job, for example type=bind,src=/data,dst=/data,readonly
    """
    return _lma_command("export", args, image, name, cpu, memMB, h, env, max_retries, mounts)


def serve(
    *args: str,
    port: int = 50051,
    replicas: int = 1,
    image: str = torchx.IMAGE,
    name: str = "lma-serve",
    cpu: int = 2,
    memMB: int = 4096,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 3,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Serves an exported model over gRPC: torchrec-lma serve.

    Args:
        args: the model and arguments of torchrec-lma serve, after --; in a container --host 0.0.0.0 is among them
        port: of the service, which containers expose
        replicas: servers, each on a machine or in a container of its own
        image: image of a Docker or Kubernetes job; must contain torchrec_lma with its serve extra
        name: name of the job
        cpu: CPU cores of a server
        memMB: RAM of a server, in MB; a new model is loaded beside the old one
        h: named resource, instead of cpu and memMB
        env: environment variables, for example OMP_NUM_THREADS=1
        max_retries: how often the scheduler restarts a failed server
        mounts: mounts of a Docker or Kubernetes job, for example type=bind,src=/models,dst=/models,readonly
    """
    arguments = [*args, "--port", str(port)]
    app = _lma_command("serve", arguments, image, name, cpu, memMB, h, env, max_retries, mounts)
    app.roles[0].port_map = {"grpc": port}
    app.roles[0].num_replicas = replicas
    return app


def _lma_command(
    command: str,
    args: Sequence[str],
    image: str,
    name: str,
    cpu: int,
    memMB: int,
    h: Optional[str],
    env: Optional[Dict[str, str]],
    max_retries: int,
    mounts: Optional[List[str]],
) -> specs.AppDef:
    """One process of ``torchrec-lma COMMAND``."""
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name=command,
                image=image,
                entrypoint="python",
                args=["-m", "torchrec_lma.cli", command, *args],
                env=env or {},
                resource=specs.resource(cpu=cpu, memMB=memMB, h=h),
                max_retries=max_retries,
                mounts=specs.parse_mounts(mounts) if mounts else [],
            )
        ],
    )
