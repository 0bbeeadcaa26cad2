"""capture_graphs: one CUDA graph a length bucket, replayed with the padding mask as an input.

Dimension key: B utterances, T samples, F frames, D features, H heads.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# of an input and of a filler row: shorter ones may give no frame at all
MIN_SAMPLES = 400

# from a call and a memory pool: the replay, the output that it overwrites, and the pool
_Capture = Callable[[Callable[[], Any], Any], tuple[Callable[[], None], Any, Any]]
# waves [B, T], mask [B, T] int64, the replay, its output, and the tensors' versions
_Bucket = tuple[Tensor, Tensor, Callable[[], None], Any, list[int]]


class GraphedModel(nn.Module):
    """A model whose forward replays the graph of the smallest bucket that holds its input.

    Outputs are copies, cut back to the batch and the frames of the input. Everything else
    (``config``, ``device``, ...) is the model's.
    """

    def __init__(self, model: nn.Module, sizes: set[tuple[int, int]], capture: _Capture) -> None:
        super().__init__()
        self.model, self.training, self._capture, self._pool = model, False, capture, None
        self._held = [
            (held, name)
            for module in model.modules()
            for held in (module._modules, module._parameters, module._buffers)
            for name in held
        ]
        like = next(t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
        # largest first: the others fit into its inputs and into its memory pool
        ordered = sorted(sizes, key=lambda size: size[0] * size[1], reverse=True)
        waves = like.new_zeros(ordered[0][0] * ordered[0][1])
        mask = torch.zeros_like(waves, dtype=torch.int64)
        self._captured: dict[tuple[int, int], _Bucket] = {}
        for B, T in ordered:
            masked = mask[: B * T].view(B, T).zero_()
            masked[:, :MIN_SAMPLES] = 1  # padded, so that what is compiled here takes any mask
            self._captured[B, T] = self._bucket(waves[: B * T].view(B, T), masked)
        # now: a first call joins the weights of fused layers
        self._addresses = self._state()[0]
        # a replay after a move must not read freed memory
        self._storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def _bucket(self, waves: Tensor, mask: Tensor) -> _Bucket:
        call = partial(self.model, waves, attention_mask=mask)
        replay, output, self._pool = self._capture(call, self._pool)
        return waves, mask, replay, output, self._state()[1]

    def _state(self) -> tuple[list[int], list[int]]:
        """Where layers and tensors are, and how often each tensor was written to."""
        held = [held.get(name) for held, name in self._held]
        tensors = [x for x in held if isinstance(x, Tensor)]
        addresses = [x.data_ptr() if isinstance(x, Tensor) else id(x) for x in held]
        return addresses, [0 if t.is_inference() else t._version for t in tensors]

    @torch.no_grad()
    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Replay on waveforms.

        Args:
            input_values: [B, T].
            attention_mask: [B, T], ones over valid samples, right padding; ``None``: all valid.

        Raises:
            ValueError: if no bucket holds the input, or it is shorter than 400 samples.
            RuntimeError: if the model is in training mode, or a weight or a layer of it is another
                one than when it was captured.
        """
        if self.training or self.model.training:
            raise RuntimeError("a captured model must stay in eval mode, got training mode")
        B, T = input_values.shape
        fitting = [(b, t) for b, t in self._captured if b >= B and t >= T >= MIN_SAMPLES]
        if not fitting:
            raise ValueError(
                f"input_values must have {MIN_SAMPLES} samples or more and fit a captured bucket "
                f"{sorted(self._captured)} (batch, samples), got {(B, T)}"
            )
        key = min(fitting)
        waves, mask, replay, output, versions = self._captured[key]
        if key != (B, T):
            waves.zero_()
            mask.zero_()
            mask[B:, :MIN_SAMPLES] = 1
        waves[:B, :T] = input_values
        mask[:B, :T] = 1 if attention_mask is None else attention_mask
        replay()
        # while the device works
        addresses, now = self._state()
        if addresses != self._addresses:
            raise RuntimeError("a weight moved, or a layer is another one: capture the model again")
        if now != versions:
            # what was made of a weight before the capture, like an int8 copy, is made anew
            _, _, replay, output, _ = self._captured[key] = self._bucket(waves, mask)
            replay()
        return _cut(output, (key[0], B), self._frames(key[1], T))

    def _frames(self, bucket: int, T: int) -> dict[int, int]:
        """Of a bucket, to those of T samples: of the output, and before an adapter at the end."""
        count: Any = self.model._get_feat_extract_output_lengths
        adapter = getattr(getattr(self.model, "config", None), "add_adapter", False)
        kinds = ({}, {"add_adapter": False}) if adapter else ({},)
        return {int(count(bucket, **kind)): int(count(T, **kind)) for kind in kinds}


