"""Compile csrc/ into one library: `nvmm kernels build` (what `make kernels` runs).

g++ compiles the bindings and the CPU loops; with a CUDA build of torch nvcc adds the kernels. Only
PyTorch's stable ABI is used, so the library loads under any torch from 2.10 on. `build_simulated`
compiles the CUDA sources by g++ too, to run on the CPU (simulator.h).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / "csrc"
SOURCES = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent / "csrc"
"""The C++ and CUDA sources: inside an installed package, beside it in a checkout."""
PREBUILT = PACKAGE / "kernels" / "native.so"
ARCHITECTURES = ("80", "90a", "100a")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
HOST_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    STABLE_ABI,
)


class BuildError(RuntimeError):
    """No compiler, a torch that is too old, or a source that does not compile."""


def library() -> Path:
    """Return where this installation's library is, or would be.

    It is beside the package's Python files in a checkout. An installed package keeps it in the
    user's cache, under a name that changes with the sources, the machine and torch's kind.
    """
    if PREBUILT.is_file() or SOURCES != INSTALLED:
        return PREBUILT
    state = hashlib.sha256(f"{platform.machine()} {_torch_has_cuda()} {nvcc()}".encode())
    for path in sorted(path for path in SOURCES.rglob("*.*") if path.is_file()):
        state.update(path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nvmm" / "kernels" / state.hexdigest()[:16] / "native.so"


def build_once(target: Path) -> str | None:
    """Build into the cache on first use; return why that is not possible, None when it is there.

    Processes that come at once wait for the first. A failure is kept beside the library, so that
    no later process tries again; `nvmm kernels build` does.
    """
    failed = target.with_name("failed.txt")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name("lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_file():
                return None
            if failed.is_file():
                reason = failed.read_text(encoding="utf-8")
                return f"{reason} (that was then; nvmm kernels build tries again)"
            print(f"nvmm: compiling the kernels, once, into {target.parent}", file=sys.stderr)
            try:
                build(target)
            except BuildError as error:
                reason = f"the kernels do not compile: {str(error).strip().splitlines()[-1]}"
                failed.write_text(reason, encoding="utf-8")
                return reason
    except OSError as error:
        return f"the kernels' cache {target.parent} cannot be written: {error}"
    return None


def build(target: Path, *, cuda: bool | None = None) -> bool:
    """Write the library to `target`; returns whether it holds CUDA kernels.

    cuda: None takes nvcc where it is found and this torch can use it; True without nvcc raises
    BuildError.
    """
    compiler = nvcc() if cuda or (cuda is None and _torch_has_cuda()) else None
    if cuda and compiler is None:
        raise BuildError("no nvcc in CUDA_HOME, /usr/local/cuda or PATH")
    commands = {
        path: host_command(path) for path in [SOURCES / "bindings.cpp", *sources("_cpu.cpp")]
    }
    libraries: list[str] = []
    if compiler is not None:
        commands |= {path: device_command(path, compiler) for path in sources(".cu")}
        runtime = compiler.parent.parent
        libraries = [f"-L{runtime}/lib64", f"-L{runtime}/lib", "-lcudart_static", "-lrt", "-ldl"]
    _compile_and_link(commands, target, libraries)
    with contextlib.suppress(FileNotFoundError):
        target.with_name("failed.txt").unlink()
    return compiler is not None


def build_simulated(target: Path, extra: Iterable[Path] = (), flags: Sequence[str] = ()) -> None:
    """The CUDA sources, compiled by g++ as `torch.ops.nvmm_simulated.*` on the CPU.

    extra: more sources of that kind; flags: added to the compiler's and linker's.
    """
    simulated = ("-DNVMM_SIMULATED", "-O1", *flags)
    commands = {
        path: host_command(path, ("-x", "c++", *simulated))
        for path in [SOURCES / "bindings.cpp", *sources(".cu"), *extra]
    }
    _compile_and_link(commands, target, list(flags))


def sources(ending: str) -> list[Path]:
    """Files in the folders of the operations whose names end so."""
    return sorted(SOURCES.glob(f"*/*{ending}"))


def nvcc() -> Path | None:
    """The compiler of CUDA_HOME, of /usr/local/cuda, or of PATH."""
    found = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = [Path(folder) / "bin" / "nvcc" for folder in folders if folder]
    candidates += [Path(found)] if found else []
    return next((path for path in candidates if path.is_file()), None)


def host_command(source: Path, flags: Sequence[str] = ()) -> list[str]:
    """g++'s command for one source, without `-o`."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("no C++ compiler (apt-get install g++, or set CXX)")
    return [compiler, *HOST_FLAGS, *flags, *_includes(), "-c", str(source)]


def device_command(
    source: Path, compiler: Path, architectures: Iterable[str] = ARCHITECTURES
) -> list[str]:
    """nvcc's command for one source, without `-o`."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    # USE_CUDA shows the CUDA part of torch's C shims, which the CPU wheel's headers have too.
    host = [
        "-O3",
        "-std=c++20",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        STABLE_ABI,
        "-DUSE_CUDA",
    ]
    return [str(compiler), *host, *codes, *_includes(), "-c", str(source)]


def _torch_has_cuda() -> bool:
    return _torch().version.cuda is not None


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise BuildError("torch is not installed where this runs") from error
    return torch


def _includes() -> list[str]:
    torch = _torch()
    include = Path(str(torch.__file__)).parent / "include"
    if not (include / "torch" / "csrc" / "stable" / "ops.h").is_file():
        raise BuildError(f"torch {torch.__version__} has no stable ABI; it takes 2.10 or newer")
    return [f"-I{SOURCES}", "-isystem", str(include)]


def _compile_and_link(
    commands: dict[Path, list[str]], target: Path, libraries: Sequence[str]
) -> None:
    lib = Path(str(_torch().__file__)).parent / "lib"
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        objects = [str(Path(folder, f"{path.name}.o")) for path in commands]
        jobs = [[*command, "-o", o] for command, o in zip(commands.values(), objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, jobs))
        finished = Path(folder, "library.so")
        linker = next(iter(commands.values()))[0]
        run(
            [
                linker,
                "-shared",
                *objects,
                f"-L{lib}",
                "-ltorch_cpu",
                *libraries,
                "-o",
                str(finished),
            ]
        )
        # Renamed into place: a process that has the old one mapped keeps it.
        shutil.copy(finished, f"{target}.new")
        os.replace(f"{target}.new", target)


def run(command: Sequence[str]) -> str:
    """Run a compiler; returns what it printed. Raises BuildError with that when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
