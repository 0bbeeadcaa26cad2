"""The cases, most important first: the order in which a sitting runs them."""

from bench.case import Case, ValueCase
from bench.cases.attention_cuda import ATTENTION_CUDA
from bench.cases.ceilings import CEILINGS
from bench.cases.checkpoint_bytes import CHECKPOINT_BYTES
from bench.cases.cold_start import COLD_START
from bench.cases.conv1d_cpu import CONV1D_CPU
from bench.cases.conv1d_cuda import CONV1D_CUDA
from bench.cases.conv_blocks_cuda import CONV_MODULE_CUDA, FRONT_END_CUDA, POSITIONAL_CUDA
from bench.cases.depthwise_cuda import DEPTHWISE_CUDA
from bench.cases.encoder_cpu import ENCODER_CPU
from bench.cases.encoder_cuda import ENCODER_CUDA, ENCODER_MODELS
from bench.cases.host_overhead import HOST_OVERHEAD
from bench.cases.import_time import IMPORT_TIME
from bench.cases.linear_backward_cuda import LINEAR_BACKWARD
from bench.cases.linear_cpu import LINEAR_CPU
from bench.cases.linear_cuda import (
    LINEAR_BATCH1,
    LINEAR_BITS,
    LINEAR_LARGE,
    LINEAR_ODD,
    LINEAR_STREAM,
)
from bench.cases.linear_ladder_cuda import LINEAR_LADDER
from bench.cases.linear_training_cuda import LINEAR_TRAINING
from bench.cases.norm_cuda import NORM_CUDA
from bench.cases.training_cuda import TRAINING_CUDA

ON_CPU = (ENCODER_CPU, CHECKPOINT_BYTES, IMPORT_TIME, LINEAR_CPU, CONV1D_CPU)
ON_CUDA = (
    CEILINGS, LINEAR_BATCH1, ENCODER_CUDA, LINEAR_LARGE, LINEAR_BACKWARD, LINEAR_STREAM,
    HOST_OVERHEAD, LINEAR_ODD, LINEAR_BITS, LINEAR_TRAINING, LINEAR_LADDER, TRAINING_CUDA,
    COLD_START, FRONT_END_CUDA, POSITIONAL_CUDA, CONV_MODULE_CUDA, DEPTHWISE_CUDA, ATTENTION_CUDA,
    CONV1D_CUDA, NORM_CUDA, *ENCODER_MODELS,
)  # fmt: skip
CASES: dict[str, Case | ValueCase] = {case.name: case for case in (*ON_CPU, *ON_CUDA)}
