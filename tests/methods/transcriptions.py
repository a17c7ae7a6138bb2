"""Published caching methods as plain loops over lists: the reference that policy files are compared with.

Each function states one method as its authors' code or paper does, on one trajectory. Nothing of the package is
imported. Streams are lists of vectors, one vector of floats a step. `True` in a result means that the step computes.
The functions of values return what the method answers, `None` where it computes.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator, Sequence

Vector = Sequence[float]
Stream = Sequence[Vector]


# --- norms -----------------------------------------------------------------------------------------------


def mean_abs(vector: Vector) -> float:
    """Mean of the absolute values."""
    return sum(abs(number) for number in vector) / len(vector)


def minus(left: Vector, right: Vector) -> list[float]:
    """Difference, element by element."""
    return [a - b for a, b in zip(left, right, strict=True)]


def relative_l1(new: Vector, old: Vector) -> float:
    """Mean absolute change over the mean absolute value of the anchor; NaN where both are 0."""
    change, scale = mean_abs(minus(new, old)), mean_abs(old)
    if scale == 0:
        return math.nan if change == 0 else math.inf
    return change / scale


def polynomial(coefficients: Sequence[float], x: float) -> float:
    """Polynomial with the highest power first, by Horner's rule."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


def cosine(left: Vector, right: Vector) -> float:
    """Cosine of the angle between two vectors."""
    dot = sum(a * b for a, b in zip(left, right, strict=True))
    norms = math.sqrt(sum(a * a for a in left)) * math.sqrt(sum(b * b for b in right))
    return dot / norms if norms else math.nan


# --- schedules of the clock alone ------------------------------------------------------------------------


def taylorseer(steps: int, interval: int, first: int) -> list[bool]:
    """TaylorSeer (arXiv:2503.06923), the authors' schedule: a counter of skips since the last full step."""
    computed = list[bool]()
    counter = 0
    for step in range(steps):
        full = step < first or counter == interval - 1
        counter = 0 if full else counter + 1
        computed.append(full)
    return computed


def taylorseer_diffusers(steps: int, interval: int, before: int, after: int | None = None) -> list[bool]:
    """TaylorSeer as diffusers schedules it: the interval starts anew after the warm-up, with a prediction."""
    return [
        step < before or (after is not None and step >= after) or (step - before - 1) % interval == 0
        for step in range(steps)
    ]


def delta_dit(steps: int, interval: int, boundary: float) -> tuple[list[bool], list[bool]]:
    """Delta-DiT (arXiv:2406.01125): the rear blocks are cached before the boundary, the front blocks after it.

    Returns:
        What the front blocks compute, and what the rear blocks compute.
    """
    front, rear = list[bool](), list[bool]()
    for step in range(steps):
        early = step / steps < boundary
        tick = step == 0 or step % interval == 0
        rear.append(tick or not early)
        front.append(tick or early)
    return front, rear


def blockdance(steps: int, interval: int, begin: float) -> list[bool]:
    """BlockDance (arXiv:2503.15927): the structural blocks are reused in the later stage, every Nth step computes."""
    return [step / steps <= begin or step % interval == 0 for step in range(steps)]


def spectrum_window(steps: int, start: float, flex: float, warmup: int, stop: float) -> list[bool]:
    """Spectrum (arXiv:2603.01623): the window grows by `flex` at each computed step after the warm-up."""
    computed = list[bool]()
    window, cached = start, 0
    for step in range(steps):
        if step < warmup or step >= int(stop * steps):
            full = True
        else:
            full = (cached + 1) % math.floor(window) == 0
            if full:
                window += flex
        cached = 0 if full else cached + 1
        computed.append(full)
    return computed


# --- schedules of a signal -------------------------------------------------------------------------------


