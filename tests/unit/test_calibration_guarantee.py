"""The promise itself: exact bounds, the walk over counts, and simulations with a known true risk."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from gnuq_serve.calibration.binomial import clopper_pearson_upper, fewest_answers, most_errors
from gnuq_serve.calibration.counts import counts_to_test, learned_first_count
from gnuq_serve.calibration.guarantee import guarantee, one_of_each_group

LEVEL, CONFIDENCE = 0.1, 0.95


def falling(count):
    """Scores in (0, 1), falling."""
    return np.linspace(0.99, 0.01, count)


@pytest.mark.parametrize(("errors", "count"), [(0, 29), (1, 50), (7, 60), (30, 31), (31, 31), (0, 1)])
@pytest.mark.parametrize("miss", [0.05, 0.0031])
def test_the_bound_is_clopper_pearson(errors, count, miss):
    expected = binomtest(errors, count, alternative="less").proportion_ci(1 - miss, method="exact").high
    assert clopper_pearson_upper(errors, count, miss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("level", [0.01, 0.05, 0.1, 0.2, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_the_fewest_answers_are_the_first_count_that_passes_without_an_error(level, confidence):
    count = next(k for k in range(1, 10_000) if binom.cdf(0, k, level) <= 1 - confidence)
    assert fewest_answers(level, confidence) == count


@pytest.mark.parametrize("level", [0.02, 0.1, 0.5])
def test_the_most_errors_that_pass(level):
    counts = np.array([1, 5, 28, 29, 30, 45, 46, 47, 500, 501])
    naive = [max([e for e in range(-1, k + 1) if binom.cdf(e, k, level) <= 0.05]) for k in counts]
    assert most_errors(counts, level, 0.05).tolist() == naive


def test_29_answers_without_an_error_support_10_percent_at_95():
    found = guarantee(falling(29), np.ones(29, dtype=bool))
    assert found.promises[0].threshold == 0.0
    assert (found.promises[0].answered, found.promises[0].first_count) == (29, 29)
    short = guarantee(falling(28), np.ones(28, dtype=bool)).promises[0]
    assert short.threshold is None
    assert "needs 29 answers without an error, and there are 28" in short.sentence


def test_29_are_enough_also_among_those_that_follow_and_for_each_of_several_levels():
    correct = np.arange(60) < 29
    found = guarantee(falling(60), correct, max_error=(0.1, 0.2))
    assert found.promises[0].answered == 29
    assert found.promises[0].threshold <= falling(60)[28]
    assert found.promises[0].threshold > falling(60)[29]
    assert found.promises[1].threshold is not None


def test_the_walk_stops_at_the_first_count_that_fails():
    # Naive walk over the same counts, with binomtest.
    rng = np.random.default_rng(3)
    score = rng.random(800)
    correct = rng.random(800) < 0.75 + 0.25 * score
    found = guarantee(score, correct, first_counts={LEVEL: 40}).promises[0]
    order = np.argsort(-score)
    passed, count = 0, 40
    while binomtest(int((~correct[order[:count]]).sum()), count, LEVEL, alternative="less").pvalue <= 0.05:
        passed, count = count, min(800, max(count + 1, math.floor(count * 1.05)))
        if passed == 800:
            break
    assert 40 < passed < 800
    assert found.answered == passed
    assert (score >= found.threshold).sum() == passed
    assert found.errors == (~correct[score >= found.threshold]).sum()
    assert found.share == passed / 800
    assert found.upper <= LEVEL


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(8))
def test_mapie_finds_the_same_threshold(seed):
    """MAPIE's Learn then Test over the same thresholds: 1 - precision is the error rate among answered."""
    from mapie.risk_control import BinaryClassificationController

    rng = np.random.default_rng(seed)
    score = np.sort(rng.random(400))[::-1]
    correct = rng.random(400) < 0.6 + 0.4 * score
    ours = guarantee(score, correct).promises[0]
    between = np.append((score[:-1] + score[1:]) / 2, 0.0)  # below the k-th score at k - 1
    counts = np.array(counts_to_test(ours.first_count, 400))
    controller = BinaryClassificationController(
        predict_function=lambda x: np.column_stack([1 - x[:, 0], x[:, 0]]),
        risk="precision",
        target_level=1 - LEVEL,
        confidence_level=CONFIDENCE,
        list_predict_params=between[counts - 1],
        fwer_method="fixed_sequence",
    )
    controller.calibrate(score[:, None], correct.astype(int))
    # MAPIE 1.6 gets the number of errors back as ceil(count * rate), at times one too many by rounding.
    errors = np.cumsum(~correct)[counts - 1]
    p_values = np.ravel(controller.p_values)
    exact, one_more = (binom.cdf(errors + extra, counts, LEVEL) for extra in (0, 1))
    rounded = ~np.isclose(p_values, exact, rtol=1e-9, atol=0)
    assert ((exact < p_values) & (p_values <= one_more * (1 + 1e-9)))[rounded].all()
    assert not rounded.all()
    valid = controller.valid_predict_params
    theirs = 0 if len(valid) == 0 else int((score >= min(valid)).sum())
    assert theirs == ours.answered or (theirs < ours.answered and rounded[: len(valid) + 1].any())


