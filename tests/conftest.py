"""For all tests, before any of their modules is imported: Triton interprets its kernels on the CPU (it decides when it
is imported, and torch imports it in passing), and hypothesis judges answers, never the speed of the machine."""

import os

from hypothesis import HealthCheck, settings

os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")
