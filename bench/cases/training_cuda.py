"""One step of HuBERT pre-training: float, quantization-aware, and LoRA on a frozen 4-bit model.

The encoder is run as it is, or compiled. torchao's quantization-aware training has weights of 4
bits in its linear layers, ours in its convolutions, too.

A step masks spans of frames (each frame starts one of 10 frames with probability 0.08), encodes the
waveform, projects the masked frames to 256 features, takes the cosine with each of 504 learned
classes over a temperature of 0.1, the cross-entropy with random targets (Hsu et al., 2021,
equations 1 and 3, masked frames only), all gradients, and a step of AdamW. Parameters are fp32
under bf16 autocast on a GPU; no dropout and no layer drop, so that all providers compute the same.

Dimension key: B batch, T samples, F frames, K classes, D hidden features, P projected features.
"""

import contextlib
import copy
import functools
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.case import Case, Cost, Goal, Point, Prepared, Provider, Row
from bench.cases.encoder_cuda import TINY
from bench.cuda_peers import TORCHAO
from bench.shapes import SAMPLE_RATE, SECONDS
from lowbit_kernels import QuantConfig, QuantSpec, quantize
from lowbit_kernels.conversion.qat import prepare_qat

CLASSES, PROJECTED, TEMPERATURE = 504, 256, 0.1
MASK_PROBABILITY, MASK_FRAMES = 0.08, 10
RANK, LORA_SCALE = 16, 2.0
# the loss of a random model is near log(504) whatever the weights are rounded to
LOSS_ERROR = 0.05


@dataclass(frozen=True)
class Inputs:
    """audio [B, T]; masked [B, F], whether a frame is; targets, a class of each masked frame."""

    model: nn.Module
    audio: Tensor
    masked: Tensor
    targets: Tensor

    @property
    def frames(self) -> int:
        """Of the whole batch."""
        return self.masked.numel()


def encoder(sizes: dict[str, int]) -> nn.Module:
    """A model of transformers with random weights."""
    from transformers import (
        HubertConfig,
        HubertModel,
        Wav2Vec2ConformerConfig,
        Wav2Vec2ConformerModel,
    )

    still = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout",
         "layerdrop", "conformer_conv_dropout", "final_dropout"), 0.0,
    )  # fmt: skip
    options = still | (TINY if "tiny" in sizes else {})
    torch.manual_seed(0)
    if "conformer" in sizes:
        return Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**options))
    return HubertModel(HubertConfig(**options, attn_implementation="sdpa"))


def make_inputs(point: Point, device: str, dtype: torch.dtype) -> Inputs:
    """Noise, spans of masked frames, random classes."""
    model: Any = encoder(point.sizes)
    generator = torch.Generator().manual_seed(0)
    B, T = point.sizes["B"], point.sizes["T"]
    audio = torch.randn(B, T, generator=generator)
    frames = int(model._get_feat_extract_output_lengths(torch.tensor(T)))
    starts = torch.rand(B, frames, generator=generator) < MASK_PROBABILITY
    starts[:, 0] = True
    masked = F.max_pool1d(F.pad(starts.float(), (MASK_FRAMES - 1, 0)), MASK_FRAMES, stride=1).bool()
    targets = torch.randint(CLASSES, (int(masked.sum()),), generator=generator)
    return Inputs(model.to(device), audio.to(device), masked.to(device), targets.to(device))


class Pretraining(nn.Module):
    """The encoder, the projection and the classes."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        device = next(encoder.parameters()).device
        self.encoder = encoder
        generator = torch.Generator().manual_seed(1)
        D = encoder.config.hidden_size
        weights = torch.randn(PROJECTED, D, generator=generator) / D**0.5
        self.projection = nn.Linear(D, PROJECTED, device=device)
        self.projection.weight.data.copy_(weights)
        nn.init.zeros_(self.projection.bias)
        classes = torch.randn(CLASSES, PROJECTED, generator=generator)
        self.classes = nn.Parameter(classes.to(device))

    def forward(self, inputs: Inputs) -> Tensor:
        """The loss."""
        frames = self.encoder(inputs.audio, mask_time_indices=inputs.masked).last_hidden_state
        projected = self.projection(frames.flatten(0, 1)[inputs.masked.flatten()])
        similar = F.normalize(projected.float(), dim=-1) @ F.normalize(self.classes, dim=-1).T
        return F.cross_entropy(similar / TEMPERATURE, inputs.targets)


def prepare(inputs: Inputs, encoder: nn.Module, compiled: bool = False) -> Prepared:
    """A training step of the parameters that ask for a gradient; it returns the loss before it."""
    model = Pretraining(encoder).train()
    if compiled:
        # masks, whose places a compiler cannot know, lie between the two
        for part in ("feature_extractor", "encoder"):
            encoder.get_submodule(part).compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    on_gpu = inputs.audio.is_cuda
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)
    autocast: Callable[[], Any] = contextlib.nullcontext
    if on_gpu:
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)

    def step() -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            with autocast():
                loss = model(inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()[None]

    def facts() -> Row:
        row: Row = {"frames": inputs.frames, "trained": sum(p.numel() for p in trained)}
        return row | (_peak(step, _kept(model, optimizer)) if on_gpu else {})

    stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return Prepared(step, LOSS_ERROR, weight_bytes=stored, facts=facts)


def _kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes between two steps."""
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *state))


