"""Interleaved timing: plain and with the brain take the same batches in turn, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

WARM_UP = 2


@dataclass
class Stopwatch:
    """Adds up the seconds spent in wrapped functions; one that calls another is counted once."""

    seconds: float = 0.0
    _inside: bool = field(default=False, repr=False)

    def around(self, owner: Any, *names: str) -> None:
        """Replace methods of ``owner`` by timed ones."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += time.perf_counter() - start

        return timed


def interleave(
    plain: Callable[[Any], Any], ours: Callable[[Any], Any], watch: Stopwatch, batches: Iterable[Any], count: int
) -> list[tuple[float, float, float]]:
    """Seconds of (plain, with the brain, the brain's own code) for ``count`` batches after two that warm up."""
    rows = []
    for number, batch in enumerate(batches):
        if number == count + WARM_UP:
            break
        # In turn first: whoever comes second finds the batch in the cache.
        order = (plain, ours) if number % 2 else (ours, plain)
        before, seconds = watch.seconds, {}
        for take in order:
            start = time.perf_counter()
            take(batch)
            seconds[take] = time.perf_counter() - start
        if number >= WARM_UP:
            rows.append((seconds[plain], seconds[ours], watch.seconds - before))
    return rows


def summarise(rows: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    """Medians; ``own`` is the brain's code as a share of the plain iteration on the same batch."""
    own = sorted(share / alone for alone, _, share in rows)
    return {
        "iterations": len(rows),
        "plain_iteration_s": statistics.median(alone for alone, _, _ in rows),
        "brain_iteration_s": statistics.median(ours for _, ours, _ in rows),
        "ratio": statistics.median(ours / alone for alone, ours, _ in rows),
        "own_median": statistics.median(own),
        "own_mean": statistics.mean(own),
        "own_p99": own[min(len(own) - 1, int(0.99 * len(own)))],
        "own_worst": own[-1],
    }


def watch_adapter(adapter: Any, watch: Stopwatch, taps: dict[Any, Sequence[str]]) -> None:
    """Clocks around what every adapter of ours does in a step; ``taps`` names what is the host's own."""
    guard = adapter.session._taps[0]
    watch.around(guard, "_check_gradients", "_measure_update", "_watched")
    for owner, names in taps.items():
        watch.around(owner, *names)