def _cut(output: Any, rows: tuple[int, int], frames: dict[int, int]) -> Any:
    """Copy an output's tensors, from the rows and frames of the bucket to those of the input."""
    if isinstance(output, Tensor):
        if output.dim() and output.shape[0] == rows[0]:
            output = output[: rows[1]]
        # [B, F, D] and attention's [B, H, F, F]; [B, labels] has no frames
        if output.dim() == 3 and output.shape[1] in frames:
            output = output[:, : frames[output.shape[1]]]
        elif output.dim() == 4 and output.shape[2] == output.shape[3] in frames:
            output = output[..., : frames[output.shape[2]], : frames[output.shape[3]]]
        return output.clone()
    if isinstance(output, tuple | list):
        return type(output)(_cut(item, rows, frames) for item in output)
    if isinstance(output, dict):
        return type(output)(**{name: _cut(item, rows, frames) for name, item in output.items()})
    return output


def capture_graphs(
    model: nn.Module,
    *,
    seconds: Iterable[float] = (1, 2, 5, 10, 20, 30),
    batch: Iterable[int] = (1, 8, 32),
    sampling_rate: int = 16_000,
) -> GraphedModel:
    """Capture one CUDA graph for every bucket of length and batch size.

    An input gets the bits that the model gives it padded to its bucket. A quantized model also
    ignores the padding; one in float keeps what its architecture makes of it.

    Args:
        model: a waveform encoder of transformers in eval mode on a CUDA device, called as
            ``model(input_values, attention_mask=...)``.
        seconds: lengths of the buckets, in seconds.
        batch: batch sizes of the buckets.
        sampling_rate: in Hz.

    Returns:
        A module with the model's call and attributes, for ``transformers.pipeline`` too. The
        buckets share their memory, so its calls must follow one another. Weights may be updated in
        place: each bucket is then captured again at its next call.

    Raises:
        RuntimeError: if the model is not on a CUDA device.
        ValueError: if the model is in training mode or no such encoder, or a bucket is too small.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise RuntimeError(
            f"capture_graphs needs a model on a CUDA device, got one on {device.type!r}; "
            "elsewhere call the model itself"
        )
    samples = [round(s * sampling_rate) for s in seconds]
    sizes = {(b, t) for b in batch for t in samples}
    return _capture_all(model, sizes, partial(_capture_cuda, device))


@torch.inference_mode(False)
@torch.no_grad()
def _capture_all(model: nn.Module, sizes: set[tuple[int, int]], capture: _Capture) -> GraphedModel:
    if any(module.training for module in model.modules()):
        raise ValueError("model must be in eval mode for graph capture, got training mode")
    name, takes = type(model).__name__, getattr(model, "main_input_name", "input_values")
    if takes != "input_values" or not hasattr(model, "_get_feat_extract_output_lengths"):
        raise ValueError(f"model must be one of transformers that takes waveforms, got {name}")
    if not sizes or any(b < 1 or t < MIN_SAMPLES for b, t in sizes):
        raise ValueError(
            "seconds and batch must give buckets that hold at least 1 utterance of "
            f"{MIN_SAMPLES} samples, got {sorted(sizes)}"
        )
    # pipelines know a model by the name of its class
    return type(name, (GraphedModel,), {})(model, sizes, capture)  # type: ignore[no-any-return]


def _capture_cuda(
    device: torch.device, call: Callable[[], Any], pool: Any
) -> tuple[Callable[[], None], Any, Any]:
    with torch.cuda.device(device), torch.inference_mode():  # else the stream is one of device 0
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # lazy allocations and kernel compilation happen outside the capture
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # its default stream is of the device that captured first
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            output = call()
    return graph.replay, output, graph.pool()