def first_block_cache(
    residuals: Stream,
    threshold: float,
    *,
    warmup: int = 0,
    streak: int | None = None,
    window: tuple[float, float] = (-1.0, 2.0),
) -> list[bool]:
    """First Block Cache: the anchor is the first block's residual of the last computed step.

    `warmup`: Steps that compute before anything is reused.
    `streak`: Most reuses in a row.
    `window`: Shares of the trajectory between which steps may reuse.
    """
    computed = list[bool]()
    anchor: Vector | None = None
    hits = 0
    for step, residual in enumerate(residuals):
        share = step / max(1, len(residuals) - 1)
        full = (
            anchor is None
            or step < warmup
            or not window[0] < share < window[1]
            or (streak is not None and hits >= streak)
            or not relative_l1(residual, anchor) <= threshold
        )
        if full:
            anchor, hits = residual, 0
        else:
            hits += 1
        computed.append(full)
    return computed


def teacache(probes: Stream, coefficients: Sequence[float], threshold: float) -> list[bool]:
    """TeaCache (arXiv:2411.19108): the rescaled change since the previous step is added up until it is too large."""
    computed = list[bool]()
    total, previous = 0.0, probes[0]
    for step, probe in enumerate(probes):
        if step in (0, len(probes) - 1):
            full = True
        else:
            total += polynomial(coefficients, relative_l1(probe, previous))
            full = not total < threshold
        if full:
            total = 0.0
        previous = probe
        computed.append(full)
    return computed


def magcache(
    ratios: Sequence[float], threshold: float, most: int, retention: float, *, inclusive: bool = True
) -> list[bool]:
    """MagCache (arXiv:2506.09045): the product of calibrated ratios, and the sum of its distances from 1."""
    computed = list[bool]()
    product, error, skipped = 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        full = True
        if step >= int(retention * len(ratios) + 0.5) and step > 0:
            product *= ratio
            skipped += 1
            error += abs(1 - product)
            small = error <= threshold if inclusive else error < threshold
            full = not (small and skipped <= most)
        if full:
            product, error, skipped = 1.0, 0.0, 0
        computed.append(full)
    return computed


def dbcache(
    residuals: Stream,
    threshold: float,
    *,
    warmup: int = 8,
    streak: int = -1,
    most: int = -1,
    total: float | None = None,
    mask: str | None = None,
) -> list[bool]:
    """DBCache of cache-dit: warm-up, step mask, bounds and then the change of the first blocks' residual.

    `residuals`: What the first Fn blocks add to the hidden states.
    `streak`: Most cached steps in a row, -1 without a limit.
    `most`: Most cached steps of the trajectory, -1 without a limit.
    `total`: Largest sum of the changes of cached steps over the trajectory.
    `mask`: `1` for a step that must compute.
    """
    computed = list[bool]()
    anchor: Vector | None = None
    run, cached, accumulated = 0, 0, 0.0
    for step, residual in enumerate(residuals):
        full = (
            anchor is None
            or step < warmup
            or (mask is not None and mask[step] == "1")
            or (most >= 0 and cached >= most)
            or (streak >= 0 and run >= streak)
            or (total is not None and accumulated >= total)
        )
        if not full:
            assert anchor is not None
            change = relative_l1(residual, anchor)
            full = not change < threshold
            if not full:
                accumulated += change
        if full:
            anchor, run = residual, 0
        else:
            run, cached = run + 1, cached + 1
        computed.append(full)
    return computed


def dbprune(inputs: Sequence[Stream], threshold: float, warmup: int) -> list[list[bool]]:
    """DBPrune of cache-dit: each block alone, by the change of its own input since it last ran.

    `inputs`: For each block, its input at each step.

    Returns:
        For each block, what it computes.
    """
    rows = list[list[bool]]()
    for stream in inputs:
        anchor: Vector | None = None
        row = list[bool]()
        for step, value in enumerate(stream):
            full = anchor is None or step < warmup or not relative_l1(value, anchor) < threshold
            if full:
                anchor = value
            row.append(full)
        rows.append(row)
    return rows