def test_the_first_count_is_never_below_the_fewest():
    assert guarantee(falling(50), np.ones(50, bool), first_counts={LEVEL: 3}).promises[0].first_count == 29


def test_equal_scores_stay_together():
    score = np.repeat([0.9, 0.6, 0.3], [40, 40, 20])
    correct = np.repeat([True, True, False], [40, 40, 20])
    found = guarantee(score, correct)
    assert found.promises[0].answered == 80
    assert 0.3 < found.promises[0].threshold <= 0.6
    assert {point.answered for point in found.band} == {40, 80, 100}
    for point in found.band:
        assert (score >= point.threshold).sum() == point.answered
    constant = guarantee(np.full(200, 0.7), np.arange(200) >= 5).promises[0]
    assert (constant.answered, constant.threshold) == (200, 0.0)


def test_no_threshold_is_a_normal_outcome_with_numbers():
    rng = np.random.default_rng(0)
    score = rng.random(300)
    found = guarantee(score, rng.random(300) < 0.8 * score, max_error=(0.02,))
    promise = found.promises[0]
    assert (promise.threshold, promise.upper, promise.answered, promise.share) == (None, None, 0, 0.0)
    assert found.best.upper == min(point.upper for point in found.band)
    assert (
        f"the best that this data supports is {found.best.upper:.2f} at {found.best.share:.0%}"
        in promise.sentence
    )


def test_the_band_shares_the_confidence_among_its_points():
    rng = np.random.default_rng(1)
    score = rng.random(500)
    correct = rng.random(500) < score
    band = guarantee(score, correct).band
    assert len(band) == 16
    assert (band[0].answered, band[-1].answered, band[-1].threshold) == (20, 500, 0.0)
    for point in band:
        chosen = score >= point.threshold
        assert (point.answered, point.errors) == (chosen.sum(), (~correct[chosen]).sum())
        bound = binomtest(point.errors, point.answered, alternative="less")
        assert point.upper == pytest.approx(bound.proportion_ci(1 - 0.05 / 16, method="exact").high, rel=1e-9)


def test_any_level_is_read_from_the_band():
    score = falling(1000)
    correct = np.random.default_rng(5).random(1000) < score
    found = guarantee(score, correct)
    allowed = [point for point in found.band if point.upper <= 0.3]
    assert found.at_most(0.3) == max(allowed, key=lambda point: point.answered)
    assert found.at_most(0.001) is None


