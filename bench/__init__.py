"""Benchmarks: cases with their peers side by side, results as JSON, tables and plots from it.

``python -m bench list`` shows the cases. ``pytest --benchmark`` runs the microbenchmarks.
"""

import sys
import time
from pathlib import Path

# before torch is imported: a run's minutes count from here
STARTED = time.perf_counter()

# what lies beside this folder is measured, installed or not
sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
