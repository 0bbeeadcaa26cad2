"""The command line itself: start, help, exit codes, devices, missing packages."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lowbit_kernels.matmul import csrc
from lowbit_kernels.matmul.tuned import table_path


def test_help_imports_no_torch_and_names_every_command():
    script = (
        "import sys\n"
        "from lowbit_kernels.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stopped:\n"
        "    heavy = {'torch', 'numpy', 'transformers', 'triton'} & set(sys.modules)\n"
        "    sys.exit(f'code {stopped.code}, loaded {heavy}' if stopped.code or heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in (
        "quantize",
        "inspect",
        "compare",
        "cost",
        "transcribe",
        "encode",
        "env",
        "demo",
    ):
        assert f" {command} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["env", "--fast"], "No such option"),
        (["quantize", "SRC"], "OUT must be given, unless --dry-run is"),
        (["quantize", "SRC", "OUT", "--bits", "four"], "--bits"),
        (["quantize", "SRC", "OUT", "--bits", "3"], "bits must be one of (1, 2, 4, 8), got 3"),
        (["quantize", "SRC", "OUT", "--preset", "tiny"], "--preset must be one of small, fast"),
        (["quantize", "SRC", "OUT", "--inputs", "int9"], "--inputs must be int8 or float"),
        (["quantize", "SRC", "OUT", "--group-size", "x"], "--group-size must be a power of two"),
        (["quantize", "SRC", "OUT", "--group-size", "48"], "group_size must be a power of two"),
        (["transcribe", "MODEL", "a.wav", "--device", "tpu"], "--device must be cpu, cuda"),
        (["encode", "MODEL", "a.wav", "--out", "o", "--format", "pt"], "safetensors, npy"),
        (["compare", "F", "Q", "a.wav", "--texts", "no.tsv"], "--texts no.tsv: no such file"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    arguments, message, lowbit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    called = lowbit(*arguments)
    assert called.code == 2
    assert called.out == ""
    assert message in called.err
    assert called.err.startswith("lowbit: ")
    assert called.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_asked_for_and_absent(lowbit, float_model, clips):
    called = lowbit("transcribe", float_model, *clips, "--device", "cuda")
    assert called.code == 2
    assert "no CUDA GPU can be used" in called.err
    assert "--device cpu" in called.err
    assert called.err.count("\n") == 1


def test_triton_missing_on_a_gpu_machine(lowbit, float_model, clips, monkeypatch):
    from lowbit_kernels.cli import load

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    called = lowbit("transcribe", float_model, *clips)
    assert called.code == 2
    assert 'pip install "triton>=3.6"' in called.err
    monkeypatch.setattr(load, "find_spec", lambda name: name)
    called = lowbit("transcribe", float_model, *clips, "--device", "cuda:3")
    assert called.code == 2
    assert "this machine has 1 GPUs" in called.err


@pytest.mark.parametrize(
    ("module", "extra"), [("soundfile", "audio"), ("soxr", "audio"), ("transformers", "hf")]
)
def test_a_missing_package_is_named_with_its_extra(
    module, extra, lowbit, float_model, clips, monkeypatch
):
    import lowbit_kernels.cli.load  # noqa: F401

    monkeypatch.setitem(sys.modules, module, None)
    called = lowbit("transcribe", float_model, *clips)
    assert called.code == 2
    assert f'{module} is not installed: pip install "lowbit-kernels[{extra}]"' in called.err
    assert called.err.count("\n") == 1


def test_env_says_what_is_there(lowbit):
    found = lowbit("env", "--json").json
    assert found["versions"]["torch"] == str(torch.__version__)
    assert found["devices"][0]["device"] == "cpu"
    assert found["optional"].keys() >= {"transformers", "soundfile", "flash-attn"}
    shown = lowbit("env")
    assert shown.code == 0
    assert str(torch.__version__) in shown.out


def test_env_says_what_serves_a_gpu(lowbit, monkeypatch):
    h200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: h200)
    monkeypatch.setattr(csrc, "is_available", lambda: True)
    gpu = lowbit("env", "--json").json["devices"][1]
    assert gpu["device"] == "cuda:0"
    assert gpu["detail"].startswith("sm_90, 141 GiB")
    assert "CUDA C++ (few rows)" in gpu["backends"]
    known = table_path(h200.name).exists()
    assert f"tiles: {'measured here' if known else 'defaults'}" in gpu["backends"]


def test_no_command_shows_the_help_and_nothing_else(lowbit):
    called = lowbit()
    assert called.code == 2
    assert "Usage: lowbit" in called.out
    assert called.err == ""


def test_a_file_that_is_not_found_is_named_without_its_number(lowbit, float_model):
    called = lowbit("quantize", float_model, "/proc/nowhere/out")
    assert called.code == 2
    assert called.err == "lowbit: /proc/nowhere: No such file or directory\n"
