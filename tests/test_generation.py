"""`generate` in batches and in the words of transformers: rows of any length, every option with the
meaning that it has there."""

import functools
import itertools
import logging
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import nextlat
from conftest import every_family, in_quick, sampling, tiny_lm
from nextlat import NextLatConfig, NextLatError, NextTokenConfig, ObjectiveModel, attach
from nextlat.backbone import probe_ids
from nextlat.decoding import AdaptiveLength, Costs, Request, Stopping, decode
from nextlat.decoding.cache import NOT_TAKEN_BACK, drafting_obstacle
from nextlat.decoding.cycle import Eager
from nextlat.decoding.prepared import prepared, shares_passes
from nextlat.decoding.sampling import Greedy
from reference import (
    VOCABULARY,
    Oracle,
    decoding_lm,
    enumerated,
    five_token_model,
    letters,
    p_value,
)

NEW, WIDEST = 22, 11
RAGGED = (11, 1, 7, 3, 10, 2, 5, 4)


def ragged_prompts(rows: int) -> tuple[Tensor, Tensor]:
    """Left-padded ids (rows, 11) and their mask; the pad token 0 occurs in no prompt."""
    lengths = torch.tensor(RAGGED[:rows])
    ids = torch.randint(1, VOCABULARY, (rows, WIDEST), generator=torch.Generator().manual_seed(8))
    mask = (torch.arange(WIDEST) >= WIDEST - lengths[:, None]).long()
    return ids * mask, mask


def theirs(lm: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    return lm.generate(
        ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False} | options
    )


@functools.lru_cache
def batch_case(family: str, rows: int) -> tuple[ObjectiveModel, Tensor, Tensor, Tensor]:
    """A model whose oracle drafts every row's continuation with mistakes at places of its own, and
    what transformers makes of it."""
    lm = decoding_lm(family)
    lm.generation_config.pad_token_id = 0
    ids, mask = ragged_prompts(rows)
    expected = theirs(lm, ids, mask, max_new_tokens=NEW + 20)
    model = attach(lm, NextTokenConfig())
    sequences = [row[WIDEST - length :] for row, length in zip(expected, RAGGED, strict=False)]
    # Positions are counted in the row's own text: rows of different lengths meet the same mistakes
    # in different cycles.
    model.objective = Oracle(model, sequences, wrong={13, 15, 16, 21, 28}, strict=False)
    return model, ids, mask, expected


@pytest.mark.parametrize("rows", [1, 3, 8])
@every_family
def test_ragged_batches_equal_transformers_with_mixed_acceptance(family: str, rows: int):
    model, ids, mask, expected = batch_case(family, rows)
    assert shares_passes(model.objective) == (family != "gemma2")
    for draft_length in (0, 1, 4, 16, "auto"):
        out, stats = model.generate(
            ids, mask, max_new_tokens=NEW, draft_length=draft_length, return_stats=True
        )
        assert out.tolist() == expected[:, : WIDEST + NEW].tolist(), f"draft length {draft_length}"
        assert stats.tokens == rows * NEW
        if draft_length == 4:
            assert 0.2 < stats.acceptance_rate < 0.95
        if (
            shares_passes(model.objective) or draft_length == 0
        ):  # without drafts any model's rows share their passes
            assert stats.passes < stats.cycles or rows == 1


