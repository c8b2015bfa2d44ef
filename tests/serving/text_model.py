"""A small text model that is trained where it is needed: a tokenizer and a Llama with next-latent
prediction, in a minute of one core."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import nextlat

STORIES = Path(__file__).parents[3] / "shared" / "data" / "text"
SUBJECTS = "the cat|a small dog|her brother|the old king|a red bird|my friend|the farmer|a frog"
VERBS = "saw|found|liked|carried|painted|lost|followed|hid"
OBJECTS = "the ball|a shiny stone|some bread|the blue boat|a long rope|the moon|an apple|a song"
ENDS = "and was happy|in the garden|before dinner|near the river|and ran home|with a smile"


def documents() -> list[str]:
    """TinyStories where they are at hand, else stories of a small grammar."""
    file = STORIES / "tinystories_train.txt"
    if file.is_file():
        return file.read_text()[:3_000_000].split("<|endoftext|>")
    draw = random.Random(0)
    parts = [words.split("|") for words in (SUBJECTS, VERBS, OBJECTS, ENDS)]
    return [
        " ".join(
            f"One day {' '.join(draw.choice(part) for part in parts)}." for _ in range(8)
        )
        for _ in range(4000)
    ]  # fmt: skip


def tokenizer_of(texts: list[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE without special tokens but the one that ends a document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<end>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def train(
    directory: Path,
    config: nextlat.NextLatConfig | None = None,
    *,
    steps: int = 300,
    rows: int = 8,
    length: int = 96,
    layers: int = 4,
    width: int = 128,
    max_length: int = 1024,
    tie_embeddings: bool = False,
    seed: int = 0,
) -> Path:
    """Train, save with `save_pretrained` and the tokenizer, and return the directory."""
    texts = documents()
    tokenizer = tokenizer_of(texts[:2000])
    ids = tokenizer("<end>".join(texts[:6000]), return_tensors="pt", verbose=False).input_ids[0]
    lm = nextlat.llama(
        len(tokenizer),
        layers=layers,
        width=width,
        max_length=max_length,
        tie_embeddings=tie_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        seed=seed,
    )
    torch.manual_seed(seed)
    model = nextlat.attach(lm, config or nextlat.NextLatConfig(horizon=2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length, (rows,))
        batch = torch.stack([ids[start : start + length] for start in starts])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def prompts(directory: Path, count: int = 8, longest: int = 48) -> list[list[int]]:
    """Token ids of beginnings of unequal length."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    texts = documents()[-count:]
    lengths = [4 + (longest - 4) * i // max(1, count - 1) for i in range(count)]
    return [
        tokenizer(text * 20, verbose=False).input_ids[:length]
        for text, length in zip(texts, lengths, strict=True)
    ]
