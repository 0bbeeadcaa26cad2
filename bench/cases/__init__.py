"""The cases, most important first: the order in which a sitting runs them."""

from bench.cases.checkpoint_bytes import CHECKPOINT_BYTES
from bench.cases.conv1d_cpu import CONV1D_CPU
from bench.cases.encoder_cpu import ENCODER_CPU
from bench.cases.import_time import IMPORT_TIME
from bench.cases.linear_cpu import LINEAR_CPU
from bench.harness import Case, ValueCase

CASES: dict[str, Case | ValueCase] = {
    case.name: case for case in (ENCODER_CPU, CHECKPOINT_BYTES, IMPORT_TIME, LINEAR_CPU, CONV1D_CPU)
}
