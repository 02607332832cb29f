"""TorchX components: each function is one job, and its docstring is its command line help.

Run them from the repository root, locally, on Slurm or on Kubernetes; only ``--scheduler`` and its ``-cfg`` change::

    torchx run --scheduler local_cwd torchx_components/lma.py:allocate -- --help
    torchx run --scheduler local_cwd torchx_components/lma.py:train -j 1x2 -- --epochs 1
    torchx run --scheduler slurm -cfg partition=gpu torchx_components/lma.py:train -j 4x8 --gpu 8 -- --epochs 1
    torchx run --scheduler kubernetes -cfg queue=default torchx_components/lma.py:train --image IMAGE -j 4x8 --gpu 8

What follows ``--`` goes to the program. ``python`` and ``torchrun`` are taken from PATH (locally: activate the
environment first) and relative paths from the working directory of the job: the current directory with local_cwd, the
current directory or ``job_dir`` with Slurm, the image's WORKDIR with Docker and Kubernetes, where TorchX copies the
workspace.

TorchX executes this file inside a module of its own when it is given by path: ``__file__`` is not this file, imports
must be absolute, and helpers need names that TorchX does not use. Its linter reads the annotations and knows only
``typing``'s Dict, List and Optional of plain types.
"""

from typing import Dict, List, Optional

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
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains a DLRM with LMA embedding tables, one process per device, with torchrun.

    Args:
        script_args: arguments of the training script, after --
        script: training script, relative to the job's working directory or absolute
        j: nodes x processes per node, for example 4x8; min:max nodes for an elastic job, for example 2:4x8
        image: image of a Docker or Kubernetes job; must contain torchrec_lma with its dependencies
        name: experiment/run
        cpu: CPU cores per node
        gpu: GPUs per node
        memMB: memory per node, in MB
        h: named resource of a node, instead of cpu, gpu and memMB
        env: environment variables, for example OMP_NUM_THREADS=4,NCCL_DEBUG=INFO
        max_retries: how often the scheduler restarts a failed job
        mounts: mounts of a Docker or Kubernetes job, for example type=bind,src=/data,dst=/data,readonly
        rdzv_port: port of the first node where the nodes of a multi-node job meet
    """
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
    image: str = torchx.IMAGE,
    name: str = "lma-allocate",
    cpu: int = 2,
    memMB: int = 4096,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
) -> specs.AppDef:
    """Builds the allocation of LMA memory from data, in one process: torchrec-lma allocate.

    Args:
        args: arguments of torchrec-lma allocate, after --
        image: image of a Docker or Kubernetes job; must contain torchrec_lma with its dependencies
        name: name of the job
        cpu: CPU cores
        memMB: memory, in MB
        h: named resource, instead of cpu and memMB
        env: environment variables, for example OMP_NUM_THREADS=4
        max_retries: how often the scheduler restarts a failed job
        mounts: mounts of a Docker or Kubernetes job, for example type=bind,src=/data,dst=/data,readonly
    """
    return specs.AppDef(
        name=name,
        roles=[
            specs.Role(
                name="allocate",
                image=image,
                entrypoint="python",
                args=["-m", "torchrec_lma.cli", "allocate", *args],
                env=env or {},
                resource=specs.resource(cpu=cpu, memMB=memMB, h=h),
                max_retries=max_retries,
                mounts=specs.parse_mounts(mounts) if mounts else [],
            )
        ],
    )
