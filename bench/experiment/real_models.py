"""Two encoders with real weights: hama's Conformer, which reads phones, and Whisper base's.

Dimension key: B utterances, S samples, T frames, C features, H heads, V tokens.
"""

import re
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.experiment.archives import read_ct2, read_hama
from lowbit_kernels.attention import flash_attention

_WHISPER_HEAD_DIM = 64
_WHISPER_LAYER = re.compile(r"encoder/layer_\d+/ffn/linear_0/weight")
HAMA_SLOTS = {"X": ("self_attn",), "Y": ("conv_module",), "F": ("ffn1", "ffn2")}


class FeedForward(nn.Module):
    """Norm, linear layer, Swish, linear layer."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = (
            nn.LayerNorm(size),
            nn.Linear(size, inner),
            nn.Linear(inner, size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        y: Tensor = self.fc2(F.silu(self.fc1(self.norm(x))))
        return y


class SelfAttention(nn.Module):
    """Attention without positions."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.in_proj, self.out_proj = (
            heads,
            nn.Linear(size, 3 * size),
            nn.Linear(size, size),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.out_proj(flash_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class ConvolutionModule(nn.Module):
    """Norm, pointwise convolution, GLU, depthwise convolution, Swish, pointwise convolution."""

    def __init__(self, size: int, taps: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.pointwise1, self.pointwise2 = nn.Conv1d(size, 2 * size, 1), nn.Conv1d(size, size, 1)
        self.depthwise = nn.Conv1d(size, size, taps, padding=taps // 2, groups=size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        y = F.glu(self.pointwise1(self.norm(x).mT), 1)
        out: Tensor = self.pointwise2(F.silu(self.depthwise(y))).mT
        return out


class HamaLayer(nn.Module):
    """A Conformer's layer."""

    def __init__(self, size: int, inner: int, heads: int, taps: int) -> None:
        super().__init__()
        self.ffn1, self.ffn2 = FeedForward(size, inner), FeedForward(size, inner)
        self.attn_norm, self.self_attn = nn.LayerNorm(size), SelfAttention(size, heads)
        self.conv_module, self.norm = ConvolutionModule(size, taps), nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        x = x + 0.5 * self.ffn1(x)
        x = x + self.self_attn(self.attn_norm(x))
        x = x + self.conv_module(x)
        y: Tensor = self.norm(x + 0.5 * self.ffn2(x))
        return y


class HamaConformer(nn.Module):
    """Waveforms to phones: log mel energies, a strided convolution, four layers, a projection.

    Args:
        tensors: of ``read_hama``, of the package's ``asr_waveform.hama``.
    """

    mel_fb: Tensor
    stft_real_kernel: Tensor
    stft_imag_kernel: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for own in ("mel_fb", "stft_real_kernel", "stft_imag_kernel"):
            self.register_buffer(own, tensors[own])
        prefix = "acoustic_model.model."
        layers = 1 + max(int(n.split(".")[3]) for n in tensors if n.startswith(f"{prefix}blocks."))
        matrices = [tensor for name, tensor in tensors.items() if name.startswith("onnx::MatMul")]
        convolutions = [tensor for name, tensor in tensors.items() if name.startswith("onnx::Conv")]
        inner, (size, mels, taps) = matrices[0].shape[1], convolutions[0].shape
        self.stem = nn.Conv1d(mels, size, taps, stride=2, padding=taps // 2)
        kernel = convolutions[2].shape[-1]
        self.layers = nn.ModuleList(HamaLayer(size, inner, 4, kernel) for _ in range(layers))
        tokens = tensors[f"{prefix}proj.bias"].shape[0]
        self.classifier = nn.Linear(size, tokens)
        state = {"stem.weight": convolutions[0], "stem.bias": convolutions[1]}
        state["classifier.weight"] = tensors[f"{prefix}proj.weight"].squeeze(2)
        state["classifier.bias"] = tensors[f"{prefix}proj.bias"]
        # matrices come without names, six a layer, as [in, out]
        names = ("ffn1.fc1", "ffn1.fc2", "self_attn.in_proj", "self_attn.out_proj",
                 "ffn2.fc1", "ffn2.fc2")  # fmt: skip
        for i in range(layers):
            for name, matrix in zip(names, matrices[6 * i :], strict=False):
                state[f"layers.{i}.{name}.weight"] = matrix.t()
            for name, tensor in zip(("weight", "bias"), convolutions[2 + 2 * i :], strict=False):
                state[f"layers.{i}.conv_module.depthwise.{name}"] = tensor
        renamed = {".conv.": ".conv_module.", ".attn.in_proj_bias": ".self_attn.in_proj.bias",
                   ".attn.out_proj": ".self_attn.out_proj"}  # fmt: skip
        for name, tensor in tensors.items():
            if name.startswith(f"{prefix}blocks."):
                name = name.removeprefix(prefix).replace("blocks.", "layers.")
                for old, new in renamed.items():
                    name = name.replace(old, new)
                state[name] = tensor
        self.load_state_dict(state, strict=False)
        missing = self.state_dict().keys() - state.keys() - dict(self.named_buffers()).keys()
        if missing or state.keys() - self.state_dict().keys():
            raise ValueError(f"tensors must be of hama's Conformer, got none for {sorted(missing)}")

    def forward(self, waveforms: Tensor) -> tuple[Tensor, None]:
        """Waveforms [B, S] to logits [B, T, V]."""
        x = F.pad(waveforms[:, None], (200, 200), mode="reflect")
        real, imaginary = (
            F.conv1d(x, kernel, stride=160)
            for kernel in (self.stft_real_kernel, self.stft_imag_kernel)
        )
        power = (real.square() + imaginary.square()).mT @ self.mel_fb
        x = F.gelu(self.stem(power.clamp(min=1e-10).log().mT)).mT
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x), None


def load_hama(path: Path) -> HamaConformer:
    """The Conformer of the package's ``asr_waveform.hama``, in evaluation mode."""
    return HamaConformer(read_hama(path)).eval()


def load_whisper(parts: list[Path]) -> Any:
    """Whisper's encoder from CTranslate2's file, as transformers' class, in evaluation mode."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    tensors, state = read_ct2(parts), {}
    size, mels, _ = tensors["encoder/conv1/weight"].shape
    config = WhisperConfig(
        d_model=size, num_mel_bins=mels, encoder_attention_heads=size // _WHISPER_HEAD_DIM,
        encoder_layers=len([name for name in tensors if _WHISPER_LAYER.fullmatch(name)]),
        encoder_ffn_dim=tensors["encoder/layer_0/ffn/linear_0/bias"].shape[0],
        max_source_positions=tensors["encoder/position_encodings/encodings"].shape[0],
    )  # fmt: skip
    for place in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            state[f"{place}.{kind}"] = tensors[f"encoder/{place}/{kind}"]
    state["embed_positions.weight"] = tensors["encoder/position_encodings/encodings"]
    norms = {"layer_norm": "encoder/layer_norm"}
    for i in range(config.encoder_layers):
        theirs, own = f"encoder/layer_{i}", f"layers.{i}"
        norms[f"{own}.self_attn_layer_norm"] = f"{theirs}/self_attention/layer_norm"
        norms[f"{own}.final_layer_norm"] = f"{theirs}/ffn/layer_norm"
        for kind in ("weight", "bias"):
            q, k, v = tensors[f"{theirs}/self_attention/linear_0/{kind}"].chunk(3)
            state |= {f"{own}.self_attn.q_proj.{kind}": q, f"{own}.self_attn.v_proj.{kind}": v}
            if kind == "weight":  # the keys' bias is zero, and no parameter
                state[f"{own}.self_attn.k_proj.weight"] = k
            state[f"{own}.self_attn.out_proj.{kind}"] = tensors[
                f"{theirs}/self_attention/linear_1/{kind}"
            ]
            for j in range(2):
                state[f"{own}.fc{j + 1}.{kind}"] = tensors[f"{theirs}/ffn/linear_{j}/{kind}"]
    for own, theirs in norms.items():
        state[f"{own}.weight"] = tensors[f"{theirs}/gamma"]
        state[f"{own}.bias"] = tensors[f"{theirs}/beta"]
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(state)
    return encoder.eval()
