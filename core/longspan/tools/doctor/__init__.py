"""What works here, what does not, and the line that would fix it: the facts behind `longspan doctor`.

Nothing here initialises CUDA, and no setting that cannot be read stops it.
"""

from longspan.tools.doctor.machine import LocalDevice, Machine, machine
from longspan.tools.doctor.remedies import Remedy
from longspan.tools.doctor.report import Report, examine
from longspan.tools.doctor.settings import Setting, settings
from longspan.tools.doctor.usability import Unusable, unusable

__all__ = [
    "LocalDevice",
    "Machine",
    "Remedy",
    "Report",
    "Setting",
    "Unusable",
    "examine",
    "machine",
    "settings",
    "unusable",
]
