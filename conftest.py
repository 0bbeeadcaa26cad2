"""What every test and bench shares: the device, seeds, NaN poison, markers and our options."""

import os
from collections.abc import Callable, Generator, Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before any kernel is imported: Triton reads it at import
    os.environ["TRITON_INTERPRET"] = "1"
# what the extras bring: a module of tests that imports one of them is skipped where it is missing
OPTIONAL = {"jiwer", "matplotlib", "peft", "sklearn", "soundfile", "soxr", "transformers"}
# no test may reach a model hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the microbenchmarks in bench/ and no tests"
    )
    parser.addoption(
        "--aot-all", action="store_true", help="compile kernels for every target, not sm_80/sm_90"
    )
    parser.addoption(
        "--gpu", action="store_true", help="run only the tests that use a GPU where there is one"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        if config.option.benchmark:
            raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install '.[bench]'")
        return
    chosen = config.option.benchmark_only or getattr(config.option, "benchmark_enable", False)
    if config.option.benchmark:
        config.option.benchmark_only = True
        if config.args_source == pytest.Config.ArgsSource.TESTPATHS:
            config.args[:] = ["bench"]
    elif not chosen:
        config.option.benchmark_skip = True


def pytest_report_header() -> str:
    if HAS_GPU:
        return f"lowbit: GPU {torch.cuda.get_device_name()}, kernels compiled"
    return "lowbit: no GPU, kernels run in Triton's interpreter; tests marked gpu are skipped"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    call = getattr(report, "call", None)
    cause = call.excinfo.value.__cause__ if report.failed and call and call.excinfo else None
    if isinstance(cause, ModuleNotFoundError):
        package = str(cause.name).partition(".")[0]
        if package in OPTIONAL:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: needs {package}")
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.gpu:
        used = [
            i for i in items if "gpu" in i.keywords or "device" in getattr(i, "fixturenames", ())
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in used])
        # what only a GPU can show comes first, should the time not last
        items[:] = sorted(used, key=lambda item: "gpu" not in item.keywords)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def _uses_gpu(item: pytest.Item) -> bool:
    return "gpu" in item.keywords or "device" in getattr(item, "fixturenames", ())


@pytest.fixture
def device() -> str:
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_uninitialized_memory() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an output element which nobody writes fails loudly."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_strided")}

    def poisoned(name: str) -> Callable[..., torch.Tensor]:
        def allocate(*args: object, **kwargs: object) -> torch.Tensor:
            out: torch.Tensor = originals[name](*args, **kwargs)
            if out.device.type != "meta" and not _is_fake(out) and out.numel():
                if out.is_floating_point():
                    out.detach().fill_(float("nan"))
                elif out.dtype in (torch.int8, torch.int32):
                    out.fill_(torch.iinfo(out.dtype).min)
            return out

        return allocate

    for name in originals:
        setattr(torch, name, poisoned(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
