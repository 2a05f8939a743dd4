"""Notes what happens when, in the schema that the simulator shares."""

import time

from offload.scheduler.trace import MemorySample, Span, Trace

_MOST_SPANS = 400_000
"""At some 100 bytes each; a run that is longer keeps its beginning, and its sums stay right."""

_SPANS_TIMED = 500


class Recorder:
    """Any thread may add to it. Times given to it are `time.perf_counter()`'s."""

    def __init__(self) -> None:
        self.trace = Trace("runtime")
        self._zero = time.perf_counter()

    def span(self, resource: str, name: str, begin: float, end: float, nbytes: int = 0) -> None:
        if len(self.trace.spans) < _MOST_SPANS:
            self.trace.spans.append(Span(resource, name, begin - self._zero, end - self._zero, nbytes))
        else:
            self.trace.dropped_spans += 1

    def memory(self, tier: str, category: str, nbytes: int) -> None:
        if len(self.trace.memory) < _MOST_SPANS:
            self.trace.memory.append(MemorySample(time.perf_counter() - self._zero, tier, category, nbytes))


def span_cost_seconds() -> float:
    """What noting one span takes on this machine, when nothing else interferes."""
    return min(_noting_seconds(_SPANS_TIMED) for _ in range(5)) / _SPANS_TIMED


def _noting_seconds(count: int) -> float:
    recorder = Recorder()
    begun = time.perf_counter()
    for _ in range(count):
        recorder.span("compute", "block", time.perf_counter(), time.perf_counter())
    return time.perf_counter() - begun


def tracing_use(trace: Trace) -> dict[str, float]:
    """What noting the spans took: their number, times what one takes."""
    noted = len(trace.spans) + len(trace.memory)
    return {"spans": noted, "seconds": noted * span_cost_seconds(), "dropped": trace.dropped_spans}