def easycache(inputs: Stream, outputs: Stream, threshold: float, warmup: int) -> list[bool]:
    """EasyCache (arXiv:2507.02860): the input's change since the previous step, times the rate of the model.

    The rate is the change of the output over the change of the input between the last two computed steps. `outputs`
    has what the model would compute at each step.
    """
    steps = len(inputs)
    computed = list[bool]()
    kept = list[int]()  # the computed steps
    total = 0.0
    for step in range(steps):
        full = step < warmup or step == steps - 1 or len(kept) < 2
        if not full:
            last, before = kept[-1], kept[-2]
            rate = mean_abs(minus(outputs[last], outputs[before])) / mean_abs(minus(inputs[last], inputs[before]))
            total += rate * mean_abs(minus(inputs[step], inputs[step - 1])) / mean_abs(outputs[last])
            full = not total < threshold
        if full:
            kept.append(step)
            total = 0.0
        computed.append(full)
    return computed


def ucache(
    inputs: Stream,
    outputs: Stream,
    threshold: float,
    *,
    decay: float = 1.0,
    window: tuple[float, float] = (0.15, 0.95),
    multipliers: tuple[float, float] = (0.5, 1.5),
    gain: float = 1.6,
) -> list[bool]:
    """UCache of stable-diffusion.cpp: EasyCache anchored at the last computed step, with penalties.

    It knows the computed steps of its window alone. Each estimate is divided by the geometric mean of the output's size
    and of the moving average of its changes, and grows by half for each cached step in a row. The threshold depends on
    how many steps of the window have been computed.
    """
    steps = len(inputs)
    start = min(int(window[0] * steps), steps - 1)
    end = min(int(window[1] * steps), steps - 1)
    computed = list[bool]()
    anchor: tuple[Vector, Vector] | None = None
    rate: float | None = None
    average: float | None = None
    total, hits, active = 0.0, 0, 0
    for step, (x, v) in enumerate(zip(inputs, outputs, strict=True)):
        if not start <= step < end:
            computed.append(True)
            continue
        moved: float | None = None
        if anchor is not None:
            moved = mean_abs(minus(x, anchor[0]))
            if rate is not None:
                size = max(mean_abs(anchor[1]), 1e-6)
                scale = math.sqrt(size * (size if average is None else max(gain * average, 1e-6)))
                total = total * decay + rate * moved / scale * (1 + 0.5 * hits)
                share = active / steps
                limit = threshold * (multipliers[0] if share < 0.2 else multipliers[1] if share > 0.8 else 1.0)
                if total < limit:
                    hits += 1
                    computed.append(False)
                    continue
                total = 0.0
        computed.append(True)
        hits, active = 0, active + 1
        if anchor is not None:
            assert moved is not None
            change = mean_abs(minus(v, anchor[1]))
            average = change if average is None else 0.8 * average + 0.2 * change
            rate = change / moved
        anchor = x, v
    return computed


def seacache(
    probes: Stream, threshold: float, *, retention: int = 1, end: int = 1, streak: int | None = None
) -> list[bool]:
    """SeaCache (arXiv:2602.18993): the change of the filtered probe since the previous step, added up.

    `probes`: The probe after `wiener_filter`.
    """
    steps = len(probes)
    computed = list[bool]()
    total, hits = 0.0, 0
    for step, probe in enumerate(probes):
        full = step < retention or step >= steps - end or (streak is not None and hits >= streak)
        if not full:
            total += relative_l1(probe, probes[step - 1])
            full = not total < threshold
        if full:
            total, hits = 0.0, 0
        else:
            hits += 1
        computed.append(full)
    return computed


def adacache(residuals: Stream, codebook: Sequence[tuple[float, int]]) -> list[bool]:
    """AdaCache (arXiv:2411.02397): each computed step sets how many steps later the next one computes.

    The change is divided by the steps since the previous computed step. Steps 0 and 1 and the last two compute.

    `codebook`: Pairs of a largest change and the number of steps to the next computed one, in ascending order.
    """
    steps = len(residuals)
    computed = list[bool]()
    last, due = -1, 0
    for step in range(steps):
        full = step in (0, 1) or step >= steps - 2 or step >= due
        if full:
            rate = 1
            if last >= 0:
                change = relative_l1(residuals[step], residuals[last]) / (step - last)
                rate = next((number for limit, number in codebook if change < limit), codebook[-1][1])
            last, due = step, step + rate
        computed.append(full)
    return computed


