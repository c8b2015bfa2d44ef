"""Several processes that train one model: what they were started with, what they tell each other,
and which of them speaks.

The first one (rank 0) writes, evaluates and times. Nothing here needs torch before it is called.
"""

import atexit
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from nextlat.errors import NextLatError, first_line

OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Under torchrun a process that dies ends the others: none is ever waited for in vain.
NO_TIME_OUT = timedelta(days=365)
PATIENCE = timedelta(seconds=10)  # of a process that keeps silent, until another has spoken
SETTLING = 0.5  # seconds for the threads of gloo, which need microseconds
NOT_OURS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}


def count() -> int:
    """How many processes were started together, by the environment."""
    return _number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process is the first of them, or alone."""
    return _number("RANK", 0) == 0


def refuse_several(what: str) -> None:
    """For what one process does.

    Raises:
        NextLatError: several were started together.
    """
    if count() > 1:
        raise NextLatError(f"{what} runs in one process: start it without torchrun or accelerate.")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def asked(name: str) -> bool:
    """Whether a switch of accelerate's is on in the environment."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def check_environment(
    *, accumulation: int, precision: str | None, compiled: bool | None = None
) -> None:
    """Refuse what a launcher has put into the environment and training would ignore or contradict.

    Args:
        accumulation: micro-batches of a step.
        precision: no, bf16 or fp16; None = what the environment says.
        compiled: whether the model is to be compiled; None = what the environment says.

    Raises:
        NextLatError: naming the variable and the way out.
    """
    missing = [name for name in OF_TORCHRUN if not os.environ.get(name)]
    if missing and (count() > 1 or "LOCAL_RANK" not in missing):
        there = next(name for name in ("WORLD_SIZE", "LOCAL_RANK") if name not in missing)
        raise NextLatError(
            f"{there} is {os.environ[there]}, but {', '.join(missing)} not set, so that the "
            f"processes would not find each other: start them with torchrun, or unset {there}."
        )
    for name, what in NOT_OURS.items():
        if asked(name):
            raise NextLatError(
                f"accelerate is configured for {what} ({name}), which objective models do not "
                "train with: choose FSDP2 or plain data parallelism."
            )
    if asked("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "2") != "2":
        raise NextLatError(
            "accelerate is configured for FSDP1 (FSDP_VERSION), which objective models do not "
            "train with: choose fsdp_version 2."
        )
    steps = _number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1)
    if steps not in (1, accumulation):
        raise NextLatError(
            f"accelerate is configured for {steps} gradient accumulation steps, and training for "
            f"{accumulation}: give the same number, or leave out accelerate's."
        )
    given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision is not None and given not in ("no", precision):
        raise NextLatError(
            f"accelerate is configured for mixed precision {given}, and training for "
            f"{precision.replace('no', 'fp32')}: give the same, or leave out accelerate's."
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiled is False and backend.lower() != "no":
        raise NextLatError(
            f"accelerate is configured to compile with {backend}, and the recipe not to: leave out "
            "accelerate's dynamo_backend, or set run.compile=true instead."
        )


def join() -> None:
    """Meet the other processes, if there are any, without a limit to later waits."""
    import torch
    from torch import distributed

    # As accelerate would, which gives gloo a time-out that nobody can set.
    if count() > 1 and not torch.cuda.is_available() and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=NO_TIME_OUT)
        settle_at_exit()


def settle_at_exit() -> None:
    """Let the threads of gloo finish before the interpreter ends. They may still hold tensors when
    the last message has long arrived, and a thread that has to wait for a dying interpreter to give
    them back aborts the process (SIGABRT, PyTorch issue 190489)."""
    atexit.unregister(_settle)
    atexit.register(_settle)


def _settle() -> None:
    time.sleep(SETTLING)


def leave() -> None:
    """Part from the other processes when the work in common is done: what the first one does from
    here on, it does alone."""
    if several():
        from torch import distributed

        distributed.destroy_process_group()


def several() -> bool:
    """Whether this process has met others."""
    from torch import distributed

    return (
        distributed.is_available()
        and distributed.is_initialized()
        and (distributed.get_world_size() > 1)
    )


def share_weights(model: Any, device: Any) -> None:
    """Let the weights of the first process be those of all, as DDP does when training begins; what
    is evaluated before would be several models.

    Args:
        model: of the same architecture on all processes.
        device: on which they talk to each other.
    """
    from torch import distributed

    for x in (*model.parameters(), *model.buffers()):
        sent = x.detach().to(device).contiguous()
        distributed.broadcast(sent, 0)
        x.detach().copy_(sent)


@contextmanager
def together() -> Iterator[None]:
    """All processes leave this block at the same time, and an error in one of them is an error in
    all. For blocks in which they do not talk to each other.

    Raises:
        NextLatError: another process failed in it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if several():
        from torch import distributed

        told: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(told, _sentence(error) if error else None)
        sentences = [sentence for sentence in told if sentence]
        if sentences and error is None:
            raise NextLatError(sentences[0])
    if error is not None:
        raise error


def _sentence(error: Exception) -> str:
    if isinstance(error, NextLatError):
        return str(error)
    return f"another process ended with {type(error).__name__}: {first_line(error)}."


@contextmanager
def survivors() -> Iterator[None]:
    """What the others are told when a process is gone without a word.

    Raises:
        NextLatError: one is.
    """
    try:
        yield
    except RuntimeError as error:
        if not several() or not re.search("gloo|nccl", f"{type(error).__name__} {error}", re.I):
            raise
        raise NextLatError(
            "another of the processes is gone (killed, or out of memory): the same command goes on "
            "from the last checkpoint."
        ) from error


class Agreement:
    """Whether any process has asked for something, known to all of them at the same step: the
    answer to the question of the step before, so that nobody waits for it."""

    def __init__(self) -> None:
        from torch import distributed

        self._group = distributed.new_group(backend="gloo", timeout=NO_TIME_OUT)
        self._pending: tuple[Any, Any] | None = None

    def reached(self, asks: bool) -> bool:
        """To be called by all processes at every step."""
        import torch
        from torch import distributed

        answer = False
        if self._pending is not None:
            work, asked_before = self._pending
            work.wait()
            answer = bool(asked_before.item())
        flag = torch.tensor(float(asks))
        work = distributed.all_reduce(
            flag, distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._pending = work, flag
        return answer


@contextmanager
def one_voice() -> Iterator[bool]:
    """Whether this process is the one to say how the run ended: the first of all that comes here.
    The others wait until it has."""
    if count() == 1:
        yield True
        return
    store = _store()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if store is None:  # nobody can be asked: what is wrong so early is so for all
        speaks = is_first()
        if not speaks:
            time.sleep(PATIENCE.total_seconds() / 2)
        yield speaks
        return
    speaks = store.add(f"nextlat/spoken/{attempt}", 1) == 1
    try:
        if not speaks:
            with suppress(RuntimeError):
                store.wait([f"nextlat/heard/{attempt}"], PATIENCE)
        yield speaks
    finally:
        if speaks:
            store.set(f"nextlat/heard/{attempt}", "1")


def _store() -> Any:
    """What torchrun keeps for its processes to leave messages in; None where it cannot be
    reached."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ.get("MASTER_ADDR", ""), _number("MASTER_PORT", 0)
    if not re.fullmatch(r"[\w.:-]+", address) or not port:
        return None
    try:
        return TCPStore(address, port, is_master=False, timeout=PATIENCE)
    except (RuntimeError, ValueError):
        return None
