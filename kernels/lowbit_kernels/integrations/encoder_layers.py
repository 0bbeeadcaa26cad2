"""Encoder layers of transformers in a handful of ops, in inference: ``quantize(fuse=True)``.

A layer stays an instance of its class, with its parameters where they are, and computes what it did
wherever it cannot be fused: in training or with gradients, under autocast or ``torch.compile``,
with hooks or adapters inside, or with another ``attn_implementation`` than ``"lowbit"`` and
``"lowbit_int8"``.

Dimension key: B batch, T frames, C features, H heads, D head dimension.
"""

import functools
import inspect
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit_kernels.attention import (
    Position,
    attend_int8,
    flash_attention,
    int8_scores_attention,
)
from lowbit_kernels.attention.position import Scheme
from lowbit_kernels.integrations.activations import epilogue_of
from lowbit_kernels.integrations.chosen_attention import INT8_NAME, chosen
from lowbit_kernels.integrations.class_swap import Swapped
from lowbit_kernels.modules.blocks import (
    Int8Rows,
    Operand,
    Reader,
    UnnormalizedRows,
    add_linear,
    can_join,
    hidden,
    is_fusible,
    joined,
    linear,
    normalize,
    normalize_and_keep,
    operand,
)


class Attention(NamedTuple):
    """The parts of self-attention, whatever a family calls them."""

    module: Any
    inputs: tuple[Any, Any, Any]
    output: Any
    head_dim: int


