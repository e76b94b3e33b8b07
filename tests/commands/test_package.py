"""A wheel, made of a source archive, works in an empty folder outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from nvmm import __version__

ROOT = Path(__file__).parents[2]
BUILD = """
import sys, setuptools.build_meta as backend
name = backend.build_sdist(sys.argv[1])
print(name)
"""


def run(*command: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **more}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with nvmm's wheel; the other packages are those of the tests'."""
    folder = tmp_path_factory.mktemp("package")
    # 1. The archive is made of a copy: setuptools writes into the folder that it builds.
    copy = folder / "checkout"
    tracked = run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    run("git", "init", "--quiet", cwd=copy)
    run("git", "add", "--all", cwd=copy)
    author = ("-c", "user.name=n", "-c", "user.email=e@x")
    run("git", *author, "commit", "--quiet", "--message", "all", cwd=copy)
    run(sys.executable, "-c", BUILD, folder, cwd=copy)
    [archive] = folder.glob("nvmm-*.tar.gz")
    # 2. The wheel is made of the archive, as pip would without a wheel.
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run(*pip, "wheel", *options, archive, cwd=folder)
    [wheel] = folder.glob("nvmm-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    [packages] = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return folder / "venv" / "bin" / "nvmm"


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    library = tmp_path / "cache" / "nvmm" / "kernels"
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    # 1. It is the wheel's code, and says the commit that it was built from.
    version = run(installed, "--version", cwd=folder).stdout
    head = run("git", "rev-parse", "HEAD", cwd=installed.parents[2] / "checkout").stdout.strip()
    assert version.startswith(f"nvmm {__version__} ({head}), megatron-core ")
    found = json.loads(run(installed, "doctor", "--json", cwd=folder, **cache).stdout)
    state = {each["name"]: each for each in found}
    assert str(installed.parents[1]) in state["nvmm"]["text"]
    assert Path(state["launchers"]["text"], "slurm.sh").is_file()
    assert state["torch"]["state"] == "ok" and state["kernels"]["state"] == "absent"
    assert str(library) in state["kernels"]["text"]
    # 2. Configs are there, and plans, composes and lists without a kernel.
    assert "experiment/nvlm_d: " in run(installed, "train", "--help", cwd=folder).stdout
    shown = run(installed, "train", "experiment=nvlm_d/sft_7b", "--cfg", "job", cwd=folder).stdout
    assert "nvmm.models.multimodal.MultimodalModel" in shown
    assert "8 x 2 x 1 x 4" in run(installed, "plan", "llama3_8b_128k", "8x2x1x4", cwd=folder).stdout
    assert not any(folder.iterdir())
    # 3. The kernels are compiled by the first that loads them.
    if shutil.which("g++"):
        first = run(installed, "kernels", cwd=folder, **cache)
        assert "compiling the kernels, once" in first.stderr and str(library) in first.stdout
        again = run(installed, "kernels", cwd=folder, **cache)
        assert again.stderr == "" and again.stdout == first.stdout
