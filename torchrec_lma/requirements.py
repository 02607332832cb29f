"""What this package needs beside what pip brings with it, and the command that brings it.

torchrec's wheel requires fbgemm-gpu, the CUDA build of FBGEMM. It does not load without a CUDA driver, and pip cannot
be told that fbgemm-gpu-cpu stands for it; so no extra for the CPU can bring torchrec.
"""

import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

# Minor versions of torchrec, and of the FBGEMM that each is made for; first the one of the extra cpu.
TESTED = ("1.8", "1.9")
EXTRAS = {
    "google": "serve",
    "grpc": "serve",
    "grpc_health": "serve",
    "grpc_reflection": "serve",
    "matplotlib": "plot",
    "prometheus_client": "serve",
    "torchx": "torchx",
}


def check_torchrec() -> None:
    """Raises ModuleNotFoundError if torchrec or FBGEMM is missing; warns of a torchrec that the tests never met."""
    torchrec = f"pip install --no-deps 'torchrec=={_minor_of_fbgemm() or TESTED[0]}.*'"
    if find_spec("fbgemm_gpu") is None:
        raise ModuleNotFoundError(
            "torchrec_lma needs FBGEMM and torchrec. With an NVIDIA GPU: pip install 'torchrec_lma[cuda]'. Without: "
            f"pip install 'torchrec_lma[cpu]' && {torchrec}",
            name="fbgemm_gpu",
        )
    if find_spec("torchrec") is None:
        raise ModuleNotFoundError(
            f"torchrec_lma needs torchrec, which pip does not install beside fbgemm-gpu-cpu by itself: {torchrec}",
            name="torchrec",
        )
    found = version("torchrec")
    if _minor(found) not in TESTED:
        warnings.warn(
            f"torchrec {found} is installed; torchrec_lma is tested with {' and '.join(TESTED)}. Where it "
            "fails, install one of these",
            stacklevel=3,
        )


def install_line(module: str | None) -> str | None:
    """The command that installs the extra which a missing module is of; None for a module of no extra."""
    extra = EXTRAS.get((module or "").split(".")[0])
    return None if extra is None else f"pip install 'torchrec_lma[{extra}]'"


def _minor_of_fbgemm() -> str | None:
    for name in ("fbgemm-gpu-cpu", "fbgemm-gpu"):
        try:
            return _minor(version(name))
        except PackageNotFoundError:
            continue
    return None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
