"""Layers of these encoders in a handful of ops, in inference: ``quantize(fuse=True)``.

Dimension key: B batch, T frames, C features.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_kernels.attention.gate_op import position_gate
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.conv1d.depthwise_op import MAX_CHANNELS, depthwise_conv1d_norm
from lowbit_kernels.conversion.registry import (
    ATTENTIONS,
    EXPOSERS,
    FINISHERS,
    OFFSETS,
    Adapter,
    AttentionModules,
)
from lowbit_kernels.formats import QuantConfig
from lowbit_kernels.integrations.class_swap import Swapped
from lowbit_kernels.integrations.conformer_layers import FusedConformerLayer
from lowbit_kernels.integrations.encoder_layers import (
    Attention,
    FeedForward,
    FusedLayer,
    Parts,
    PostNormLayer,
    PreNormLayer,
    has_hooks,
)
from lowbit_kernels.integrations.fuse import fuse_layers, register_fused
from lowbit_kernels.integrations.silence import layer_inputs
from lowbit_kernels.modules import QConv1d
from lowbit_kernels.modules.base import remembered
from lowbit_kernels.modules.blocks import (
    Int8Rows,
    Operand,
    can_join,
    joined,
    linear,
    normalize_and_keep,
    operand,
)
from lowbit_kernels.modules.conv1d import is_depthwise, is_pointwise
from lowbit_kernels.modules.conv_module import fold_batch_norm
from lowbit_kernels.modules.low_bit_matmuls import NAME as MATMULS
from ssl_models.conformer import ConformerLayer, RelativeAttention
from ssl_models.front_end import ConvFrontEnd
from ssl_models.squeezeformer import ChannelScale, SqueezeformerLayer
from ssl_models.transformer import (
    GatedAttention,
    PreNormTransformerLayer,
    SelfAttention,
    TransformerLayer,
)


class _WithLengths(FusedLayer):
    """Layers that take lengths where those of transformers take a mask."""

    def forward(self, x: Tensor, frame_lengths: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """[B, T, C] to [B, T, C]; ``frame_lengths`` [B] counts valid frames."""
        return super().forward(x, None, frame_lengths=frame_lengths, **kwargs)

    def _uses_our_attention(self, attention: Any) -> bool:
        return MATMULS not in attention._modules

    def _lengths(
        self, mask: Tensor | None, frame_lengths: Tensor | None = None, **_: Any
    ) -> Tensor | None:
        return frame_lengths


class _WithoutMask(Swapped):
    """Stands between the fused layers and these, which know no mask."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """[B, T, C] to [B, T, C]."""
        return super().forward(x, **kwargs)  # type: ignore[misc]


class _Attending(FusedLayer):
    """Layers of which a Sparseformer's attend locally, and WavLM's with a gated bias.

    Locally static int8 inputs cost one op more; a gate is one op.
    """

    @property
    def _is_gated(self) -> bool:  # type: ignore[override]
        return isinstance(self.attention, GatedAttention)

    def _fits(self, **_: Any) -> bool:
        linear = getattr(self.attention, "gru_rel_pos_linear", None)
        return linear is None or (type(linear) is nn.Linear and not has_hooks(linear))

    def _position(self, x: Tensor, offset_bias: Tensor | None = None, **_: Any) -> Scheme | None:
        attention = self.attention
        if offset_bias is None:
            return None
        linear = attention.gru_rel_pos_linear
        gate = position_gate(x, linear.weight, linear.bias, attention.gru_rel_pos_const)
        return Scheme("offset", offset_bias, gate)

    def _attended(
        self,
        rows: Any,
        qkv: Operand,
        dtype: torch.dtype,
        lengths: Tensor | None,
        attention: Attention,
        position: Any = None,
    ) -> Tensor | Int8Rows:
        module = attention.module
        if module.window is None and module.block is None:
            return super()._attended(rows, qkv, dtype, lengths, attention, position)
        heads = linear(rows, qkv, dtype)
        q, k, v = heads.view(*heads.shape[:2], 3, -1, attention.head_dim).permute(2, 0, 3, 1, 4)
        out: Tensor = module.attend(q, k, v, lengths=lengths, position=position)
        return out.transpose(1, 2).flatten(2)


class FusedTransformerLayer(_WithLengths, _Attending, PostNormLayer, _WithoutMask):  # type: ignore[misc]
    """7 launches, with int8 inputs of one scale a token 9."""


class FusedPreNormTransformerLayer(_WithLengths, _Attending, PreNormLayer, _WithoutMask):  # type: ignore[misc]
    """As many, with 16-bit inputs 5."""


class FusedSslConformerLayer(_WithLengths, FusedConformerLayer, _WithoutMask):  # type: ignore[misc]
    """14 launches, with int8 inputs of one scale a token 17, with 16-bit ones 11."""


class FusedSqueezeformerLayer(_WithLengths, FusedConformerLayer, _WithoutMask):  # type: ignore[misc]
    """Attention, feed-forward, convolution module, feed-forward, with a norm behind each.

    Three launches, two, three, two and the norms: 14, with int8 inputs of one scale a token 17. The
    learned scales are in the weights, see ``fold_scales``; each norm also makes the int8 rows of
    the next block.
    """

    def _parts(self) -> Parts:
        a, first, second = self.self_attn, self.ffn1, self.ffn2
        return Parts(
            Attention(a, (a.linear_q, a.linear_k, a.linear_v), a.linear_out, a.head_size),
            tuple(
                FeedForward(f.intermediate_dense, f.intermediate_act_fn, f.output_dense)
                for f in (first, second)
            ),
            (
                self.self_attn_layer_norm, self.ffn1_layer_norm, self.conv_layer_norm,
                self.final_layer_norm,
            ),
            (first, second, self.conv_module, *(scale for scale, _ in self.readers())),
        )  # fmt: skip

    def _fits(self, relative_position_embeddings: Tensor | None = None, **_: Any) -> bool:
        scales = (scale for scale, _ in self.readers())
        has_positions = relative_position_embeddings is not None
        return has_positions and _fuses_swish(self.conv_module) and all(map(_is_folded, scales))

    def _fused(self, x: Tensor, lengths: Tensor | None, parts: Parts, **kwargs: Any) -> Tensor:
        attention, (first, second), norms = parts[:3]
        rows, qkv, conv = self._take(x), joined(self, attention.inputs), self.conv_module
        position = self._position(x, **kwargs)
        h = self._attend(x if rows is None else rows, qkv, x, lengths, attention, position)
        x, rows = normalize_and_keep(h, norms[0], operand(first.first))
        h = first.run(x if rows is None else rows, x)
        x, rows = normalize_and_keep(h, norms[1], operand(conv.pointwise_conv1))
        h = _convolve(conv, x if rows is None else rows, lengths, x)
        x, rows = normalize_and_keep(h, norms[2], operand(second.first))
        h = second.run(x if rows is None else rows, x)
        following = self.following()
        inputs = None if following is None else following._parts().attention.inputs
        after = joined(following, inputs) if inputs is not None and can_join(inputs) else None
        y, rows = normalize_and_keep(h, norms[3], after)
        if following is not None and rows is not None:
            following._hand(y, rows)
        return y


def _fuses_swish(module: Any) -> bool:
    """Whether a Squeezeformer's convolution module can run as three ops here and now."""
    convs = module.pointwise_conv1, module.depthwise_conv, module.pointwise_conv2
    norm = module.batch_norm
    return (
        all(type(conv) is QConv1d and conv.spec.inputs in (None, "int8") for conv in convs)
        and is_pointwise(convs[0])
        and is_depthwise(convs[1])
        and is_pointwise(convs[2])
        and type(norm) is nn.BatchNorm1d
        and not any(has_hooks(part) for part in (*convs, norm, module.gate, module.activation))
    )


