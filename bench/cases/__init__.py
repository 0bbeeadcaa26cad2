"""The cases, most important first: the order in which a sitting runs them."""

from bench.cases.attention_cuda import ATTENTION_CUDA
from bench.cases.checkpoint_bytes import CHECKPOINT_BYTES
from bench.cases.conv1d_cpu import CONV1D_CPU
from bench.cases.conv1d_cuda import CONV1D_CUDA
from bench.cases.encoder_cpu import ENCODER_CPU
from bench.cases.encoder_cuda import ENCODER_CUDA
from bench.cases.import_time import IMPORT_TIME
from bench.cases.linear_cpu import LINEAR_CPU
from bench.cases.linear_cuda import LINEAR_CUDA
from bench.cases.norm_cuda import NORM_CUDA
from bench.cases.tune import TUNE
from bench.harness import Case, ValueCase

ON_CPU = (ENCODER_CPU, CHECKPOINT_BYTES, IMPORT_TIME, LINEAR_CPU, CONV1D_CPU)
ON_CUDA = (ENCODER_CUDA, LINEAR_CUDA, ATTENTION_CUDA, CONV1D_CUDA, NORM_CUDA, TUNE)
CASES: dict[str, Case | ValueCase] = {case.name: case for case in (*ON_CPU, *ON_CUDA)}
