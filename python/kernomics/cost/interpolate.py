"""Seconds between measured points: monotone in every dim, exact where measured, utilisation held outside.

    log seconds(x) = multilinear in log x over a grid;  grid node = median(guess, floor, ceiling)
    guess   = log(rates @ features(x)) + smooth residual, made monotone, + log of the mean of measured over guessed seconds
    floor   = the largest measurement whose dims are all <= x;  ceiling = the smallest whose dims are all >= x

The grid is the product of each dim's measured values, continued beyond them. Features are bytes, FLOPs and launches;
their rates >= 0 are fitted to the measurements. The residual (utilisation) is the posterior mean of a Gaussian process
whose covariance is a product of one kernel a dim, so that the grid's covariance is a Kronecker product; measurements
far off their surroundings weigh little (Student t). Steps add seconds, and the mean of scattered seconds lies above what
the mean of their logs says: the guess's last term (Duan's smearing estimate; a ratio counts as ``STRAY`` at most) makes
up for it. All three of guess, floor and ceiling rise with x, so their median does; where measurements agree with a
monotone surface, floor and ceiling meet in each of them. Where they contradict one another the guess decides, and only
a measured point itself still returns its measurement.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import product
from math import ceil, exp, log

import numpy as np

REACH = (2.0, 8.0, 64.0)  # nodes beyond the largest measured value, as multiples of it; past the last nothing is said
APART = 2.1  # largest ratio of neighbouring nodes between measured values: log-linear between them
BELOW = 4  # ratio of the nodes from the smallest measured value down to 1
SOFT = 1024  # a dim that may be 0 is taken in log(x + SOFT)
NOISE = 0.01  # variance of a measurement's scatter over that of the utilisation
LENGTH = 2.5  # e-foldings of a dim over which utilisation changes
OWN = 0.1  # part of the utilisation that each value of a free dim has for itself (a kernel tuned for it alone)
FREEDOM = 2  # degrees of freedom of the scatter
STRAY = 1.5  # measured over guessed seconds from which on a measurement says no more of the mean: some are 100 times off
TRUST = 1.0  # sigmas from the guess beyond which a measurement that contradicts others bounds nothing
DRIFT = 0.15  # added relative error a doubling outside: about what a table cut in half errs on the rest
FALLS = 0.03  # share of neighbours that fall by over a tenth, above which a tuned dim is free
INSTANT = 1e-9  # seconds of a node without work (a collective of one rank)
FOLD = 10  # one measurement in ten is left out to judge the surface
UNJUDGED = 0.5  # relative error where there are too few measurements to leave any out


@dataclass(frozen=True)
class Point:
    """Seconds at a point: ``exact`` where it was measured, ``outside`` in doublings beyond the measurements."""

    seconds: float
    sigma: float
    exact: bool
    outside: float


class Surface:
    """Seconds over integer dims from scattered measurements.

    Parameters
    ----------
    points
        Measured dims, [points, dims].
    seconds
        Measured seconds over 0, [points]; of equal points the fastest counts.
    features
        ``features(x [points, dims]) -> [points, features]``: work >= 0 that rises with every dim but the free ones.
    free
        Columns along which seconds may fall (the ranks that share the work): interpolated, not made monotone.
    tuned
        Columns for whose values kernels are chosen one by one (heads): free where the measurements often fall.
    noise
        Variance of a measurement's scatter over that of the utilisation.
    tiles
        {column: size} of a dim that kernels pad to tiles: utilisation steps where a tile begins.
    continued
        {column: values} of nodes to continue a dim along, where ``REACH`` would not do.
    """

    def __init__(self, points, seconds, features, free=(), tuned=(), noise=NOISE, tiles=None, continued=None):
        x, seconds = distinct(np.asarray(points, dtype=np.int64), np.asarray(seconds, dtype=float))
        free = {*free, *(j for j in tuned if _falls(x, seconds, j) > FALLS)}
        self.dims, self.features, self.rates = x.shape[1], features, fit(features(x), seconds)
        self.ordered = [j for j in range(self.dims) if j not in free]
        core = [np.unique(x[:, j]) for j in range(self.dims)]
        self.axes = [_continued(axis, (continued or {}).get(j)) for j, axis in enumerate(core)]
        self.shift = [SOFT if axis[0] == 0 else 0 for axis in self.axes]
        self.logs = [np.log(axis + shift) for axis, shift in zip(self.axes, self.shift)]
        at = tuple(np.searchsorted(a, x[:, j]) for j, a in enumerate(self.axes))  # node of each measurement
        core_at = tuple(np.searchsorted(c, x[:, j]) for j, c in enumerate(core))
        nodes = np.stack(np.meshgrid(*self.axes, indexing="ij"), -1).reshape(-1, self.dims)
        base = np.log(np.maximum(features(nodes) @ self.rates, INSTANT)).reshape([len(a) for a in self.axes])
        within, onto = [], []  # covariances of the measured values, of all nodes with them
        for j, (axis, c, shift) in enumerate(zip(self.axes, core, self.shift)):
            tile = (tiles or {}).get(j)
            within.append(_kernel(c + shift, c + shift, tile, j in free))
            onto.append(_kernel(np.clip(axis, c[0], c[-1]) + shift, c + shift, tile, j in free))
        y = np.log(seconds)
        residual = y - base[at]

        def complete(rows, weights):
            """Log seconds of every node from some of the measurements."""
            seen = tuple(i[rows] for i in core_at)
            smooth, weights = _smooth(within, onto, seen, residual[rows], noise, weights)
            return self._monotone(base + smooth, tuple(i[rows] for i in at), y[rows]), weights

        self.grid, weights = complete(slice(None), None)
        self.measured = np.full(base.shape, np.nan)  # NaN where nobody measured
        self.measured[at] = seconds
        self.outside = self._distance(~np.isnan(self.measured))
        self.sigma = UNJUDGED
        if len(x) >= 2 * FOLD:
            out = np.arange(len(x)) % FOLD == FOLD // 2
            judged, _ = complete(~out, weights[~out])
            self.sigma = float(np.quantile(np.abs(judged[at] - y)[out], 0.6827))
        self._lists = [axis.tolist() for axis in self.axes]

    def _monotone(self, guess, at, y):
        """Log seconds of the nodes, monotone, from a guess and the measurements y at some of them."""
        for _ in range(3):
            for j in self.ordered:
                guess = _isotonic(guess, j)
        guess = (self._rising(guess) + self._falling(guess)) / 2
        error = y - guess[at]
        bounds = np.ones(len(y), bool)
        floor, ceiling = self._bounds(guess.shape, at, y, bounds)
        bounds = (floor[at] <= ceiling[at]) | (np.abs(error) <= TRUST * 1.4826 * np.median(np.abs(error)))
        floor, ceiling = self._bounds(guess.shape, at, y, bounds)
        guess += log(np.mean(np.exp(np.minimum(error, log(STRAY)))))
        return np.clip(guess, np.minimum(floor, ceiling), np.maximum(floor, ceiling))

    def _bounds(self, shape, at, y, rows):
        """(largest measurement that each node dominates, smallest that dominates it), infinite where there is none."""
        floor, ceiling = np.full(shape, -np.inf), np.full(shape, np.inf)
        some = tuple(i[rows] for i in at)
        floor[some] = ceiling[some] = y[rows]
        return self._rising(floor), self._falling(ceiling)

    def _rising(self, grid):
        """Running maximum along every ordered axis."""
        for j in self.ordered:
            grid = np.maximum.accumulate(grid, axis=j)
        return grid

    def _falling(self, grid):
        """Running minimum from the far end along every ordered axis."""
        for j in self.ordered:
            grid = np.flip(np.minimum.accumulate(np.flip(grid, j), axis=j), j)
        return grid

    def _distance(self, known):
        """Doublings of each node beyond the measurements: 0 where one has all dims <= and one all dims >= the node's."""
        total = 0.0
        for ahead in (1, -1):
            far = np.where(known, 0.0, np.inf)
            for j, logs in enumerate(self.logs):
                line = np.moveaxis(far, j, 0)[::ahead]  # views: written through
                gaps = np.abs(np.diff(logs[::ahead])) / log(2)
                for i, gap in enumerate(gaps):
                    np.minimum(line[i + 1], line[i] + gap, out=line[i + 1])
                np.minimum.accumulate(line[::-1], axis=0, out=line[::-1])  # whatever a measurement dominates is inside
            total = total + far
        return total

    def seconds(self, x):
        """The Point at dims ``x``; None beyond the reach of the grid."""
        corner, weights = [], []
        for value, axis, shift in zip(x, self._lists, self.shift):
            if value < axis[0] or value > axis[-1]:
                return None
            i = bisect_right(axis, value) - 1
            if value == axis[i]:
                corner.append((i,))
                weights.append((1.0,))
            else:
                w = log((value + shift) / (axis[i] + shift)) / log((axis[i + 1] + shift) / (axis[i] + shift))
                corner.append((i, i + 1))
                weights.append((1 - w, w))
        nodes = list(product(*corner))
        if len(nodes) == 1:
            measured = float(self.measured[nodes[0]])
            if measured == measured:
                return Point(measured, 0.0, True, 0.0)
        value = outside = 0.0
        for node, ws in zip(nodes, product(*weights)):
            w = 1.0
            for part in ws:
                w *= part
            value += w * self.grid[node]
            outside += w * self.outside[node]
        return Point(exp(value), self.sigma + DRIFT * float(outside), False, float(outside))

    def many(self, x):
        """Seconds at dims ``x`` [points, dims]; NaN beyond the reach of the grid."""
        x = np.asarray(x, dtype=np.int64)
        low, part, inside = [], [], np.ones(len(x), bool)
        for j, (axis, logs) in enumerate(zip(self.axes, self.logs)):
            inside &= (x[:, j] >= axis[0]) & (x[:, j] <= axis[-1])
            value = np.clip(x[:, j], axis[0], axis[-1])
            i = np.searchsorted(axis, value, side="right") - 1
            gap = logs[np.minimum(i + 1, len(axis) - 1)] - logs[i]
            low.append(i)
            part.append((np.log(value + self.shift[j]) - logs[i]) / np.where(gap > 0, gap, 1))
        total = np.zeros(len(x))
        for upper in product((False, True), repeat=self.dims):
            node = tuple(np.minimum(i + u, len(a) - 1) for i, u, a in zip(low, upper, self.axes))
            total += np.prod([p if u else 1 - p for p, u in zip(part, upper)], axis=0) * self.grid[node]
        at_node = np.all([p == 0 for p in part], axis=0)
        measured = np.where(at_node, self.measured[tuple(low)], np.nan)
        return np.where(inside, np.where(np.isnan(measured), np.exp(total), measured), np.nan)


