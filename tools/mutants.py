"""Plant one-line faults and count those that the nearest tests catch: python tools/mutants.py

cosmic-ray (the extra `mutants`) changes an operator, a number, a comparison or a decorator of one
module at a time, in a copy of the checkout, and runs that module's nearest test files. Hours for a
room: --shard 2/8 takes every eighth module, --sample 10 draws ten faults of each. It prints a line
a module, and those faults that lived, as file:line and change.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("training", "checkpoint", "parallel", "modules", "data/order", "objectives")
TRAINER, CHECKPOINT = "tests/training/test_trainer.py", "tests/checkpoint/test_checkpoint.py"
NEAREST = {
    "training/accounting": TRAINER,
    "training/logger": "tests/training/test_metrics.py",
    "training/optimizer": "tests/training/test_optim.py",
    "training/profiler": "tests/test_train.py",
    "training/start": TRAINER,
    "training/summary": "tests/training/test_metrics.py",
    "training/trainer": f"{TRAINER} tests/training/test_validation.py",
    **{f"checkpoint/{name}": CHECKPOINT for name in ("base", "files", "index", "load")},
    **{f"checkpoint/{name}": CHECKPOINT for name in ("save", "weights", "digests")},
    "parallel/collectives": "tests/training/test_optim.py",
    "parallel/environment": "tests/parallel/test_setup.py",
    "parallel/fp8_recipe": "tests/modules/test_fp8_scales.py",
    "parallel/groups": "tests/modules/encoders/test_vision.py",
    "parallel/schedule": TRAINER,
    "modules/mlp": "tests/models/test_language.py",
    "modules/embedding": "tests/models/test_bidirectional.py",
    "modules/post_norm": "tests/models/test_bidirectional.py",
    "modules/spans": "tests/modules/test_cross_attention.py",
    "modules/specs": "tests/models/test_language.py",
    "modules/encoders/audio": "tests/models/test_second_modality.py",
    "modules/encoders/base": "tests/modules/encoders/test_vision.py",
    "modules/encoders/layers": "tests/modules/encoders/test_vision.py",
    "data/order/mixture": "tests/data/order/test_blend.py",
    "data/order/sample_ids": "tests/data/order/test_order.py",
    "objectives/objective": TRAINER,
}
"""Module -> its nearest test files, where tests/<room>/test_<module>.py is not there."""
# Unions in annotations are not computed, and a decorator's absence is mostly an import error.
LEFT_OUT = re.compile(r"core/(ReplaceBinaryOperator_BitOr_|RemoveDecorator)")
TIMEOUT = 900.0
"""Seconds; tests that a fault makes hang have caught it."""


def modules() -> dict[str, str]:
    """Return module, as `training/optim`, -> the test files that stand nearest to it."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / "nvmm" / room).rglob("*.py")):
            name = path.relative_to(ROOT / "nvmm").with_suffix("").as_posix()
            if path.stem == "__init__":
                continue
            mirrored = f"tests/{Path(name).parent.as_posix()}/test_{path.stem}.py"
            found[name] = mirrored if (ROOT / mirrored).is_file() else NEAREST[name]
    return found


def copy_checkout(to: Path) -> None:
    """Copy the files that git knows, and the compiled kernels."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kernels = "nvmm/kernels/native.so"
    for name in [*listed.stdout.split("\0"), kernels]:
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def attack(copy: Path, name: str, tests: str, python: str, sample: int | None) -> tuple[int, int]:
    """Plant the faults of one module; print those that live; return (caught, planted).

    Raises RuntimeError when the tests fail without a fault.
    """
    from cosmic_ray.commands import init
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.testing import run_tests
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import TestOutcome

    pytest = [python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    pytest += ["-m", "not slow and not gpu"]
    command = shlex.join(["env", f"PYTHONPATH={copy}", "OMP_NUM_THREADS=1", *pytest])
    outcome, output = run_tests(command, TIMEOUT)
    if outcome != TestOutcome.SURVIVED:
        raise RuntimeError(f"{tests} fail without a fault:\n{output}")
    with use_db(str(copy / "mutants.sqlite")) as database:
        init([Path("nvmm", f"{name}.py")], database, {})
        faults = [item.mutations for item in database.pending_work_items]
    faults = [fault for fault in faults if not LEFT_OUT.match(fault[0].operator_name)]
    # The same faults each time, whatever order the database gives.
    faults.sort(key=str)
    faults = random.Random(name).sample(faults, min(sample or len(faults), len(faults)))
    caught = 0
    for fault in faults:
        result = mutate_and_test(fault, command, TIMEOUT)
        caught += result.test_outcome != TestOutcome.SURVIVED
        if result.test_outcome == TestOutcome.SURVIVED:
            print("\n".join(_changes(name, result.diff)), flush=True)
    return caught, len(faults)


def _changes(name: str, diff: str) -> list[str]:
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    return [f"  {name}  {line}" for line in lines if line.startswith(("@@", "-", "+"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", action="append", help="training/optim; all by default")
    parser.add_argument("--shard", default="1/1", help="2/8: the second of every eight modules")
    parser.add_argument("--sample", type=int, help="faults of each module; all by default")
    parser.add_argument("--python", default=sys.executable, help="runs the tests")
    options = parser.parse_args()
    number, count = map(int, options.shard.split("/"))
    chosen = {
        name: tests
        for name, tests in modules().items()
        if options.module is None or name in options.module
    }
    caught = planted = 0
    for name in list(chosen)[number - 1 :: count]:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            copy_checkout(copy)
            with contextlib.chdir(copy):
                result = attack(copy, name, chosen[name], options.python, options.sample)
        caught, planted = caught + result[0], planted + result[1]
        print(f"{name}: {result[0]} of {result[1]} caught ({chosen[name]})", flush=True)
    print(f"{caught} of {planted} caught")


if __name__ == "__main__":
    main()
