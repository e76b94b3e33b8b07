"""MM-Embed for Transformers: copied into exported folders, where `trust_remote_code` runs it.

It uses nothing of nvmm: the import below becomes one of the file beside it.
`processing_mm_embed.py` writes its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from nvmm.convert.formats.modeling_nvembed import LatentAttentionModel, decoder, pooled, visible


class MMEmbedConfig(PretrainedConfig):
    """The config of a multimodal embedder.

    text_config, vision_config: of decoder and encoder; latent_attention_config: sizes, or None for
    plain pooling; image_token_index: stands for a token of a picture.
    """

    model_type = "mm_embed"

    def __init__(
        self,
        text_config: dict[str, Any] | None = None,
        vision_config: dict[str, Any] | None = None,
        latent_attention_config: dict[str, Any] | None = None,
        causal: bool = False,
        hidden_size: int = 4096,
        max_position_embeddings: int = 4096,
        multimodal_projector_bias: bool = True,
        image_token_index: int = 0,
        image_seq_length: int = 576,
        instruction_masking: str = "mm_embed",
        max_seq_length: int = 512,
        **kwargs: Any,
    ) -> None:
        self.text_config = text_config
        self.vision_config = vision_config
        self.latent_attention_config = latent_attention_config
        self.causal = causal
        self.hidden_size = hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.multimodal_projector_bias = multimodal_projector_bias
        self.image_token_index = image_token_index
        self.image_seq_length = image_seq_length
        self.instruction_masking = instruction_masking
        self.max_seq_length = max_seq_length
        super().__init__(**kwargs)


class VisionTower(nn.Module):
    """CLIP, under the name that its weights had before Transformers 5."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        fields = {key: value for key, value in config.items() if key != "model_type"}
        tower = CLIPVisionModel(CLIPVisionConfig(**fields))
        self.vision_model = getattr(tower, "vision_model", tower)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode pictures [n, 3, side, side] as patches [n, patches, width]."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]


class Projector(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, vision_size: int, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, hidden_size, bias=bias)
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [..., vision_size] to [..., hidden_size]."""
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


class MMEmbedModel(PreTrainedModel):
    """CLIP, a projector, a decoder, bidirectional unless config.causal, and latent attention."""

    config_class = MMEmbedConfig

    def __init__(self, config: MMEmbedConfig) -> None:
        super().__init__(config)
        vision = dict(config.vision_config or {})
        self.vision_tower = VisionTower(vision)
        self.multi_modal_projector = Projector(
            vision["hidden_size"], config.hidden_size, config.multimodal_projector_bias
        )
        self.language_model = decoder(config.text_config)
        sizes = config.latent_attention_config
        self.latent_attention_model = (
            LatentAttentionModel(config.hidden_size, sizes) if sizes else None
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the decoder's input embeddings."""
        return self.language_model.embed_tokens

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Embed ids [b, s], with features of pictures [n, 3, side, side] at their places, in order.

        Raises ValueError when there are more or fewer places than features.
        """
        places = input_ids == self.config.image_token_index
        hidden = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
        count = 0 if pixel_values is None else len(pixel_values) * self.config.image_seq_length
        if int(places.sum()) != count:
            raise ValueError(
                f"{int(places.sum())} places of pictures in input_ids, {count} features"
            )
        if pixel_values is None:
            return hidden
        features = self.multi_modal_projector(self.vision_tower(pixel_values.to(hidden.dtype)))
        return hidden.masked_scatter(places[..., None], features.to(hidden.dtype))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pool_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """input_ids [b, s], padded on the right; masks [b, s]; pixel_values [n, 3, side, side].

        Returns last_hidden_state [b, s, h], and with pool_mask pooler_output [b, h], the unit
        vectors of its tokens' means.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden = self.language_model(
            inputs_embeds=self.embed(input_ids, pixel_values),
            attention_mask=visible(attention_mask, self.config.causal),
            use_cache=False,
        ).last_hidden_state
        if self.latent_attention_model is not None:
            hidden = self.latent_attention_model(hidden)
        vectors = None if pool_mask is None else pooled(hidden, pool_mask)
        if not return_dict:
            return (hidden,) if vectors is None else (hidden, vectors)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=vectors)
