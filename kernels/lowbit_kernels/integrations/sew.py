"""SEW and SEW-D, which attend to one frame of every few, in one graph and blind to padding.

An utterance's frames that do not fill the last group have no counterpart among the pooled ones and
come out as zero. Here that is so in a padded batch, too.

Dimension key: B batch, T frames, P pooled frames, C features.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.integrations.class_swap import Swapped


class MaskedSqueezedEncoder(Swapped):
    """An encoder: positions and pooling over valid frames, layers over pooled ones.

    Subclasses have ``_run_layers``: [B, P, C] and its mask [B, P], true on valid frames, through
    the layers.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B, T, C] to [B, T, C]; ``attention_mask`` [B, T] is true on valid frames."""
        T, squeeze = hidden_states.shape[1], self.config.squeeze_factor
        P = T // squeeze
        pooled_mask = None
        if attention_mask is not None:
            valid = attention_mask.bool()
            hidden_states = hidden_states.masked_fill(~valid[..., None], 0)
            # max_pool1d would make a graph a length, and count a group that is filled in part
            full = torch.div(valid.sum(-1), squeeze, rounding_mode="floor")
            pooled_mask = torch.arange(P, device=full.device) < full[:, None]
        x = hidden_states.transpose(1, 2)
        x = (self.pool(x) + self.pos_conv_embed(x)[..., :P]).transpose(1, 2)  # [B, P, C]
        outputs = self._run_layers(x, pooled_mask, **kwargs)
        x = self.upsample(outputs.last_hidden_state)
        if pooled_mask is not None:
            x = x.masked_fill(~pooled_mask.repeat_interleave(squeeze, 1)[..., None], 0)
        # no question whether there is anything to pad: its answer would be a second graph
        outputs.last_hidden_state = nn.functional.pad(x, (0, 0, 0, T - squeeze * P))
        return outputs


class MaskedSEWEncoder(MaskedSqueezedEncoder):
    """SEW's, with layers of its own."""

    def _run_layers(
        self,
        x: Tensor,
        mask: Tensor | None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Also collects what versions of transformers without hooks on layers ask for."""
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
        from transformers.integrations.fsdp import is_fsdp_managed_module
        from transformers.masking_utils import create_bidirectional_mask
        from transformers.modeling_outputs import BaseModelOutput

        x = self.dropout(self.layer_norm(x))
        attended = create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=mask
        )
        states: tuple[Tensor, ...] = (x,)
        weights: tuple[Tensor, ...] = ()
        may_skip = self.training and self.config.layerdrop > 0
        # there every process must run every layer
        may_skip = may_skip and not is_deepspeed_zero3_enabled()
        may_skip = may_skip and not is_fsdp_managed_module(self)
        for layer in self.layers:
            if not (may_skip and torch.rand([]) < self.config.layerdrop):
                out = layer(x, attention_mask=attended, **kwargs)
                x, *rest = out if isinstance(out, tuple) else (out,)
                weights += tuple(rest)
            states += (x,)
        return BaseModelOutput(
            last_hidden_state=x,
            hidden_states=states if output_hidden_states else None,
            attentions=weights or None,
        )


class MaskedSEWDEncoder(MaskedSqueezedEncoder):
    """SEW-D's, around an encoder of DeBERTa layers."""

    def _run_layers(
        self, x: Tensor, mask: Tensor | None, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        if mask is None:
            mask = torch.ones(x.shape[:2], device=x.device)
        return self.encoder(x, mask.long(), **kwargs)


class PooledFrameMask(Swapped):
    """A classification head that sums the layers, whose outputs are pooled frames."""

    def _get_feature_vector_attention_mask(
        self, feature_vector_length: int, attention_mask: Tensor
    ) -> Tensor:
        """[B, S] of samples to [B, P]."""
        if not self.config.use_weighted_layer_sum:
            return super()._get_feature_vector_attention_mask(  # type: ignore[misc, no-any-return]
                feature_vector_length, attention_mask
            )
        frames = self._get_feat_extract_output_lengths(attention_mask.sum(-1))
        full = torch.div(frames, self.config.squeeze_factor, rounding_mode="floor")
        return torch.arange(feature_vector_length, device=full.device) < full[:, None]
