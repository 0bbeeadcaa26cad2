"""capture_graphs: one CUDA graph a length bucket, replayed with the padding mask as an input.

Dimension key: B utterances, T samples, F frames.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# filler rows of a batch bucket are this long: shorter ones may give no frame at all
MIN_SAMPLES = 400


# a replayable call; what it reads: waves [B, T] and mask [B, T] int64; and its output
_Captured = tuple[Callable[[], None], Tensor, Tensor, Any]


class GraphedModel(nn.Module):
    """A model whose forward replays the graph of the smallest bucket that holds its input.

    Outputs are copies, cut back to the batch and the frames of the input.
    """

    def __init__(self, model: nn.Module, captured: dict[tuple[int, int], _Captured]) -> None:
        super().__init__()
        self.model = model
        self._captured = dict(sorted(captured.items()))

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Replay on waveforms.

        Args:
            input_values: [B, T] on the model's device.
            attention_mask: [B, T], ones over valid samples, right padding; ``None``: all valid.

        Raises:
            ValueError: if no bucket holds the input.
        """
        B, T = input_values.shape
        key = next(((b, t) for b, t in self._captured if b >= B and t >= T), None)
        if key is None:
            raise ValueError(
                f"input_values must fit a captured bucket {list(self._captured)} "
                f"(batch, samples), got {(B, T)}"
            )
        replay, waves, mask, output = self._captured[key]
        waves.zero_()
        waves[:B, :T] = input_values
        mask.zero_()
        mask[:, :MIN_SAMPLES] = 1
        mask[:B] = 0
        mask[:B, :T] = 1 if attention_mask is None else attention_mask
        replay()
        frames = int(self.model._get_feat_extract_output_lengths(T))  # type: ignore[operator]
        return _cut(output, key[0], B, frames)


def _cut(output: Any, bucket: int, B: int, frames: int) -> Any:
    """Copy an output's tensors, without the rows and frames that only the bucket has."""
    if isinstance(output, Tensor):
        rows = output[:B] if output.dim() and output.shape[0] == bucket else output
        return (rows[:, :frames] if rows.dim() > 1 else rows).clone()
    if isinstance(output, tuple | list):
        return type(output)(_cut(item, bucket, B, frames) for item in output)
    if isinstance(output, dict):
        return type(output)(**{k: _cut(item, bucket, B, frames) for k, item in output.items()})
    return output


def capture_graphs(
    model: nn.Module,
    *,
    seconds: Iterable[float] = (1, 2, 5, 10, 20, 30),
    batch: Iterable[int] = (1,),
    sampling_rate: int = 16_000,
) -> GraphedModel:
    """Capture one CUDA graph for every bucket of length and batch size.

    Args:
        model: a waveform model in eval mode on a CUDA device, called as
            ``model(input_values, attention_mask=...)``.
        seconds: lengths of the buckets, in seconds.
        batch: batch sizes of the buckets.
        sampling_rate: in Hz.

    Returns:
        A module with the model's call. The model must not move or be trained afterwards; in-place
        updates of its weights are seen by the graphs.

    Raises:
        RuntimeError: if the model is not on a CUDA device.
        ValueError: if the model is in training mode, or a bucket is too small.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise RuntimeError(
            f"capture_graphs needs a model on a CUDA device, got one on {device.type!r}; "
            "elsewhere call the model itself"
        )
    with torch.cuda.device(device):  # else the streams are those of device 0
        return _capture_all(model, seconds, batch, sampling_rate, device, _capture_cuda)


def _capture_all(
    model: nn.Module,
    seconds: Iterable[float],
    batch: Iterable[int],
    sampling_rate: int,
    device: torch.device,
    capture: Callable[[Callable[[], Any], Any], tuple[Callable[[], None], Any, Any]],
) -> GraphedModel:
    if model.training:
        raise ValueError("model must be in eval mode for graph capture, got training mode")
    sizes = [(b, round(s * sampling_rate)) for b in batch for s in seconds]
    for b, t in sizes:
        if b < 1 or t < MIN_SAMPLES:
            raise ValueError(
                f"a bucket must hold at least 1 utterance of {MIN_SAMPLES} samples, got {(b, t)}"
            )
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    captured, pool = {}, None
    for b, t in sorted(sizes, reverse=True):  # largest first, so that the pool is shared
        waves = torch.zeros(b, t, device=device, dtype=dtype)
        mask = torch.ones(b, t, device=device, dtype=torch.int64)
        replay, output, pool = capture(partial(model, waves, attention_mask=mask), pool)
        captured[b, t] = (replay, waves, mask, output)
    return GraphedModel(model, captured)


def _capture_cuda(call: Callable[[], Any], pool: Any) -> tuple[Callable[[], None], Any, Any]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(3):  # lazy allocations and kernel compilation happen outside the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, pool=pool):
        output = call()
    return graph.replay, output, graph.pool()
