"""What became of the drafts: the drawing of cycles, the text that streams, and how it ends."""

import os
import re
import signal
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import nextlat
from conftest import tiny_lm
from nextlat.cli import app
from nextlat.decoding import Cycle, Pass
from nextlat.decoding.stream import RESET, TokenText, coloured, draw, legend, marked

pytestmark = pytest.mark.slow

WORDS = [" was", " a", " girl", "\n", "é", "<|endoftext|>", "Once"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level() -> PreTrainedTokenizerFast:
    """All bytes, and a few words; bos is token 0 but not put before a text by itself, as in GPT-2's
    tokenizer."""
    spelled = [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][
            0
        ]
        for word in WORDS
    ]
    names = ["<|endoftext|>", *BYTES]
    merges = []
    for word in spelled[:3]:
        for end in range(2, len(word) + 1):
            if word[:end] not in names:
                names.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


TOKENIZER = byte_level()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text).input_ids)


def after(text: str) -> TokenText:
    before = TokenText(TOKENIZER.decode)
    before.add(ids(text))
    return before


def words(prompt: Sequence[int], tokenizer: PreTrainedTokenizerFast, step: int) -> str:
    text = TokenText(tokenizer.decode)
    pieces = [text.add(prompt[i : i + step]) for i in range(0, len(prompt), step)]
    return "".join([*pieces, text.rest()])


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize(
    "text", [" was a girl", "naïve – 東京 🙂 end", "\N{REPLACEMENT CHARACTER} alone", ""]
)
def test_pieces_join_to_the_text_of_the_whole(text: str, step: int):
    assert words(ids(text), TOKENIZER, step) == TOKENIZER.decode(ids(text)) == text


def test_text_that_is_no_unicode_joins_too():
    for seed in range(20):
        tokens = torch.randint(
            len(TOKENIZER), (40,), generator=torch.Generator().manual_seed(seed)
        ).tolist()
        assert (
            words(tokens, TOKENIZER, 1) == words(tokens, TOKENIZER, 3) == TOKENIZER.decode(tokens)
        )


def test_words_are_joined_as_the_tokenizer_joins_them():
    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(string.ascii_letters)}))
    assert words([3, 4, 3], PreTrainedTokenizerFast(tokenizer_object=core), 1) == "d e d"


def test_no_character_is_shown_before_it_is_whole():
    text = TokenText(TOKENIZER.decode)
    first, second = ids("é")
    assert (text.add([first]), text.add([second])) == ("", "é")
    assert text.add([first]) == "" and text.rest() == "\N{REPLACEMENT CHARACTER}"


def test_a_cycle_is_drawn_as_accepted_rejected_corrected():
    [was], [a], [girl], [newline] = map(ids, (" was", " a", " girl", "\n"))
    before = after("There")
    pieces = draw(Cycle((was, a, girl, newline), 2, (was, a, a)), before)
    assert pieces == [(" was a", "accepted"), (" girl\\n", "rejected"), (" a", "corrected")]
    # What was rejected is not part of what the next cycle goes on from.
    assert draw(Cycle((girl,), 1, (girl, was)), before) == [(" girl", "accepted"), (" was", "own")]
    assert draw(Cycle((), 0, (newline,)), before) == [("\n", "own")]


def test_what_a_draft_has_behind_the_end_is_not_rejected():
    [was], [a], [girl] = map(ids, (" was", " a", " girl"))
    assert draw(Cycle((was, a, girl), 2, (was, a)), after("")) == [(" was a", "accepted")]


def test_a_character_that_a_rejected_token_would_have_completed():
    first, second = ids("é")
    [e] = ids("e")
    other = ids("è")[1]
    before = TokenText(TOKENIZER.decode)
    assert draw(Cycle((e, first, other), 2, (e, first, second)), before) == [
        ("e", "accepted"),
        ("è", "rejected"),
        ("é", "corrected"),
    ]


def test_colours_and_marks():
    pieces = [(" was", "accepted"), (" a", "rejected"), (" girl", "corrected"), (".", "own")]
    assert marked(pieces) == "[+ was][- a] girl."
    text = coloured(pieces)
    assert re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)", text) == [
        ("32", " was"), ("0", ""), ("9;31", " a"), ("0", ""), ("1;33", " girl"), ("0", ""),
        ("1", "."), ("0", ""),
    ]  # fmt: skip
    assert legend(colours=False).startswith("[+") and "\x1b" not in legend(colours=True)
    assert all("\n" not in legend(colours=colours, styled=True) for colours in (True, False))


