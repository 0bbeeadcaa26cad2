"""From what a user calls a model, or a device, to the thing itself."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from lowbit_kernels.checkpoint import MANIFEST, CheckpointError, load_quantized
from lowbit_kernels.cli.errors import CommandError, first_line, require
from lowbit_kernels.cli.speech import Speech
from lowbit_kernels.conversion import adapt
from lowbit_kernels.integrations import rebuild

# checkpoints that were fine-tuned elsewhere come without it
_TRAINING_ONLY = "masked_spec_embed"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find_device(name: str | None) -> torch.device:
    """The device called ``name``; ``None`` takes a GPU if there is one.

    Raises:
        CommandError: if it is absent, or lacks what the kernels need, saying how to get it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise CommandError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise CommandError(f"--device {name}: no CUDA GPU can be used: {_why_no_cuda()}")
    if (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs")
    if find_spec("triton") is None:
        raise CommandError(
            f'--device {name}: Triton is not installed: pip install "triton>=3.6", or --device cpu'
        )
    return device


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; https://pytorch.org/get-started "
            "has the install command of one with it, or use --device cpu"
        )
    return f"torch {torch.__version__} finds no GPU or driver; see nvidia-smi, or use --device cpu"


def is_quantized(source: str) -> bool:
    """Whether a model is a low-bit checkpoint of this library."""
    directory = Path(source)
    return (directory / MANIFEST).exists() or rebuild.is_quantized_pretrained(directory)


def load_speech(source: str, device: torch.device) -> Speech:
    """Load a model in float32 on a CPU and in float16 on a GPU.

    A float model, too, is made to give a padded utterance what it gives a single one.

    Args:
        source: a hub id, a folder of transformers, or a low-bit checkpoint.
        device: where to.

    Raises:
        CommandError: if it cannot be loaded; the message names it and the reason.
        CheckpointError: for a low-bit checkpoint that cannot be read.
    """
    require("transformers", "hf")
    with quiet_transformers():
        model = _load_quantized(source) if is_quantized(source) else _load_float(source)
        if not hasattr(model, "config"):
            raise CommandError(f"{source}: a {type(model).__name__} is no model of transformers")
        adapt(model)
        return Speech(source, model.eval().to(device, float_type(device)), source)


def float_type(device: torch.device) -> torch.dtype:
    """What a float model computes in: float16 on a GPU, float32 on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.float32


def load_processor(source: str) -> Any:
    """The processor of a model, or its feature extractor alone; ``None`` if it has neither."""
    transformers = require("transformers", "hf")
    for auto in (transformers.AutoProcessor, transformers.AutoFeatureExtractor):
        with quiet_transformers(), contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return auto.from_pretrained(source)
    return None


def _load_quantized(source: str) -> Any:
    try:
        return load_quantized(source)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CommandError(f"{source}: {first_line(error)}") from None


def _load_float(source: str) -> Any:
    transformers = require("transformers", "hf")
    path = Path(source)
    if path.is_file():
        raise CommandError(f"{source}: a file; a model is a folder or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise CommandError(f"{source}: no config.json in it, so it is not a model")
    if not path.exists() and not _HUB_ID.fullmatch(source):
        raise CommandError(f"{source}: no such folder")
    failed = "cannot be loaded" if path.exists() else "no such folder, nor does the hub give it"
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        names = config.architectures or ["AutoModel"]
        kind = getattr(transformers, names[0], None)
        if kind is None:
            raise CommandError(
                f"{source}: transformers {version('transformers')} has no class {names[0]}"
            )
        model, found = kind.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        _check_complete(source, names[0], found)
        return model
    except CommandError:
        raise
    # a damaged file can fail in any layer of the loader, down to safetensors' own exception
    except Exception as error:
        raise CommandError(f"{source}: {failed} ({first_line(error)})") from None


def _check_complete(source: str, kind: str, found: dict[str, Any]) -> None:
    """Raise if a model kept arbitrary weights, of which transformers only warns."""
    missing = sorted(n for n in found["missing_keys"] if not n.endswith(_TRAINING_ONLY))
    if missing:
        raise CommandError(
            f"{source}: its weights lack {len(missing)} tensors of a {kind}, {missing[0]!r} first"
        )
    for name, in_file, in_model in sorted(found["mismatched_keys"]):
        raise CommandError(
            f"{source}: its weights do not fit its config.json: {name!r} is {tuple(in_file)} in "
            f"the file and {tuple(in_model)} in the model"
        )


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep a library's progress bars and notes off stderr; errors still come as exceptions."""
    import transformers

    log = transformers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.set_verbosity(level)
        log.enable_progress_bar()
