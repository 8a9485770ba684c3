"""What works here, what does not, and the line that would mend it: the facts behind `longspan doctor`.

Nothing here initialises CUDA, and no setting that cannot be read stops it.
"""

from longspan.doctor.machine import Machine, Place, machine
from longspan.doctor.remedies import Remedy
from longspan.doctor.report import Report, examine
from longspan.doctor.settings import Setting, settings
from longspan.doctor.usability import Unusable, unusable

__all__ = ["Machine", "Place", "Remedy", "Report", "Setting", "Unusable", "examine", "machine", "settings", "unusable"]
