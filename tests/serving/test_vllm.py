"""A trained model in the real vLLM: `make serve-test` makes an environment that has one."""

import gc
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import text_model
import torch

import nextlat
from conftest import tiny_lm
from nextlat import NextLatConfig, NextLatError

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="there is no vLLM in this environment: `make serve-test` makes one that has it",
    ),
    pytest.mark.filterwarnings("ignore"),  # vLLM's, of which there are many
]

NEW_TOKENS = 48
GREEDY = {"temperature": 0.0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(autouse=True, scope="module")
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        # One process for everything: an engine then starts in three seconds and not in thirty.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model.train(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def prompts(run: Path) -> list[list[int]]:
    """Of unequal length; the last is longer than a chunk of 64 tokens."""
    return [*text_model.prompts(run, 7), text_model.prompts(run, 8, longest=150)[-1]]


@pytest.fixture(scope="module")
def expected(run: Path, prompts: list[list[int]]) -> list[list[int]]:
    return of_transformers(run, prompts)


@contextmanager
def engine(run: Path, draft_length: int = 0, **options: Any) -> Iterator[Any]:
    """vLLM on a run, in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    speculation = {
        "method": "eagle",
        "model": str(run / "nextlat"),
        "num_speculative_tokens": draft_length,
        "draft_sample_method": options.pop("draft_sample_method", "greedy"),
        "disable_eagle_block_drop": True,
    }
    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "seed": 0,
    }
    llm = LLM(
        model=str(run),
        speculative_config=speculation if draft_length else None,
        **settings | options,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def decoded(llm: Any, prompts: list[list[int]], **sampling: Any) -> list[list[int]]:
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(**GREEDY | sampling),
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def metrics(llm: Any) -> dict[str, Any]:
    return {
        metric.name: getattr(metric, "value", getattr(metric, "values", None))
        for metric in llm.get_metrics()
    }


def load(run: Path) -> nextlat.ObjectiveModel:
    # The one attention of transformers that caps its logits where a model does, as vLLM's do.
    return nextlat.load(run, attn_implementation="eager")


def of_transformers(run: Path, prompts: list[list[int]]) -> list[list[int]]:
    lm = load(run).lm
    return [
        lm.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


def check_cycles(llm: Any, run: Path, prompts: list[list[int]], draft_length: int) -> None:
    """vLLM's cycles and accepted tokens are `model.generate`'s, but for what vLLM drafts past the
    last token: `generate` shortens its last draft, vLLM throws away what is too much."""
    model = load(run)
    cycles, accepted = 0, [0] * draft_length
    for prompt in prompts:
        _, stats = model.generate(
            torch.tensor([prompt]),
            torch.ones(1, len(prompt), dtype=torch.long),
            draft_length=draft_length,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            return_stats=True,
        )
        cycles += stats.cycles
        for i, count in enumerate(stats.accepted_by_position):
            accepted[i] += count
    counted = metrics(llm)
    assert counted["vllm:spec_decode_num_drafts"] == cycles
    surplus = [
        theirs - ours
        for theirs, ours in zip(
            counted["vllm:spec_decode_num_accepted_tokens_per_pos"], accepted, strict=True
        )
    ]
    assert sum(accepted) > 10  # a drafter of which nothing is accepted would agree by nature
    assert all(0 <= extra <= len(prompts) for extra in surplus)


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("draft_length", [0, 1, 2, 4])
def test_greedy_output_is_that_of_transformers(
    draft_length: int,
    prefix_caching: bool,
    run: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    with engine(run, draft_length, enable_prefix_caching=prefix_caching) as llm:
        assert decoded(llm, prompts) == expected
        if draft_length:
            check_cycles(llm, run, prompts, draft_length)
        if prefix_caching:
            assert decoded(llm, prompts) == expected
            assert metrics(llm)["vllm:prefix_cache_hits"] >= 128  # of the longest prompt's 150


def test_compiled_output_is_the_same(
    run: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with engine(run, 2, enforce_eager=False) as llm:
        assert decoded(llm, prompts) == expected
        check_cycles(llm, run, prompts, 2)


def gru(directory: Path) -> None:
    text_model.train(directory, NextLatConfig(horizon=2, dynamics="gru"), steps=150)


def separate_norms_tied(directory: Path) -> None:
    config = NextLatConfig(horizon=2, separate_norms=True)
    text_model.train(directory, config, steps=60, tie_embeddings=True)


def random(family: str, **overrides: Any) -> Callable[[Path], None]:
    """A random model, some of whose drafts are accepted because it repeats itself."""

    def save(directory: Path) -> None:
        sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        lm = tiny_lm(
            family, 64, seed=2, head_dim=32, max_position_embeddings=512, **sizes, **overrides
        )
        nextlat.attach(lm, NextLatConfig(zero_init=True)).save_pretrained(directory)

    return save


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(gru, id="gru"),
        pytest.param(separate_norms_tied, id="separate norms, tied embeddings"),
        pytest.param(random("qwen3"), id="qwen3"),
        pytest.param(random("granite"), id="granite: scaled head"),
        pytest.param(random("gemma2", sliding_window=32), id="gemma2: all of it"),
    ],
)
def test_sidecars_and_targets_of_every_kind(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    prompts = [list(range(1, 1 + length)) for length in (5, 20, 40)]
    with engine(tmp_path, 3, skip_tokenizer_init=True) as llm:
        assert decoded(llm, prompts, detokenize=False) == of_transformers(tmp_path, prompts)
        check_cycles(llm, tmp_path, prompts, 3)


@pytest.mark.parametrize(
    ("config", "family", "sentence"),
    [
        (nextlat.MTPConfig(horizon=2), "llama", "objective 'mtp', which cannot draft in vLLM"),
        (NextLatConfig(), "gpt2", "here they are 'transformer.wte'"),
    ],
)
def test_what_cannot_draft_is_refused_at_start(
    config: Any, family: str, sentence: str, tmp_path: Path
) -> None:
    sizes = {"gpt2": {"n_embd": 64, "n_head": 2}}.get(
        family, {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    )
    nextlat.attach(tiny_lm(family, **sizes), config).save_pretrained(tmp_path)
    with (
        pytest.raises(NextLatError, match=sentence),
        engine(tmp_path, 2, skip_tokenizer_init=True, max_model_len=128),
    ):
        pass


def test_bf16_with_drafts_is_bf16_without_up_to_ties(run: Path, prompts: list[list[int]]) -> None:
    """Verifying several tokens at once rounds otherwise than one at a time: a row may part where
    its two likeliest tokens are as good as equal, and nowhere else."""
    from vllm import SamplingParams

    with engine(run, dtype="bfloat16") as llm:
        plain = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(**GREEDY, logprobs=2),
            use_tqdm=False,
        )
    with engine(run, 4, dtype="bfloat16") as llm:
        drafted = decoded(llm, prompts)
    for output, tokens in zip((output.outputs[0] for output in plain), drafted, strict=True):
        parts = [i for i, (a, b) in enumerate(zip(output.token_ids, tokens, strict=True)) if a != b]
        if parts:
            likely = {token: entry.logprob for token, entry in output.logprobs[parts[0]].items()}
            assert tokens[parts[0]] in likely
            assert max(likely.values()) - likely[tokens[parts[0]]] < 0.1


@pytest.mark.parametrize("draft_sample_method", ["greedy", "probabilistic"])
def test_samples_have_the_distribution_of_the_model(
    draft_sample_method: str, tmp_path: Path
) -> None:
    """Four tokens of six, enumerated: chi-square of what 4,000 requests drew, plainly, with top-k
    and with seeds of their own, greedy requests among them."""
    from scipy.stats import chi2
    from vllm import SamplingParams

    vocab, length, count, prompt = 6, 4, 4000, [1, 2, 3]
    lm = nextlat.llama(
        vocab, layers=1, width=64, heads=2, max_length=64, initializer_range=0.3, seed=1
    )
    torch.manual_seed(0)
    nextlat.attach(lm, NextLatConfig()).save_pretrained(tmp_path)
    sequences = list(itertools.product(range(vocab), repeat=length))
    inputs = torch.tensor([[*prompt, *sequence] for sequence in sequences])
    with torch.no_grad():
        logits = lm(inputs).logits[:, len(prompt) - 1 : -1]

    with engine(
        tmp_path, 3, draft_sample_method=draft_sample_method, skip_tokenizer_init=True,
        max_model_len=64, max_num_seqs=256, max_num_batched_tokens=2048,
    ) as llm:  # fmt: skip
        for temperature, top_k, seeded in ((0.7, 0, False), (1.5, 3, False), (0.7, 0, True)):
            scaled = logits / temperature
            if top_k:
                limit = scaled.topk(top_k).values[..., -1:]
                scaled = scaled.masked_fill(scaled < limit, float("-inf"))
            chosen = inputs[:, len(prompt) :, None]
            exact = scaled.log_softmax(-1).gather(-1, chosen).sum((1, 2)).exp() * count
            drawing = [
                SamplingParams(
                    temperature=temperature, top_k=top_k or -1, seed=i if seeded else None,
                    max_tokens=length, ignore_eos=True, detokenize=False,
                )
                for i in range(count)
            ]  # fmt: skip
            greedy = SamplingParams(
                temperature=0, max_tokens=length, ignore_eos=True, detokenize=False
            )
            outputs = llm.generate(
                [{"prompt_token_ids": prompt}] * (count + 100), [*drawing, *[greedy] * 100],
                use_tqdm=False,
            )  # fmt: skip
            drawn = [tuple(output.outputs[0].token_ids) for output in outputs]
            assert len(set(drawn[count:])) == 1
            counts = Counter(drawn[:count])
            # Sequences that are rarely due count together.
            often = exact >= 5
            due = [*exact[often].tolist(), float(exact[~often].sum())]
            seen = [counts[sequences[i]] for i in often.nonzero().flatten().tolist()]
            seen.append(count - sum(seen))
            statistic = sum((a - b) ** 2 / b for a, b in zip(seen, due, strict=True) if b)
            assert chi2.sf(statistic, len(due) - 1) > 1e-3
        assert metrics(llm)["vllm:spec_decode_num_accepted_tokens"] > count / 4


def is_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_user_serves_asks_and_stops(
    run: Path, prompts: list[list[int]], expected: list[list[int]], tmp_path: Path
) -> None:
    """`nextlat serve`, compiled and in processes of its own, asked by several clients at once."""
    from openai import OpenAI
    from transformers import AutoTokenizer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "nextlat", "serve", str(run), "--draft-length", "4",
        "--port", str(port), "--max-model-len", "512", "--max-num-seqs", "4",
        "--max-num-batched-tokens", "64",
    ]  # fmt: skip
    variables = os.environ | ENVIRONMENT
    del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
    log = tmp_path / "log"
    with log.open("w") as sink:
        server = subprocess.Popen(
            command, env=variables, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        ready = f"{run} is served at http://127.0.0.1:{port}/v1 with 4 drafted tokens a cycle."
        for _ in range(600):
            if ready in log.read_text() or server.poll() is not None:
                break
            time.sleep(0.5)
        assert ready in log.read_text(), log.read_text()[-3000:]
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
        tokenizer = AutoTokenizer.from_pretrained(run)

        def ask(prompt: list[int], stream: bool) -> str:
            answer = client.completions.create(
                model=str(run), prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=stream,
                extra_body={"ignore_eos": True},
            )  # fmt: skip
            return "".join(part.choices[0].text for part in (answer if stream else [answer]))

        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
        with ThreadPoolExecutor(8) as pool:
            for stream in (False, True):
                answers = list(pool.map(ask, prompts, itertools.repeat(stream)))
                assert answers == texts
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, log.read_text()[-3000:]
        assert time.monotonic() - started < 60
        assert "Traceback" not in log.read_text()
        for _ in range(20):
            if not is_running(server.pid):
                break
            time.sleep(0.5)
        assert not is_running(server.pid)  # nor is any of its processes
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