def _convolve(
    module: Any, x: Tensor | Int8Rows, lengths: Tensor | None, residual: Tensor
) -> Tensor:
    """A Squeezeformer's convolution module of x [B, T, C], added to the residual, as three ops."""
    depthwise, norm, dtype = module.depthwise_conv, module.batch_norm, residual.dtype
    first, second = operand(module.pointwise_conv1), operand(module.pointwise_conv2)
    inner = linear(x, first, dtype, epilogue=module.epilogue)
    tensors = [
        t
        for t in (
            depthwise.scale, depthwise.bias, norm.weight, norm.bias, norm.running_mean,
            norm.running_var,
        )
        if t is not None
    ]  # fmt: skip
    fold = partial(fold_batch_norm, depthwise, norm)
    scale, bias = remembered(depthwise, "_folded_norm", tensors, fold)
    is_static = second.static is not None
    # of more channels no program of the GPU's kernel holds a frame
    int8_rows = second.takes_int8 and not is_static and norm.num_features <= MAX_CHANNELS
    y, y_scale = depthwise_conv1d_norm(
        inner, depthwise.quantized_weight(), bias, padding=depthwise.padding[0], scale=scale,
        epilogue=module.epilogue, lengths=lengths, int8_rows=int8_rows,
        out_scale=second.weight.input_scale if is_static else None,
    )  # fmt: skip
    rows = Int8Rows(y, y_scale if int8_rows else None) if int8_rows or is_static else y
    return linear(rows, second, dtype, residual=residual)


