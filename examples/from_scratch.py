"""Train a small transformer from scratch with next-latent prediction, and save it.

    python examples/from_scratch.py my-model

It learns to count in steps: each row starts anywhere and goes on by a step of its own, modulo 30.
"""

import sys

import torch

import nextlat

VOCABULARY, ROWS, LENGTH, STEPS = 30, 32, 16, 150


def rows(generator: torch.Generator) -> torch.Tensor:
    """(ROWS, LENGTH) tokens: start, start + step, start + 2 step, ..."""
    start = torch.randint(VOCABULARY, (ROWS, 1), generator=generator)
    step = torch.randint(1, 5, (ROWS, 1), generator=generator)
    return (start + step * torch.arange(LENGTH)) % VOCABULARY


lm = nextlat.llama(vocab_size=VOCABULARY, layers=2, width=64, seed=0)
model = nextlat.attach(lm, nextlat.NextLatConfig(horizon=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(0)

for i in range(1, STEPS + 1):
    ids = rows(generator)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if i % 50 == 0:
        print(i, {name: round(value.item(), 3) for name, value in out.losses.items()})

model.save_pretrained(sys.argv[1])  # opens with AutoModelForCausalLM, or with nextlat.load
