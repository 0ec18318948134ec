"""Schedule of step attempts: some run in the caller's thread, one at a time in the given order, others in a pool.

A schedule is independent of storage and of live values. It attempts a step once all steps that it waits for have ended,
and only if the steps that it needs succeeded.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from simpo_pipeline.executor.planning.graph import Step
from simpo_pipeline.executor.running.attempt import Ending


class Schedule:
    """One pass over `steps`. All other steps that these need or come after are assumed to have succeeded before.

    A step that needs a failed step ends as DEP_FAILED. A step that waits for a postponed step is itself POSTPONED.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        needs: Mapping[Step, Iterable[Step]],
        after: Mapping[Step, Iterable[Step]],
        in_caller: Collection[Step],
        attempt: Callable[[Step], Ending],
    ):
        within = set(steps)
        self._steps = tuple(steps)
        self._needs = {step: within.intersection(needs.get(step, ())) for step in steps}
        self._waits = {step: self._needs[step] | within.intersection(after.get(step, ())) for step in steps}
        self._followers: dict[Step, list[Step]] = {step: [] for step in steps}
        for step, waits in self._waits.items():
            for before in waits:
                self._followers[before].append(step)
        self._open_waits = {step: len(waits) for step, waits in self._waits.items()}
        self._attempt = attempt
        self._in_caller = in_caller
        self._caller_queue = deque(step for step in steps if step in in_caller)
        self._caller_ready: set[Step] = set()
        self._endings: dict[Step, Ending] = {}
        self._passed_over: deque[Step] = deque()
        self._changed = threading.Condition()
        self._crash: BaseException | None = None

    def run(
        self, on_passed_over: Callable[[Step, Ending], None], pool_size: int, on_interrupt: Callable[[], None]
    ) -> dict[Step, Ending]:
        """Attempt every step that can be attempted, and return how each step ended.

        Args:
            on_passed_over: called in this thread for each step that cannot be attempted.
            pool_size: the maximum number of steps that run at the same time in the pool.
            on_interrupt: called if this thread is interrupted, to end the steps that run in the pool.
        """
        with ThreadPoolExecutor(pool_size, thread_name_prefix="step") as pool:
            try:
                with self._changed:
                    for step in self._steps:
                        if self._open_waits[step] == 0 and step not in self._endings:
                            self._start(step, pool)
                while (step := self._next_in_caller(on_passed_over)) is not None:
                    self._end(step, self._attempt(step), pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                on_interrupt()
                raise
        return {step: self._endings[step] for step in self._steps}

    def _next_in_caller(self, on_passed_over: Callable[[Step, Ending], None]) -> Step | None:
        """Wait for the next step of the caller's thread. Return None once every step has ended."""
        with self._changed:
            while True:
                if self._crash is not None:
                    raise self._crash
                while self._passed_over:
                    step = self._passed_over.popleft()
                    on_passed_over(step, self._endings[step])
                while self._caller_queue and self._caller_queue[0] in self._endings:
                    self._caller_queue.popleft()
                if self._caller_queue and self._caller_queue[0] in self._caller_ready:
                    return self._caller_queue.popleft()
                if len(self._endings) == len(self._steps):
                    return None
                self._changed.wait()

    def _attempt_in_pool(self, step: Step, pool: ThreadPoolExecutor) -> None:
        try:
            self._end(step, self._attempt(step), pool)
        except BaseException as error:  # raised again in the caller's thread
            with self._changed:
                self._crash = error
                self._changed.notify_all()

    def _end(self, step: Step, ending: Ending, pool: ThreadPoolExecutor) -> None:
        with self._changed:
            self._endings[step] = ending
            self._follow(step, pool)
            self._changed.notify_all()

    def _follow(self, ended: Step, pool: ThreadPoolExecutor) -> None:
        """Start or pass over every step that waited only for `ended`."""
        just_ended = [ended]
        while just_ended:
            for follower in self._followers[just_ended.pop()]:
                self._open_waits[follower] -= 1
                if self._open_waits[follower] == 0 and not self._start(follower, pool):
                    just_ended.append(follower)

    def _start(self, step: Step, pool: ThreadPoolExecutor) -> bool:
        """Start a step, or pass it over, which ends it. Return False if it was passed over."""
        if any(self._endings[need] in (Ending.FAILED, Ending.DEP_FAILED) for need in self._needs[step]):
            self._pass_over(step, Ending.DEP_FAILED)
            return False
        if any(self._endings[before] is Ending.POSTPONED for before in self._waits[step]):
            self._pass_over(step, Ending.POSTPONED)
            return False
        if step in self._in_caller:
            self._caller_ready.add(step)
        else:
            pool.submit(self._attempt_in_pool, step, pool)
        return True

    def _pass_over(self, step: Step, ending: Ending) -> None:
        self._endings[step] = ending
        self._passed_over.append(step)
