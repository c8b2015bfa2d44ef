"""Conversations: from any file through the tokenizer's own template to packed rows, and the same
tokens in training as in use."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import CHATML, MARKED, chat_tokenizer, conversation, tiny_lm
from nextlat.batch import Batch
from nextlat.cli import app
from nextlat.errors import NextLatError
from nextlat.hub import document_ids, document_start
from nextlat.tasks.text.chat import chat_prompt
from nextlat.tasks.text.text import Text, TextConfig
from nextlat.tasks.text.tokens import Encoder, existing_tokenizer, trained_tokenizer
from nextlat.training.recipe import load_recipe
from nextlat.training.train import train

CHATS = [
    conversation(f"Tell me {i}.", f"I say {i}, gladly.", *["And\nagain. "] * (i % 2))
    for i in range(24)
]
SETTINGS: dict[str, Any] = {"row_length": 96, "held_out": 4, "tests": 4, "probes": 0}
SETTINGS |= {"prompt_length": 8, "column": "messages"}


@pytest.fixture(params=[True, False], ids=["marked", "unmarked"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return chat_tokenizer(marked=request.param)


def write_jsonl(path: Path, chats: list[Any] = CHATS, column: str = "messages") -> Path:
    path.write_text("".join(json.dumps({column: chat}) + "\n" for chat in chats))
    return path


def write_parquet(path: Path) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    # One message has a column that the others then have too, empty.
    rows = [*CHATS[:-1], [{**message, "name": "Ada"} for message in CHATS[-1]]]
    pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in rows]), path)
    return path


def build(tmp_path: Path, made: Any, chats: list[Any] = CHATS, **changes: Any) -> Text:
    made.save_pretrained(tmp_path / "tokenizer")
    data = write_jsonl(tmp_path / "chats.jsonl", chats)
    settings = {"train": str(data), "tokenizer": str(tmp_path / "tokenizer")}
    return TextConfig(**(SETTINGS | settings | changes)).build()


def test_documents_are_what_the_template_makes_of_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, tokenizer)
    for c, chat in enumerate(CHATS[4:]):
        expected = tokenizer.apply_chat_template(chat).input_ids
        assert task.train.document(c).tolist() == expected
        assert expected.count(tokenizer.eos_token_id) == len(chat)
    row = task.train_dataset(0)[0]
    assert torch.equal(row["labels"], row["input_ids"])


def test_every_source_gives_the_same_documents(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = build(tmp_path, tokenizer)
    found = [build(tmp_path, tokenizer, train=str(write_parquet(tmp_path / "chats.parquet")))]
    pytest.importorskip("datasets", reason="the extra nextlat[text] is not installed")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl")
    found.append(build(tmp_path, tokenizer, train=None, dataset=str(tmp_path / "set")))
    for task in found:
        assert task.fingerprint() == whole.fingerprint()


def test_the_loss_is_on_what_the_assistant_says(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, tokenizer, assistant_only=True)
    for c, chat in enumerate(CHATS[4:]):
        labels = task.train.labels(c)
        said = [m["content"] + "<|im_end|>" for m in chat if m["role"] == "assistant"]
        assert tokenizer.decode(labels[labels != -100]) == "".join(said)
    assert task.fingerprint() != build(tmp_path, tokenizer).fingerprint()
    row = task.train_dataset(0)[0]
    batch = Batch.from_inputs(**{name: x[None] for name, x in row.items()})
    scored = row["input_ids"][batch.scored_positions + 1]
    assert 0 < len(scored) < len(row["input_ids"]) / 2
    # What is left out of the loss is not left out of the rollout.
    assert batch.linked.sum() > 2 * len(scored)


def test_both_kinds_of_template_give_the_same_tokens(tmp_path: Path) -> None:
    marked, unmarked = (
        build(tmp_path, chat_tokenizer(marked=marked), assistant_only=True)
        for marked in (True, False)
    )
    for c in range(len(CHATS) - 4):
        assert marked.train.document(c).tolist() == unmarked.train.document(c).tolist()
        assert marked.train.labels(c).tolist() == unmarked.train.labels(c).tolist()


def test_prompts_end_where_the_assistant_speaks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, tokenizer, assistant_only=True)
    prompts = task.prompts(3)
    assert len(prompts) == 3
    for prompt, chat in zip(prompts, CHATS, strict=False):
        assert prompt.tolist() == chat_prompt(tokenizer, chat[0]["content"])


# ---- the same tokens in training and in use ----


def test_a_prompt_is_the_beginning_of_a_conversation_as_it_is_trained(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = build(tmp_path, tokenizer)
    for c, chat in enumerate(CHATS[4:]):
        prompt = chat_prompt(tokenizer, chat[0]["content"])
        assert task.train.document(c)[: len(prompt)].tolist() == prompt


def llama_like() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    return tokenizer


def gpt2_like() -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def qwen_like() -> PreTrainedTokenizerFast:
    tokenizer = chat_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = None, "<|endoftext|>"
    return tokenizer


BEGINNINGS = {
    "llama": (llama_like, ["<|im_start|>"]),
    "gpt2": (gpt2_like, ["<|endoftext|>"]),
    "qwen": (qwen_like, []),
    "chatml": (chat_tokenizer, []),
    "ours": (lambda: trained_tokenizer(["a b"], 300), ["<|endoftext|>"]),
    "words": (lambda: load_recipe("city-tiny").task.build().tokenizer, None),
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_text_begins_as_the_tokenizer_has_it(kind: str, tmp_path: Path) -> None:
    make, start = BEGINNINGS[kind]
    made = make()
    if kind == "words":
        assert document_start(made) == ([] if made.bos_token_id is None else [made.bos_token_id])
        return
    made.save_pretrained(tmp_path)
    tokenizer = existing_tokenizer(str(tmp_path))
    assert tokenizer.convert_ids_to_tokens(document_start(tokenizer)) == start
    text = "some <|im_end|> text"
    [(ids, _)] = Encoder(tokenizer)([text])
    assert ids == [*document_ids(tokenizer, text), tokenizer.eos_token_id]
    assert (
        tokenizer.decode(ids[len(start) : -1]) == text and tokenizer.eos_token_id not in ids[1:-1]
    )


@pytest.mark.slow
def test_a_chat_model_trains_and_answers_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_tokenizer(marked=False)
    tiny_lm("llama", 259, max_position_embeddings=128, eos_token_id=1).save_pretrained(
        tmp_path / "lm"
    )
    tokenizer.save_pretrained(tmp_path / "lm")
    data = write_jsonl(tmp_path / "chats.jsonl", [conversation("Hi", "Oh, hello.")] * 40)
    overrides = [
        *(f"{key}={tmp_path / 'lm'}" for key in ("backbone.pretrained", "task.tokenizer")),
        *(f"task.{key}={value}" for key, value in SETTINGS.items()),
        *(
            f"task.train={data}",
            "task.assistant_only=true",
            "backbone.frozen=false",
            "backbone.cached_rows=0",
        ),
        *("steps=60", "batch_size=4", "schedule.name=constant", "schedule.warmup_steps=0"),
        *("schedule.decay_steps=", "optimizer.learning_rate=1e-2", "run.save_every=60"),
    ]
    train(load_recipe("own-model", overrides), tmp_path / "run")
    seen = []
    original = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda x, **k: (seen.append(x), original(x, **k))[1])
    result = CliRunner().invoke(
        app, ["generate", str(tmp_path / "run"), "Hi", "--chat", "--draft-length", "2"]
    )
    assert result.exit_code == 0, result.output
    assert "Oh, hello." in result.output
    assert [tokenizer.apply_chat_template(
        conversation("Hi", "")[:1], add_generation_prompt=True
    ).input_ids] in seen  # fmt: skip


# ---- what is refused ----


def test_bad_input_is_told_in_one_sentence(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    user = {"role": "user", "content": "Who?"}
    answer = {"role": "assistant", "content": "I."}
    chat = [user, answer]

    def refused(
        match: str, chats: list[Any], template: str | None = CHATML, **changes: Any
    ) -> None:
        tokenizer.chat_template = template
        (tmp_path / "tokenizer/chat_template.jinja").unlink(missing_ok=True)
        with pytest.raises(NextLatError, match=match) as raised:
            build(tmp_path, tokenizer, [*[chat] * 5, *chats], **changes)
        assert "\n" not in str(raised.value)

    refused("begins with 'Who.' has no turn of the assistant", [[user]], assistant_only=True)
    refused(r"message 2 of line 6 of .*chats.jsonl has no role", [[user, {"content": "x"}]])
    refused("message 1 of line 6 of", [["plain"]])
    refused(r"has no chat template: give one that has", [chat], template=None)
    refused(
        r"cannot render the conversation that begins with 'Who.' \(roles must alternate\)",
        [[user, user]],
        template="{{ raise_exception('roles must alternate') }}",
    )
    refused(r"cannot render .* \(Expected an expression", [chat], template="{% for %}")
    refused(
        r"renders the start of a conversation otherwise .*mark them",
        [chat],
        template="{{ messages | length }}" + CHATML.replace(MARKED[0], "").replace(MARKED[1], ""),
        assistant_only=True,
    )
    refused("holds both texts and conversations", ["a text"])
    refused("task.tokenizer, not task.vocab_size", [chat], tokenizer=None, vocab_size=300)
    write = write_jsonl(tmp_path / "text.jsonl", ["a text"] * 9)
    refused("is text, not conversations", [], train=str(write), assistant_only=True)
