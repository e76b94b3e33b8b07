"""What is installed on this machine, and what is missing for what: `nvmm doctor [--json]`.

The exit code is 0 where models can be trained here, 1 where something that every run needs is
missing or broken. What only some runs need is listed as absent, with what it is for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nvmm.version import PACKAGE, installed, packages, revision

State = Literal["ok", "differs", "absent", "wrong"]
OLDEST_PYTHON = (3, 11)
EXTRAS = {
    "cuda": "GPUs: backend=transformer_engine, precision=fp8, flash attention",
    "jobs": "nvmm job: vectors and indexes",
    "synth": "job=synthesise",
    "tables": "nvmm shard parquet, hf",
    "audio": "sounds in shards",
    "remote": "shards in S3 and behind HTTP",
    "eval": "ROUGE, the needle's heat map",
    "lm-eval": "benchmark=lm_eval",
    "embed": "mteb and sentence-transformers, which judge embedders",
    "sentencepiece": "tokenizer folders with *.model alone",
}
"""Extra -> what it is for."""


@dataclass(frozen=True)
class Finding:
    """One line: "ok", "differs" from what was tested, "absent" (some runs need it), "wrong"."""

    name: str
    state: State
    text: str


def main() -> int:
    """Print what was found; return 1 where something that every run needs is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print a list of findings as JSON")
    options = parser.parse_args()
    findings = list(examine())
    wrong = [finding.name for finding in findings if finding.state == "wrong"]
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{finding.state:<8} {finding.name:<{width}}  {finding.text}")
        print(f"wrong: {', '.join(wrong)}" if wrong else "models can be trained here")
    return 1 if wrong else 0


def examine() -> Iterator[Finding]:
    """Look at everything, what every run needs first."""
    version, commit = packages()["nvmm"], revision() or "commit unknown"
    yield Finding("nvmm", "ok", f"{version} ({commit}) in {PACKAGE}")
    yield Finding("launchers", "ok", str(beside("launchers")))
    new_enough = tuple(map(int, platform.python_version_tuple()[:2])) >= OLDEST_PYTHON
    yield Finding("python", "ok" if new_enough else "wrong", platform.python_version())
    yield from required()
    yield from hardware()
    yield from kernels()
    yield from extras()


def beside(name: str) -> Path:
    """Return a folder or file that is inside an installed package, beside it in a checkout."""
    inside = PACKAGE / name
    return inside if inside.exists() else PACKAGE.parent / name


def tested() -> dict[str, str]:
    """Return the versions that the tests pass with, by normal name."""
    path = beside("constraints.txt")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pins = (line.partition("==") for line in lines if "==" in line)
    return {str(canonicalize_name(name)): version for name, _, version in pins}


def needed(extra: str = "") -> list[Requirement] | None:
    """Return what an extra ("": every run) needs; None where pip has not installed nvmm."""
    try:
        listed = [Requirement(line) for line in requires("nvmm") or []]
    except PackageNotFoundError:
        return None
    return [
        each
        for each in listed
        if (each.marker is None) == (not extra)
        and (each.marker is None or each.marker.evaluate({"extra": extra}))
    ]


def required() -> Iterator[Finding]:
    """Compare the packages that every run needs with what is allowed, and with what was tested."""
    listed, versions = needed(), tested()
    if listed is None:
        yield Finding("packages", "differs", "nvmm runs from a path; pip has not installed it")
        listed = [Requirement(name) for name in ("megatron-core", "torch", "transformers")]
    for each in sorted(listed, key=lambda each: each.name):
        have, tried = installed(each.name), versions.get(canonicalize_name(each.name))
        if have is None:
            yield Finding(each.name, "wrong", f"missing: pip install '{each}'")
        elif not each.specifier.contains(have, prereleases=True):
            yield Finding(each.name, "wrong", f"{have} must be {each.specifier}")
        elif _differs(have, tried):
            yield Finding(each.name, "differs", f"{have}; tested with {tried}")
        else:
            yield Finding(each.name, "ok", have)


def hardware() -> Iterator[Finding]:
    """Look for GPUs, and for what ranks speak through."""
    if installed("torch") is None:
        return
    from nvmm.parallel.devices import communication, gpus

    versions, found = communication(), gpus()
    for gpu in found:
        text = f"{gpu['name']}, {gpu['gigabytes']} GB, compute capability {gpu['capability']}"
        yield Finding("gpu", "ok", text)
    if not found:
        why = "this torch is built for CPUs" if versions["cuda"] is None else "torch sees none"
        yield Finding("gpu", "absent", f"{why}; runs use the {os.cpu_count()} CPUs")
    if versions["nccl"] is not None:
        yield Finding("nccl", "ok", f"{versions['nccl']}, CUDA {versions['cuda']}")
    else:
        state: State = "wrong" if len(found) > 1 else "absent"
        yield Finding("nccl", state, "ranks on several GPUs speak through it")
    if versions["gloo"] is None:
        yield Finding("gloo", "wrong", "missing in this torch; ranks agree through it")


def kernels() -> Iterator[Finding]:
    """Look for the compilers and for what they made."""
    from nvmm.kernels import build

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    text = compiler or "compiles the kernels; without it eager PyTorch runs (apt-get install g++)"
    yield Finding("g++", "ok" if compiler else "absent", text)
    nvcc = build.nvcc()
    text = str(nvcc or "compiles the kernels for GPUs")
    yield Finding("nvcc", "ok" if nvcc else "absent", text)
    if installed("torch") is None:
        return
    library = build.library()
    if not library.is_file():
        where = "is not built: nvmm kernels build, or the first run, makes it"
        yield Finding("kernels", "absent", f"{library} {where}")
        return
    from nvmm.kernels.library import MISSING, has_cuda
    from nvmm.parallel.devices import gpus

    if MISSING is not None:
        yield Finding("kernels", "wrong", MISSING)
    elif gpus() and not has_cuda():
        text = f"{library} has none for GPUs, where eager PyTorch runs: nvmm kernels build --cuda"
        yield Finding("kernels", "absent", text)
    else:
        yield Finding("kernels", "ok", f"{library}: CPU{' and CUDA' if has_cuda() else ''}")


def extras() -> Iterator[Finding]:
    """Look for the packages of each extra."""
    versions = tested()
    for extra, purpose in EXTRAS.items():
        listed = needed(extra)
        if listed is None:
            return
        have = {each.name: installed(each.name) for each in listed}
        missing = [name for name, version in have.items() if version is None]
        if missing:
            text = f"{', '.join(missing)} missing, for {purpose}: pip install 'nvmm[{extra}]'"
            yield Finding(f"[{extra}]", "absent", text)
            continue
        others = [
            f"{name} {version} (tested {tried})"
            for name, version in have.items()
            if _differs(str(version), tried := versions.get(canonicalize_name(name)))
        ]
        state: State = "differs" if others else "ok"
        yield Finding(f"[{extra}]", state, "; ".join([purpose, *others]))


def _differs(version: str, tried: str | None) -> bool:
    """Return whether a version is not the tested one; a suffix as +cpu tells torch's builds."""
    return tried is not None and version.partition("+")[0] != tried.partition("+")[0]
