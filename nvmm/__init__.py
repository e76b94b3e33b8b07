"""nvmm: distributed training of multimodal LLMs on megatron-core."""

__version__ = "0.1.0"