def _is_folded(scale: ChannelScale) -> bool:
    """Whether a scale changes nothing."""

    def compare() -> bool:
        return bool((scale.weight == 1).all()) and bool((scale.bias == 0).all())

    return bool(remembered(scale, "_identity", [scale.weight, scale.bias], compare))


def _can_fold(layer: nn.Module) -> bool:
    """Whether a layer is a Squeezeformer's, with scales that its layers can take over."""
    return isinstance(layer, SqueezeformerLayer) and all(
        type(reader) in (nn.Linear, nn.Conv1d) and reader.bias is not None
        for _, readers in layer.readers()
        for reader in readers
    )


@torch.no_grad()
def fold_scales(layer: nn.Module) -> nn.Module:
    """A copy of a Squeezeformer's layer with its scales in the weights behind them.

    W (s x + b) + c = (W s) x + (W b + c): what is quantized is W s. The scales stay as ones and
    zeros that are not trained.
    """
    folded: Any = copy.deepcopy(layer)
    for scale, readers in folded.readers():
        factor, shift = scale.weight.double(), scale.bias.double()
        for reader in readers:
            matrix = reader.weight.double().flatten(1)
            reader.bias.copy_(reader.bias.double() + matrix @ shift)
            reader.weight.copy_((matrix * factor).view_as(reader.weight))
        scale.weight.fill_(1)
        scale.bias.zero_()
        scale.requires_grad_(False)
    return folded  # type: ignore[no-any-return]


def _find_attention(model: nn.Module) -> list[nn.Module]:
    """Those that call ``modules.attend``."""
    return [m for m in model.modules() if isinstance(m, RelativeAttention | SelfAttention)]


def _silence(model: nn.Module) -> dict[nn.Module, Tensor]:
    """What the convolutions of front ends get in silence; see ``silence_offsets``."""
    # mel energies of silence are far from those of speech
    front_ends = [m for m in model.modules() if isinstance(m, ConvFrontEnd) and m.in_channels == 1]
    return {conv: x for each in front_ends for conv, x in layer_inputs(each).items()}


def _finish(model: nn.Module, config: QuantConfig | None) -> str | None:
    """Let what was quantized run in few calls, where that is asked for."""
    is_ours = False
    for module in model.modules():
        if isinstance(module, ConvFrontEnd):
            module.find_layout()
        is_ours |= isinstance(module, TransformerLayer | ConformerLayer | SqueezeformerLayer)
    if not is_ours or config is None or not config.fuse:
        return None
    return f"{fuse_layers(model)} encoder layers are fused"


register_fused(TransformerLayer, FusedTransformerLayer)
register_fused(PreNormTransformerLayer, FusedPreNormTransformerLayer)
register_fused(ConformerLayer, FusedSslConformerLayer)
register_fused(SqueezeformerLayer, FusedSqueezeformerLayer)
ATTENTIONS.append(AttentionModules(_find_attention, lambda model: None))
# where nothing is quantized in the end, the layer itself takes its place again
EXPOSERS.append(Adapter(_can_fold, fold_scales, lambda layer: layer))
OFFSETS.append(_silence)
FINISHERS.append(_finish)