def foresight(outputs: Sequence[Stream], gamma: float, warmup: int, interval: int) -> list[list[bool]]:
    """Foresight (arXiv:2506.00329): each block by the squared change of its output, against that of the warm-up.

    `outputs`: For each block, what it would compute at each step.
    """
    rows = list[list[bool]]()
    for stream in outputs:
        row = list[bool]()
        kept = list[int]()
        limit, change = math.nan, math.nan
        for step in range(len(stream)):
            full = step < warmup or step % interval == 0 or not change <= limit
            if full:
                if kept:
                    difference = minus(stream[step], stream[kept[-1]])
                    change = sum(number * number for number in difference) / len(difference)
                kept.append(step)
                if step == warmup - 1:
                    limit = gamma * change
            row.append(full)
        rows.append(row)
    return rows


def bwcache(outputs: Sequence[Stream], threshold: float, first: int, interval: int) -> list[bool]:
    """BWCache (arXiv:2509.13789): all blocks, by the mean change of their outputs between the last computed steps.

    `outputs` has for each block what it would compute at each step.
    """
    computed = list[bool]()
    kept = list[int]()
    for step in range(len(outputs[0])):
        full = step < first or step - kept[-1] >= interval
        if not full:
            new, old = kept[-1], kept[-2]
            changes = [relative_l1(stream[new], stream[old]) for stream in outputs]
            full = not sum(changes) / len(changes) < threshold
        if full:
            kept.append(step)
        computed.append(full)
    return computed


def adaptive_guidance(cond: Stream, uncond: Stream, gamma: float) -> list[bool]:
    """Adaptive Guidance (arXiv:2312.12487): the unconditional branch runs until both predictions are nearly alike.

    The similarity of a step decides from the next step on, and for the rest of the trajectory.
    """
    computed = list[bool]()
    alike = False
    for positive, negative in zip(cond, uncond, strict=True):
        computed.append(not alike)
        if not alike:
            alike = cosine(positive, negative) >= gamma
    return computed


def guidance_interval(steps: int, first: int, last: int) -> list[bool]:
    """Guidance at the steps from `first` to `last` (arXiv:2404.07724)."""
    return [first <= step <= last for step in range(steps)]


def guider_window(steps: int, start: float, stop: float) -> list[bool]:
    """Guidance as the guiders of diffusers limit it to a share of the steps."""
    return [int(start * steps) <= step < int(stop * steps) for step in range(steps)]


def dicache(
    inputs: Stream, outputs: Stream, threshold: float, *, full: int, last: int, difference: bool = False
) -> list[bool]:
    """DiCache (arXiv:2508.17356): the change of the first blocks' output since the previous step, added up.

    `full` is the number of steps that compute at the beginning, `last` at the end. With `difference` the change of the
    input is taken off.
    """
    steps = len(inputs)
    computed = list[bool]()
    total = 0.0
    for step in range(steps):
        runs = step == 0 or step < full or step >= steps - last
        if not runs:
            change = relative_l1(outputs[step], outputs[step - 1])
            total += abs(change - relative_l1(inputs[step], inputs[step - 1])) if difference else change
            runs = not total < threshold
        if runs:
            total = 0.0
        computed.append(runs)
    return computed


def dicache_values(probes: Stream, residuals: Stream, computed: Sequence[bool], most: float) -> list[Vector]:
    """What DiCache adds to the hidden states: residuals that move on as far as those of the probe have moved."""
    answers, kept = list[Vector](), list[int]()
    for step, runs in enumerate(computed):
        if runs:
            kept.append(step)
            answers.append(residuals[step])
        elif len(kept) < 2:
            answers.append(residuals[kept[-1]])
        else:
            new, old = kept[-1], kept[-2]
            far = mean_abs(minus(probes[step], probes[old])) / mean_abs(minus(probes[new], probes[old]))
            far = min(max(far, 1.0), most)
            answers.append([b + far * (a - b) for a, b in zip(residuals[new], residuals[old], strict=True)])
    return answers


