"""What the tests share: tiny random models of many families, and the real data if at hand."""

import importlib.util
import os
import sys
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nextlat.decoding.sampling import Sampling, Scores
from nextlat.results import Chart, Measurement
from nextlat.scores import Score
from nextlat.weights import SUMS

FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "granite", "mixtral")


def in_quick(values: Iterable[str], quick: Container[str]) -> list[Any]:
    """Values of a parameter, of which only some belong to `make quick`."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


every_family = pytest.mark.parametrize("family", in_quick(FAMILIES, {"llama", "gpt2", "gemma2"}))

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.2,  # large, so that different inputs give visibly different logits
}
_SPECIFIC = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
        "bos_token_id": None, "eos_token_id": None,
    },
    "gemma2": {
        "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
        "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0,
    },
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def tiny_lm(
    family: str, vocab_size: int = 50, seed: int = 0, **overrides: object
) -> PreTrainedModel:
    """A random model of a family, small enough for exact comparisons, in eval mode and fp32."""
    settings = {
        **({} if family == "gpt2" else _COMMON),
        **_SPECIFIC[family],
        "vocab_size": vocab_size,
        **overrides,
    }
    config = CONFIG_MAPPING[family](**settings)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def sampling(
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
) -> Sampling:
    """The sampler that `generate(do_sample=True, ...)` makes of these settings."""
    processors = [
        *([TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []),
        *([TopKLogitsWarper(top_k)] if top_k is not None else []),
        *([TopPLogitsWarper(top_p)] if top_p is not None else []),
    ]
    return Sampling(
        Scores(processors), None if seed is None else torch.Generator().manual_seed(seed)
    )


@pytest.fixture
def data_dir() -> Path:
    """The real data for development and tests; not part of the repository."""
    path = Path(os.environ.get("NEXTLAT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(
            f"real data not found in {path}: set NEXTLAT_DATA to the directory that holds "
            "manhattan/ and text/"
        )
    return path


@pytest.fixture(autouse=True, scope="session")
def no_ones_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept from one run to the next is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTLAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small tensors: threads only add noise, and bit-for-bit comparisons want a fixed number of
    them."""
    torch.set_num_threads(1)


def forget_sums(directory: Path) -> None:
    """As a version without checksums left it, or as somebody who edits its files should."""
    (directory / SUMS).unlink()


def by_key(found: Iterable[Measurement | Chart]) -> dict[str, Score]:
    """The scores of a task's measurements, by the keys of their metrics; charts are left out."""
    return {m.metric.key: m.score for m in found if isinstance(m, Measurement)}


def load_benchmark(name: str) -> ModuleType:
    """A script of benchmarks/ as a module, without running it."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MARKED = "{% generation %}", "{% endgeneration %}"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_tokenizer(*, marked: bool = True) -> PreTrainedTokenizerFast:
    """Every byte a token, roles in the template of ChatML.

    Args:
        marked: whether the template marks what the assistant says.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=259, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    template = CHATML
    for mark in () if marked else MARKED:
        template = template.replace(mark, "")
    tokenizer.chat_template = template
    return tokenizer


def conversation(question: str, *answers: str) -> list[dict[str, str]]:
    """A question with its answer, and for every further answer the same question once more."""
    return [
        {"role": role, "content": content}
        for answer in answers
        for role, content in (("user", question), ("assistant", answer))
    ]
