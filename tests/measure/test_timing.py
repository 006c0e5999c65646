"""The timing loop on a device of the tests' own time, and the CUDA clock on a stand-in for torch.cuda."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from fastres.measure import timing
from fastres.measure.timing import Settings, interleaved, summary

SETTINGS = Settings(burst=1.0, samples=4, limit=100.0, warmup=50.0, first=2, window=2)


def steady(fake_device, name, seconds):
    return {"call": lambda: fake_device.work(name, seconds)}


def test_a_steady_call_has_its_own_time_in_every_sample(fake_device):
    variants = {"a": steady(fake_device, "a", 2.0), "b": steady(fake_device, "b", 0.3)}
    outcome = interleaved(variants, fake_device, SETTINGS)
    assert outcome.failures == {}
    assert outcome.timings["a"].whole == pytest.approx([2.0] * 4)
    assert outcome.timings["b"].whole == pytest.approx([0.3] * 4)
    assert outcome.timings["a"].note == outcome.timings["b"].note == ""


def test_bursts_of_the_variants_alternate_and_take_turns_in_going_first(fake_device):
    variants = {name: steady(fake_device, name, 1.0) for name in "abc"}
    interleaved(variants, fake_device, SETTINGS)
    assert fake_device.log[-12:] == list("abcbcacababc")


def test_parts_are_timed_apart_and_together(fake_device):
    parts = {
        "forward": lambda: fake_device.work("f", 1.0),
        "backward": lambda: fake_device.work("b", 2.0),
        "optimizer": lambda: fake_device.work("o", 0.25),
    }
    timing = interleaved({"a": parts}, fake_device, Settings(10.0, 3, 1e9, 1e9)).timings["a"]
    assert {name: summary(seconds)[0] for name, seconds in timing.parts.items()} == {
        "forward": 1.0,
        "backward": 2.0,
        "optimizer": 0.25,
    }
    assert timing.whole == [3.25] * 3


def test_a_burst_repeats_short_calls_and_goes_through_all_inputs(fake_device):
    interleaved({"a": steady(fake_device, "a", 0.3)}, fake_device, SETTINGS, cycle=3)
    calls = len(fake_device.log) - 3 - 2 * 3  # the first calls, and two bursts of one cycle to see how long they are
    assert calls == 6 * (SETTINGS.samples + 2 * SETTINGS.window)  # 3 calls last 0.9 s, so 6 make a burst


def test_nothing_is_sampled_before_times_are_flat(fake_device):
    times = itertools.chain([8.0, 7.0, 6.0, 5.0, 4.0, 4.0, 3.0, 3.0, 2.0, 2.0], itertools.repeat(1.0))
    outcome = interleaved({"a": {"call": lambda: fake_device.work("a", next(times))}}, fake_device, SETTINGS)
    assert outcome.timings["a"].whole == [1.0] * 4
    assert outcome.timings["a"].note == ""


def test_times_that_never_settle_are_sampled_after_a_while_and_noted(fake_device):
    times = itertools.count(10.0)
    now = itertools.count(0.0, 1.0)
    settings = Settings(burst=1.0, samples=2, limit=1e9, warmup=5.0)
    drifting = {"call": lambda: fake_device.work("a", next(times) ** 3)}
    timing = interleaved({"a": drifting}, fake_device, settings, now=lambda: next(now)).timings["a"]
    assert len(timing.whole) == 2
    assert "still moved by" in timing.note and "when warm-up ended" in timing.note


def test_the_limit_ends_sampling_after_the_least_number(fake_device):
    now = itertools.count(0.0, 60.0)
    settings = Settings(burst=1.0, samples=1000, limit=100.0, warmup=0.0, least=3)
    timing = interleaved({"a": steady(fake_device, "a", 1.0)}, fake_device, settings, now=lambda: next(now))
    assert len(timing.timings["a"].whole) == 3


def test_a_variant_that_raises_is_left_out_and_the_others_go_on(fake_device):
    def at_once():
        raise RuntimeError("no kernel\nfor this shape")

    countdown = itertools.count(20, -1)

    def later():
        fake_device.work("later", 1.0)
        if next(countdown) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    variants = {"at once": {"call": at_once}, "later": {"call": later}, "good": steady(fake_device, "good", 1.0)}
    outcome = interleaved(variants, fake_device, Settings(1.0, 30, 1e9, 1e9))
    assert outcome.failures == {"at once": "RuntimeError: no kernel for this shape", "later": "out of memory"}
    assert list(outcome.timings) == ["good"]
    assert outcome.timings["good"].whole == [1.0] * 30


def test_no_variants_give_no_timings(fake_device):
    assert interleaved({}, fake_device, SETTINGS).timings == {}


def test_a_queued_burst_gets_a_lead_in_proportion_to_its_calls(fake_device, monkeypatch):
    host = itertools.count(0.0, 0.5)  # every look at the host's clock finds it half a second later
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(host))
    leads = []
    monkeypatch.setattr(fake_device, "prepare", leads.append)
    settings = Settings(burst=4.0, samples=3, limit=1e9, warmup=1e9, queued=True)
    interleaved({"a": steady(fake_device, "a", 1.0)}, fake_device, settings, now=lambda: 0.0)
    # The first burst times the launches; already the second, which says how many calls fill a burst, has their lead.
    assert leads[:2] == [0.0, 1.5 * 0.5]
    assert set(leads[2:]) == {1.5 * 0.5 * 4}


def test_summary_gives_median_and_percentiles():
    assert summary([3.0]) == (3.0, 3.0, 3.0)
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == pytest.approx((3.5, 2.0, 5.0))


def test_the_host_clock_orders_instants():
    clock = timing.clock(torch.device("cpu"))
    start = clock.mark()
    clock.prepare(1.0)
    clock.wait()
    assert clock.seconds(start, clock.mark()) >= 0


class FakeCuda:
    """A queue of work: an event's time is known once the device was synchronised. Filling takes 2 ms, a call 1 ms."""

    def __init__(self, monkeypatch):
        self.now, self.synchronised, self.fills = 0.0, False, 0
        cuda = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self, stream):
                assert stream == "stream"
                self.time, cuda.synchronised = cuda.now, False

            def elapsed_time(self, end):
                assert cuda.synchronised
                return (end.time - self.time) * 1e3  # CUDA's are milliseconds

        def synchronize(device):
            self.synchronised = True

        fill = torch.Tensor.fill_

        def counted_fill(tensor, value):
            self.fills += 1
            self.now += 2e-3
            return fill(tensor, value)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(L2_cache_size=2**25))
        monkeypatch.setattr(torch.Tensor, "fill_", counted_fill)


def test_the_cuda_clock_reads_events_in_seconds_and_fills_the_l2(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    clock = timing.CudaClock(torch.device("cpu"))  # where its buffer lies does not matter here
    assert clock._filler.nbytes == 4 * 2**25
    start = clock.mark()
    cuda.now += 0.25
    end = clock.mark()
    clock.wait()
    assert clock.seconds(start, end) == pytest.approx(0.25)
    for lead, fills in ((0.0, 1), (2e-3, 1), (5e-3, 3)):
        cuda.fills = 0
        clock.prepare(lead)
        assert cuda.fills == fills


def test_the_timing_loop_runs_on_the_cuda_clock(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def call():
        cuda.now += 1e-3

    clock = timing.CudaClock(torch.device("cpu"))
    settings = Settings(burst=3e-3, samples=5, limit=1e9, warmup=1e9, queued=True)
    outcome = interleaved({"a": {"call": call}, "b": {"one": call, "two": call}}, clock, settings, cycle=2)
    assert outcome.failures == {}
    assert outcome.timings["a"].whole == pytest.approx([1e-3] * 5)
    assert outcome.timings["b"].parts["two"] == pytest.approx([1e-3] * 5)
