"""How long a call takes: median and spread over repeats."""

import time
from dataclasses import dataclass

import numpy as np

SHORTEST = 200e-6  # seconds of one sample at least: faster calls are timed several together
WARM = 10e-3  # seconds of untimed calls at the start of a turn, which bring caches and threads back to their places
MOST = 200  # samples of a call: those of short calls span a burst of noise


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over ``n`` samples."""

    median: float
    p10: float
    p90: float
    n: int

    @staticmethod
    def of(samples):
        p10, median, p90 = np.percentile(samples, (10, 50, 90))
        return Timing(float(median), float(p10), float(p90), len(samples))

    @property
    def spread(self):
        """Half the distance from p10 to p90, as a share of the median."""
        return (self.p90 - self.p10) / 2 / self.median


@dataclass
class Timed:
    """A call under measurement: as many samples as ``budget_s`` pays for, at least ``least``, at most ``most``."""

    call: object
    budget_s: float = 0.5
    least: int = 5
    most: int = MOST
    together: int = 0  # calls of one sample

    def __post_init__(self):
        self.samples = []

    def once(self):
        start = time.perf_counter()
        for _ in range(self.together):
            self.call()
        return (time.perf_counter() - start) / self.together

    def warm_up(self):
        """Untimed calls: seconds of the fastest."""
        fastest, before = float("inf"), time.perf_counter()
        self.call()
        now = time.perf_counter()
        stop = now + WARM
        while now < stop:
            fastest, before = min(fastest, now - before), now
            self.call()
            now = time.perf_counter()
        return min(fastest, now - before)

    def turn(self, part):
        """Samples for ``part`` (0 to 1) of the limits, after untimed calls."""
        fastest = self.warm_up()
        if not self.together:
            self.together = max(1, int(SHORTEST / max(fastest, 1e-9)))
        stop = time.perf_counter() + self.budget_s * part
        least, most = (len(self.samples) + max(1, round(x * part)) for x in (self.least, self.most))
        while len(self.samples) < least or (len(self.samples) < most and time.perf_counter() < stop):
            self.samples.append(self.once())


def interleave(timed, rounds=3):
    """Measure several calls by turns, so that a disturbance of the machine meets them all: a Timing each.

    Every turn starts with untimed calls, which bring back what the others drove out of the caches.
    """
    for _ in range(rounds):
        for x in timed:
            x.turn(1 / rounds)
    return [Timing.of(x.samples) for x in timed]


def measure(call, budget_s=0.5, least=5, most=MOST):
    """The Timing of ``call()``."""
    return interleave([Timed(call, budget_s, least, most)], rounds=1)[0]
