"""The adaptive draft length: costs, the stopping rule, and what it learns."""

import numpy as np
import pytest

from nextlat.decoding.draft_length import LONGEST, AdaptiveLength, Costs, measure

CHEAP = Costs(draft=0.05, verify=tuple(1 + 0.02 * k for k in range(LONGEST + 1)))
DEAR = Costs(draft=0.6, verify=tuple(1 + 0.3 * k for k in range(LONGEST + 1)))


def simulate(
    length: AdaptiveLength,
    rate: float,
    cycles: int,
    *,
    rows: int = 1,
    informative: bool = False,
    seed: int = 0,
):
    """Cycles in which every drafted token is accepted with probability `rate` (given those before):
    lengths and time per token.

    With `informative`, tokens are of two kinds: the drafter is sure of one (accepted 95 %) and
    unsure of the other (5 %).
    """
    rng = np.random.default_rng(seed)
    drafted, tokens, time = [], 0, 0.0
    for _ in range(cycles):
        planned = length.plan(range(rows))
        sure = rng.random((LONGEST, rows)) < rate
        chance = np.where(sure, 0.95, 0.05) if informative else np.full((LONGEST, rows), rate)
        kept = rng.random((LONGEST, rows)) < chance
        place = 0
        while place < planned:
            place += 1
            confidence = np.where(sure[place - 1], 0.9, 0.3) if informative else np.full(rows, 0.6)
            if (
                length.stepwise
                and place < planned
                and not length.more(place - 1, confidence.tolist())
            ):
                break
        accepted = [int(np.cumprod(kept[:place, row]).sum()) for row in range(rows)]
        length.observe([place] * rows, accepted)
        drafted.append(place)
        tokens += sum(accepted) + rows
        time += length.costs.v(place) + place * length.costs.c
    return drafted, tokens / rows / time


def best_fixed(costs: Costs, rate: float) -> float:
    """Speed of the best fixed length when acceptance is independent: max (1 - a^{k+1}) / (1 - a) /
    (v + k c)."""
    return max(
        (1 - rate ** (k + 1)) / (1 - rate) / (costs.v(k) + k * costs.c) for k in range(LONGEST + 1)
    )


@pytest.mark.parametrize("stepwise", [True, False])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_it_comes_close_to_the_best_fixed_length(rate: float, stepwise: bool):
    speeds = [
        simulate(AdaptiveLength(CHEAP, stepwise=stepwise), rate, 600, seed=seed)[1]
        for seed in range(6)
    ]
    assert np.mean(speeds) > 0.93 * best_fixed(CHEAP, rate)


@pytest.mark.parametrize("stepwise", [True, False])
def test_where_drafts_do_not_pay_it_decodes_plainly_but_for_a_probe_now_and_then(stepwise: bool):
    drafted, speed = simulate(AdaptiveLength(DEAR, stepwise=stepwise), 0.6, 800)
    tail = drafted[200:]
    assert 0 < sum(tail) <= len(tail) / AdaptiveLength.PROBE + 1
    assert speed > 0.95


def test_probes_notice_that_the_text_has_become_easier():
    length = AdaptiveLength(CHEAP)
    hopeless, _ = simulate(length, 0.0, 300)
    assert sum(hopeless[100:]) <= 2 * 200 / AdaptiveLength.PROBE
    easy, _ = simulate(length, 0.95, 1200, seed=1)
    assert np.mean(easy[-200:]) > 4


def test_confidence_beats_any_fixed_length_where_it_says_something():
    costs = Costs(draft=0.15, verify=tuple(1 + 0.03 * k for k in range(LONGEST + 1)))
    _, informed = simulate(AdaptiveLength(costs), 0.75, 1500, informative=True)
    _, blind = simulate(AdaptiveLength(costs, stepwise=False), 0.75, 1500, informative=True)
    assert informed > 1.03 * blind


