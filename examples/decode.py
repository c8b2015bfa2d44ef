"""Decode with a saved model: the output is the transformer's own, drafted by the objective.

python examples/decode.py my-model
"""

import sys

import torch

import nextlat

model = nextlat.load(sys.argv[1])
prompts = torch.tensor([[3, 5, 7, 9], [10, 14, 18, 22]])  # or tokenizer(..., return_tensors="pt")

# Greedy: token for token what transformers' own generate gives.
out, stats = model.generate(prompts, max_new_tokens=24, draft_length=4, return_stats=True)
assert torch.equal(out, model.lm.generate(prompts, max_new_tokens=24, do_sample=False))
print(out.tolist())
print(f"{stats.mean_acceptance_length:.2f} tokens per forward pass of the transformer")
print("acceptance by position:", [round(share, 2) for share in stats.acceptance_by_position])

# Sampled: with the transformer's own distribution.
generator = torch.Generator(model.device).manual_seed(0)
out = model.generate(
    prompts,
    max_new_tokens=24,
    do_sample=True,
    temperature=0.8,
    draft_length=4,
    generator=generator,
)
print(out.tolist())