# --- schedules of several kinds of modules ---------------------------------------------------------------


def tgate(steps: int, gate: int, warmup: int, interval: int, late: int) -> tuple[list[bool], list[bool], list[bool]]:
    """T-GATE (arXiv:2404.02747): steps with guidance, and those that compute self-attention and cross-attention."""
    guided, own, other = list[bool](), list[bool](), list[bool]()
    for step in range(steps):
        if step < gate - 1:
            own.append(step <= warmup or step % interval == 0)
        elif step == gate - 1:
            own.append(True)
        else:
            own.append(step % late == 0)
        guided.append(step < gate)
        other.append(step < gate)
    return guided, own, other


def tgate_values(
    own: tuple[Stream, Stream], other: tuple[Stream, Stream], gate: int, warmup: int, interval: int, late: int
) -> tuple[list[Vector], list[Vector]]:
    """What T-GATE's self-attention and cross-attention give the conditional half.

    Both are given as streams of the unconditional and of the conditional half. Before the gate the results of both
    halves are kept as they are, at the last step before it the mean of both, and later those of the conditional half.
    """
    steps = len(own[0])
    _, runs, _ = tgate(steps, gate, warmup, interval, late)
    given, crossed = list[Vector](), list[Vector]()
    kept: Vector = ()
    settled: Vector = ()
    for step in range(steps):
        if runs[step]:
            given.append(own[1][step])
            halves = zip(own[0][step], own[1][step], strict=True)
            kept = [(a + b) / 2 for a, b in halves] if step == gate - 1 else own[1][step]
        else:
            given.append(kept)
        if step < gate:
            settled = [(a + b) / 2 for a, b in zip(other[0][step], other[1][step], strict=True)]
            crossed.append(other[1][step])
        else:
            crossed.append(settled)
    return given, crossed


def deepcache(steps: int, interval: int) -> list[bool]:
    """DeepCache (arXiv:2312.00858): the steps at which the whole U-Net runs."""
    return [step % interval == 0 for step in range(steps)]


def deepcache_modules(down: Sequence[int], up: Sequence[int], branch: int) -> set[str]:
    """The layers below DeepCache's cut, from the numbers of layers of the blocks: what its helper skips."""
    layer, block = branch % 3, branch // 3
    skipped = {"mid_block"}
    for number, layers in enumerate(down):
        for index in range(layers):
            if number > block or (number == block and index >= layer):
                skipped.add(f"down_blocks.{number}.{index}")
    for number, layers in enumerate(up):
        from_end = len(up) - 1 - number
        for index in range(layers):
            if from_end > block or (from_end == block and layers - 1 - index > layer):
                skipped.add(f"up_blocks.{number}.{index}")
    return skipped


def smoothcache(errors: Sequence[Sequence[float]], limit: float) -> list[bool]:
    """SmoothCache (arXiv:2411.10510): after a computed step, as many steps reuse as keep the error below the limit.

    `errors` has for each step the errors of its output one, two and three steps later. The last step computes.
    """
    steps = len(errors)
    computed = [False] * steps
    step = 0
    while step < steps:
        computed[step] = True
        reach = 0
        for distance, error in enumerate(errors[step], 1):
            if error <= limit:
                reach = distance
        step += reach + 1
    computed[-1] = True
    return computed


def learning_to_cache(scores: Sequence[Sequence[float]], threshold: float, *, alternate: bool) -> list[list[bool]]:
    """Learning-to-Cache (arXiv:2406.01733), and HarmoniCa (arXiv:2410.01723) without alternation.

    `scores` has for each module its score at each step, the number of the step counted from the end.
    """
    rows = list[list[bool]]()
    for module in scores:
        row, kept = list[bool](), False
        for step in range(len(module)):
            left = len(module) - 1 - step
            if alternate and left % 2 == 1:
                kept = False
            row.append(not kept or module[left] > threshold)
            kept = True
        rows.append(row)
    return rows