def test_one_row_of_each_group_counts():
    groups = ["a", "a", "a", "b", None, None, "b"]
    drawn = {tuple(one_of_each_group(groups, 7, seed).tolist()) for seed in range(60)}
    assert all(len(rows) == 4 and {4, 5} <= set(rows) for rows in drawn)
    assert {rows[0] for rows in drawn} == {0, 1, 2} | ({3} & {rows[0] for rows in drawn})
    assert guarantee(falling(90), np.ones(90, bool), groups=[str(i // 3) for i in range(90)]).units == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_error": ()}, "max_error is empty"),
        ({"max_error": (10,)}, "max_error=10 must lie between 0 and 1"),
        ({"confidence": 1.0}, "confidence=1.0 must lie between 0 and 1"),
        ({"scores": [0.5, float("nan")]}, "scores must be probabilities"),
        ({"scores": [0.5, 1.5]}, "scores must be probabilities"),
        ({"scores": [0.5]}, "scores has 1 entries and correct 2"),
        ({"groups": ["a"]}, "groups has 1 entries for 2 rows"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        guarantee(**{"scores": [0.5, 0.4], "correct": [True, False], **change})


def test_nothing_at_all_supports_nothing():
    found = guarantee([], [])
    assert (found.band, found.best, found.curve, found.promises[0].threshold) == ((), None, (), None)


def test_the_learned_start_moves_past_confident_errors():
    # The ten surest answers are wrong, the next 300 right: a walk that starts at 29 never gets anywhere.
    correct = np.ones(600, dtype=bool)
    correct[:10] = False
    correct[400:] = False
    count = learned_first_count(falling(600), correct, units=600, max_error=LEVEL, confidence=CONFIDENCE)
    assert 150 < count <= 450
    assert learned_first_count([], [], units=600, max_error=LEVEL, confidence=CONFIDENCE) == 29
    assert guarantee(falling(600), correct, first_counts={LEVEL: 29}).promises[0].threshold is None
    assert guarantee(falling(600), correct, first_counts={LEVEL: count}).promises[0].answered > 300


# Simulations: the true risk of every threshold is known; a violation is a promise whose true risk is above.


@dataclass
class World:
    """A population of scores on a fine grid: ``p_error[i]`` at score ``score[i]``, all equally likely."""

    score: np.ndarray  # falling
    p_error: np.ndarray

    def risk(self, threshold):
        above = int(np.searchsorted(-self.score, -threshold, side="right"))
        return 0.0 if above == 0 else float(self.errors_above[above] / above)

    @cached_property
    def errors_above(self):
        return np.concatenate([[0.0], np.cumsum(self.p_error)])

    def best(self, level):
        """The largest share of answers with a true risk at the level or below."""
        below = np.flatnonzero(np.cumsum(self.p_error) / np.arange(1, self.p_error.size + 1) <= level)
        return 0.0 if below.size == 0 else (below[-1] + 1) / self.p_error.size

    def draw(self, rng, count, most=1):
        """``count`` groups of 1 to ``most`` rows. Those of a group have similar scores and, mostly, one label."""
        groups = np.repeat(np.arange(count), rng.integers(1, most + 1, size=count))
        near = rng.integers(-self.score.size // 10, self.score.size // 10, size=groups.size)
        place = (rng.integers(self.score.size, size=count)[groups] + near) % self.score.size
        wrong = rng.random(count)[groups] < self.p_error[place]
        return self.score[place], ~wrong, groups


def logistic(base, slope, shift=0.0):
    """Scores whose log-odds of an error fall linearly; overall error rate near ``base``."""
    z = np.linspace(-4, 4, 200_000)[::-1]
    weight = np.exp(-z * z / 2)
    place = np.searchsorted(np.cumsum(weight) / weight.sum(), (np.arange(200_000) + 0.5) / 200_000)
    z = z[np.minimum(place, z.size - 1)]
    offset = np.linspace(-12, 12, 481)
    means = [np.mean(1 / (1 + np.exp(slope * z - o))) for o in offset]
    o = float(np.interp(base, means, offset))
    return World(np.linspace(1, 0, z.size, endpoint=False), 1 / (1 + np.exp(slope * z - o)))


def bumpy():
    """The surest answers are often wrong, and the risk of answering crosses 10 % five times."""
    x = (np.arange(200_000) + 0.5) / 200_000
    p = np.select([x < 0.05, x < 0.3, x < 0.38, x < 0.7, x < 0.8], [0.2, 0.03, 0.3, 0.03, 0.4], 0.02)
    return World(1 - x, p)


def tied(world, values):
    """The same world with ``values`` different scores only."""
    return World(np.ceil(world.score * values) / values, world.p_error)


WORLDS = {
    "errors 10 %": logistic(0.1, 1.0),
    "errors 30 %": logistic(0.3, 2.0),
    "errors 50 %": logistic(0.5, 3.0),
    "errors 80 %": logistic(0.8, 4.0),
    "risk not monotone": bumpy(),
    "ten scores": tied(logistic(0.3, 2.0), 10),
    "three scores": tied(logistic(0.1, 2.0), 3),
}
MOSTLY_MADE = {"errors 10 %", "errors 30 %", "errors 50 %", "risk not monotone", "three scores"}
REPETITIONS = 1000
# Three standard errors of a share near .05 over 1,000 repetitions.
MOST = (1 - CONFIDENCE) + 3 * math.sqrt(0.05 * 0.95 / REPETITIONS)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "rows_of_a_group"), [(60, 1), (250, 1), (1000, 1), (250, 8)])
@pytest.mark.parametrize("name", WORLDS)
def test_promises_hold(name, count, rows_of_a_group):
    """Named in advance: the walk. After looking: every level and every threshold of the band at once."""
    world, rng = WORLDS[name], np.random.default_rng(count)
    broken = made = picked_broken = picked_made = 0
    share = picked_share = 0.0
    for seed in range(REPETITIONS):
        score, correct, groups = world.draw(rng, count, rows_of_a_group)
        names = [str(group) for group in groups] if rows_of_a_group > 1 else None
        # Where the surest answers are often wrong, no walk from the top gets anywhere.
        starts = {LEVEL: count // 4} if name == "risk not monotone" else None
        found = guarantee(score, correct, groups=names, seed=seed, first_counts=starts)
        assert found.units == count
        promise = found.promises[0]
        if promise.threshold is not None:
            made += 1
            share += promise.share
            broken += world.risk(promise.threshold) > LEVEL
        # Whoever picks after looking picks the worst: any point whose true risk is above its bound.
        picked_broken += any(world.risk(point.threshold) > point.upper for point in found.band)
        if (point := found.at_most(LEVEL)) is not None:
            picked_made += 1
            picked_share += point.share
    print(
        f"{name}, {count} x {rows_of_a_group}: named in advance broken {broken / REPETITIONS:.3f}, made "
        f"{made / REPETITIONS:.2f}, answered {share / REPETITIONS:.2f}; after looking broken "
        f"{picked_broken / REPETITIONS:.3f}, made {picked_made / REPETITIONS:.2f}, answered "
        f"{picked_share / REPETITIONS:.2f} (best possible {world.best(LEVEL):.2f})"
    )
    assert broken / REPETITIONS <= MOST
    assert picked_broken / REPETITIONS <= MOST
    # A promise that is never made does not count.
    if count == 1000 and name in MOSTLY_MADE:
        assert made / REPETITIONS > 0.5
        assert picked_made / REPETITIONS > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["errors 30 %", "risk not monotone", "ten scores"])
def test_promises_hold_with_a_learned_start(name):
    """The start comes from other rows; it makes more promises, or larger ones, than the fixed start."""
    world, rng = WORLDS[name], np.random.default_rng(7)
    broken = made = 0
    share = fixed_share = 0.0
    for _ in range(REPETITIONS):
        score, correct, _ = world.draw(rng, 400)
        start = learned_first_count(score, correct, units=400, max_error=LEVEL, confidence=CONFIDENCE)
        score, correct, _ = world.draw(rng, 400)
        promise = guarantee(score, correct, first_counts={LEVEL: start}).promises[0]
        fixed_share += guarantee(score, correct).promises[0].share
        if promise.threshold is not None:
            made += 1
            share += promise.share
            broken += world.risk(promise.threshold) > LEVEL
    print(
        f"{name}: broken {broken / REPETITIONS:.3f}, made {made / REPETITIONS:.2f}, answered "
        f"{share / REPETITIONS:.3f} (fixed start {fixed_share / REPETITIONS:.3f})"
    )
    assert broken / REPETITIONS <= MOST
    assert made / REPETITIONS > (0.02 if name == "risk not monotone" else 0.5)


@pytest.mark.slow
def test_rows_of_a_group_taken_as_independent_would_break_the_promise():
    """The simulation can fail: data of the same kind, its groups concealed."""
    world, rng = WORLDS["errors 30 %"], np.random.default_rng(1)
    broken = 0
    for _ in range(300):
        score, correct, _ = world.draw(rng, 250, 8)
        threshold = guarantee(score, correct).promises[0].threshold
        broken += threshold is not None and world.risk(threshold) > LEVEL
    assert broken / 300 > 0.1
