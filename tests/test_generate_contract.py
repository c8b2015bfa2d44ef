"""Whatever `transformers` takes in `generate` does here what it does there, or is refused by name:
every argument, every field of a generation config, processors, criteria and constraints."""

import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    MaxLengthCriteria,
    PreTrainedModel,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    WatermarkingConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import nextlat
from conftest import tiny_lm
from nextlat import NextLatError, NextTokenConfig, ObjectiveModel, attach
from nextlat.backbone import CACHE
from reference import VOCABULARY, Oracle, decoding_lm, letters

NEW, LENGTHS, DRAFTS = 12, (9, 4, 6), (0, 1, 4, "auto")
EOS = [5, 9, 17, 33, 40]


def prompts(rows: int) -> dict[str, Tensor]:
    """Padded on the left; the padding token 0 occurs in no prompt."""
    ids = torch.randint(1, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(9) >= 9 - torch.tensor(LENGTHS[:rows])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def language_model() -> PreTrainedModel:
    lm = decoding_lm("llama")
    lm.generation_config.pad_token_id = 0
    return lm


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    return language_model()


def sequences(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.sequences


def drafting(lm: PreTrainedModel, expected: Tensor, mask: Tensor) -> ObjectiveModel:
    """A model that drafts what is going to be said, wrong at every third position."""
    model = attach(lm, NextTokenConfig())
    rows = [
        torch.cat([row[:9][keep.bool()], row[9:], torch.ones(20, dtype=torch.long)])
        for row, keep in zip(expected, mask, strict=False)
    ]
    model.objective = Oracle(model, rows, wrong={*range(0, 60, 3)}, strict=False)
    return model


def assert_same(
    lm: PreTrainedModel, options: Callable[[], dict[str, Any]], rows: int, drafts: Any = DRAFTS
) -> None:
    """By `model.generate`, and by `lm.generate` with ours in place of its loop."""
    given = prompts(rows) | {"max_new_tokens": NEW, "do_sample": False}

    def merged() -> dict[str, Any]:
        return {name: x for name, x in (given | options()).items() if x is not None}

    expected = sequences(lm.generate(**merged()))
    model = drafting(lm, expected, given["attention_mask"])
    for draft_length in drafts:
        out = model.generate(**merged(), draft_length=draft_length)
        assert sequences(out).tolist() == expected.tolist(), draft_length
    if "tokenizer" not in merged():  # which transformers does not hand on
        ours = {"custom_generate": nextlat.speculative(model), "draft_length": 3}
        out = lm.generate(**merged(), **ours)
        assert sequences(out).tolist() == expected.tolist()


def bias(row: int, ids: Tensor) -> list[int]:
    return [t for t in range(VOCABULARY) if (t + row + len(ids)) % 3]


SAMPLED = {"do_sample": True}  # with settings that leave one token
SAME: dict[str, dict[str, Any]] = {
    "max_length": {"max_length": 15, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 7},
    "min_length": {"min_length": 14, "eos_token_id": EOS},
    "min_new_tokens": {"min_new_tokens": 8, "eos_token_id": EOS},
    "early_stopping": {"early_stopping": True},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": ["b", "Xa"], "tokenizer": letters(), "eos_token_id": 49},
    "do_sample": SAMPLED | {"top_k": 1},
    "use_cache": {"use_cache": False},
    "max_cache_len": {"max_cache_len": 100},
    "temperature": SAMPLED | {"temperature": 1e-5},
    "top_k": SAMPLED | {"top_k": 1, "temperature": 3.0},
    "top_p": SAMPLED | {"top_p": 1e-6},
    "min_p": SAMPLED | {"min_p": 1.0},
    "top_h": SAMPLED | {"top_h": 1e-6},
    "typical_p": SAMPLED | {"typical_p": 1e-6},
    "epsilon_cutoff": SAMPLED | {"epsilon_cutoff": 0.999, "top_k": 1},
    "eta_cutoff": SAMPLED | {"eta_cutoff": 0.999, "top_k": 1},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 0.3},
    "length_penalty": {"length_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[7], [3, 4]]},
    "renormalize_logits": {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 3},
    "forced_eos_token_id": {"forced_eos_token_id": 6},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (2, 3.0), "eos_token_id": EOS
    },
    "suppress_tokens": {"suppress_tokens": [1, 2, 3, 30, 31]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [*range(0, 50, 2)]},
    "sequence_bias": {"sequence_bias": [[[7], 5.0], [[3, 4], -9.0]]},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "num_return_sequences": {"num_return_sequences": 2} | SAMPLED | {"top_k": 1},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "pad_token_id": {"pad_token_id": 3, "eos_token_id": EOS},
    "bos_token_id": {"bos_token_id": 3},
    "eos_token_id": {"eos_token_id": EOS},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "decoder_start_token_id": {"decoder_start_token_id": 3},
    "num_assistant_tokens": {"num_assistant_tokens": 3},
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "constant"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.3},
    "max_matching_ngram_size": {"max_matching_ngram_size": 2},
    "assistant_lookbehind": {"assistant_lookbehind": 5},
    "target_lookbehind": {"target_lookbehind": 5},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "speculation_type": {"speculation_type": "dflash"},
    "disable_compile": {"disable_compile": True},
    "diversity_penalty": {"diversity_penalty": 0.0},
    "prefill_chunk_size": {"prefill_chunk_size": 4},
    # Arguments beside the configuration.
    "generation_config": {
        "generation_config": GenerationConfig(max_new_tokens=9, pad_token_id=3),
        "max_new_tokens": None, "do_sample": None,
    },
    "logits_processor": {"logits_processor": [lambda ids, scores: -scores]},
    "stopping_criteria": {"stopping_criteria": [MaxLengthCriteria(13)]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": bias},
    "negative_prompt_ids": {
        "guidance_scale": 1.5, "negative_prompt_ids": torch.full((3, 2), 7),
        "negative_prompt_attention_mask": torch.ones(3, 2, dtype=torch.long),
    },
    "synced_gpus": {"synced_gpus": False},
    "position_ids": {"position_ids": torch.arange(3, 12).expand(3, -1)},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "num_beams": {"num_beams": 2},
    "use_mtp": {"use_mtp": True},
    "cache_implementation": {"cache_implementation": "static"},
    "token_healing": {"token_healing": True, "tokenizer": letters()},
    "output_attentions": {"output_attentions": True},
    "output_hidden_states": {"output_hidden_states": True},
    "is_assistant": {"is_assistant": True},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "low_memory": {"low_memory": True},
    "penalty_alpha": {"penalty_alpha": 0.6},
    "dola_layers": {"dola_layers": "high"},
    "num_beam_groups": {"num_beam_groups": 2},
    "constraints": {"constraints": [object()]},
    "force_words_ids": {"force_words_ids": [[3]]},
    "assistant_model": {"assistant_model": tiny_lm("llama", VOCABULARY)},
    CACHE: {CACHE: DynamicCache()},
    "synced_gpus": {"synced_gpus": True},
    "inputs_embeds": {"inputs_embeds": torch.zeros(3, 9, 32)},
    "custom_generate": {"custom_generate": lambda **_: None},
}
# Of `generate_batch`, of caches that are refused, or of the library's compilation of its own loop.
WITHOUT_EFFECT = {"cache_config", "compile_config", "continuous_batching_config"}
OF_PYTHON = {"self", "inputs", "streamer", "kwargs"}  # streamers: below


def here(table: dict[str, dict[str, Any]]) -> list[str]:
    """Those that this version of transformers has."""
    names = dict(inspect.signature(GenerationMixin.generate).parameters) | vars(GenerationConfig())
    of_models = {"position_ids", CACHE, "inputs_embeds"}
    return [name for name in table if name in names.keys() | of_models]


def test_every_argument_and_field_is_decided_on() -> None:
    """One that a newer transformers brings is to be tried out, or refused."""
    arguments = inspect.signature(GenerationMixin.generate).parameters.keys() - OF_PYTHON
    fields = vars(GenerationConfig()).keys() - WITHOUT_EFFECT
    covered = {name for options in SAME.values() for name in options} | REFUSED.keys()
    assert {x for x in arguments | fields if x[0] != "_"} - covered == {"transformers_version"}


@pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("name", here(SAME))
def test_it_does_what_it_does_in_transformers(
    lm: PreTrainedModel, name: str, rows: int, recwarn: pytest.WarningsRecorder
) -> None:
    options = {key: x[:rows] if isinstance(x, Tensor) else x for key, x in SAME[name].items()}
    assert_same(lm, lambda: dict(options), rows)


@pytest.mark.parametrize("name", here(REFUSED))
def test_it_is_refused_by_name(lm: PreTrainedModel, name: str) -> None:
    model = attach(lm, nextlat.NextLatConfig())
    given = prompts(3) | {"max_new_tokens": 4} | REFUSED[name]
    with pytest.raises(NextLatError, match=name) as caught:
        model.generate(**given)
    assert "\n" not in str(caught.value)
    if name not in ("custom_generate", "token_healing"):
        with pytest.raises(NextLatError, match=name):
            lm.generate(**given, custom_generate=nextlat.speculative(model))


def test_what_the_model_has_stored_counts() -> None:
    lm, tokenizer = language_model(), letters()
    lm.generation_config.update(eos_token_id=EOS, repetition_penalty=1.3, stop_strings=["b", "Xa"])
    for rows in (1, 3):
        assert_same(lm, lambda: {"tokenizer": tokenizer}, rows)
    model = attach(lm, nextlat.NextLatConfig())
    with pytest.raises(NextLatError, match="stop_strings needs the tokenizer"):
        model.generate(**prompts(1))
    options = prompts(1) | {"max_new_tokens": NEW, "stop_strings": None}
    assert model.generate(**options).tolist() == lm.generate(**options).tolist()


def test_token_types_are_read_as_there() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING["bert"](
        vocab_size=VOCABULARY, is_decoder=True, initializer_range=0.3, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    for rows in (1, 3):
        assert_same(lm, lambda n=rows: {"token_type_ids": torch.ones(n, 9, dtype=torch.long)}, rows)


# ---- processors ----


class Alternate(LogitsProcessor):
    """Odd tokens at odd steps, even ones at even steps, by counting its own calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, (1 - self.calls % 2) :: 2] = -torch.inf
        return scores


class Apart(LogitsProcessor):
    """No row may say what another has said last."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, input_ids[:, -1], -torch.inf)


class ByRow(LogitsProcessor):
    """Depends on the number of the row and on its tokens; never wants to see one that is over."""

    stateless = True

    def __init__(self, rows: int, ends: list[int]) -> None:
        self.rows, self.ends = rows, torch.tensor(ends, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert len(input_ids) == self.rows
        assert not torch.isin(input_ids[:, 9:], self.ends).any(), "shown what comes after the end"
        assert input_ids.shape[1] < 9 + NEW, "shown what lies beyond the last token"
        row_B1, token_V = torch.arange(len(scores))[:, None], torch.arange(VOCABULARY)
        return scores - 4.0 * ((row_B1 + input_ids[:, -1:] + token_V) % 4 == 0)


PROCESSORS: dict[str, Callable[[], dict[str, Any]]] = {
    "counting": lambda: {"logits_processor": [Alternate()]},
    "between rows": lambda: {"logits_processor": [Apart()], "eos_token_id": EOS},
    "a watermark with a state": lambda: {
        "watermarking_config": SynthIDTextWatermarkingConfig(
            ngram_len=3, keys=[3, 5, 9], context_history_size=8
        )
    },
}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors_that_may_keep_a_state_are_asked_as_there(
    lm: PreTrainedModel, name: str, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nextlat"):
        assert_same(lm, PROCESSORS[name], rows)
    told = [r.message for r in caplog.records if "may keep a state between calls" in r.message]
    assert told and all("without drafts" in sentence for sentence in told)


@pytest.mark.parametrize("rows", [1, 3])
def test_processors_of_one_row_are_shown_drafts_up_to_the_end(
    lm: PreTrainedModel, rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    ends = EOS if rows == 1 else []  # transformers itself goes on showing rows that have ended
    with caplog.at_level(logging.WARNING, logger="nextlat"):
        for some in ([], ends):
            options = {"eos_token_id": some or None, "logits_processor": [ByRow(rows, some)]}
            assert_same(lm, lambda o=options: o, rows)
    assert not [r for r in caplog.records if r.name.startswith("nextlat")]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_constraint_has_nothing_to_allow_after_the_end(lm: PreTrainedModel, rows: int) -> None:
    """For several rows transformers asks all the same, and fails."""
    allowed = {token: [(token * 7 + 1) % VOCABULARY] for token in range(VOCABULARY)} | {8: [49]}
    allowed[49] = []

    def tokens(row: int, prefix: Tensor) -> list[int]:
        return allowed[int(prefix[-1])]

    given = prompts(rows)
    given["input_ids"][:, -1] = torch.tensor([1, 8, 1])[:rows]
    options = {"prefix_allowed_tokens_fn": tokens, "eos_token_id": 49, "max_new_tokens": NEW}
    want = [
        lm.generate(ids[None, 9 - n :], **options)[0, n:].tolist()
        for ids, n in zip(given["input_ids"], LENGTHS, strict=False)
    ]
    assert len(want[0]) < NEW
    model = attach(lm, nextlat.NextLatConfig())
    for draft_length in DRAFTS:
        out = model.generate(**given, **options, draft_length=draft_length)[:, 9:].tolist()
        assert [row[: len(w)] for row, w in zip(out, want, strict=True)] == want


# ---- stopping criteria ----


def fourteen(input_ids: Tensor, scores: Any, **_: Any) -> bool:
    """As most user code writes it."""
    return input_ids.shape[1] >= 14


class EveryFifth:
    """Ends all rows at the seventh call, and a row with a token that five divides, in its own
    words: a tensor of all rows."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(input_ids)
        return (input_ids[:, -1] % 5 == 0) | torch.tensor(len(self.seen) == 7)


def unsure(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
    assert len(scores) == input_ids.shape[1] - 9
    return scores[-1].softmax(-1).amax(-1) < 0.1


@pytest.mark.parametrize("eos", [None, 49])
@pytest.mark.parametrize("rows", [1, 3])
def test_criteria_are_asked_as_there(lm: PreTrainedModel, rows: int, eos: int | None) -> None:
    asked: list[EveryFifth] = []

    def fifth() -> list[Any]:
        asked.append(EveryFifth())
        return [asked[-1]]

    scores = {"return_dict_in_generate": True, "output_scores": True}
    ends = {"eos_token_id": eos}
    assert_same(lm, lambda: ends | {"stopping_criteria": [fourteen]}, rows)
    assert_same(lm, lambda: ends | scores | {"stopping_criteria": [unsure]}, rows)
    assert_same(lm, lambda: ends | {"stopping_criteria": fifth()}, rows)
    seen = [[ids.tolist() for ids in each.seen] for each in asked if each.seen]
    assert len(seen) >= 5 and all(calls == seen[0] for calls in seen)
    if rows == 1 or eos is not None:
        words = {"stop_strings": ["b", "Xa"], "tokenizer": letters()}
        assert_same(lm, lambda: ends | words, rows)


# ---- streamers and threads ----


def test_a_streamer_of_generate_itself_hears_all(lm: PreTrainedModel) -> None:
    tokenizer, ids = letters(), prompts(1)["input_ids"]
    expected = lm.generate(ids, max_new_tokens=NEW, do_sample=False)
    model = drafting(lm, expected, torch.ones_like(ids))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    call = {"streamer": streamer, "custom_generate": nextlat.speculative(model), "draft_length": 3}
    thread = threading.Thread(
        target=lm.generate, args=(ids,), kwargs=call | {"max_new_tokens": NEW, "do_sample": False}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(expected[0, 9:])


@pytest.mark.parametrize(
    "config",
    [
        nextlat.NextLatConfig(),
        nextlat.MTPConfig(horizon=3),
        nextlat.JTPConfig(horizon=3),
        nextlat.BSTConfig(),
        NextTokenConfig(),
    ],
    ids=["nextlat", "mtp", "jtp", "bst", "next-token"],
)
def test_two_threads_get_each_its_own_output(config: Any) -> None:
    lm = language_model()
    model = attach(lm, config).train()
    drafts = 0 if model.objective.max_draft_length == 0 else 3
    given = [prompts(3), prompts(1)]
    want = [model.generate(**each, max_new_tokens=NEW, draft_length=0) for each in given]
    others: list[Any] = []

    def work(i: int) -> None:
        for _ in range(12):
            try:
                out = model.generate(**given[i], max_new_tokens=NEW, draft_length=drafts)
                others.extend([] if torch.equal(out, want[i]) else [out])
            except Exception as error:
                others.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not others
    assert all(module.training for module in model.modules())