@pytest.mark.parametrize("family", ["lfm2", "qwen3_next"])
def test_without_drafts_recurrent_models_decode_batches_as_transformers_does(family: str, caplog):
    lm = decoding_lm(family)
    lm.generation_config.pad_token_id = 0
    ids, mask = ragged_prompts(4)
    out, stats = attach(lm, NextTokenConfig()).generate(
        ids, mask, max_new_tokens=NEW, return_stats=True
    )
    assert out.tolist() == theirs(lm, ids, mask).tolist()
    assert stats.passes == NEW - 1 and not [
        r for r in caplog.records if r.name.startswith("nextlat")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_rows_end_at_different_times_wherever_the_end_falls(family: str):
    model, ids, mask, expected = batch_case(family, 8)
    inside = 0
    for row, place in product((1, 2, 6), (0, 3, 9)):
        eos = expected[row, WIDEST + place].item()
        plain = theirs(model.lm, ids, mask, eos_token_id=eos)
        for draft_length in (0, 3, 8):
            out, stats = model.generate(
                ids,
                mask,
                max_new_tokens=NEW,
                draft_length=draft_length,
                eos_token_id=eos,
                return_stats=True,
            )
            assert out.tolist() == plain.tolist()
            inside += stats.accepted > 0
    assert inside > 0


@pytest.mark.parametrize(
    "config", [nextlat.MTPConfig(horizon=3), nextlat.JTPConfig(horizon=3)], ids=["mtp", "jtp"]
)
def test_other_drafters_decode_ragged_batches_too(config: Any):
    lm = decoding_lm("llama")
    lm.generation_config.pad_token_id = 0
    model, (ids, mask) = attach(lm, config), ragged_prompts(5)
    alone = [
        model.generate(row[WIDEST - n :][None], max_new_tokens=NEW, draft_length=0)[0, n:].tolist()
        for row, n in zip(ids, RAGGED, strict=False)
    ]
    for draft_length in (0, 2, 3, "auto"):
        out, stats = model.generate(
            ids, mask, max_new_tokens=NEW, draft_length=draft_length, return_stats=True
        )
        assert out[:, WIDEST:].tolist() == alone
        assert stats.drafted_by_position[3:] == []
    with pytest.raises(NextLatError, match="at most 3 tokens"):
        model.generate(ids, mask, max_new_tokens=NEW, draft_length=4)


def test_one_pass_serves_all_rows_and_ended_rows_take_no_part():
    model, ids, mask, expected = batch_case("llama", 8)
    model.generate(ids, mask, max_new_tokens=2)  # what is tried out once is over
    shapes: list[tuple[int, ...]] = []
    hook = model.lm.base_model.register_forward_hook(
        lambda _, args, kwargs, out: shapes.append(out[0].shape), with_kwargs=True
    )
    try:
        _, stats = model.generate(ids, mask, max_new_tokens=NEW, draft_length=4, return_stats=True)
    finally:
        hook.remove()
    assert len(shapes) == 1 + stats.passes
    rows = [shape[0] for shape in shapes]  # that have ended leave the batch
    assert rows[0] == 8 and rows == sorted(rows, reverse=True) and rows[-1] < 8
    assert max(shape[1] for shape in shapes[1:]) == 5
    # The slowest row alone decides how many passes there are.
    alone = [
        model.generate(
            expected[b : b + 1, WIDEST - n : WIDEST],
            max_new_tokens=NEW,
            draft_length=4,
            return_stats=True,
        )[1].passes
        for b, n in enumerate(RAGGED)
    ]
    assert stats.passes == max(alone) < sum(alone) == stats.cycles


def test_a_row_at_the_last_position_of_the_model_does_not_disturb_the_others():
    # Drafts of the longest row would reach past GPT-2's table of positions and past the cache.
    lm = tiny_lm("gpt2", vocab_size=VOCABULARY, seed=5, n_positions=WIDEST + 9)
    lm.generation_config.pad_token_id = 0
    ids, mask = ragged_prompts(3)
    expected = theirs(lm, ids, mask, max_new_tokens=9)
    assert (
        attach(lm, NextLatConfig()).generate(ids, mask, max_new_tokens=9, draft_length=16).tolist()
        == expected.tolist()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_whose_rows_cannot_share_a_pass_say_so_once(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog
):
    model, ids, mask, expected = batch_case(family, 3)
    monkeypatch.setattr(prepared(model.objective), "shares_passes", False)
    with caplog.at_level(logging.WARNING, logger="nextlat"):
        for draft_length in (0, 4):
            out = model.generate(ids, mask, max_new_tokens=NEW, draft_length=draft_length)
            assert out.tolist() == expected[:, : WIDEST + NEW].tolist()
    assert len([r for r in caplog.records if "one after another" in r.message]) == 1


def test_what_was_found_out_is_about_the_model_as_it_is_now(monkeypatch: pytest.MonkeyPatch):
    model = attach(decoding_lm("llama"), NextLatConfig())
    tried: list[str] = []

    def supports(backbone: Any) -> bool:
        tried.append("again")
        if len(tried) == 1:
            raise torch.OutOfMemoryError("not enough memory")
        return len(tried) % 2 == 0

    monkeypatch.setattr("nextlat.decoding.prepared.supports_ragged", supports)
    with pytest.raises(torch.OutOfMemoryError):
        shares_passes(model.objective)
    assert shares_passes(model.objective) and len(tried) == 2  # a failure was not remembered
    with torch.autocast("cpu", torch.bfloat16):
        assert not shares_passes(model.objective)
    assert shares_passes(model.objective) and len(tried) == 3
    model.lm.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.lm.model.layers[0].mlp.up_proj)
    assert shares_passes(model.objective) and len(tried) == 4
    model.bfloat16()
    assert not shares_passes(model.objective) and len(tried) == 5


def test_calls_that_run_at_the_same_time_do_not_share_what_they_learn(
    monkeypatch: pytest.MonkeyPatch,
):
    model, ids, _, expected = batch_case("llama", 1)
    request, plan = (
        Request([ids[0]], Greedy(), Stopping(NEW), "auto", together=True),
        AdaptiveLength.plan,
    )
    learning: dict[int, set[int]] = {0: set(), 1: set()}

    def recorded(self: AdaptiveLength, rows: Any) -> int:
        learning[running].add(id(self))
        return plan(self, rows)

    monkeypatch.setattr(AdaptiveLength, "plan", recorded)
    calls = [decode(model.objective, request) for _ in learning]
    tokens: list[list[int]] = [[], []]
    with torch.no_grad():
        while min(map(len, tokens)) < NEW:
            for running in learning:
                for done in itertools.islice(calls[running], 1):
                    tokens[running] += done.cycles[0].tokens
    assert tokens == [expected[0, WIDEST : WIDEST + NEW].tolist()] * 2
    assert all(len(used) == 1 for used in learning.values()) and learning[0] != learning[1]


def test_auto_decodes_plainly_where_drafts_are_known_not_to_pay(monkeypatch: pytest.MonkeyPatch):
    model, (ids, mask) = attach(decoding_lm("llama"), NextLatConfig()), ragged_prompts(3)
    expected = model.generate(ids, mask, max_new_tokens=NEW, draft_length=0)
    dear = Costs(1.0, tuple(1.0 + k for k in range(17)))
    caches = list[str]()
    monkeypatch.setattr(Eager, "adaptive_length", lambda *_: AdaptiveLength(dear))
    make = Eager.__init__

    def seen(self: Eager, objective: Any, sampler: Any, cache: Any, drafts: bool) -> None:
        caches.append(type(cache).__name__)
        make(self, objective, sampler, cache, drafts=drafts)

    monkeypatch.setattr(Eager, "__init__", seen)
    for _ in range(2):
        assert torch.equal(model.generate(ids, mask, max_new_tokens=NEW), expected)
    assert caches == ["RaggedCache", "GrowingCache"]


# Words of transformers.


class Ten(StoppingCriteria):
    """Ends a row behind the token 10."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] == 10


WORDS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[7], [3, 4]]},
    "suppress_tokens": {"suppress_tokens": [1, 2, 3, 30, 31]},
    "max_length": {"max_length": WIDEST + 10, "max_new_tokens": None},
    "min_new_tokens": {"min_new_tokens": 12, "eos_token_id": [5, 9, 17, 33, 40]},
    "forced_eos_token_id": {"forced_eos_token_id": 6},
    "prefix_allowed_tokens_fn": {
        "prefix_allowed_tokens_fn": lambda row, ids: [
            t for t in range(VOCABULARY) if (t + row + len(ids)) % 3
        ]
    },
    "stopping_criteria": {"stopping_criteria": [Ten()], "eos_token_id": 49},
    "generation_config": {
        "generation_config": GenerationConfig(max_new_tokens=9, pad_token_id=3),
        "max_new_tokens": None,
    },
}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("family", in_quick(["llama", "gemma2"], {"llama"}))
def test_options_mean_what_they_mean_in_transformers(family: str, name: str):
    model, ids, mask, _ = batch_case(family, 3)
    options = {
        key: value
        for key, value in ({"max_new_tokens": NEW} | WORDS[name]).items()
        if value is not None
    }
    plain = model.lm.generate(ids, attention_mask=mask, **options)
    for draft_length in (0, 3, "auto"):
        assert (
            model.generate(ids, mask, draft_length=draft_length, **options).tolist()
            == plain.tolist()
        )
        custom = model.lm.generate(
            ids,
            attention_mask=mask,
            custom_generate=nextlat.speculative(model),
            draft_length=draft_length,
            **options,
        )
        assert custom.tolist() == plain.tolist()


@pytest.mark.parametrize("draft_length", [0, 8])
def test_stop_strings_end_inside_a_draft(draft_length: int):
    model, ids, mask, expected = batch_case("llama", 3)
    tokenizer = letters()
    strings = [
        tokenizer.decode(expected[1, WIDEST + 4 : WIDEST + 6]),
        tokenizer.decode(expected[2, WIDEST + 2]),
    ]
    options = {"stop_strings": strings, "eos_token_id": 49, "pad_token_id": 0}
    plain = theirs(model.lm, ids, mask, tokenizer=tokenizer, **options)
    assert (plain[1:, -1] == 0).any(), "no row ended early"
    for words in (options, {"generation_config": GenerationConfig(**options)}):
        out = model.generate(
            ids, mask, max_new_tokens=NEW, tokenizer=tokenizer, draft_length=draft_length, **words
        )
        assert out.tolist() == plain.tolist()


@pytest.mark.parametrize("draft_length", [0, 5])
def test_scores_and_logits_are_those_of_transformers(draft_length: int):
    model, ids, mask, _ = batch_case("llama", 3)
    options = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    }
    options["eos_token_id"] = theirs(model.lm, ids, mask, repetition_penalty=1.3)[
        1, WIDEST + 6
    ].item()
    plain = theirs(model.lm, ids, mask, **options)
    out = model.generate(ids, mask, max_new_tokens=NEW, draft_length=draft_length, **options)
    assert type(out) is type(plain)
    assert out.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        ours, others = (
            torch.stack(getattr(out, name), dim=1),
            torch.stack(getattr(plain, name), dim=1),
        )
        assert ours.shape == others.shape
        for b in range(3):
            ends = (
                (plain.sequences[b, WIDEST:] == options["eos_token_id"])
                .nonzero()
                .flatten()
                .tolist()
            )
            end = ends[0] + 1 if ends else NEW
            torch.testing.assert_close(ours[b, :end], others[b, :end], rtol=1e-4, atol=1e-4)
            assert (ours[b, end:] == 0).all()


class Listener(BaseStreamer):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.heard.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_what_it_would_have_heard(capsys: pytest.CaptureFixture[str]):
    model, ids, _, _ = batch_case("llama", 1)
    mask = torch.ones_like(ids)
    ours, plain = Listener(), Listener()
    model.generate(ids, max_new_tokens=NEW, draft_length=6, streamer=ours)
    theirs(model.lm, ids, mask, streamer=plain)
    assert ours.heard == plain.heard and ours.ended
    model.lm.generate(
        ids,
        max_new_tokens=NEW,
        custom_generate=nextlat.speculative(
            model, streamer=TextStreamer(letters(), skip_prompt=True)
        ),
    )
    assert capsys.readouterr().out.strip() == letters().decode(
        [token for [token] in plain.heard[1:]]
    )


def test_several_sequences_for_one_prompt():
    model, ids, mask, _ = batch_case("llama", 2)
    generator = torch.Generator().manual_seed(0)
    options = {
        "max_new_tokens": 6,
        "do_sample": True,
        "num_return_sequences": 3,
        "temperature": 3.0,
    }
    out = model.generate(ids, mask, draft_length=3, generator=generator, **options)
    assert out.shape == (6, WIDEST + 6)
    assert out[:, :WIDEST].tolist() == ids.repeat_interleave(3, dim=0).tolist()
    assert len({tuple(row) for row in out[:, WIDEST:].tolist()}) == 6


def test_the_wrong_model_and_no_memory_are_told(monkeypatch: pytest.MonkeyPatch):
    model, ids, mask, _ = batch_case("llama", 2)
    other = tiny_lm("llama", vocab_size=VOCABULARY)
    with pytest.raises(NextLatError, match="decodes model\\.lm only"):
        other.generate(
            ids, attention_mask=mask, max_new_tokens=4, custom_generate=nextlat.speculative(model)
        )

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.")

    monkeypatch.setattr("nextlat.decoding.cache.RaggedCache.prefill", full)
    with pytest.raises(
        NextLatError, match=f"out of memory with a batch of 2 rows of up to {WIDEST + 4} tokens"
    ):
        model.generate(ids, mask, max_new_tokens=4)


# Sampling in batches, under every kind of draft policy.

FREE = Costs(draft=0.02, verify=(1.0,) * 17)
POLICIES: dict[str, Any] = {
    "plain": 0,
    "fixed": 3,
    "stepwise": lambda: AdaptiveLength(Costs(0.3, tuple(1 + 0.05 * k for k in range(17)))),
    "stepwise, cheap": lambda: AdaptiveLength(FREE),
    "ahead": lambda: AdaptiveLength(FREE, stepwise=False, lengths=(0, 1, 2, 4)),
}


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.4, "top_k": 4, "top_p": 0.95}], ids=["plain", "warped"]
)
def test_sampled_batches_follow_the_enumerated_distribution(
    policy: str, settings: dict, monkeypatch: pytest.MonkeyPatch
):
    model, prompt = five_token_model()
    rows, new = 500, 9
    prompts = [prompt[0] if b % 2 else prompt[0, 1:] for b in range(rows)]  # two lengths
    sampler = sampling(**settings, seed=4)
    choice = POLICIES[policy]() if callable(POLICIES[policy]) else POLICIES[policy]
    if not isinstance(choice, int):
        monkeypatch.setattr("nextlat.decoding.loop._draft_length", lambda *_: nullcontext(choice))
    counts = [torch.zeros(5, 5, 5, dtype=torch.float64) for _ in range(2)]
    drafted = accepted = 0
    for _ in range(4):
        tokens: list[list[int]] = [[] for _ in range(rows)]
        request = Request(prompts, sampler, Stopping(new), choice, together=True)
        for done in decode(model.objective, request):
            for row, cycle in zip(tokens, done.cycles, strict=True):
                if cycle is not None:
                    row += cycle.tokens
                    drafted, accepted = drafted + len(cycle.drafted), accepted + cycle.accepted
        for b, row in enumerate(tokens):
            assert len(row) == new
            counts[b % 2][tuple(row[:3])] += 1
    assert drafted == 0 if policy == "plain" else 0.1 < accepted / drafted < 0.95
    for odd, observed in enumerate(counts):
        expected = enumerated(model.lm, prompt if odd else prompt[:, 1:], sampler)
        assert p_value(observed, expected) > 1e-4


# One graph for a cycle.


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile that still has to trace a cycle into one graph, but leaves out the C++
    compiler; the graphs it made."""
    graphs: list[Any] = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(
        "nextlat.decoding.cycle.torch.compile",
        lambda function, **options: original(
            function, backend=backend, fullgraph=options["fullgraph"], dynamic=options["dynamic"]
        ),
    )
    torch._dynamo.reset()
    return graphs


@pytest.mark.slow
def test_lengths_may_have_more_graphs_than_torch_lets_a_function_have(traced: list[Any]):
    model = attach(decoding_lm("llama"), NextLatConfig())
    ids, _ = ragged_prompts(1)
    for k in range(9):
        model.generate(ids, max_new_tokens=2, draft_length=k, compile=True)
    assert len(traced) == 9


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_a_compiled_cycle_is_one_graph_with_the_same_output(family: str, traced: list[Any]):
    lm = decoding_lm(family)
    lm.generation_config.pad_token_id = 0
    model = attach(lm, NextLatConfig())
    ids, mask = ragged_prompts(3)
    expected = theirs(lm, ids, mask).tolist()
    for _ in range(2):
        assert (
            model.generate(ids, mask, max_new_tokens=NEW, draft_length=3, compile=True).tolist()
            == expected
        )
        assert len(traced) == 1, "the second call must find the first one's graph"
    sampled = [
        model.generate(
            ids,
            mask,
            max_new_tokens=8,
            do_sample=True,
            draft_length=2,
            compile=compiled,
            generator=torch.Generator().manual_seed(1),
        )
        for compiled in (True, False)
    ]
    assert sampled[0].shape == sampled[1].shape
    assert len(traced) == 2


def test_what_cannot_be_one_graph_is_said_and_done_all_the_same(
    traced: list[Any], caplog: pytest.LogCaptureFixture
):
    model, ids, mask, _ = batch_case("llama", 3)
    expected = theirs(model.lm, ids, mask, repetition_penalty=1.5).tolist()
    with caplog.at_level(logging.WARNING, logger="nextlat"):
        out = model.generate(
            ids, mask, max_new_tokens=NEW, repetition_penalty=1.5, draft_length=2, compile=True
        )
    assert out.tolist() == expected
    assert not traced
    assert (
        "compile=True has no effect: a logits processor looks at the tokens before" in caplog.text
    )


@pytest.mark.parametrize("rounds_by", ["rows and positions", "positions"])
def test_drafts_are_refused_for_errors_but_not_for_rounding_that_the_model_magnifies(
    rounds_by: str,
):
    model = attach(decoding_lm("llama"), NextLatConfig())

    def rounds(module: Any, arguments: Any, out: Any) -> Any:
        """Otherwise for other shapes, as matrix products do, but so that it can be seen."""
        rows, positions = out.shape[:2]
        return out * (1 + 1e-2 * (positions + (rows if "rows" in rounds_by else 0)))

    model.lm.model.layers[0].mlp.register_forward_hook(rounds)
    refused = drafting_obstacle(model.backbone, extra_layers=1)
    assert refused == ("" if "rows" in rounds_by else NOT_TAKEN_BACK)


def test_probes_are_of_the_whole_vocabulary():
    lm = decoding_lm("llama")
    ids = probe_ids(lm)
    assert ids.unique().numel() == 10 and ids.max() > 0.7 * lm.config.vocab_size