# --- what is answered ------------------------------------------------------------------------------------


def _differences(values: Sequence[float], computed: Sequence[bool], order: int) -> Iterator[tuple[int, list[float]]]:
    """For each step, the steps since the last full one and TaylorSeer's recursive differences over the gap."""
    factors = list[float]()
    last = -1
    for step, value in enumerate(values):
        if computed[step]:
            new = [value]
            for i in range(min(order, len(factors))):
                new.append((new[i] - factors[i]) / (step - last))
            factors, last = new, step
        yield step - last, factors


def taylor_values(values: Sequence[float], computed: Sequence[bool], order: int) -> list[float | None]:
    """TaylorSeer's prediction: powers of the steps since the last full one; no value at a full step."""
    return [
        sum(factor * k**i / math.factorial(i) for i, factor in enumerate(factors)) if k else None
        for k, factors in _differences(values, computed, order)
    ]


def hermite_values(values: Sequence[float], computed: Sequence[bool], order: int, scale: float) -> list[float | None]:
    """HiCache's prediction (arXiv:2508.16984): TaylorSeer with scaled Hermite polynomials of the physicists."""
    answers = list[float | None]()
    for k, factors in _differences(values, computed, order):
        if not k:
            answers.append(None)
            continue
        x = scale * k
        polynomials = [1.0, 2 * x]
        for i in range(1, order):
            polynomials.append(2 * x * polynomials[i] - 2 * i * polynomials[i - 1])
        answer = factors[0]
        for i in range(1, len(factors)):
            answer += factors[i] / math.factorial(i) * scale**i * polynomials[i]
        answers.append(answer)
    return answers


def bdf2_values(values: Sequence[float], computed: Sequence[bool]) -> list[float | None]:
    """BDF2 with the slope of the last two computed steps, on a grid of the steps ahead.

    With the newest value f1 at distance k and the one before, f2, at distance k + g, the scheme of second order with
    variable steps is solved for the value ahead, where the derivative is (f1 - f2) / g.
    """
    answers = list[float | None]()
    kept = list[tuple[int, float]]()
    for step, value in enumerate(values):
        if computed[step]:
            kept.append((step, value))
            answers.append(None)
        elif len(kept) < 2:
            answers.append(kept[-1][1])
        else:
            (older, f2), (newer, f1) = kept[-2:]
            k, gap = step - newer, newer - older
            ratio = k / gap
            slope = (f1 - f2) / gap
            # (1 + 2r)/(1 + r) y - (1 + r) f1 + r^2/(1 + r) f2 = k slope
            y = (k * slope + (1 + ratio) * f1 - ratio * ratio / (1 + ratio) * f2) * (1 + ratio) / (1 + 2 * ratio)
            answers.append(y)
    return answers


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination with pivots."""
    size = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(size):
            if r != i:
                factor = rows[r][i] / rows[i][i]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def chebyshev_value(history: Sequence[tuple[float, float]], at: float, order: int, ridge: float, mix: float) -> float:
    """Spectrum's forecast: ridge regression on Chebyshev polynomials, mixed with half a step of the last slope.

    `history`: Positions in [-1, 1] and values of the computed steps, the oldest first.
    `at`: Position of the forecast.
    """

    def basis(x: float) -> list[float]:
        terms = [1.0, x]
        while len(terms) <= order:
            terms.append(2 * x * terms[-1] - terms[-2])
        return terms[: order + 1]

    rows = [basis(x) for x, _ in history]
    matrix = [
        [sum(row[i] * row[j] for row in rows) + (ridge if i == j else 0.0) for j in range(order + 1)]
        for i in range(order + 1)
    ]
    right = [sum(row[i] * value for row, (_, value) in zip(rows, history, strict=True)) for i in range(order + 1)]
    coefficients = _solved(matrix, right)
    fitted = sum(c * b for c, b in zip(coefficients, basis(at), strict=True))
    newest, before = history[-1][1], history[-2][1]
    return mix * fitted + (1 - mix) * (newest + 0.5 * (newest - before))


def _transformed(vector: Sequence[complex], sign: float) -> list[complex]:
    size = len(vector)
    return [
        sum(value * cmath.exp(sign * 2j * math.pi * k * n / size) for n, value in enumerate(vector))
        for k in range(size)
    ]


def wiener_filter(grid: Sequence[Vector], sigma: float, beta: float) -> list[list[float]]:
    """SeaCache's spectral filter on a grid of two axes.

    The gain of an axis at frequency f is a S / (a^2 S + b^2) with S = |f|^-beta, a = 1 - sigma, b = sigma. The gains of
    the axes are multiplied and divided by their mean. The frequency 0 takes the value of the lowest one.
    """
    height, width = len(grid), len(grid[0])

    def gains(size: int) -> list[float]:
        frequencies = [min(k, size - k) / size for k in range(size)]
        lowest = min((f for f in frequencies if f > 0), default=1.0)
        result = list[float]()
        for f in frequencies:
            power = max(f, lowest) ** -beta
            a, b = 1 - sigma, sigma
            result.append(a * power / (a * a * power + b * b))
        return result

    rows, columns = gains(height), gains(width)
    total = sum(r * c for r in rows for c in columns) / (height * width)
    spectrum = [_transformed([complex(x) for x in row], -1) for row in grid]
    spectrum = [
        list(column) for column in zip(*(_transformed(c, -1) for c in zip(*spectrum, strict=True)), strict=True)
    ]
    scaled = [[spectrum[i][j] * rows[i] * columns[j] / total for j in range(width)] for i in range(height)]
    back = [_transformed(row, 1) for row in scaled]
    back = [list(column) for column in zip(*(_transformed(c, 1) for c in zip(*back, strict=True)), strict=True)]
    return [[value.real / (height * width) for value in row] for row in back]


def align_scale(probe: Vector, newest: Vector, before: Vector, low: float, high: float) -> float:
    """DiCache's scale: how far the probe moved from the older anchor, over how far the anchors are apart."""
    apart = mean_abs(minus(newest, before))
    ratio = mean_abs(minus(probe, before)) / apart if apart else math.nan
    return min(max(ratio, low), high)