def _peak(step: Callable[[], Tensor], kept: int) -> Row:
    """The most during a step; the other providers' models lie on the device too."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return {"peak_bytes": kept + torch.cuda.max_memory_allocated() - before}


def float_training(inputs: Inputs, compiled: bool = False) -> Prepared:
    """PyTorch's own."""
    return prepare(inputs, copy.deepcopy(inputs.model), compiled)


def quantization_aware(
    inputs: Inputs, config: QuantSpec | QuantConfig, compiled: bool = False
) -> Prepared:
    """Every layer with a fake-quantized weight and learned scales."""
    model = copy.deepcopy(inputs.model)
    prepare_qat(model, config)
    return prepare(inputs, model, compiled)


def torchao_qat(inputs: Inputs) -> Prepared:
    """Every linear layer with a fake-quantized weight in torchao's way, compiled."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = copy.deepcopy(inputs.model)
    widths = (m.in_features for m in model.modules() if isinstance(m, nn.Linear))
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=math.gcd(64, *widths))
    quantize_(model, QATConfig(weight_config=weight, step="prepare"))
    return prepare(inputs, model, compiled=True)


def attention_too() -> QuantConfig:
    """4-bit weights and products of attention, int8 inputs."""
    return QuantConfig(QuantSpec(4, inputs="int8"), attention_matmuls="int4")


def with_lora(inputs: Inputs, low_bit: bool) -> Prepared:
    """A frozen encoder with adapters in the linear layers of its blocks."""
    model = copy.deepcopy(inputs.model)
    if low_bit:
        quantize(model, QuantConfig.small())
    model.requires_grad_(False)
    names = [name for name, _ in _linears(model)]
    if importlib.util.find_spec("peft"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=int(RANK * LORA_SCALE), target_modules=names)
        return prepare(inputs, get_peft_model(model, config))
    for name in names:
        model.set_submodule(name, LoRA(model.get_submodule(name)))
    return prepare(inputs, model)


class LoRA(nn.Module):
    """layer(x) + LORA_SCALE x A' B', A [RANK, in], B [out, RANK] zero at first."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, device = layer, layer.bias.device
        self.A = nn.Parameter(torch.randn(RANK, layer.in_features, device=device) / RANK)
        self.B = nn.Parameter(torch.zeros(layer.out_features, RANK, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., out]."""
        return self.layer(x) + LORA_SCALE * F.linear(F.linear(x, self.A), self.B)


def _linears(model: nn.Module) -> Iterable[tuple[str, nn.Linear]]:
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None and ".layers." in name:
            yield name, layer


def cost(point: Point, itemsize: int) -> Cost:
    """Three times the forward's operations, counted on the meta device; bytes of the audio."""
    from torch.utils.flop_counter import FlopCounterMode

    B, T = point.sizes["B"], point.sizes["T"]
    model = encoder(point.sizes).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(B, T, device="meta"))
    return Cost(3 * counter.get_total_flops(), bytes=itemsize * B * T)


COMPILED, COMPILED_QAT, TORCHAO_QAT = (
    "bf16 training, compiled", "lowbit w4 QAT, compiled", "torchao w4 QAT, compiled"
)  # fmt: skip
# a step costs at most 1.15 of the float step, and half of torchao's
_GOALS = (Goal(COMPILED_QAT, 1 / 1.15, 1.0, COMPILED), Goal(COMPILED_QAT, 2.0, 3.0, TORCHAO_QAT))


def _point(name: str, B: int, T: int, **kind: int) -> Point:
    return Point(name, {"B": B, "T": T} | kind, name, () if "tiny" in kind else _GOALS)


TRAINING_CUDA = Case(
    name="training_cuda",
    title="A HuBERT pre-training step",
    points=(
        _point("HuBERT-base, 16 x 10 s", 16, SECONDS * SAMPLE_RATE),
        _point("Conformer, 16 x 10 s", 16, SECONDS * SAMPLE_RATE, conformer=1),
    ),
    make_inputs=make_inputs,
    providers=(
        Provider("bf16 training", float_training),
        Provider(COMPILED, lambda inputs: float_training(inputs, compiled=True), gpu_only=True),
        Provider("bf16 frozen, LoRA", lambda inputs: with_lora(inputs, low_bit=False)),
        Provider("lowbit w4 QAT", lambda inputs: quantization_aware(inputs, QuantSpec(4))),
        Provider(
            COMPILED_QAT,
            lambda inputs: quantization_aware(inputs, QuantSpec(4), compiled=True), gpu_only=True,
        ),
        Provider(TORCHAO_QAT, torchao_qat, TORCHAO, gpu_only=True),
        Provider("lowbit w1 QAT", lambda inputs: quantization_aware(inputs, QuantSpec(1))),
        Provider(
            "lowbit w4a8 QAT, 4-bit attention",
            lambda inputs: quantization_aware(inputs, attention_too()),
        ),
        Provider("lowbit w4 frozen, LoRA", lambda inputs: with_lora(inputs, low_bit=True)),
    ),
    baseline="bf16 training",
    cost=cost,
    layout="providers",
    weight=3.0,
    device="cuda",
    dtype=torch.bfloat16,
    small=(
        _point("HuBERT, tiny", 2, 1600, tiny=1),
        _point("Conformer, tiny", 2, 1600, tiny=1, conformer=1),
    ),
)  # fmt: skip
