"""Settings that every test shares."""

import gc
import os
import threading

import pytest
import torch
from hypothesis import HealthCheck, settings
from processes import Processes

from torchprune_ext.compensation import solvers

pytest.register_assert_rewrite("calibrating", "cases", "compensating", "contracts", "globally", "snapshots")

torch.set_num_threads(1)  # the tensors are tiny; pytest -n is the parallelism

settings.register_profile(
    "local", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.register_profile("quick", settings.get_profile("ci"), max_examples=10)  # of tests/mutate.py
settings.register_profile("thorough", settings.get_profile("local"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Collect thousands of tests without looking through them for garbage, now and at each collection later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.fixture(scope="session")
def processes():
    made = Processes()
    yield made
    made.stop()


@pytest.fixture
def no_thread_left():
    before = set(threading.enumerate())
    yield
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= before


@pytest.fixture
def to_the_end(monkeypatch):
    """Let the conjugate gradients run until nothing is gained any more."""
    monkeypatch.setattr(solvers, "TOLERANCE", 0.0)
