"""``lowbit quantize``: a float checkpoint to a low-bit one that transformers loads."""

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from lowbit_kernels.cli.errors import CommandError
from lowbit_kernels.cli.load import (
    find_device,
    is_quantized,
    load_processor,
    load_speech,
    quiet_transformers,
)
from lowbit_kernels.cli.output import note
from lowbit_kernels.conversion import QuantizationReport, dequantize, quantize
from lowbit_kernels.formats import QuantConfig, QuantSpec
from lowbit_kernels.formats.spec import GroupSize
from lowbit_kernels.integrations.processor import prepare_processor

_PRESETS = {"small": QuantConfig.small, "fast": QuantConfig.fast}
_GROUPS: dict[str, GroupSize] = {"auto": "auto", "channel": None, "tensor": "tensor"}


def make_config(
    preset: str,
    bits: int,
    group_size: str,
    inputs: str | None,
    deterministic: bool = False,
    fuse: bool = False,
) -> QuantConfig:
    """A preset with the parts that the user names replaced.

    Args:
        preset: ``"small"`` or ``"fast"``.
        bits: bits a weight.
        group_size: a number, ``"auto"``, ``"channel"`` or ``"tensor"``.
        inputs: ``"int8"`` or ``"float"``; ``None`` as the preset.
        deterministic: as in ``QuantSpec``.
        fuse: as in ``QuantConfig``.

    Raises:
        CommandError: for a word that is none of these.
        ValueError: for values that no format has.
    """
    if preset not in _PRESETS:
        raise CommandError(f"--preset must be one of {', '.join(_PRESETS)}, got {preset!r}")
    if inputs not in (None, "int8", "float"):
        raise CommandError(f"--inputs must be int8 or float, got {inputs!r}")
    base = _PRESETS[preset](bits).default
    kind = base.inputs if inputs is None else {"int8": "int8", "float": None}[inputs]
    size = _group_size(group_size)
    spec = QuantSpec(base.bits, size, inputs=kind, deterministic=deterministic)
    return QuantConfig(spec, fuse=fuse)


def _group_size(text: str) -> GroupSize:
    if text.isdecimal():
        return int(text)
    if text not in _GROUPS:
        raise CommandError(
            "--group-size must be a power of two >= 32, channel (one scale a channel) or tensor, "
            f"got {text!r}"
        )
    return _GROUPS[text]


def quantize_checkpoint(
    source: str, out: Path | None, config: QuantConfig, method: str, *, force: bool
) -> QuantizationReport:
    """Quantize a checkpoint and save it, with its processor, as a folder of transformers.

    Args:
        source: a hub id, a folder of transformers, or a low-bit checkpoint.
        out: the new folder, which appears only when it is complete; ``None`` only reports.
        config: which layer gets what.
        method: how weights are rounded.
        force: replace a checkpoint that is at ``out``.

    Raises:
        CommandError: if ``source`` cannot be loaded, nothing in it can be quantized, or ``out`` is
            taken.
        ValueError: for a weight that is not finite.
        OSError: if the disk refuses; what was at ``out`` is still there.
    """
    if out is not None:
        _check_free(out, force)
    model = load_speech(source, find_device("cpu")).model
    if is_quantized(source):
        note(f"note: {source} is low-bit already, so weights that were rounded are rounded again")
        dequantize(model)
    report = quantize(model, config, method=method, dry_run=out is None)
    if out is None:
        return report
    if not report.quantized:
        raise CommandError(f"{source}: {'; '.join(report.notes)}, so nothing was saved")
    processor = load_processor(source)
    if processor is None:
        note(f"note: {source} has no processor, so transcribe and encode cannot use the result")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        try:
            with quiet_transformers():
                model.save_pretrained(new)
                if processor is not None:
                    prepare_processor(processor).save_pretrained(new)
        except SafetensorError as error:  # its writer says a full disk in its own words
            raise OSError(f"{out} cannot be written: {error}") from None
        _move(new, out)
    return report


def _check_free(out: Path, force: bool) -> None:
    if out.is_file():
        raise CommandError(f"{out} is a file; OUT must be a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise CommandError(f"{out} exists; --force replaces it")
    if not any((out / name).exists() for name in ("config.json", "lowbit.json")):
        raise CommandError(f"{out} exists and is not a checkpoint, so --force does not replace it")


def _move(new: Path, out: Path) -> None:
    """Put a folder in another's place; at every moment one of the two is whole on the disk."""
    old = Path(f"{new.parent}-old-")
    if out.exists():
        os.replace(out, old)
    try:
        os.replace(new, out)
    except BaseException:
        if old.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)
