"""Build the optional CUDA C++ kernels: ``python setup_cuda.py`` puts one library into the package.

It needs CUDA's compiler and the headers of the PyTorch that is installed, whose build may be one
for a CPU, and no GPU. The library serves every Python and, from 2.11 on, every PyTorch: it uses
PyTorch's stable ABI alone.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels" / "csrc"
PACKAGE = Path(__file__).parent / "kernels" / "lowbit_kernels"
LIBRARY = "_csrc.so"
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
# PyTorch 2.11, the oldest that is supported
TARGET_VERSION = "0x020b000000000000"


def find_nvcc() -> str | None:
    """The compiler: of $CUDA_HOME, on the path, or where CUDA installs itself."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def known_architectures(nvcc: str) -> list[str]:
    """Those of ``ARCHITECTURES`` that this compiler knows."""
    listed = subprocess.run(
        [nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
    ).stdout
    known = re.findall(r"compute_(\w+)", listed)
    return [arch for arch in ARCHITECTURES if arch in known]


def compile_command(nvcc: str, architectures: list[str], library: Path) -> list[str]:
    """The one call of the compiler that builds the library."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("setup_cuda.py needs PyTorch's headers: pip install torch")
    torch_dir = Path(spec.origin).parent
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    # GPUs later than the last architecture compile its PTX
    last = re.sub(r"\D", "", architectures[-1])
    codes.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    # torch is loaded before the library, so its own libraries are found by their names
    return [
        nvcc, "-shared", "-std=c++17", "-O3", "--threads=0", "-cudart=static",
        "-Xcompiler=-fPIC,-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", *codes,
        f"-I{SOURCES}", f"-I{torch_dir}/include",
        str(SOURCES / "small_m.cu"), "-o", str(library),
        f"-L{torch_dir}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Build and return the exit code: 2 where something that the build needs is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--arch", nargs="+", help=f"GPU architectures (default: of {', '.join(ARCHITECTURES)} all "
        "that the compiler knows); 90a is one, too"
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=PACKAGE, help="folder (default: %(default)s)"
    )
    # what setuptools calls building in place is what this script does
    parser.add_argument("command", nargs="?", choices=["build_ext"], help=argparse.SUPPRESS)
    parser.add_argument("--inplace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print(
            "setup_cuda.py: no nvcc found in $CUDA_HOME/bin, on the path or in /usr/local/cuda/bin",
            file=sys.stderr,
        )
        return 2
    try:
        command = compile_command(
            nvcc, options.arch or known_architectures(nvcc), options.output / LIBRARY
        )
        # beside the library, which is replaced in one step: a process may have it loaded
        partial = options.output / f"{LIBRARY}.{os.getpid()}"
        command[command.index("-o") + 1] = str(partial)
        options.output.mkdir(parents=True, exist_ok=True)
        subprocess.run(command, check=True)
        partial.replace(options.output / LIBRARY)
    except ModuleNotFoundError as error:
        print(f"setup_cuda.py: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"setup_cuda.py: {nvcc} failed, exit code {error.returncode}", file=sys.stderr)
        return 2
    print(options.output / LIBRARY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
