"""For all tests, before any of their modules is imported: Triton interprets its kernels on the CPU (it decides when it
is imported, and torch imports it in passing), and hypothesis judges answers, never the speed of the machine.

ASSAY_TEST_DEVICE=cuda runs the tests of Triton's kernels on a GPU instead, compiled."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

if os.environ.get("ASSAY_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Products of a few kilobytes gain nothing from threads, and threads that spin on a busy core cost 10 times."""
    import torch  # not above: there Triton would still compile

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Where PYTEST_STRICT is set, as continuous integration does, a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", ())) if reporter is not None else 0
    if os.environ.get("PYTEST_STRICT") and skipped and session.exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"{skipped} skipped: in continuous integration that is a failure", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
