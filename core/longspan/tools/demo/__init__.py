"""The main job, shown on a real text: causal dilated attention by every backend that fits, checked and timed.

`run` does the work and returns a `Report` of plain values; `longspan demo` prints it.
"""

from longspan.tools.demo.report import Baseline, Report, Row, Timing
from longspan.tools.demo.run import DEFAULT_TOKENS, PATTERN, OnReport, OnStep, run

__all__ = ["DEFAULT_TOKENS", "PATTERN", "Baseline", "OnReport", "OnStep", "Report", "Row", "Timing", "run"]
