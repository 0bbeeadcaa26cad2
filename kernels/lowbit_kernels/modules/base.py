"""What QLinear and QConv1d share: buffers of a quantized weight, and ``weight`` as a view of them.

Dimension key: N output channels, K the reduction (see ``formats/packing.py``).
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowbit_kernels.checks import autocast
from lowbit_kernels.fake_quant import Quantizer, fake_quantize
from lowbit_kernels.fake_quant.quantizer import INPUT_LEVELS
from lowbit_kernels.formats import QuantizedWeight, QuantSpec
from lowbit_kernels.formats.spec import LOW_INPUTS

_BUFFERS = ("qweight", "scale", "group_scale", "zero_point", "input_scale")
# checked after every load and kept by .to(dtype): a bf16 scale would cost 8 bits of precision
KEEP_DTYPE = ("scale", "zero_point", "input_scale", "input_offset", "offset_bias")


# accessors of Tensor.data, as __torch_function__ sees them
_DATA = vars(torch._C.TensorBase)["data"]
_GET_DATA, _SET_DATA = _DATA.__get__, _DATA.__set__


# what the ops compute with
OP_INPUTS = (None, "int8", "fp8")


def check_spec(
    name: str, spec: QuantSpec, served: tuple[str | None, ...] = (*OP_INPUTS, *LOW_INPUTS)
) -> QuantSpec:
    """A spec that layers, by default linear ones, compute with.

    Raises:
        ValueError: if it is no ``QuantSpec``; ``name`` is the argument's.
        NotImplementedError: for input kinds that this version does not compute with.
    """
    if not isinstance(spec, QuantSpec):
        raise ValueError(f"{name} must be a QuantSpec, got {spec!r}")
    if spec.inputs not in served:
        raise NotImplementedError(
            f"inputs must be one of {served} in this version, got {spec.inputs!r}"
            + (": prepare_qat learns the scales of fewer bits" if spec.has_low_inputs else "")
        )
    if spec.has_low_inputs and spec.input_scale != "static":
        raise NotImplementedError(
            "input_scale must be 'static', which is learned, for inputs below 8 bits, "
            f"got {spec.input_scale!r} with {spec.inputs!r}"
        )
    return spec


def round_input(x: Tensor, quantizer: Quantizer, *, keeps_zeros: bool) -> Tensor:
    """x [..., K] fake-quantized, where zeros must stay also if the levels are -1 and 1.

    Padding is zero for a convolution, and so is the sign of zero in BiT.
    """
    y = fake_quantize(x, quantizer)
    return torch.where(x == 0, x, y) if keeps_zeros and quantizer.levels.is_binary else y


class DequantizedWeight(Tensor):
    """The dequantized weight a module hands out. Writing into it requantizes the module.

    PEFT merges an adapter with ``layer.weight.data += delta``. On a plain tensor that write would
    be lost; here every in-place operation, and assignment to ``.data``, reaches the module.
    """

    _module: "QuantizedModule"

    @staticmethod
    def of(values: Tensor, module: "QuantizedModule") -> "DequantizedWeight":
        weight = values.as_subclass(DequantizedWeight)
        weight._module = module
        return weight

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        target = kwargs.get("out", args[0] if args else None)
        if func == _GET_DATA and isinstance(target, cls):
            return cls.of(out.as_subclass(Tensor), target._module)
        if isinstance(target, cls) and _writes(func, name, kwargs):
            target._module.weight = target.as_subclass(Tensor)
            return out
        return _plain(out)


def _writes(func: Any, name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a function changes its first argument (or ``out``) in place."""
    if "out" in kwargs or name == "__setitem__" or func == _SET_DATA:
        return True
    if name.endswith("__"):  # __iadd__ and its kin, but not __init__, __int__, __iter__
        return name.startswith("__i") and hasattr(Tensor, name.replace("__i", "__", 1))
    return name.endswith("_") and name != "requires_grad_"


def _plain(out: Any) -> Any:
    if isinstance(out, DequantizedWeight):
        return out.as_subclass(Tensor)
    if isinstance(out, tuple | list) and not hasattr(out, "_fields"):
        return type(out)(_plain(item) for item in out)
    return out


