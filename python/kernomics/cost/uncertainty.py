"""Inputs that are ranges: what a result's spread is, which input moves it most, and by how much."""

import zlib
from dataclasses import dataclass
from math import exp, inf, isfinite, log
from numbers import Real
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from kernomics.cost import CostError, wrong

ALLOWED = 'a number, "lo..hi" (uniform), "lo..mode..hi" (triangular), or a table with dist = "normal" or "lognormal"'
FIELDS = {"normal": ("mean", "sd"), "lognormal": ("median", "sigma")}  # sigma: standard deviation of the logarithm
STEP = 1e-4  # of ln x in elasticities: error about STEP**2, well above rounding


class Spread(NamedTuple):
    p10: float
    p50: float
    p90: float
    samples: tuple  # in the order drawn


@dataclass(frozen=True)
class Input:
    """One input: ``dist`` is fixed (value), uniform (lo, hi), triangular (lo, mode, hi), normal or lognormal (FIELDS).

    normal and lognormal keep to low .. high, the tails cut off and the rest scaled up.
    """

    dist: str
    values: tuple
    low: float = -inf
    high: float = inf

    @property
    def fixed(self):
        return self.dist == "fixed"

    @property
    def median(self):
        return self.quantile(0.5)

    def quantile(self, p):
        """The value that a share p of the draws stays below, 0 <= p <= 1; arrays give arrays."""
        shares = np.asarray(p, np.float64)
        if not ((shares >= 0) & (shares <= 1)).all():
            raise wrong("p", p, "0 to 1")
        found = self._quantile(shares)
        return float(found) if found.ndim == 0 else found

    def _quantile(self, p):
        if self.fixed:
            return np.full(p.shape, self.values[0])
        if self.dist == "uniform":
            lo, hi = self.values
            return lo + p * (hi - lo)
        if self.dist == "triangular":
            lo, mode, hi = self.values
            rise, fall = np.sqrt(p * (hi - lo) * (mode - lo)), np.sqrt((1 - p) * (hi - lo) * (hi - mode))
            return np.where(p * (hi - lo) < mode - lo, lo + rise, hi - fall)
        centre, width = self.values
        if self.dist == "lognormal":
            centre = log(centre)
            low, high = (log(x) if x > 0 else -inf for x in (self.low, self.high))
        else:
            low, high = self.low, self.high
        below, above = ndtr((low - centre) / width), ndtr((high - centre) / width)
        z = centre + width * ndtri(below + p * (above - below))
        return np.clip(np.exp(z) if self.dist == "lognormal" else z, self.low, self.high)

    def sample(self, rng, n):
        """n draws, one in each of n equally likely slices (Latin hypercube), in random order."""
        return self.quantile((rng.permutation(n) + rng.random(n)) / n)