def fit(features, seconds):
    """Rates >= 0 with the least squared relative error of ``features @ rates``, tried over every subset in use."""
    a = features / seconds[:, None]  # [points, features]; wanted: a @ rates = 1
    scale = np.maximum(a.max(axis=0), 1e-300)
    a = a / scale
    gram, side, best = a.T @ a, a.sum(axis=0), (np.inf, None)
    for use in map(np.array, product((False, True), repeat=a.shape[1])):
        rates = np.zeros(len(use))
        rates[use] = np.linalg.lstsq(gram[np.ix_(use, use)], side[use], rcond=None)[0]
        left = rates @ gram @ rates - 2 * side @ rates
        if (rates >= 0).all() and (rates > 0).any() and left < best[0]:
            best = (left, rates)
    return best[1] / scale


def _falls(x, seconds, j):
    """Share of the pairs of measurements next to each other along a dim of which the larger takes a tenth less."""
    others = np.delete(x, j, 1)
    order = np.lexsort((x[:, j], *others.T))
    pair = (others[order][1:] == others[order][:-1]).all(axis=1)
    return np.mean(np.diff(np.log(seconds[order]))[pair] < -0.1) if pair.any() else 0.0


def distinct(x, seconds):
    """Points in order without repetition, each with its least seconds."""
    order = np.lexsort((seconds, *x.T[::-1]))
    x, seconds = x[order], seconds[order]
    first = np.r_[True, (x[1:] != x[:-1]).any(axis=1)]
    return x[first], seconds[first]


