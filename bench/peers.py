"""Other people's quantizers on a CPU, each behind one function."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

ONNXRUNTIME = {"onnxruntime": "onnxruntime", "onnx": "onnx", "onnxscript": "onnxscript"}
OPENVINO = {"openvino": "openvino", "nncf": "nncf"}


def dynamic_int8(model: nn.Module) -> nn.Module:
    """PyTorch's own: int8 linear layers, one scale a tensor, 7-bit inputs; a new model."""
    with warnings.catch_warnings():
        # they announce its removal, and a bench of it cannot act on that
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8, inplace=True
        )


def dynamic_int8_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model of ``dynamic_int8``."""
    count = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.dynamic.Linear):
            weight, bias = module._packed_params._weight_bias()
            count += weight.numel() + (0 if bias is None else bias.nbytes)
    return count


def onnxruntime_int8(model: nn.Module, x: Tensor) -> tuple[Callable[[], Tensor], int]:
    """ONNX Runtime with dynamic int8 matrix products; the convolutions stay in float.

    Returns:
        A call for inputs like x, and the bytes of the model file.
    """
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(model, (x,), source, input_names=["x"], dynamo=True, verbose=False)
        quantize_dynamic(source, target, op_types_to_quantize=["MatMul"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(
            target, options, providers=["CPUExecutionProvider"]
        )  # fmt: skip
        nbytes = sum(path.stat().st_size for path in Path(folder).glob("int8.onnx*"))
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0]), nbytes


def openvino_int8(model: nn.Module, x: Tensor) -> tuple[Callable[[], Tensor], int]:
    """OpenVINO with NNCF's post-training int8: linear layers and convolutions, static scales.

    Returns:
        A call for inputs like x, and the bytes of the model file.
    """
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    clips = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    quantized = nncf.quantize(
        converted,
        nncf.Dataset([clip.numpy() for clip in clips]),
        subset_size=len(clips),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(quantized, path, compress_to_fp16=False)
        nbytes = path.with_suffix(".bin").stat().st_size
    compiled = openvino.Core().compile_model(
        quantized, "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    )
    request, audio = compiled.create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer({0: audio})[0].copy()), nbytes