def _number(value):
    """The finite float of a number, NumPy's too, else None."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:  # an integer too large for a float
        return None


def parse(value, name="input"):
    """The Input of a number, a text or a table (or an Input, as it is); ``name`` is the field that errors tell.

    >>> parse("1..3").median
    2.0
    >>> parse({"dist": "lognormal", "median": 2, "sigma": 0.3}).median
    2.0
    """
    if isinstance(value, Input):
        return value
    if isinstance(value, dict):
        return _table(value, name)
    if isinstance(value, str):
        try:
            numbers = [float(x) for x in value.split("..")]
        except ValueError:
            raise wrong(name, value, ALLOWED) from None
        if not all(map(isfinite, numbers)) or len(numbers) > 3:
            raise wrong(name, value, ALLOWED)
        if len(numbers) > 1 and (numbers != sorted(numbers) or numbers[0] == numbers[-1]):
            raise wrong(name, value, "numbers that rise from lo to hi")
        return Input(("fixed", "uniform", "triangular")[len(numbers) - 1], tuple(numbers))
    if _number(value) is None:
        raise wrong(name, value, ALLOWED)
    return Input("fixed", (float(value),))


def _table(table, name):
    dist = table.get("dist")
    if dist not in FIELDS:
        raise wrong(f"{name}.dist", dist, ", ".join(FIELDS))
    centre, width = FIELDS[dist]
    for field in table:
        if field not in ("dist", centre, width, "low", "high"):
            raise wrong(f"{name}: field", field, f"dist, {centre}, {width}, low, high")
    numbers = {field: _number(table.get(field)) for field in (centre, width)}
    numbers |= {field: _number(table[field]) for field in ("low", "high") if field in table}
    for field, number in numbers.items():
        positive = field == width or dist == "lognormal"
        if number is None or (positive and number <= 0 and field != "low"):
            raise wrong(f"{name}.{field}", table.get(field), "a number above 0" if positive else "a number")
    low, high = numbers.get("low", -inf), numbers.get("high", inf)
    if not low < high:
        raise wrong(f"{name}.low", low, f"below high = {high:g}")
    if not low <= numbers[centre] <= high:
        raise wrong(f"{name}.{centre}", numbers[centre], f"low .. high, {low:g} .. {high:g}")
    if dist == "lognormal":
        low = max(low, 0.0)
    return Input(dist, (numbers[centre], numbers[width]), low, high)


def _inputs(inputs):
    if not isinstance(inputs, dict):
        raise wrong("inputs", type(inputs).__name__, "a table of name and input")
    return {name: parse(value, name) for name, value in inputs.items()}


def _call(f, at):
    """f(**at) as a finite float; a CostError with the inputs where it is none."""
    found = _number(f(**at))
    if found is None:
        raise _not_finite(at)
    return found


def _call_all(f, drawn, n):
    """f(**drawn) as n finite floats; a CostError with the first draw where one is none."""
    found = np.asarray(f(**drawn), np.float64)
    if found.shape not in ((), (n,)):
        raise wrong("the result's shape", found.shape, f"() or ({n},)")
    found = np.broadcast_to(found, n)
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise _not_finite({name: values[bad[0]] for name, values in drawn.items()})
    return found.tolist()


def _not_finite(at):
    return CostError(f"the result is not a finite number at {', '.join(f'{k} = {v:g}' for k, v in at.items())}")


def sample(inputs, n, seed=0):
    """name -> n draws of the input [n], independent of one another.

    The same seed gives the same draws, whatever the order of the inputs, and an input's draws stay when others come or go.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise wrong("n", n, "a whole number of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise wrong("seed", seed, "a whole number of at least 0")
    return {name: x.sample(np.random.default_rng([seed, zlib.crc32(name.encode())]), n) for name, x in _inputs(inputs).items()}


def monte_carlo(f, inputs, n=2000, seed=0, each=None, vectorised=False):
    """Spread of f over the draws of ``sample(inputs, n, seed)``.

    f takes the inputs as keyword floats and ``each(done, n)`` is called after every draw. ``vectorised``: f takes all draws
    at once, as arrays [n], and gives [n], or one number for all; ``each`` is not called.
    """
    drawn = sample(inputs, n, seed)
    if vectorised:
        samples = _call_all(f, drawn, n)
    else:
        samples, drawn = [], {name: values.tolist() for name, values in drawn.items()}
        for i in range(n):
            samples.append(_call(f, {name: values[i] for name, values in drawn.items()}))
            if each:
                each(i + 1, n)
    return Spread(*map(float, np.quantile(samples, (0.1, 0.5, 0.9))), tuple(samples))


def tornado(f, inputs):
    """[(name, f at the input's p10, f at its p90)], the others at their median: widest swing first, fixed inputs left out."""
    inputs = _inputs(inputs)
    middle = {name: x.median for name, x in inputs.items()}
    rows = [(name, *(_call(f, {**middle, name: x.quantile(p)}) for p in (0.1, 0.9)))
            for name, x in inputs.items() if not x.fixed]
    return sorted(rows, key=lambda row: -abs(row[2] - row[1]))


def elasticities(f, inputs, step=STEP):
    """name -> d ln f / d ln x at the medians: percent of f per percent of x; 0 for an x of 0.

    Central differences of ``step`` in ln x, which must change f beyond its rounding; one-sided where f refuses (ValueError)
    one side, as at the end of a range.
    Raises CostError where f is 0 or changes sign.
    """
    middle = {name: x.median for name, x in _inputs(inputs).items()}
    base, slopes = _call(f, middle), {}
    for name, x in middle.items():
        ends = []
        for by in (-step, step):
            try:
                ends.append((by, _call(f, {**middle, name: x * exp(by)})))
            except ValueError as error:
                refused = error
        if not ends:
            raise refused
        (a, low), (b, high) = ends if len(ends) == 2 else ((0.0, base), *ends)
        if low * high <= 0:
            raise CostError(f"the result is {low:g} and {high:g} beside {name} = {x:g}, allowed: both above or both below 0")
        slopes[name] = log(high / low) / (b - a)
    return slopes
