"""Where the time of each forward pass went."""

import time
from collections import defaultdict

from offload.runtime.recorder import Recorder
from offload.scheduler.phases import BACKWARD, PREFILL, STANDALONE, PhaseTimes
from offload.scheduler.trace import OWN, PASS, WAIT


class PassClock:
    """Charges time to the phase of the pass that is under way.

    Args:
        recorder: keeps the spans.
        asynchronous: True if the device computes behind the host's back, so that what is not waiting is compute.
    """

    def __init__(self, recorder: Recorder, asynchronous: bool = False) -> None:
        self._recorder = recorder
        self._asynchronous = asynchronous
        self.phases: defaultdict[str, PhaseTimes] = defaultdict(PhaseTimes)
        self.phase = STANDALONE
        self.interval = 0
        """Counts passes, and the times between them."""
        self._inside: list[tuple[str, str]] = []
        """Whose time it is, the innermost last."""
        self._mark = 0.0
        self._begun = 0.0
        self.loading_seconds = 0.0
        """Passes stood still so long until weights came that stay from then on; in no phase."""
        self._left_out = 0.0
        self._first = True
        """The prefill is the first prompt's."""
        self._decode_start_length: int | None = None

    def begin_pass(self, phase: str, tokens: int, batch_size: int, cached_tokens: int, continues: bool = False) -> None:
        """A call of the model begins.

        Args:
            tokens: positions of one sequence in this pass.
            batch_size: sequences.
            cached_tokens: positions that the KV cache holds already.
            continues: it is a later chunk of the same prompt.
        """
        self.phase = phase
        self.interval += 1
        times = self.phases[phase]
        times.passes += 1
        times.context_tokens += cached_tokens
        if times.passes == 1:
            times.batch_size, times.pass_tokens = batch_size, tokens
            self._first = True
        elif continues and self._first:
            times.pass_tokens += tokens
        elif phase == PREFILL:
            self._first = False
        if phase == PREFILL:
            times.tokens += tokens * batch_size
            self._decode_start_length = None
        else:
            # A pass may add several tokens (speculation): how many is seen when the next one begins.
            if self._decode_start_length is not None:
                times.tokens += max(0, cached_tokens - self._decode_start_length - 1)
            times.tokens += 1
            self._decode_start_length = cached_tokens
        # What an interrupt left inside is forgotten.
        self._inside.clear()
        self._left_out = 0.0
        self._begun = time.perf_counter()

    def end_pass(self) -> None:
        times = self.phases[self.phase]
        ended = time.perf_counter()
        times.seconds += ended - self._begun - self._left_out
        if times.passes == 1 or (self.phase == PREFILL and self._first):
            times.first_seconds = times.seconds
        self._recorder.span(PASS, self.phase, self._begun, ended)
        if self._asynchronous:
            waited = times.overhead_seconds + sum(times.wait_seconds.values())
            times.compute_seconds = max(0.0, times.seconds - waited)
        self.phase = STANDALONE
        self.interval += 1

    def begin_backward(self) -> bool:
        """The first block of a backward pass is wanted; False if it is under way already."""
        if self.phase == BACKWARD:
            return False
        self.phase = BACKWARD
        self.interval += 1
        self.phases[BACKWARD].passes += 1
        self._left_out = 0.0
        self._begun = time.perf_counter()
        return True

    def end_backward(self) -> bool:
        """False if there was none."""
        if self.phase != BACKWARD:
            return False
        self.end_pass()
        return True

    def enter(self, resource: str, name: str) -> None:
        """From now on the time is `name`'s, until it leaves, or something inside of it enters.

        Args:
            resource: COMPUTE, HOST_COMPUTE or OWN.
        """
        self._settle(time.perf_counter())
        self._inside.append((resource, name))

    def leave(self) -> None:
        """The last one that entered is through; the time is that one's again that it entered inside of."""
        self._settle(time.perf_counter())
        self._inside.pop()

    def set_aside(self) -> list[tuple[str, str]]:
        """The one whose time it is stops in the middle; another goes on with something else."""
        self._settle(time.perf_counter())
        inside, self._inside = self._inside, []
        return inside

    def take_up(self, inside: list[tuple[str, str]]) -> None:
        """It goes on where it stopped."""
        self._settle(time.perf_counter())
        self._inside = inside

    def pause(self) -> None:
        """Nobody's time until `resume`: somebody waits, and says afterwards for what."""
        self._settle(time.perf_counter())

    def resume(self) -> None:
        self._mark = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """So long it stood still, until now, for weights that stay from now on."""
        self.loading_seconds += seconds
        self._left_out += seconds

    def charge_wait(self, link: str, begin: float, end: float) -> None:
        """Compute stood still, between two moments of `time.perf_counter()`."""
        self._settle(begin)
        self._mark = end
        times = self.phases[self.phase]
        times.wait_seconds[link] += end - begin
        if self.phase == STANDALONE:
            times.seconds += end - begin
        self._recorder.span(WAIT, link, begin, end)

    def _settle(self, until: float) -> None:
        """Charge what passed since the last change to who it was."""
        begin, self._mark = self._mark, until
        if not self._inside or until <= begin:
            return
        resource, name = self._inside[-1]
        times, seconds = self.phases[self.phase], until - begin
        if resource == OWN:
            times.overhead_seconds += seconds
        elif not self._asynchronous or self.phase == STANDALONE:
            times.compute_seconds += seconds
        if self.phase == STANDALONE:
            times.seconds += seconds
        self._recorder.span(resource, name, begin, until)
