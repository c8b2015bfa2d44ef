"""Self-speculative decoding: the output is the transformer's own, and every cycle costs one forward
pass."""

from functools import lru_cache
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import FAMILIES, every_family, in_quick, sampling, tiny_lm
from nextlat import NextLatConfig, NextLatError, NextTokenConfig, ObjectiveModel, attach
from nextlat.batch import Batch
from nextlat.decoding import Cycle, GenerationStats, Pass, Request, Stopping, decode
from nextlat.decoding.prepared import shares_passes
from nextlat.decoding.sampling import Greedy
from reference import VOCABULARY, Oracle, decoding_lm, enumerated, five_token_model, p_value

NEW, DRAWS = 24, 25


@lru_cache
def greedy_case(family: str, prompt_length: int) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A model, a prompt (1, T) and what transformers itself makes of it, (T + NEW + 10,)."""
    lm = decoding_lm(family)
    prompt = torch.randint(
        VOCABULARY, (1, prompt_length), generator=torch.Generator().manual_seed(400 + prompt_length)
    )
    sequence = plain_greedy(lm, prompt, NEW + 10)[0]
    assert len(set(sequence.tolist())) > 8, (
        "a continuation that repeats itself would hide a misplaced draft"
    )
    return lm, prompt, sequence


def plain_greedy(lm: PreTrainedModel, prompt: Tensor, new: int, **settings: object) -> Tensor:
    mask = settings.pop("attention_mask", torch.ones_like(prompt))
    return lm.generate(
        prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **settings
    )


def oracle_model(
    family: str, prompt_length: int, wrong: set[int]
) -> tuple[ObjectiveModel, Tensor, Tensor]:
    lm, prompt, sequence = greedy_case(family, prompt_length)
    model = attach(lm, NextTokenConfig())
    model.objective = Oracle(model, [sequence], wrong)
    return model, prompt, sequence


def wrong_positions(prompt_length: int) -> set[int]:
    """Stretches of 0 to 6 right drafts between wrong ones, so that cycles accept none, some and
    all."""
    gaps, position, wrong = [1, 1, 3, 7, 1, 5, 2, 4, 6, 1, 2], prompt_length, set()
    for gap in gaps:
        position += gap
        wrong.add(position)
    return wrong


def expected_cycles(
    first: int, new: int, draft_length: int, wrong: set[int]
) -> list[tuple[int, int]]:
    """(drafted, accepted) of every cycle when exactly the positions in `wrong` are drafted wrongly;
    `first` = prompt length."""
    cycles, produced = [], 1
    while produced < new:
        drafted = min(draft_length, new - produced - 1)
        accepted = next((j for j in range(drafted) if first + produced + j in wrong), drafted)
        cycles.append((drafted, accepted))
        produced += accepted + 1
    return cycles


@pytest.mark.parametrize("prompt_length", [1, 5, 13])  # shorter and longer than Gemma's window of 8
@pytest.mark.parametrize("family", in_quick([*FAMILIES, "lfm2"], {"llama", "gpt2", "lfm2"}))
def test_greedy_equals_transformers_with_mixed_acceptance(family: str, prompt_length: int):
    wrong = wrong_positions(prompt_length)
    model, prompt, sequence = oracle_model(family, prompt_length, wrong)
    seen = set()
    for draft_length in range(9):
        prefill, *cycles = run(model, prompt, draft_length)
        tokens = [token for cycle in (prefill, *cycles) for token in cycle.tokens]
        assert tokens == sequence[prompt_length : prompt_length + NEW].tolist(), (
            f"draft length {draft_length}"
        )
        # One cycle too many would mean that accepted work was thrown away, one too few that a wrong
        # draft got through.
        expected = expected_cycles(prompt_length, NEW, draft_length, wrong)
        assert [(len(cycle.drafted), cycle.accepted) for cycle in cycles] == expected
        seen |= {"none" if n == 0 else "all" if n == k else "some" for k, n in expected if k > 0}
    assert seen == {"none", "some", "all"}


def run(
    model: ObjectiveModel,
    prompt: Tensor,
    draft_length: int,
    new: int = NEW,
    eos: frozenset[int] = frozenset(),
):
    together = shares_passes(model.objective)
    stopping = Stopping(new, eos)
    request = Request(list(prompt), Greedy(), stopping, draft_length, together=together)
    with torch.no_grad():
        return [done.cycles[0] for done in decode(model.objective, request)]


@every_family
def test_greedy_equals_transformers_with_its_own_drafts(family: str):
    lm, prompt = tiny_lm(family, vocab_size=VOCABULARY, seed=1), torch.arange(3, 8)[None]
    expected = plain_greedy(lm, prompt, NEW).tolist()
    model = attach(lm, NextLatConfig())
    for draft_length in (1, 5):
        ids, stats = model.generate(
            prompt, max_new_tokens=NEW, draft_length=draft_length, return_stats=True
        )
        assert ids.tolist() == expected
        assert stats.tokens == NEW == 1 + stats.cycles + stats.accepted


@pytest.mark.parametrize("draft_length", [0, 1, 4, 8])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_transformer_runs_once_for_the_prompt_and_once_per_cycle(
    family: str, draft_length: int
):
    model, prompt, _ = oracle_model(family, 5, wrong_positions(5))
    run(model, prompt, 1)  # what is tried out once is over
    widths: list[int] = []
    hook = model.lm.base_model.register_forward_hook(
        lambda _, args, kwargs, out: widths.append(out[0].shape[1]), with_kwargs=True
    )
    try:
        cycles = run(model, prompt, draft_length)[1:]
    finally:
        hook.remove()
    assert widths == [5] + [len(cycle.drafted) + 1 for cycle in cycles]


def test_perfect_drafts_need_the_fewest_possible_cycles():
    model, prompt, _ = oracle_model("llama", 5, set())
    for draft_length in range(1, 9):
        assert len(run(model, prompt, draft_length)[1:]) == -(-(NEW - 1) // (draft_length + 1))


@pytest.mark.parametrize("wrong", [set(), {12, 16}])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_end_of_sequence_stops_wherever_it_falls(family: str, wrong: set[int]):
    # Every position of the continuation plays the end once: as the first token, inside a draft, as
    # a bonus, as a correction.
    model, prompt, sequence = oracle_model(family, 5, wrong)
    continuation = sequence[5:].tolist()
    inside = 0
    for end, draft_length in product(range(12), (1, 3, 6)):
        eos = continuation[end]
        stop = continuation.index(eos) + 1
        cycles = run(model, prompt, draft_length, eos=frozenset([eos, VOCABULARY + 5]))
        assert [token for cycle in cycles for token in cycle.tokens] == continuation[:stop]
        inside += 0 < cycles[-1].accepted == len(cycles[-1].tokens) < len(cycles[-1].drafted)
    assert inside >= 5


@pytest.mark.parametrize("new", range(1, 8))
def test_drafts_never_reach_past_max_new_tokens(new: int):
    model, prompt, sequence = oracle_model("gpt2", 5, set())
    for draft_length in range(9):
        cycles = run(model, prompt, draft_length, new)
        assert [token for cycle in cycles for token in cycle.tokens] == sequence[
            5 : 5 + new
        ].tolist()
        assert all(len(cycle.drafted) <= draft_length for cycle in cycles)
        # The last token is never read, so a cycle may draft one less than there is room for.
        made = 1
        for cycle in cycles[1:]:
            assert made + len(cycle.drafted) + 1 <= new
            made += len(cycle.tokens)


def test_the_last_position_of_an_absolute_table_can_be_filled():
    lm = tiny_lm("gpt2", vocab_size=VOCABULARY, n_positions=20)
    prompt = torch.arange(6)[None]
    model = attach(lm, NextLatConfig())
    for draft_length in (0, 4):
        assert (
            model.generate(prompt, max_new_tokens=14, draft_length=draft_length).tolist()
            == plain_greedy(lm, prompt, 14).tolist()
        )
    with pytest.raises(NextLatError, match="20 positions"):
        model.generate(prompt, max_new_tokens=15)


@pytest.mark.parametrize("draft_length", [0, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_left_padded_rows_come_out_as_from_transformers(family: str, draft_length: int):
    lm = tiny_lm(family, vocab_size=VOCABULARY, seed=5)
    lm.generation_config.pad_token_id = 0
    lengths = [12, 3, 7]
    ids = torch.randint(1, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]).long()
    ids = ids * mask
    rows = plain_greedy(lm, ids, NEW, attention_mask=mask)
    # Ends that let the rows stop at different times, one of them not at all.
    eos = [rows[1, 12 + 4].item(), rows[2, 12 + 9].item()]
    expected = plain_greedy(lm, ids, NEW, attention_mask=mask, eos_token_id=eos)
    model = attach(lm, NextLatConfig())
    assert (
        model.generate(
            ids, mask, max_new_tokens=NEW, draft_length=draft_length, eos_token_id=eos
        ).tolist()
        == expected.tolist()
    )
    assert (expected[:, 12:] == 0).any(), (
        "no row ended early: the test would not see a missing padding"
    )


def test_end_of_sequence_is_read_from_the_generation_config_unless_given():
    lm, prompt, sequence = greedy_case("llama", 5)
    model = attach(lm, NextLatConfig())
    eos = sequence[5 + 3].item()
    stop = sequence[5:].tolist().index(eos) + 1
    lm.generation_config.eos_token_id = [eos]
    try:
        assert model.generate(prompt, max_new_tokens=NEW).shape[1] == 5 + stop
        assert model.generate(prompt, max_new_tokens=NEW, eos_token_id=None).shape[1] == 5 + NEW
    finally:
        lm.generation_config.eos_token_id = None
    assert model.generate(prompt, max_new_tokens=NEW, eos_token_id=eos).shape[1] == 5 + stop


# Sampling.

SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"temperature": 1.3, "top_k": 3},
    "top_p": {"top_p": 0.7},
}


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_sampled_tokens_follow_the_enumerated_distribution(name: str):
    model, prompt = five_token_model()
    sampler = sampling(**SETTINGS[name], seed=11)
    expected = enumerated(model.lm, prompt, sampler)
    counts, stats = torch.zeros(5, 5, 5, dtype=torch.float64), GenerationStats()
    for draft_length in range(1, 9):
        for _ in range(DRAWS):
            tokens: list[int] = []
            # Room for drafts as long as asked for; three tokens come from one cycle or from
            # several.
            stopping = Stopping(draft_length + 2)
            for done in decode(
                model.objective,
                Request(list(prompt), sampler, stopping, draft_length, together=True),
            ):
                tokens += done.cycles[0].tokens
                stats.count(done)
                if len(tokens) >= 3:
                    break
            counts[tuple(tokens[:3])] += 1
    assert 0.05 < stats.acceptance_rate < 0.95
    assert p_value(counts, expected) > 1e-4


@torch.no_grad()
def test_the_drafters_choices_appear_as_often_as_the_transformer_wants():
    """Sensitive to faults of the acceptance test, which go by the drafter's probabilities, and
    cheap: long generations.

    Given the past, "the first token of this cycle is the one that the drafter ranks r-th" has a
    probability that an uncached forward pass gives. The counts minus the sums of these
    probabilities are a martingale of known variance.
    """
    model, prompt = five_token_model()
    sampler = sampling(seed=5)
    count, mean, variance = torch.zeros(3, 5, dtype=torch.float64)
    for draft_length in (1, 2, 3, 8) * 3:
        tokens, first = prompt[0].tolist(), []
        request = Request(list(prompt), sampler, Stopping(120), draft_length, together=True)
        for done in decode(model.objective, request):
            [cycle] = done.cycles
            first += [len(tokens)] if cycle.drafted else []
            tokens += cycle.tokens
        ids, first = torch.tensor([tokens]), torch.tensor(first)
        h_TD = model.backbone.hidden(Batch.from_inputs(ids, ids, None, None))[0]
        p_TV = model.next_token_logits(h_TD[first - 1]).double().softmax(dim=-1)
        rank_TV = model.objective.draft(h_TD[first - 2], ids[0, first - 1])[1].argsort(
            dim=-1, descending=True
        )
        p_TV = p_TV.gather(-1, rank_TV)
        count += (rank_TV == ids[0, first, None]).sum(dim=0)
        mean += p_TV.sum(dim=0)
        variance += (p_TV * (1 - p_TV)).sum(dim=0)
    z = (count - mean) / variance.sqrt()
    assert z.abs().max() < 4, z


def test_randomness_comes_from_the_generator_alone():
    lm, prompt, _ = greedy_case("llama", 5)
    model = attach(lm, NextLatConfig())
    before = torch.get_rng_state()

    def sample(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(
            prompt, max_new_tokens=NEW, do_sample=True, draft_length=3, generator=generator
        )[0].tolist()

    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(before, torch.get_rng_state())


# Around the loop.


def test_stats_add_up():
    model, prompt, _ = oracle_model("llama", 5, wrong_positions(5))
    ids, stats = model.generate(
        prompt.repeat(2, 1), max_new_tokens=NEW, draft_length=4, return_stats=True
    )
    cycles = 2 * run(model, prompt, 4)[1:]
    assert stats.tokens == 2 * NEW == ids[:, 5:].numel()
    assert stats.sequences == 2
    assert stats.cycles == len(cycles)
    assert (
        stats.drafted
        == sum(len(cycle.drafted) for cycle in cycles)
        == sum(stats.drafted_by_position)
    )
    assert (
        stats.accepted == sum(cycle.accepted for cycle in cycles) == sum(stats.accepted_by_position)
    )
    assert stats.mean_acceptance_length == pytest.approx(1 + stats.accepted_per_cycle)
    assert stats.acceptance_rate == stats.accepted / stats.drafted
    by_position = [sum(cycle.accepted > i for cycle in cycles) for i in range(4)]
    assert stats.accepted_by_position == by_position
    assert stats.acceptance_by_position[0] == by_position[0] / sum(
        len(cycle.drafted) > 0 for cycle in cycles
    )
    assert stats.tokens_per_second == stats.tokens / stats.seconds > 0


def test_stats_of_different_draft_lengths_can_be_summed():
    a, b = (
        GenerationStats(sequences=1, tokens=1),
        GenerationStats(sequences=1, tokens=1, seconds=2.0),
    )
    a.count(Pass((Cycle(drafted=(3, 4), accepted=1, tokens=(3, 9)),)))
    b.count(Pass((Cycle(drafted=(7,), accepted=1, tokens=(7, 8)), None)))
    total = a + b
    assert (total.tokens, total.cycles, total.drafted, total.accepted) == (6, 2, 3, 2)
    assert (total.drafted_by_position, total.accepted_by_position, total.tried_by_position) == (
        [2, 1],
        [2, 0],
        [2, 1],
    )
    a.count(Pass((Cycle(drafted=(3, 4, 5), accepted=0, tokens=(9,)),)))
    assert a.conditional_acceptance == [0.5, 0.0, 0.0] and a.acceptance_by_position == [
        0.5,
        0.0,
        0.0,
    ]
    assert a.tried_by_position == [2, 1, 0]
    assert GenerationStats().conditional_acceptance == []
    assert GenerationStats().mean_acceptance_length == GenerationStats().acceptance_rate == 0


def test_training_mode_and_gradients_do_not_disturb_decoding():
    lm = tiny_lm("gpt2", vocab_size=VOCABULARY, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model, prompt = attach(lm, NextLatConfig()), torch.arange(5)[None]
    expected = plain_greedy(lm, prompt, NEW).tolist()
    model.train()
    model.objective.eval()
    lm.config.use_cache = False  # as the Trainer leaves it
    assert model.generate(prompt, max_new_tokens=NEW, draft_length=2).tolist() == expected
    assert model.training
    assert lm.training
    assert not model.objective.training
    model(prompt, labels=prompt).loss.backward()  # nothing that decoding left behind is in the way


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(do_sample: bool, poison: float):
    model, prompt = (
        attach(tiny_lm("llama", vocab_size=VOCABULARY), NextLatConfig()),
        torch.arange(1, 5)[None],
    )
    with torch.no_grad():
        model.objective.dynamics.f[0].weight.fill_(poison)
    with pytest.raises(NextLatError, match="drafter gives logits that are not finite"):
        model.generate(prompt, max_new_tokens=5, draft_length=2, do_sample=do_sample)
    assert model.generate(prompt, max_new_tokens=3, do_sample=do_sample, draft_length=0).shape == (
        1,
        7,
    )
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[7] = poison
    with pytest.raises(NextLatError, match="model gives logits that are not finite"):
        model.generate(prompt, max_new_tokens=5, draft_length=2, do_sample=do_sample)


def test_a_forbidden_token_is_not_an_error():
    # A model that never wants a token gives it a logit of minus infinity.
    lm = tiny_lm("llama", vocab_size=VOCABULARY)
    model, prompt = attach(lm, NextLatConfig()), torch.arange(1, 5)[None]
    favourite = model.generate(prompt, max_new_tokens=1)[0, -1].item()
    plain = model.backbone.head

    def head(h: Tensor) -> Tensor:
        return plain(h).index_fill(-1, torch.tensor([favourite]), -torch.inf)

    model.objective.next_token_logits = head
    ids = model.generate(
        prompt,
        max_new_tokens=NEW,
        do_sample=True,
        draft_length=3,
        generator=torch.Generator().manual_seed(0),
    )
    assert favourite not in ids[0, 4:].tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"draft_length": -1}, "draft_length must not be below zero"),
        ({"draft_length": "long"}, "whole number or 'auto'"),
        ({"draft_length": 1.5}, "whole number or 'auto'"),
        ({"max_new_tokens": 0}, "max_new_tokens.* must be greater than 0"),
        ({"do_sample": True, "temperature": 0.0}, "temperature.* strictly positive"),
        ({"do_sample": True, "top_k": -1}, "top_k.* strictly positive"),
        ({"do_sample": True, "min_p": 2.0}, r"min_p.* in the \[0, 1\] interval"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not supported"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported"),
        ({"assistant_model": object()}, "assistant_model is not supported"),
        ({"stop_strings": ["b"]}, "stop_strings needs the tokenizer"),
        ({"tempreature": 2.0}, "tempreature"),
        (
            {"streamer": object(), "input_ids": torch.ones(2, 3, dtype=torch.long)},
            "a streamer shows one sequence, not 2",
        ),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "prompt is empty"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "shape"),
        ({"input_ids": torch.zeros(1, 4)}, "integers"),
        ({"input_ids": torch.tensor([[1, VOCABULARY]])}, f"token {VOCABULARY} is outside"),
        ({"input_ids": torch.tensor([[1, -1]])}, "token -1 is outside"),
        ({"input_ids": torch.ones(1, 120, dtype=torch.long), "max_new_tokens": 9}, "128 positions"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "row 0 is not all on its left"),
        (
            {
                "input_ids": torch.ones(2, 3, dtype=torch.long),
                "attention_mask": torch.tensor([[1, 1, 1], [0] * 3]),
            },
            "row 1 is empty",
        ),
    ],
)
def test_bad_requests_are_told_in_one_sentence(arguments: dict, words: str):
    model = attach(greedy_case("llama", 5)[0], NextLatConfig())
    with pytest.raises(NextLatError, match=words) as caught:
        model.generate(**{"input_ids": torch.arange(4)[None], "max_new_tokens": 4} | arguments)
    assert "\n" not in str(caught.value)


def test_an_objective_that_cannot_draft_says_so_and_decodes_plainly():
    lm, prompt, sequence = greedy_case("llama", 5)
    model = attach(lm, NextTokenConfig())
    with pytest.raises(NextLatError, match="'next-token' cannot draft: use draft_length=0"):
        model.generate(prompt, max_new_tokens=5, draft_length=1)
    assert model.generate(prompt, max_new_tokens=NEW)[0].tolist() == sequence[: 5 + NEW].tolist()


def test_a_limited_drafter_names_its_limit():
    model, prompt, _ = oracle_model("llama", 5, set())
    model.objective.max_draft_length = 3
    model.generate(prompt, max_new_tokens=6, draft_length=3)
    with pytest.raises(NextLatError, match="at most 3 tokens"):
        model.generate(prompt, max_new_tokens=6, draft_length=4)


def test_a_cache_that_cannot_forget_is_refused():
    lm = decoding_lm("qwen3_next")
    model, prompt = attach(lm, NextLatConfig()), torch.arange(1, 5)[None]
    with pytest.raises(NextLatError, match="draft_length=0"):
        model.generate(prompt, max_new_tokens=4, draft_length=2)
    assert (
        model.generate(prompt, max_new_tokens=NEW).tolist()
        == plain_greedy(lm, prompt, NEW).tolist()
    )