def _cosine_wave(size: int, k: int, n: int) -> float:
    """Element n of wave k of the orthonormal DCT-II."""
    return math.sqrt((1 if k == 0 else 2) / size) * math.cos(math.pi * (n + 0.5) * k / size)


def grid_bands(grid: Sequence[Vector], cut: float) -> tuple[list[list[float]], list[list[float]]]:
    """FreqCa's split (arXiv:2510.08669) of a grid by the DCT of both axes: the low band and the high band.

    The low band has the waves whose distance from the frequency 0 is at most the share `cut` of the largest one.
    """
    height, width = len(grid), len(grid[0])
    limit = cut * math.hypot(height - 1, width - 1)
    low = [[0.0] * width for _ in range(height)]
    for i in range(height):
        for j in range(width):
            if math.hypot(i, j) > limit + 1e-9:
                continue
            strength = sum(
                grid[m][n] * _cosine_wave(height, i, m) * _cosine_wave(width, j, n)
                for m in range(height)
                for n in range(width)
            )
            for m in range(height):
                for n in range(width):
                    low[m][n] += strength * _cosine_wave(height, i, m) * _cosine_wave(width, j, n)
    return low, [minus(full, part) for full, part in zip(grid, low, strict=True)]


def fft_bands(vector: Vector, cut: float) -> tuple[list[float], list[float]]:
    """FreqCa's split of a sequence of tokens by the Fourier transform: the low band and the high band."""
    size = len(vector)
    limit = cut * (size // 2)
    spectrum = _transformed([complex(x) for x in vector], -1)
    kept = [value if min(k, size - k) <= limit + 1e-9 else 0j for k, value in enumerate(spectrum)]
    low = [value.real / size for value in _transformed(kept, 1)]
    return low, minus(vector, low)
