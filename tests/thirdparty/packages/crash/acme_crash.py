"""A native crash: nothing that Python could catch."""

import os

os.abort()