def _continued(axis, values=None):
    """A dim's nodes: its measured values, some between those far apart, those below down to 1, and those beyond."""
    beyond = np.multiply(REACH, axis[-1]) if values is None else values
    nodes = [int(axis[0])]
    while nodes[-1] > 1:
        nodes.append(max(1, nodes[-1] // BELOW))
    nodes += [*axis.tolist(), *(int(v) for v in beyond if v > axis[-1])]
    for a, b in zip(axis[:-1].tolist(), axis[1:].tolist()):
        parts = ceil(log(b / a) / log(APART)) if a else 1
        nodes += [round(a * (b / a) ** (i / parts)) for i in range(1, parts)]
    return np.array(sorted(set(nodes)))


def _kernel(values, others, tile=None, free=False):
    """Covariance of a dim's values: Matern 3/2 in log value; of a tiled dim 1/2, half of it in the padded value."""
    logs, to = np.log(values), np.log(others)
    if tile:
        logs, to = ((l + np.log(np.ceil(v / tile) * tile)) / 2 for l, v in ((logs, values), (to, others)))
    far = np.abs(logs[:, None] - to[None, :]) / LENGTH
    near = np.exp(-LENGTH * far) if tile else (1 + np.sqrt(3) * far) * np.exp(-np.sqrt(3) * far)
    return (1 - OWN) * near + OWN * (values[:, None] == others[None, :]) if free else near


def _times(kernels, grid):
    """Kronecker product of the kernels times a grid."""
    for k in kernels:  # each axis in turn comes first and goes last
        grid = (k @ grid.reshape(len(grid), -1)).T.reshape(*grid.shape[1:], len(k))
    return grid


def _smooth(within, onto, at, values, noise, weights=None):
    """(posterior mean at all nodes, weights) of a Gaussian process seen at measured nodes ``at``.

    Without weights they follow from the Student t scatter around the mean, in three rounds.
    """
    rounds = 1 if weights is not None else 3
    weights = np.ones(len(values)) if weights is None else weights
    grid = np.zeros([len(k) for k in within])
    flat, at = grid.reshape(-1), np.ravel_multi_index(at, grid.shape)
    scaled = None
    for _ in range(rounds):
        root = np.sqrt(weights / noise)
        mean = np.average(values, weights=weights)

        def matrix(v, root=root):
            flat[at] = root * v
            return root * _times(within, grid).reshape(-1)[at] + v

        start = None if scaled is None else scaled / root
        scaled = root * _solve(matrix, root * (values - mean), start)
        flat[at] = scaled
        error = values - mean - _times(within, grid).reshape(-1)[at]
        spread = max(1.4826 * np.median(np.abs(error)), 1e-6)
        if rounds > 1:
            used, weights = weights, (FREEDOM + 1) / (FREEDOM + (error / spread) ** 2)
    return mean + _times(onto, grid), used if rounds > 1 else weights


def _solve(matrix, side, start=None, steps=100, tolerance=2e-3):
    """Conjugate gradients."""
    v = np.zeros_like(side) if start is None else start.copy()
    left = side.copy() if start is None else side - matrix(v)
    ahead, size, stop = left.copy(), left @ left, tolerance**2 * (side @ side)
    for _ in range(steps):
        if size <= stop:
            break
        image = matrix(ahead)
        step = size / (ahead @ image)
        v += step * ahead
        left -= step * image
        ahead, size = left + (left @ left) / size * ahead, left @ left
    return v


def _isotonic(grid, axis):
    """The nearest grid, in least squares, that rises along an axis: neighbours out of order are pooled, all lines at once."""
    lines = np.moveaxis(grid, axis, -1)
    shape, length = lines.shape, lines.shape[-1]
    mean, count = lines.reshape(-1).copy(), np.ones(lines.size)
    first = np.arange(lines.size)  # where each pool begins
    while True:
        joined = (mean[1:] < mean[:-1]) & (first[1:] // length == first[:-1] // length)
        if not joined.any():
            break
        starts = np.flatnonzero(np.r_[True, ~joined])
        total = np.add.reduceat(mean * count, starts)
        count = np.add.reduceat(count, starts)
        mean, first = total / count, first[starts]
    return np.moveaxis(np.repeat(mean, count.astype(int)).reshape(shape), -1, axis)
