"""Before any test module is imported: Triton's kernels are interpreted on the CPU. Triton decides when it is imported,
and torch imports it in passing."""

import os

os.environ["TRITON_INTERPRET"] = "1"
