"""A sitting: its steps, its archive, going on from one, and its report."""

import json
import sys
import tarfile
import time
import zipfile

import pytest
import torch

from bench import __main__ as command
from bench import record, sitting
from bench.run import DEVICE_LOST

LOG = """\
$ python -m pytest
[gw1] [  5%] PASSED tests/test_a.py::test_b[two words]
[gw0] [ 10%] FAILED tests/test_a.py::test_c
[gw2] [ 15%] SKIPPED tests/test_a.py::test_d
[gw0] [ 20%] ERROR tests/test_a.py::test_e
FAILED tests/test_a.py::test_c - assert 0
"""


@pytest.fixture
def one(tmp_path):
    """A sitting at its start."""
    work = tmp_path / "work"
    work.mkdir()
    made = sitting.Sitting(
        work, tmp_path / "sitting.tar.gz", time.perf_counter() + 60, True, ["all"]
    )
    made.state = {"steps": {}}
    return made


def script(text):
    return [sys.executable, "-c", text]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the trial is for where there is no GPU")
def test_a_trial_leaves_one_archive_and_goes_on_from_it(tmp_path, monkeypatch, capsys):
    # others may edit the sources meanwhile
    monkeypatch.setenv("BENCH_CODE", "fixed")
    monkeypatch.setitem(sitting.SHARES, "compile", 0.4)
    record.code_digest.cache_clear()
    out = tmp_path / "out"
    arguments = ["sitting", "linear_bits", "--small", "--minutes", "0.8", "--results", str(out)]
    arguments += ["--steps", "compile", "cases"]
    try:
        assert command.main(arguments) == 0
        assert [path.name for path in out.iterdir()] == [sitting.ARCHIVE]
        first = sitting.unpack(out / sitting.ARCHIVE, tmp_path / "first")
        [result] = first.glob("*-small/linear_bits.json")
        before = json.loads(result.read_text())
        state = json.loads((first / "sitting.json").read_text())
        assert {name: step["status"] for name, step in state["steps"].items()} == {
            "compile": "done", "cases": "done",
        }  # fmt: skip
        assert "linear_bits 1x64x64" in (first / "logs" / "compile-0.log").read_text()
        started = time.perf_counter()
        again = [*arguments[:-2], "cases", "--resume", str(out)]
        assert command.main(again) == 0
        assert time.perf_counter() - started < 20  # nothing is left to run
    finally:
        record.code_digest.cache_clear()
    second = sitting.unpack(out / sitting.ARCHIVE, tmp_path / "second")
    [result] = second.glob("*-small/linear_bits.json")
    assert json.loads(result.read_text()) == before
    capsys.readouterr()
    assert command.main(["report", "--results", str(out / sitting.ARCHIVE)]) == 0
    written = capsys.readouterr().out.splitlines()
    assert [path.rpartition("/")[2] for path in written] == ["linear_bits.png", "report.md"]
    assert "## Goals" in (out / "sitting" / result.parent.name / "report.md").read_text()


def test_wrong_commands_are_refused(tmp_path, capsys):
    results = ["--results", str(tmp_path)]
    if not torch.cuda.is_available():
        assert command.main(["sitting", *results]) == 2
        assert "a sitting needs a CUDA GPU (or --small)" in capsys.readouterr().err
        assert command.main(["tune"]) == 2
    assert command.main(["sitting", "--small", "--minutes", "0.1", *results]) == 2
    assert "--minutes must be over 0.2" in capsys.readouterr().err
    gone = ["--resume", str(tmp_path / "gone")]
    assert command.main(["sitting", "--small", *results, *gone]) == 2
    assert "there is no" in capsys.readouterr().err
    assert command.main(["report", "--results", str(tmp_path / "empty")]) == 2


def test_a_process_that_takes_too_long_is_killed(one):
    quick = one.start("quick", script("print('said')"))
    slow = one.start("slow", script("import time; time.sleep(60)"))
    started = time.perf_counter()
    assert one.wait([quick, slow], 1.5) == [0, None]
    assert time.perf_counter() - started < 10
    assert one.log("quick").splitlines()[1:] == ["said"]


def test_tests_that_passed_are_not_run_again(one, monkeypatch):
    monkeypatch.setattr(sitting, "tests_digest", lambda: "same")
    monkeypatch.setattr(sitting.shutil, "which", lambda name: None)
    commands = []

    def start(name, command, **env):
        commands.append(command)
        (one.work / "logs").mkdir(exist_ok=True)
        (one.work / "logs" / f"{name}.log").write_text(LOG)

    monkeypatch.setattr(one, "start", start)
    monkeypatch.setattr(one, "wait", lambda processes, seconds: [1] * len(processes))
    one.state["steps"]["tests"] = sitting.run_tests(one, 5.0)
    row = one.state["steps"]["tests"]
    assert row["passed_tests"] == ["tests/test_a.py::test_b[two words]"]
    assert row["failed_tests"] == ["tests/test_a.py::test_c", "tests/test_a.py::test_e"]
    assert (row["status"], row["exit_code"], row["passed"]) == ("done", 1, 1)
    assert one.state["sanitizer"]["status"] == "missing"
    assert "--gpu" in commands[0]
    sitting.run_tests(one, 5.0)
    deselected = one.work / "deselect.txt"
    assert deselected.read_text() == "--deselect=tests/test_a.py::test_b[two words]\n"
    assert commands[1][-1] == f"@{deselected}"
    monkeypatch.setattr(sitting, "tests_digest", lambda: "other")
    sitting.run_tests(one, 5.0)
    assert deselected.read_text() == ""


@pytest.mark.parametrize(
    ("code", "log", "status"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "clean"),
        (9, "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 1", "failed"),
        (1, "========= Error: Device not supported. Please refer to", "refused"),
        (None, "", "unfinished"),
    ],
)
def test_what_the_sanitizer_says(code, log, status):
    assert sitting._sanitizer_verdict(True, code, log)["status"] == status
    assert sitting._sanitizer_verdict(False, None, "")["status"] == "missing"


def test_a_process_goes_on_after_what_killed_the_one_before(one, monkeypatch):
    codes = [-11, DEVICE_LOST, 0]
    monkeypatch.setattr(one, "start", lambda name, command: command)
    monkeypatch.setattr(one, "wait", lambda processes, seconds: [codes.pop(0)])
    assert sitting.run_cases(one, 60.0) == {"status": "done", "exit_codes": [-11, DEVICE_LOST, 0]}
    # one that was only slow killed nothing
    (one.work / "running").write_text('["case", "point", "provider"]')
    monkeypatch.setattr(one, "wait", lambda processes, seconds: [None])
    assert sitting.run_cases(one, 60.0)["status"] == "unfinished"
    assert not (one.work / "running").exists()


def test_wheels_are_installed_one_by_one(one, tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_peer-1.0-py3-none-any.whl", "w") as wheel:
        info = "tiny_peer-1.0.dist-info"
        wheel.writestr("tiny_peer.py", "WORD = 'found'\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-peer\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    sitting.install(one, wheels)
    state = one.state["wheels"]
    assert state["tiny_peer-1.0-py3-none-any.whl"] == "installed"
    assert "broken" in state["broken-1.0-py3-none-any.whl"]
    process = one.start("peer", script("import tiny_peer; print(tiny_peer.WORD)"))
    assert one.wait([process], 20.0) == [0]
    assert one.log("peer").splitlines()[-1] == "found"
    # what was brought along stays out of the archive
    one.save()
    with tarfile.open(one.archive) as archive:
        assert archive.getnames() == ["logs", "logs/peer.log", "sitting.json"]
