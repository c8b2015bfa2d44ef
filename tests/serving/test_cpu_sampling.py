"""What is mended in vLLM's CPU package, and that faults are found by their effect."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nextlat import NextLatError
from nextlat.serving.cpu_sampling import KERNEL, expand, mend_sampling


def as_vllm_has_it(output: Tensor, x: Tensor, ends: Tensor, old: float, new: float) -> None:
    """The fault: what is not int64 is converted, and the copy is written to."""
    copy = output if output.dtype == torch.int64 else output.to(torch.int64)
    expand(copy, x.to(torch.int64), ends, old, new)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[..., None]]:
    """A stand-in for vLLM's table of kernels, with the faulty one in it."""
    table: dict[str, Callable[..., None]] = {KERNEL: as_vllm_has_it}

    def expand_batch_to_tokens(
        x: Tensor, ends: Tensor, count: int, old: float, new: float
    ) -> Tensor:
        output = torch.full((count,), 9).to(x.dtype)
        table[KERNEL](output, x, ends, old, new)
        return output

    def apply_top_k_top_p(logits: Tensor, k: Tensor, p: Tensor | None) -> Tensor:
        return logits[:, : k.max()]

    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.triton_utils": {},
        "vllm.triton_utils.dispatcher": {"register_kernels": table.update},
        "vllm.v1": {},
        "vllm.v1.sample": {},
        "vllm.v1.sample.rejection_sampler": {
            "expand_batch_to_tokens": expand_batch_to_tokens,
            "apply_top_k_top_p": apply_top_k_top_p,
        },
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    vars(sys.modules["vllm.v1.sample"])["rejection_sampler"] = module
    return table


def test_a_faulty_kernel_is_replaced_and_a_right_one_left(
    kernels: dict[str, Callable[..., None]],
) -> None:
    mend_sampling()
    assert kernels[KERNEL] is expand
    right = kernels[KERNEL] = lambda *arguments: expand(*arguments)
    mend_sampling()
    assert kernels[KERNEL] is right


def test_what_cannot_be_mended_is_refused(
    kernels: dict[str, Callable[..., None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "vllm.triton_utils.dispatcher")
    with pytest.raises(NextLatError, match="samples wrongly"):
        mend_sampling()


def test_top_k_of_no_drafts_is_no_error(kernels: dict[str, Callable[..., None]]) -> None:
    sampler: Any = sys.modules["vllm.v1.sample.rejection_sampler"]
    nothing, k = torch.empty(0, 8), torch.empty(0, dtype=torch.int32)
    with pytest.raises(RuntimeError):
        sampler.apply_top_k_top_p(nothing, k, None)
    mend_sampling()
    assert sampler.apply_top_k_top_p(nothing, k, None) is nothing
    assert sampler.apply_top_k_top_p(torch.ones(1, 8), torch.tensor([3]), None).shape == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_value_is_repeated_for_its_tokens(dtype: torch.dtype) -> None:
    output = torch.empty(6, dtype=dtype)
    expand(output, torch.tensor([5, 0, 7], dtype=dtype), torch.tensor([1, 4, 6]), 0, 1)
    assert output.tolist() == [5, 1, 1, 1, 7, 7]