def test_every_pass_is_told_with_the_rows_it_belongs_to():
    for family in ("llama", "gemma2"):  # together, and one after another
        model = nextlat.attach(tiny_lm(family), nextlat.NextLatConfig())
        seen: list[Pass] = []
        prompts = torch.tensor([[3, 4], [5, 6], [7, 8]])
        out = model.generate(prompts, max_new_tokens=9, draft_length=2, on_pass=seen.append)
        assert all(len(done.cycles) == 3 for done in seen)
        for row in range(3):
            cycles = [done.cycles[row] for done in seen if done.cycles[row] is not None]
            assert [token for cycle in cycles for token in cycle.tokens] == out[row, 2:].tolist()
    call = nextlat.speculative(model, on_pass=seen.append)
    told = len(seen)
    model.lm.generate(
        prompts[:1], max_new_tokens=5, do_sample=False, custom_generate=call, draft_length=2
    )
    assert len(seen) > told


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that never stops by itself, with a tokenizer as above."""
    path = tmp_path_factory.mktemp("model")
    lm = tiny_lm("llama", vocab_size=len(TOKENIZER), max_position_embeddings=10**6)
    torch.manual_seed(0)
    nextlat.attach(lm, nextlat.NextLatConfig()).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    (path / "run.json").write_text("{}")
    return path


def run(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    result = CliRunner(env=environment).invoke(app, ["generate", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_what_streams_is_the_text_of_the_whole(endless: Path):
    model = nextlat.load(endless)
    whole = model.generate(torch.tensor([[0, *ids("Once é")]]), max_new_tokens=60, draft_length=0)
    expected = TOKENIZER.decode(whole[0]) + "\n"
    assert expected.startswith("<|endoftext|>Once é")  # as every document in training
    for length in ("auto", "0", "5"):
        code, out, err = run(endless, "Once é", "--max-new-tokens", "60", "--draft-length", length)
        assert (code, out) == (0, expected)
        assert re.search(
            r"60 tokens in \d+ cycles: .* tokens a second\.\n"
            r".* drafting, .* verifying, .* overhead\.\n$",
            err,
        )
        assert ("timing the machine" in err) == (length == "auto")
    assert run(endless, "<|endoftext|>Once é", "--max-new-tokens", "60")[1] == expected
    (endless / "run.json").rename(endless / "run")
    try:  # somebody else's model: as its tokenizer has it
        assert run(endless, "Once é", "--max-new-tokens", "1")[1].startswith("Once é")
    finally:
        (endless / "run").rename(endless / "run.json")


def test_drafts_are_shown_in_colours_or_by_marks(endless: Path):
    asked = (endless, "Once", "--max-new-tokens", "40", "--draft-length", "3", "--show-drafts")
    plain = run(*asked[:-1])[1]
    code, marks, err = run(*asked)
    assert code == 0 and "[-" in marks and "\x1b" not in marks + err
    assert err.startswith(legend(colours=False) + "\n")
    code, colours, err = run(*asked, FORCE_COLOR="1", TERM="xterm", COLORTERM="")
    assert (
        code == 0 and "\x1b[9;31m" in colours and err.startswith(legend(colours=True, styled=True))
    )
    kept = re.sub(r"\x1b\[9;31m[^\x1b]*\x1b\[0m", "", colours)
    assert re.sub(r"\x1b\[[\d;]*m", "", kept) == plain
    assert colours.endswith(RESET + "\n")
    assert run(*asked, FORCE_COLOR="1", TERM="xterm", NO_COLOR="1")[1] == marks


def test_the_options_mean_what_they_say(endless: Path):
    few = (endless, "Once", "--max-new-tokens", "12", "--draft-length", "2")
    greedy = run(*few)[1]
    assert run(*few, "--top-k", "1")[1] == greedy
    assert run(*few, "--top-p", "0")[1] == greedy
    assert run(*few, "--min-p", "1")[1] == greedy
    sampled = (*few, "--temperature", "1")
    samples = {run(*sampled, "--seed", seed)[1] for seed in ("1", "1", "2", "3")}
    assert len(samples) == 3 and greedy not in samples
    model = nextlat.load(endless)
    options = {"do_sample": True, "top_k": 0, "draft_length": 2, "max_new_tokens": 12}
    sample = model.generate(
        torch.tensor([[0, *ids("Once")]]), generator=torch.Generator().manual_seed(1), **options
    )
    assert TOKENIZER.decode(sample[0]) + "\n" in samples  # nothing is cut off unasked
    penalised = model.lm.generate(
        torch.tensor([[0, *ids("Once")]]),
        do_sample=False,
        max_new_tokens=12,
        repetition_penalty=3.0,
    )
    assert (
        run(*few, "--repetition-penalty", "3")[1] == TOKENIZER.decode(penalised[0]) + "\n" != greedy
    )
    begin = len("<|endoftext|>Once") + 3
    place = next(
        place for place in range(begin, len(greedy)) if greedy[place] in string.ascii_letters
    )
    code, out, _ = run(*few, "--stop", "no such text", "--stop", greedy[place])
    assert (code, out) == (0, greedy[: greedy.index(greedy[place], begin - 3) + 1] + "\n")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (["--draft-length", "many"], "--draft-length must be a whole number or auto, got 'many'"),
        (["--draft-length", "2.5"], "got '2.5'"),
        (["--draft-length", "-1"], "below zero"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "0", "--top-k", "3"], "--top-k cannot be used at temperature 0"),
        (["--top-k", "-3"], "top_k"),
        (["--top-p", "1.5"], "--top-p must be between 0 and 1"),
        (["--min-p", "2"], "min_p"),
        (["--repetition-penalty", "0"], "penalty"),
        (["--stop", ""], "--stop needs some text"),
        (["--seed", str(2**70)], "64 bits"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "2000000"], "positions"),
    ],
)  # fmt: skip
def test_bad_options_are_one_sentence(endless: Path, options: list[str], cause: str):
    code, out, err = run(endless, "Once", *options)
    assert (code, out) == (2, "") and cause in err
    assert err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.skipif(os.name != "posix", reason="signals as of POSIX")
def test_an_interrupt_leaves_the_terminal_clean(endless: Path):
    command = [
        sys.executable,
        "-m",
        "nextlat",
        "generate",
        str(endless),
        "Once",
        "--max-new-tokens",
        "900000",
        "--show-drafts",
    ]
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(400)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert begun.startswith(b"<|endoftext|>Once\x1b[")
    assert out.endswith(RESET.encode() + b"\n")
    assert err.decode().splitlines() == [legend(colours=True, styled=True), "stopped."]
