"""What `import torchrec_lma` and its commands say where something is not installed, or another version is."""

import subprocess
import sys
import warnings
from importlib import metadata

import pytest

from torchrec_lma import requirements


def error_of_import(*missing: str) -> str:
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in missing)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {hidden}import torchrec_lma"], capture_output=True, text=True
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def test_without_torchrec_the_import_says_the_command_that_brings_it() -> None:
    minor = ".".join(metadata.version("torchrec").split(".")[:2])
    assert error_of_import("torchrec").endswith(f": pip install --no-deps 'torchrec=={minor}.*'")


def test_without_fbgemm_the_import_says_the_commands_for_cpu_and_gpu() -> None:
    error = error_of_import("torchrec", "fbgemm_gpu")
    assert "pip install 'torchrec_lma[cuda]'" in error
    assert "pip install 'torchrec_lma[cpu]' && pip install --no-deps 'torchrec==" in error


def test_installed_versions_are_tested_ones() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        requirements.check_torchrec()


@pytest.mark.parametrize("version", ["1.7.0", "1.10.0", "2.0", "2026.11.1"])
def test_other_versions_are_warned_of(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(requirements, "version", {"torchrec": version, "fbgemm-gpu-cpu": "1.9.0"}.__getitem__)
    with pytest.warns(UserWarning, match=f"torchrec {version} is installed; torchrec_lma is tested with 1.8 and 1.9"):
        requirements.check_torchrec()


@pytest.mark.parametrize(
    ("module", "extra"), [("grpc_health.v1", "serve"), ("google.protobuf", "serve"), ("torchx", "torchx")]
)
def test_a_missing_module_is_named_with_its_extra(module: str, extra: str) -> None:
    assert requirements.install_line(module) == f"pip install 'torchrec_lma[{extra}]'"
    assert extra in metadata.metadata("torchrec_lma").get_all("Provides-Extra", [])


def test_a_module_of_no_extra_has_no_install_line() -> None:
    assert requirements.install_line("torchrec") is None
    assert requirements.install_line(None) is None
