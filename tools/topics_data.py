"""Write Python's own language reference as shards of text, with a SentencePiece model:

python tools/topics_data.py --to data/topics
"""

from __future__ import annotations

import argparse

from nvmm.config.compose import failures
from nvmm.data.prepare import python_topics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", default="data/topics", help="folder to write")
    folder = parser.parse_args().to
    python_topics.build(folder)
    print(f"{folder}: train-*.tar, validation-*.tar, tokenizer/topics.model")


if __name__ == "__main__":
    with failures("topics_data.py"):
        main()
