"""Whole encoders on a GPU, random weights of the published sizes.

``encoder_cuda`` is what a first sitting measures: two models, ten seconds, one utterance and 32,
eager, compiled and ours. ``encoder_<model>`` has all lengths, batches and peers, and takes longer
than one sitting: name it, and ``--resume``.

Dimension key: B batch, T samples (or mel frames), F mel bins.
"""

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Case, Cost, Goal, Point, Prepared, Provider, Row
from bench.cases.encoder_cpu import (
    FLOAT_ERROR,
    INT8_ERROR,
    encode,
    multiplied_weights,
    with_stored_weights,
)
from bench.cuda_peers import BITSANDBYTES, TORCHAO, bitsandbytes_nf4
from bench.harness import relative_error
from bench.kernels import profiled
from bench.shapes import SAMPLE_RATE, SECONDS
from lowbit_kernels import QuantConfig, capture_graphs, quantize
from lowbit_kernels.cpu.resident import resident_bytes

# against the float model: 4-bit random weights leave 0.75 in 24 Conformer layers, and results that
# have nothing to do with each other differ by 1.4
PEER_ERROR = 1.0
LARGE = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip
LAYER_NORM = {"feat_extract_norm": "layer", "conv_bias": True}
# class of transformers, and what differs from its defaults
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2-base": ("Wav2Vec2", {}),
    "wav2vec2-large": ("Wav2Vec2", LARGE),
    "hubert-large": ("Hubert", LARGE | LAYER_NORM | {"do_stable_layer_norm": True}),
    "wavlm-base": ("WavLM", {}),
    "conformer-large": (
        "Wav2Vec2Conformer", LARGE | LAYER_NORM | {"position_embeddings_type": "relative"}
    ),
    "whisper-large": (
        "Whisper",
        {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20,
         "encoder_ffn_dim": 5120, "num_mel_bins": 128},
    ),
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 4),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "conv_depthwise_kernel_size": 7,
}  # fmt: skip
TINY_WHISPER = {
    "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
    "num_mel_bins": 16, "max_source_positions": 50,
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """A float32 model in eval mode; x: audio [B, T], or log-mel features [B, F, T]."""

    model: nn.Module
    x: Tensor

    @functools.cached_property
    def float32(self) -> Tensor:
        """What the model gives in float32."""
        return encode(self.model, self.x.float())()


def float32_model(point: Point, device: str) -> nn.Module:
    """``point.origin`` with seeded random weights."""
    import transformers

    family, options = MODELS[point.origin]
    whisper = family == "Whisper"
    if "tiny" in point.sizes:
        options = options | (TINY_WHISPER if whisper else TINY)
    config = getattr(transformers, f"{family}Config")(**options)
    make = getattr(transformers, f"{family}Model")
    if whisper:
        make = transformers.models.whisper.modeling_whisper.WhisperEncoder
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = make(config)
    # the context misses what torch.Tensor(...) makes
    model.to(device)
    return model.eval().requires_grad_(False)


def _shape(point: Point, model: Any) -> tuple[int, ...]:
    B = point.sizes["B"]
    if MODELS[point.origin][0] == "Whisper":
        return B, model.config.num_mel_bins, 2 * model.config.max_source_positions
    return B, point.sizes["T"]


def make_inputs(point: Point, device: str, dtype: torch.dtype) -> Inputs:
    """Noise of unit variance."""
    torch.compiler.reset()
    model = float32_model(point, device)
    generator = torch.Generator().manual_seed(1)
    return Inputs(model, torch.randn(_shape(point, model), generator=generator).to(device, dtype))


def cost(point: Point, itemsize: int) -> Cost:
    """Counted on the meta device; bytes of the inputs and of the frames."""
    from torch.utils.flop_counter import FlopCounterMode

    model = float32_model(point, "meta")
    x = torch.empty(_shape(point, model), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        frames = model(x).last_hidden_state
    return Cost(counter.get_total_flops(), bytes=itemsize * (x.numel() + frames.numel()))


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, also of those that a peer packed into a tensor subclass."""
    return sum(_nbytes(t) for t in (*model.parameters(), *model.buffers()))


def _nbytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def prepare(
    inputs: Inputs,
    change: Callable[[nn.Module], object] = lambda model: None,
    runner: Callable[[nn.Module], Callable[..., Any]] | None = None,
    *,
    max_error: float | None = None,
    is_ours: bool = False,
    int8: bool = False,
) -> Prepared:
    """Time a model from an idle device on, as one request sees it.

    Args:
        inputs: the float model, and what it encodes.
        change: quantizes a copy of the model in place.
        runner: compiles or captures it.
        max_error: as in ``Prepared``; None: of a float model.
        is_ours: whether the weights it stores say what is right.
        int8: as in ``Prepared``.
    """
    x, before = inputs.x, _held(inputs.x)
    model = copy.deepcopy(inputs.model).to(x.dtype)
    change(model)
    call = encode(runner(model) if runner else model, x)

    def from_idle() -> Tensor:
        if _on_gpu(x):
            torch.cuda.synchronize()
        return call()

    def facts() -> Row:
        with torch.inference_mode():
            frames = call()
            row: Row = {"frames": frames.shape[0] * frames.shape[1]}
            row["error_vs_float32"] = relative_error(frames, inputs.float32)
            if is_ours:
                copies = sum(map(resident_bytes, multiplied_weights(model)))
                row["resident_bytes"] = stored + copies
            if _on_gpu(x):
                row["peak_bytes"] = _held(x) - before + _transient(call)
                row |= profiled(call)
                # a graph says nothing about its kernels but their names
                row["kinds"] = profiled(encode(model, x))["kinds"] if is_ours else row["kinds"]
        return row

    stored = stored_bytes(model)
    expected = functools.partial(with_stored_weights, model, x) if is_ours else None
    return Prepared(from_idle, max_error or FLOAT_ERROR[x.dtype], expected, stored, facts, int8)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _held(x: Tensor) -> int:
    """Bytes in use between calls, those that the pools of CUDA graphs keep among them."""
    if not _on_gpu(x):
        return 0
    pooled = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    idle = sum(s["total_size"] - s["allocated_size"] for s in pooled)
    return torch.cuda.memory_allocated() + idle


def _transient(call: Callable[[], Tensor]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def compiler(mode: str | None) -> Callable[[nn.Module], Callable[..., Any]]:
    """``torch.compile`` in a mode; those with CUDA graphs are told where a call begins."""

    def run(model: nn.Module) -> Callable[..., Any]:
        compiled = torch.compile(model, mode=mode)

        def call(x: Tensor) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(x)

        return call

    return run


def torchao(config: str, **options: Any) -> Callable[[Inputs], Prepared]:
    """Every linear layer in torchao's format, compiled."""

    def prepare_torchao(inputs: Inputs) -> Prepared:
        quantization = importlib.import_module("torchao.quantization")
        made = getattr(quantization, config)(**options)
        return prepare(
            inputs, lambda model: quantization.quantize_(model, made), compiler("reduce-overhead"),
            max_error=PEER_ERROR, int8="Int8" in config,
        )  # fmt: skip

    return prepare_torchao


def bitsandbytes(inputs: Inputs) -> Prepared:
    """Every linear layer in NF4."""

    def change(model: nn.Module) -> None:
        linears = [n for n, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        for name in linears:
            model.set_submodule(name, bitsandbytes_nf4(model.get_submodule(name)))

    return prepare(inputs, change, max_error=PEER_ERROR)


def _captured(model: nn.Module, x: Tensor) -> nn.Module:
    if x.dim() != 2:
        raise NotImplementedError("capture_graphs takes waveforms")
    return capture_graphs(model, seconds=[x.shape[1] / SAMPLE_RATE], batch=[len(x)])


def ours(config: Callable[[], QuantConfig], graphs: bool = False) -> Callable[[Inputs], Prepared]:
    """A preset with fused layers."""
    fast = config == QuantConfig.fast

    def prepare_ours(inputs: Inputs) -> Prepared:
        return prepare(
            inputs,
            lambda model: quantize(model, config(), fuse=True),
            functools.partial(_captured, x=inputs.x) if graphs else None,
            max_error=INT8_ERROR if fast else None, is_ours=True, int8=fast,
        )  # fmt: skip

    return prepare_ours


EAGER = Provider("bf16 eager", prepare)
COMPILED = Provider(
    "bf16 torch.compile, graphs",
    lambda inputs: prepare(inputs, runner=compiler("reduce-overhead")), gpu_only=True,
)  # fmt: skip
FAST = Provider("lowbit fast(), graphs", ours(QuantConfig.fast, graphs=True), gpu_only=True)
PROVIDERS = (
    EAGER,
    Provider(
        "bf16 torch.compile", lambda inputs: prepare(inputs, runner=compiler(None)), gpu_only=True
    ),
    COMPILED,
    Provider(
        "bf16 torch.compile max-autotune",
        lambda inputs: prepare(inputs, runner=compiler("max-autotune")), gpu_only=True, slow=True,
    ),
    Provider(
        "torchao int8", torchao("Int8DynamicActivationInt8WeightConfig"), TORCHAO, gpu_only=True
    ),
    Provider(
        "torchao fp8", torchao("Float8DynamicActivationFloat8WeightConfig"), TORCHAO, gpu_only=True
    ),
    Provider(
        "torchao int4",
        torchao("Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d"),
        TORCHAO, gpu_only=True,
    ),
    Provider("bitsandbytes nf4", bitsandbytes, BITSANDBYTES, gpu_only=True),
    Provider("lowbit small()", ours(QuantConfig.small)),
    Provider("lowbit small(), graphs", ours(QuantConfig.small, graphs=True), gpu_only=True),
    Provider("lowbit fast()", ours(QuantConfig.fast)),
    FAST,
)  # fmt: skip

GOALS = {
    1: (Goal(FAST.name, 5.0, 5.0, EAGER.name), Goal(FAST.name, 1.3, 1.3, COMPILED.name)),
    32: (Goal(FAST.name, 1.25, 1.5, COMPILED.name),),
}


def _point(model: str, seconds: int, B: int, goals: tuple[Goal, ...] = ()) -> Point:
    sizes = {"B": B, "T": seconds * SAMPLE_RATE}
    return Point(f"{model}, {seconds} s, batch {B}", sizes, model, goals)


def _case(name: str, title: str, points: tuple[Point, ...], **options: Any) -> Case:
    tiny = {"B": 2, "T": 1600, "tiny": 1}
    models = dict.fromkeys(point.origin for point in points)
    return Case(
        name=name, title=f"{title}, random weights", points=points, make_inputs=make_inputs,
        baseline=EAGER.name, cost=cost, layout="providers", device="cuda", dtype=torch.bfloat16,
        small=tuple(Point(f"{model}, tiny", tiny, model) for model in models), **options,
    )  # fmt: skip


ENCODER_CUDA = _case(
    "encoder_cuda", "Encoders on a GPU, 10 s of audio",
    tuple(
        _point(model, SECONDS, B, GOALS[B] if model == "wav2vec2-large" else ())
        for model in ("wav2vec2-large", "wav2vec2-base")
        for B in (1, 32)
    ),
    providers=(EAGER, COMPILED, FAST), weight=3.0,
)  # fmt: skip
ENCODER_MODELS = tuple(
    _case(
        f"encoder_{model.replace('-', '_')}", f"{model} on a GPU",
        # Whisper pads every clip to 30 s
        tuple(
            _point(model, seconds, B)
            for seconds in ((30,) if "whisper" in model else (SECONDS, 1, 30))
            for B in (1, 32, 8)
        ),
        providers=PROVIDERS, in_all=False,
    )
    for model in MODELS
)  # fmt: skip
