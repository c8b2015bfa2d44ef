"""Timing ways to decode: every way gets the same work, and padding is not counted."""

import pytest
import torch

from conftest import tiny_lm
from nextlat import NextLatConfig, NextLatError, attach
from nextlat.decoding.speed import TRANSFORMERS, Timing, compare_decoding


def test_ways_do_the_same_work_and_padding_is_not_counted():
    lm = tiny_lm("llama", vocab_size=50, seed=5, tie_word_embeddings=False)
    model = attach(lm, NextLatConfig())
    prompts = [torch.arange(2, 9), torch.arange(5, 8), torch.tensor([30])]
    plain = [
        lm.generate(p[None], max_new_tokens=12, do_sample=False, pad_token_id=0)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    end = plain[1][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in plain]
    assert len({len(row) for row in expected}) > 1
    lm.generation_config.eos_token_id = end
    done = []
    timings = compare_decoding(
        model,
        prompts,
        draft_lengths=[0, 3, "auto"],
        max_new_tokens=12,
        batch=2,
        repetitions=2,
        progress=lambda: done.append(1),
    )
    assert list(timings) == [TRANSFORMERS, 0, 3, "auto"]
    assert len(done) == 3 * 4
    for way, timing in timings.items():
        assert timing.outputs == expected
        assert timing.tokens == [len(expected[0]) + len(expected[1]), len(expected[2])]
        assert [len(seconds) for seconds in timing.seconds] == [2, 2]
        if way != TRANSFORMERS:
            assert timing.total.tokens == sum(timing.tokens)
    assert timings[3].total.drafted > timings[0].total.drafted == 0


def test_ratios_compare_tokens_per_second_within_a_repetition():
    fast, slow = (
        Timing([[1.0, 1.0], [2.0, 2.0]], [10, 20]),
        Timing([[2.0, 4.0], [2.0, 6.0]], [10, 20]),
    )
    assert fast.against(slow) == [2.0, 3.0]
    assert fast.against(slow, [0]) == [1.0, 2.0]  # the first batch alone
    assert fast.tokens_per_second == (15 + 7.5) / 2


def test_nothing_to_decode_is_told():
    model = attach(tiny_lm("llama"), NextLatConfig())
    with pytest.raises(NextLatError, match="at least one prompt"):
        compare_decoding(model, [], draft_lengths=[0], max_new_tokens=2)
