"""What every test shares: thread counts, hypothesis profiles, and the larger data beside the checkout."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from lengths import examples

# Continuous integration tries the same examples every time; by hand they are new ones.
settings.register_profile("quick", max_examples=examples(50), deadline=None, derandomize="CI" in os.environ)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

# A shell that starts the tests in the background has SIGINT ignored, here and in every child; tests press Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests run one process a core (or alone, on models too small for a second thread to pay).
torch.set_num_threads(1)

os.environ["GROUNDUP_TRUST"] = "1"  # what a test writes may be run; tests of trust take it back


@pytest.fixture(autouse=True)
def _without_waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing to disk and collecting garbage take most of a tiny run's time; tests marked `faults` do both."""
    if request.node.get_closest_marker("faults") is None:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        monkeypatch.setattr(gc, "collect", lambda generation=2: 0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of larger, real data beside the checkout; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data folder shared/data beside the checkout, which is not here")
    return folder