def test_the_calibration_learns_how_far_confidence_can_be_trusted():
    length = AdaptiveLength(CHEAP)
    simulate(length, 0.75, 600, informative=True)
    logits = np.log([0.9 / 0.1, 0.3 / 0.7])
    sure, unsure = length._accepted(0, logits)
    assert sure > 0.85 and unsure < 0.2


def test_a_step_is_drafted_while_all_rows_together_gain_more_than_it_costs():
    costs = Costs(
        draft=0.2, verify=(1.0,) * (LONGEST + 1)
    )  # a step is worth it while the mean survival exceeds 0.2 S
    length = AdaptiveLength(costs)
    length.plan(range(2))
    length._rates[:] = 1.0
    length._theta[:] = 0
    length._theta[0] = 1.0  # acceptance = confidence
    assert length.more(0, [0.98, 0.02])  # one row goes on, and that is enough: 0.5 > 0.2
    assert not length.more(1, [0.3, 0.9])  # 0.98 * 0.3 and next to nothing: 0.16 < 0.2


def test_only_rows_of_the_plan_count():
    length = AdaptiveLength(CHEAP)
    length.plan([1, 3])
    length.more(0, [0.001, 0.9, 0.001, 0.8])
    assert [round(float(1 / (1 + np.exp(-x))), 3) for x in length._confidences[0]] == [0.9, 0.8]


def test_only_verified_places_teach():
    length = AdaptiveLength(CHEAP)
    length.plan(range(2))
    length.more(0, [0.5, 0.5])
    length.more(1, [0.5, 0.5])
    length.observe([3, 2], [1, 2])
    old = AdaptiveLength.FORGET
    assert length._tried[:4].tolist() == [old + 1, old + 1, 0, 0]
    assert length._kept[:4].tolist() == [old + 1, 1, 0, 0]
    assert [(place, kept) for _, place, kept in length._seen] == [
        (0, True),
        (1, False),
        (0, True),
        (1, True),
    ]


def test_costs_are_the_fastest_of_a_few_rounds_and_never_fall_with_the_width():
    now = [0.0]
    seconds = {1: 1.0, 2: 3.0, 3: 2.0, 5: 4.0, 9: 8.0, 17: 16.0}

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now[0]

    def tick(value: float) -> None:
        now[0] += value / 1000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextlat.decoding.draft_length.time", Clock)
        busy = iter([7.0, 1.0, 5.0, 1.0, 3.0] * 20)  # what else the machine is doing
        costs = measure(lambda width: tick(seconds[width] * next(busy)), lambda: tick(0.1))
    assert costs.c == pytest.approx(0.1)
    assert [costs.v(k) for k in (0, 1, 2, 4, 8, 16)] == pytest.approx([1, 3, 3, 4, 8, 16])
    assert costs.v(6) == pytest.approx(6)  # between 4 at five tokens and 8 at nine
    # tau / (v + k c) for k = 2.5 drafted tokens
    assert costs.ceiling(2.0, 2.5) == pytest.approx(2.0 / (3.25 + 0.25))


@pytest.mark.parametrize("stepwise", [True, False])
def test_where_drafts_have_long_not_paid_whole_calls_need_no_plan(stepwise: bool):
    length = AdaptiveLength(DEAR, stepwise=stepwise)
    assert not length.rests(64), "nothing is known yet"
    drafted, _ = simulate(length, 0.6, 1000)
    probes = [n for n, k in enumerate(drafted) if k]
    assert probes[-1] - probes[-3] >= AdaptiveLength.RAREST
    while length._idle < AdaptiveLength.RAREST:
        assert length.rests(64)
    assert not length.rests(64), "a probe is due"
    assert simulate(length, 0.0, 1)[0] == [1] and length.rests(64)
    easy, _ = simulate(length, 1.0, 1000)
    assert np.mean(easy[-100:]) > 0 and not length.rests(64)


def test_where_not_even_perfect_drafts_would_pay_none_is_tried():
    length = AdaptiveLength(Costs(1.0, tuple(1.0 + k for k in range(LONGEST + 1))))
    assert length.rests(10**6) and simulate(length, 1.0, 1000)[0] == [0] * 1000
