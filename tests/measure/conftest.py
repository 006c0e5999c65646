"""A device whose time the tests make."""

import pytest


class FakeDevice:
    """A clock over a device that only moves when `work` is given to it; what was asked of it, in order, is in `log`.

    As with CUDA events, a span can be read only once the device was waited for.
    """

    def __init__(self):
        self.time = 0.0
        self.done = 0.0
        self.log = []

    def work(self, name, seconds):
        self.log.append(name)
        self.time += seconds

    def mark(self):
        return self.time

    def seconds(self, start, end):
        assert end <= self.done, "read before the device was waited for"
        return end - start

    def wait(self):
        self.done = self.time

    def prepare(self, lead):
        self.time += 5.0 + lead  # what comes before a burst is in no sample


@pytest.fixture
def fake_device():
    return FakeDevice()
