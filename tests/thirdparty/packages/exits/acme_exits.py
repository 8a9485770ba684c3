"""Some packages leave where their licence, their driver or their environment is missing."""

import sys

sys.exit(3)