class FeedForward(NamedTuple):
    """Two linear layers and what is between them; ``factor`` scales their result."""

    first: Any
    activation: Any
    second: Any
    factor: float = 1.0

    @property
    def last(self) -> Operand:
        """The second layer."""
        return operand(self.second, self.factor)

    def hidden(
        self, x: Tensor | Int8Rows | UnnormalizedRows, dtype: torch.dtype
    ) -> Tensor | Int8Rows:
        """What the second layer takes, of x [B, T, C]."""
        return hidden(x, operand(self.first), self.last, epilogue_of(self.activation), dtype)

    def run(self, x: Tensor | Int8Rows, residual: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C], added to the residual."""
        inner = self.hidden(x, residual.dtype)
        return linear(inner, self.last, residual.dtype, residual=residual)


class Parts(NamedTuple):
    """What a layer is made of. ``others``: modules of which the fused layer calls the parts."""

    attention: Attention
    feed_forwards: tuple[FeedForward, ...]
    norms: tuple[Any, ...]
    others: tuple[Any, ...] = ()


class FusedLayer(Swapped):
    """Base of the mixins: when a layer is fused, and its attention."""

    # q, k and v as one weight; the layer behind this one; what the one before has made for it
    _scratch: tuple[str, ...] = ("_joined", "_next", "_handed")
    # whether the position scheme depends on what the attention reads
    _is_gated = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """[B, T, C] to [B, T, C]; ``attention_mask`` [B, T], true for valid frames."""
        parts = self._parts()
        served = _is_served(self, hidden_states, attention_mask, parts, kwargs)
        if not served or not self._fits(**kwargs):
            self.__dict__.pop("_handed", None)
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        lengths = self._lengths(attention_mask, **kwargs)
        fused = self._fused(hidden_states, lengths, parts, **kwargs)
        return self._as_tuple(fused) if _returns_tuple(self._origin) else fused

    def _as_tuple(self, y: Any) -> tuple[Any, ...]:
        return (y,)

    def _parts(self) -> Parts:
        """Those of wav2vec2 and its kin."""
        block = self.feed_forward
        return Parts(
            attention_parts(self.attention),
            (FeedForward(block.intermediate_dense, block.intermediate_act_fn, block.output_dense),),
            (self.layer_norm, self.final_layer_norm),
            (block,),
        )

    def _fits(self, **kwargs: Any) -> bool:
        """Whether what this layer alone has, or is given, can be fused, too."""
        return True

    def _uses_our_attention(self, attention: Any) -> bool:
        return chosen(attention) is not None

    def _lengths(self, mask: Tensor | None, **_: Any) -> Tensor | None:
        """Valid frames [B]."""
        # loaded already, where a model has this attention; transformers need not be there
        from lowbit_kernels.integrations.huggingface_attention import lengths_of

        return None if mask is None else lengths_of(mask)

    def _position(self, x: Tensor, **_: Any) -> Position | Scheme | None:
        """The position scheme of the attention over x [B, T, C], what its layers read."""
        return None

    def _fused(self, x: Tensor, lengths: Tensor | None, parts: Parts, **kwargs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how its parts follow each other")

    def _attend(
        self,
        rows: Tensor | Int8Rows,
        qkv: Operand,
        residual: Tensor,
        lengths: Tensor | None,
        attention: Attention,
        position: Position | Scheme | None = None,
    ) -> Tensor:
        """Attention over what ``qkv`` takes, added to the residual, [B, T, C]."""
        dtype = residual.dtype
        attended = self._attended(rows, qkv, dtype, lengths, attention, position)
        return linear(attended, operand(attention.output), dtype, residual=residual)

    def _attended(
        self,
        rows: Tensor | Int8Rows | UnnormalizedRows,
        qkv: Operand,
        dtype: torch.dtype,
        lengths: Tensor | None,
        attention: Attention,
        position: Position | Scheme | None = None,
    ) -> Tensor | Int8Rows:
        """Attention over what ``qkv`` takes, for the layer behind it, [B, T, C]."""
        heads = linear(rows, qkv, dtype)
        q, k, v = heads.view(*heads.shape[:2], 3, -1, attention.head_dim).permute(2, 0, 3, 1, 4)
        to = operand(attention.output)
        if chosen(attention.module) == INT8_NAME:
            out = int8_scores_attention(q, k, v, lengths=lengths, position=position)
            return out.transpose(1, 2).flatten(2)
        if to.static is None:
            out = flash_attention(q, k, v, lengths=lengths, position=position)
        else:
            scale = to.weight.input_scale
            assert scale is not None, "a static weight has the scale of its input"
            out = attend_int8(q, k, v, lengths=lengths, position=position, out_scale=scale)
        out = out.transpose(1, 2).flatten(2)
        return out if to.static is None else Int8Rows(out, None)

    def following(self) -> Any:
        """The layer behind this one that gets its result as it is, and may get more; or None."""
        following = self.__dict__.get("_next", lambda: None)()
        return None if following is None or has_hooks(self) or has_hooks(following) else following

    def _hand(self, y: Tensor, made: Any) -> None:
        """Leave what the layer before has made of its result y for this one's first matmul.

        The input of that matmul, or statistics of the rows of y.
        """
        self.__dict__["_handed"] = weakref.ref(y), made

    def _take(self, x: Tensor) -> Any:
        """What the layer before has made of x, if it has."""
        of, made = self.__dict__.pop("_handed", (None, None))
        return made if of is not None and of() is x else None


class PostNormLayer(FusedLayer):
    """Attention, norm, feed-forward, norm: 7 launches, with int8 inputs 9.

    The result of a norm is a residual, too, so that somebody has to write it.
    """

    def _fused(self, x: Tensor, lengths: Tensor | None, parts: Parts, **kwargs: Any) -> Tensor:
        attention, (block,), (first_norm, second_norm) = parts[:3]
        qkv = joined(self, attention.inputs)
        rows = self._take(x)
        position = self._position(x, **kwargs)
        h = self._attend(x if rows is None else rows, qkv, x, lengths, attention, position)
        y, rows = normalize_and_keep(h, first_norm, operand(block.first))
        h = block.run(y if rows is None else rows, y)
        # y, too, is what this op makes of it, whether somebody takes the rows or not
        following, after = self.following(), qkv
        inputs = None if following is None else following._parts().attention.inputs
        if inputs is not None and can_join(inputs):
            after = joined(following, inputs)
        y, rows = normalize_and_keep(h, second_norm, after)
        if following is not None and rows is not None:
            following._hand(y, rows)
        return y


class PreNormLayer(FusedLayer):
    """Norm, attention, norm, feed-forward: 7 launches, with int8 inputs 9.

    With 16-bit inputs 5: a norm is part of the matmuls around it, but for the first one of all.
    """

    def _fused(self, x: Tensor, lengths: Tensor | None, parts: Parts, **kwargs: Any) -> Tensor:
        attention, (block,), (first_norm, second_norm) = parts[:3]
        qkv, inner = joined(self, attention.inputs), operand(block.first)
        stats = self._take(x)
        rows: Tensor | Int8Rows | UnnormalizedRows
        if self._is_gated:
            y, made = normalize_and_keep(x, first_norm, qkv)
            rows = y if made is None else made
        else:
            y, rows = x, normalize(x, first_norm, qkv, stats)
        position, reader = self._position(y, **kwargs), Reader(second_norm, inner)
        attended = self._attended(rows, qkv, x.dtype, lengths, attention, position)
        h, stats = add_linear(attended, operand(attention.output), x, reader)
        following = self.following()
        hands = isinstance(following, PreNormLayer) and block.last.folds(x)
        after = following._reader() if hands else None
        rows = block.hidden(normalize(h, *reader, stats), h.dtype)
        y, stats = add_linear(rows, block.last, h, after)
        adapter = self._modules.get("adapter_layer")
        if adapter is not None:
            return y + adapter(y)  # type: ignore[no-any-return]
        if stats is not None:
            following._hand(y, stats)
        return y

    def _reader(self) -> Reader | None:
        """The first norm, if nothing but a matmul reads it, and that matmul."""
        parts = self._parts()
        norm, inputs = parts.norms[0], parts.attention.inputs
        if self._is_gated or not is_affine(norm) or not can_join(inputs):
            return None
        return Reader(norm, joined(self, inputs))


class WhisperLayer(PreNormLayer):
    """Whisper's encoder layer, which clamps in fp16."""

    def _parts(self) -> Parts:
        return Parts(
            attention_parts(self.self_attn),
            (FeedForward(self.fc1, self.activation_fn, self.fc2),),
            (self.self_attn_layer_norm, self.final_layer_norm),
        )

    def _fused(self, x: Tensor, lengths: Tensor | None, parts: Parts, **kwargs: Any) -> Tensor:
        y = super()._fused(x, lengths, parts, **kwargs)
        if y.dtype == torch.float16:
            largest = torch.finfo(y.dtype).max - 1000
            y = y.clamp(-largest, largest)
        return y


