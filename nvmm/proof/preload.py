"""The imports that the rank server does once: megatron-core, on the CPU layer where needed."""

from nvmm.parallel.setup import prepare_backend

prepare_backend()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.distributed  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401
