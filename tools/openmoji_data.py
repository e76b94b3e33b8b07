"""Build the demo's retrieval set from npm's openmoji: python tools/openmoji_data.py

It fetches the package (4 MB) with npm, checks its sha256, draws the pictures and writes M-BEIR's
layout (nvmm/data/prepare/openmoji_tasks.py). It needs the extra demo.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nvmm.config.compose import failures
from nvmm.data.prepare.openmoji_set import Settings, build


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", default="data/openmoji", help="folder to write")
    parser.add_argument("--package", type=Path, help="openmoji-17.0.0.tgz, else npm fetches it")
    parser.add_argument("--size", type=int, default=Settings.size, help="pixels of a side")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    options = parser.parse_args()
    if options.size < 1:
        parser.error(f"--size {options.size} must be at least 1")
    made = build(options.to, Settings(options.size, options.seed), options.package)
    print(f"{options.to}: {'written' if made else 'already complete'}")


if __name__ == "__main__":
    with failures("openmoji_data.py"):
        main()