@functools.cache
def _returns_tuple(origin: type) -> bool:
    """Whether a class returns attention weights, too, as in older versions of transformers."""
    forward: Any = vars(origin)["forward"]
    return "output_attentions" in inspect.signature(forward).parameters


def attention_parts(module: Any) -> Attention:
    """Those of wav2vec2's attention, and of Whisper's."""
    inputs = module.q_proj, module.k_proj, module.v_proj
    return Attention(module, inputs, module.out_proj, module.head_dim)


def is_affine(norm: nn.Module) -> bool:
    """Whether a norm is a LayerNorm as the blocks take it."""
    return type(norm) is nn.LayerNorm and norm.bias is not None


def _is_served(
    layer: Any, x: Tensor, mask: Tensor | None, parts: Parts, kwargs: dict[str, Any]
) -> bool:
    """Whether a layer can run fused here and now."""
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled(x.device.type) or kwargs.get("output_attentions"):
        return False
    attention, blocks, norms, others = parts
    is_padding_mask = mask is None or (mask.dim() == 2 and not mask.is_floating_point())
    if not layer._uses_our_attention(attention.module) or not is_padding_mask:
        return False
    linears = (attention.output, *(each for b in blocks for each in (b.first, b.second)))
    activations = [b.activation for b in blocks if isinstance(b.activation, nn.Module)]
    called = (*attention.inputs, *linears, *activations, *norms, *others, attention.module)
    return (
        can_join(attention.inputs)
        and all(is_fusible(module) for module in linears)
        and all(is_affine(norm) for norm in norms)
        and all(epilogue_of(block.activation) is not None for block in blocks)
        and not any(has_hooks(module) for module in called)
    )


def has_hooks(module: Any) -> bool:
    """Whether somebody watches or changes a module, but for transformers, which records outputs."""
    if "forward" in module.__dict__ or module._forward_pre_hooks:
        return True
    recorder = "transformers.utils.output_capturing"
    return any(hook.__module__ != recorder for hook in module._forward_hooks.values())
