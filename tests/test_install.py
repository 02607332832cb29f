"""The wheel, installed in a clean environment, as users have the package: imports, trains, and is found by torchx."""

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support.paths import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0")[:-1]:
        if (REPOSITORY / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source]
    subprocess.run(build, check=True, capture_output=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with this wheel and, not installed again, what these tests run with."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    commands = folder / "bin"
    find = [commands / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = Path(subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip())
    # A path named in a .pth file: its packages are found, and its own .pth files, this project's among them, are not.
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [commands / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    return commands


def run(environment: Path, *command: str, cwd: Path) -> str:
    done = subprocess.run(
        [environment / "python", "-W", "ignore", *command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_types_and_protocol_and_nothing_of_tests_or_examples(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"torchrec_lma/py.typed", "torchrec_lma/serving/protos/predictor.proto"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"torchrec_lma", "torchx_components"}


def test_the_installed_package_is_the_one_that_is_imported(environment: Path, tmp_path: Path) -> None:
    where = run(environment, "-c", "import torchrec_lma; print(torchrec_lma.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment.parent)


def test_quickstart_compares_three_types_of_tables(environment: Path, tmp_path: Path) -> None:
    output = run(environment, str(REPOSITORY / "examples" / "quickstart.py"), cwd=tmp_path)
    found = re.findall(r"^(.*?) +([\d,]+) bytes +test AUC (0\.\d+)$", output, re.MULTILINE)
    names, sizes, aucs = zip(*found)
    assert names == ("full, dim 64", "full, dim 8, FP16", "LMA, dim 64, FP16")
    full, smaller, lma = (int(size.replace(",", "")) for size in sizes)
    assert smaller * 16 == full
    assert lma * 16 <= full
    assert min(map(float, aucs)) > 0.76  # an item's mean rating as the prediction reaches 0.70


def test_torchx_finds_the_components_beside_its_own(environment: Path, tmp_path: Path) -> None:
    listed = run(environment, "-m", "torchx.cli.main", "builtins", cwd=tmp_path)
    names = {line.split(".", 1)[1].split()[0] for line in listed.splitlines() if re.match(r" *\d+\. ", line)}
    assert {"lma.allocate", "lma.export", "lma.serve", "lma.train", "dist.ddp", "utils.echo"} <= names


def test_the_command_is_installed(environment: Path, tmp_path: Path) -> None:
    done = subprocess.run([environment / "torchrec-lma", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "serve" in done.stdout
