"""Build the quickstart's data set: python tools/quickstart_data.py --to data/quickstart"""

from __future__ import annotations

import argparse
import dataclasses
from typing import get_args

from nvmm.config.compose import failures
from nvmm.data.prepare import digits
from nvmm.data.samples.chat import Variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", default="data/quickstart", help="folder to write")
    for field in dataclasses.fields(digits.Amounts):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--tags", default="1d", choices=get_args(Variant), help="of tiles in text")
    parser.add_argument("--max-images", type=int, default=1, help="of a sample")
    options = vars(parser.parse_args())
    folder = options.pop("to")
    form = digits.Form(options.pop("tags"), options.pop("max_images"))
    made = digits.build(folder, digits.Amounts(**options), form)
    print(f"{folder}: {'written' if made else 'already complete'}")


if __name__ == "__main__":
    with failures("quickstart_data.py"):
        main()
