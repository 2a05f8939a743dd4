"""Several micro-batches through one model, block by block: each block is brought once for all of them.

The layer-major order of GreedySnake (arXiv 2512.17570), for models whose forward is not ours to write: each micro-batch
runs in a thread of its own, and only one of them at a time. Whoever wants a block that is not open waits; when all do, the
block that the first one wants is opened, and everyone who wants it computes with it, in order. Each micro-batch is computed
by the same kernels on the same shapes as alone, and gradients are added up in the same order: not a bit differs.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from offload.runtime.clock import PassClock
from offload.runtime.executor import LayerExecutor
from offload.runtime.rng_state import AutocastState, RngState
from offload.storage.blocks import BlockKey

MicroBatchTask = Callable[[], Any]


class _Cancelled(BaseException):
    """Another micro-batch failed: this one ends too."""


class LayerMajorRunner:
    """Runs tasks in rounds, a block each.

    Args:
        executor: brings the blocks; its lock is held by the thread that calls `run`.
        clock: told whose time it is.
    """

    def __init__(self, executor: LayerExecutor, clock: PassClock) -> None:
        self._executor = executor
        self._clock = clock
        self._open: frozenset[BlockKey] = frozenset()
        self._present: dict[int, _Participant] = {}

    def run(self, tasks: Sequence[MicroBatchTask]) -> list[Any]:
        """The tasks' results, in order.

        Raises:
            Whatever the first task that failed raised; the others are given up.
        """
        seeds = torch.randint(1 << 62, (len(tasks),)).tolist()
        everyone = [_Participant(self, task, seed) for task, seed in zip(tasks, seeds, strict=True)]
        outer = RngState(self._executor.device)
        self._executor.turns = self.wait_for
        self._executor.lock.admit(participant.name for participant in everyone)
        try:
            self._run(everyone)
        finally:
            for participant in everyone:
                participant.cancel()
            self._executor.lock.dismiss()
            self._executor.turns = None
            outer.restore()
        return [participant.result for participant in everyone]

    def wait_for(self, keys: Sequence[BlockKey]) -> None:
        """Called by whoever opens blocks: returns when they are open."""
        participant = self._present.get(threading.get_ident())
        if participant is not None and not self._open.issuperset(keys):
            inside = self._clock.set_aside()
            participant.wait(tuple(keys))
            self._clock.take_up(inside)

    def _run(self, everyone: "Sequence[_Participant]") -> None:
        while running := [participant for participant in everyone if not participant.ended]:
            keys = running[0].wants
            self._executor.open(keys)
            self._open = frozenset(keys)
            try:
                for participant in running:
                    if participant.wants == keys:
                        participant.go_on()
            finally:
                self._open = frozenset()
                self._executor.close(keys)


class _Participant:
    """One task, in its thread; it runs only between `go_on` and the next `wait`."""

    def __init__(self, rounds: LayerMajorRunner, task: MicroBatchTask, seed: int) -> None:
        self.name = f"offload-micro-batch-{id(self)}"
        self.wants: tuple[BlockKey, ...] = ()
        self.ended = False
        self.result: Any = None
        self._runner = rounds
        self._task = task
        self._seed = seed
        self._error: BaseException | None = None
        self._given_up = False
        self._randomness: RngState | None = None
        self._turn = threading.Semaphore(0)
        self._pause = threading.Semaphore(0)
        self._surroundings = _Surroundings(rounds._executor.device)
        self._thread = threading.Thread(target=self._serve, name=self.name, daemon=True)
        self._thread.start()

    def go_on(self) -> None:
        """Let it run until it wants another block, or is through. Raises what it raised."""
        self._turn.release()
        self._pause.acquire()
        if self._error is not None:
            raise self._error

    def wait(self, keys: tuple[BlockKey, ...]) -> None:
        """In its own thread: until it is its turn again, with these blocks open."""
        self.wants = keys
        self._randomness = RngState(self._runner._executor.device)
        self._pause.release()
        self._turn.acquire()
        if self._given_up:
            raise _Cancelled
        self._randomness.restore()

    def cancel(self) -> None:
        """Have it end, if it has not."""
        while self._thread.is_alive():
            self._given_up = True
            self._turn.release()
            self._thread.join(0.01)

    def _serve(self) -> None:
        self._runner._present[threading.get_ident()] = self
        self._turn.acquire()
        try:
            if not self._given_up:
                torch.manual_seed(self._seed)
                with self._surroundings:
                    self.result = self._task()
        except BaseException as error:
            if not isinstance(error, _Cancelled):
                self._error = error
        finally:
            del self._runner._present[threading.get_ident()]
            self.ended = True
            self._pause.release()


class _Surroundings:
    """What torch keeps for each thread, as it is in the thread that makes this one."""

    def __init__(self, device: torch.device) -> None:
        self._autocasts = AutocastState(device)
        self._device = device
        self._stack = ExitStack()

    def __enter__(self) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).set_device(self._device)
        self._stack.enter_context(self._autocasts.replay())
        self._stack.enter_context(torch.enable_grad())
        # A backward pass stays in its thread, on a card too: there it would share one with all others, and wait in it.
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