class QuantizedModule(nn.Module):
    """Mixin of the quantized layers; comes before ``nn.Linear`` or ``nn.Conv1d`` in the bases."""

    spec: QuantSpec
    qweight: Tensor
    scale: Tensor
    group_scale: Tensor | None
    zero_point: Tensor | None
    input_scale: Tensor | None
    K: int
    # transformers initializes whatever does not carry this mark
    _is_hf_initialized: bool = True

    def _quantize(self, weight: Tensor, method: str = "rtn") -> QuantizedWeight:
        """Quantize a float weight in the layer's own shape."""
        raise NotImplementedError(f"{type(self).__name__} must say how its weight is quantized")

    def _shape_weight(self, matrix: Tensor) -> Tensor:
        """From the format's view [N, K] to the layer's own shape."""
        raise NotImplementedError(f"{type(self).__name__} must say how its weight is shaped")

    def _weight_changed(self) -> None:
        """Called after the stored weight was replaced by a new one."""

    def _set_quantized(self, weight: QuantizedWeight) -> None:
        self.spec, self.K = weight.spec, weight.K
        is_low = self.spec.has_low_inputs
        self._op_spec = dataclasses.replace(self.spec, inputs="int8") if is_low else self.spec
        for name in _BUFFERS:
            value = getattr(weight, name)
            if name in self._buffers:
                self._buffers[name] = value
            else:
                self.register_buffer(name, value)

    def quantized_weight(self) -> QuantizedWeight:
        """The stored tensors, as the functional ops take them."""
        # five times through Module.__getattr__ would take four times as long
        stored: dict[str, Any] = self._buffers
        return QuantizedWeight(
            stored["qweight"],
            stored["scale"],
            stored["group_scale"],
            stored["zero_point"],
            self.K,
            self.spec,
            stored["input_scale"],
        )

    def _operands(self, x: Tensor, *, keeps_zeros: bool = False) -> tuple[Tensor, QuantizedWeight]:
        """x [..., K] and the weight as the ops take them.

        An input of fewer than 8 bits is rounded here: the op finds the same integers again, as int8
        ones of the same scale. Its gradient is that of training, 0 beyond the levels.
        """
        weight = self.quantized_weight()
        if weight.spec is self._op_spec:
            return x, weight
        if weight.input_scale is not None:  # else the op says what is missing
            (x,) = autocast(x)
            quantizer = Quantizer(INPUT_LEVELS[str(self.spec.inputs)], weight.input_scale, "lsq")
            x = round_input(x, quantizer, keeps_zeros=keeps_zeros)
        return x, dataclasses.replace(weight, spec=self._op_spec)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of ``weight``: the bias's, else float32."""
        bias = self._parameters["bias"]
        return torch.float32 if bias is None else bias.dtype

    @property
    def weight(self) -> Tensor:
        """The dequantized weight; assigning to it, or writing into it, requantizes."""
        values = self._shape_weight(self.quantized_weight().dequantize(self.compute_dtype))
        return values if torch.compiler.is_compiling() else DequantizedWeight.of(values, self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        shape = tuple(self.weight.shape)
        if tuple(value.shape) != shape:
            raise ValueError(f"weight must have shape {shape}, got {tuple(value.shape)}")
        value = value.detach().to(self.qweight.device)
        packed = self._quantize(value)
        for name in _BUFFERS[:4]:
            stored = getattr(self, name)
            if stored is not None:
                stored.copy_(getattr(packed, name))
        self._weight_changed()
        wanted = value.float()
        error = wanted - self.weight.as_subclass(Tensor).float()
        if power := error.square().sum().item():
            sqnr = 10 * torch.log10(wanted.square().sum() / power).item()
            warnings.warn(
                f"a weight written into a {self.spec.bits}-bit layer was requantized: "
                f"SQNR {sqnr:.1f} dB against the values written",
                stacklevel=3,
            )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would refuse a Parameter where a property stands
            QuantizedModule.weight.fset(self, value)  # type: ignore[attr-defined]
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers.pop(name) for name in KEEP_DTYPE if name in self._buffers}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, old in kept.items():
                new = None if old is None else fn(old)
                if old is not None and new is not None and new.dtype != old.dtype:
                    new = old.to(new.device)
                self._buffers[name] = new
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Also take a float checkpoint's ``weight``, which is quantized on the way in."""
        requantized = prefix + "weight" in state_dict and prefix + "qweight" not in state_dict
        if requantized:
            packed = self._quantize(state_dict.pop(prefix + "weight"))
            for name in _BUFFERS[:4]:
                if getattr(packed, name) is not None:
                    state_dict[prefix + name] = getattr(packed, name)
            for name in KEEP_DTYPE:  # a float layer has none, and they stay as they are
                if self._buffers.get(name) is not None:
                    state_dict.setdefault(prefix + name, self._buffers[name])
        for name in (*_BUFFERS, *KEEP_DTYPE):
            stored, given = self._buffers.get(name), state_dict.get(prefix + name)
            if stored is not None and given is not None and stored.dtype != given.dtype:
                raise ValueError(
                    f"{prefix}{name} must be {stored.dtype}, got {given.dtype} in the state dict"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if requantized:
            self._weight_changed()


def remembered(
    module: nn.Module, name: str, tensors: Sequence[Tensor], make: Callable[[], Any]
) -> Any:
    """What ``make`` returns, called again when one of the tensors that go into it has changed."""
    # what inference mode made does not count its changes
    if torch.compiler.is_compiling() or any(t.is_inference() for t in tensors):
        return make()
    key = [(t.data_ptr(), t._version) for t in tensors]
    stored = module.__dict__.get(name)
    if stored is None or stored[0] != key:
        # the tensors are kept, or others could take their place in memory
        stored = key, make(), [t.detach() for t in tensors]
        module.__dict__[name] = stored
    return stored[1]
