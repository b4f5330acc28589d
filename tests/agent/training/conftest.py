"""Lets the tests here, and the processes they spawn, import `ranks`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
