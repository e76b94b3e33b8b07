"""Speed and memory of an import and an export beside a copy by the safetensors library.

python tools/bench_convert.py --to /scratch/bench --gigabytes 2.5

Writes a random Qwen2-like model there, converts it in a process of its own each time, and removes
it. Peak memory is the process's largest resident set; the interpreter with torch and megatron.core
alone is measured too. Speeds are those of the tensors' way from files to files, which each program
prints itself, without the imports. "flushed" is the copy and then fsync, which ours do as well.
mbridge (on PYTHONPATH; `make bench-convert` puts it there) loads and saves on two gloo ranks, or
what stops it is printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nvmm.convert.formats import qwen2
from nvmm.convert.safetensors import write_safetensors

_MEASURE = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""
_COPY = """
import os, sys, time
from pathlib import Path
from safetensors.torch import load_file, save_file
source, target = map(Path, sys.argv[1:])
target.mkdir()
size, start = 0, time.monotonic()
for path in sorted(source.glob("*.safetensors")):
    save_file(load_file(path), target / path.name)
    size += path.stat().st_size
copied = time.monotonic() - start
for path in target.iterdir():
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
flushed = time.monotonic() - start
speeds = f"{size / copied / 1e9:.2f} GB/s, flushed {size / flushed / 1e9:.2f} GB/s"
print("safetensors copy []", speeds, file=sys.stderr)
"""
_MBRIDGE = """
import sys, time
from nvmm.parallel.setup import Parallel, prepare_backend
if __name__ == "__main__":
    prepare_backend()
    import torch.distributed as dist
    from mbridge import AutoBridge
    dist.init_process_group("gloo")
    parallel = Parallel(pipeline_model_parallel_size=2)
    parallel.initialize(seed=0, rank=dist.get_rank(), world_size=2)
    bridge = AutoBridge.from_pretrained(sys.argv[1])
    model = bridge.get_model(wrap_with_ddp=False)
    start = time.monotonic()
    bridge.load_weights(model, sys.argv[1])
    middle = time.monotonic()
    bridge.save_weights(model, sys.argv[2])
    print("mbridge", middle - start, time.monotonic() - middle)
"""
_BASE = "import torch, megatron.core.models.gpt, nvmm.convert.importing"
_LAYER_BYTES = 154_000_000


class Random:
    """Return random bf16 tensors of a Qwen2 model's shapes."""

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        self.spec = {
            name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for name, shape in shapes.items()
        }

    def blocks(self, name: str) -> Iterator[Tensor]:
        yield torch.randn(self.spec[name].shape, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", required=True, help="folder to write in; it must not exist")
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    folder = Path(options.to)
    folder.mkdir(parents=True)
    try:
        _bench(folder, options.gigabytes, options.workers)
    finally:
        shutil.rmtree(folder)


def _bench(folder: Path, gigabytes: float, workers: int) -> None:
    total, largest = _make(folder / "theirs", gigabytes)
    print(f"{total / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    tool = str(Path(__file__).with_name("convert.py"))
    for name, script in (("run_base", _BASE), ("run_copy", _COPY)):
        (folder / f"{name}.py").write_text(script)
    there, here = str(folder / "theirs"), str(folder / "ours")
    runs = {
        "imports alone": [str(folder / "run_base.py")],
        "safetensors copy": [str(folder / "run_copy.py"), there, str(folder / "copied")],
        "import": [tool, "import", "--from", there, "--to", here, "--workers", str(workers)],
        "export": [tool, "export", "--from", here, "--to", f"{here}_hf", "--format", "qwen2"],
    }
    for name, arguments in runs.items():
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, *arguments], capture_output=True, text=True
        )
        seconds = time.monotonic() - start
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr}")
        lines = done.stderr.strip().splitlines()
        peak = int(lines[-1].split()[1]) * 1024
        own = next((line for line in lines if line.startswith(name + " [")), "")
        speed = f", {own.partition(']')[2].rpartition('GB, ')[2].strip()}" if own else ""
        print(f"{name}: {seconds:.1f} s, peak {peak / 1e6:.0f} MB{speed}", flush=True)
    _mbridge(folder, there, total)


def _mbridge(folder: Path, there: str, total: int) -> None:
    if importlib.util.find_spec("mbridge") is None:
        print("mbridge: not installed")
        return
    script = folder / "run_mbridge.py"
    script.write_text(_MBRIDGE)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*ranks, str(script), there, str(folder / "mbridge")], capture_output=True, text=True
    )
    times = next((line for line in done.stdout.splitlines() if line.startswith("mbridge ")), None)
    if times is None:
        found = re.findall(r"^(?:\[rank0\]: )?(\w*Error: .*)$", done.stderr, re.MULTILINE)
        print(f"mbridge: stops with {found[0] if found else done.stderr[-500:]}")
        return
    load, save = (total / 1e9 / float(text) for text in times.split()[1:])
    print(f"mbridge on two ranks: load {load:.2f} GB/s, save {save:.2f} GB/s")


def _make(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write the model; return its bytes and those of its largest tensor."""
    h, f, v = 2048, 11008, 151936
    layers = max(1, round((gigabytes * 1e9 - 4 * v * h) / _LAYER_BYTES))
    hf = {
        "model_type": "qwen2",
        "vocab_size": v,
        "hidden_size": h,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
    }
    layer = {
        "self_attn.q_proj.weight": [h, h],
        "self_attn.q_proj.bias": [h],
        "self_attn.o_proj.weight": [h, h],
        "mlp.gate_proj.weight": [f, h],
        "mlp.up_proj.weight": [f, h],
        "mlp.down_proj.weight": [h, f],
        **{f"{name}_layernorm.weight": [h] for name in ("input", "post_attention")},
        **{f"self_attn.{x}_proj.weight": [256, h] for x in "kv"},
        **{f"self_attn.{x}_proj.bias": [256] for x in "kv"},
    }
    shapes = {f"{name}.weight": [v, h] for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = [h]
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    source = Random(shapes)
    write_safetensors(folder, source, max_shard_bytes=10**9)
    assert qwen2.to_model(hf)["transformer"]["num_layers"] == layers
    sizes = [tensor.nbytes for tensor in source.spec.values()]
    return sum(sizes), max(sizes)


if __name__ == "__main__":
    main()
