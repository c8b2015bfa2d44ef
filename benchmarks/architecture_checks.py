"""What `architectures.py` does with one model: everything that this package does with one, each
thing against the library's own."""

import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import nextlat
from nextlat import MTPConfig, NextLatConfig, NextLatError, NextTokenConfig
from nextlat.decoding.prepared import shares_passes

NEW, DRAFTS = 14, (0, 1, 4)
SINGLE, PADDED, EVEN = (5, 11, 20), (9, 4, 6), (7, 7)


class Report:
    """What was found out about one type, written to its entry as it comes, so that a crash leaves
    what there was."""

    def __init__(self, send: Callable[[dict[str, Any]], None]) -> None:
        self.entry: dict[str, Any] = {}
        self._send = send

    def set(self, **facts: Any) -> None:
        self.entry.update(facts)
        self._send(self.entry)

    def wrong(self, sentence: str) -> None:
        self.entry.setdefault("wrong", []).append(sentence)
        self._send(self.entry)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """An error other than a refusal is a fault of ours."""
        self.set(stage=name)
        try:
            yield
        except Exception as error:
            self.wrong(f"{name}: {in_a_line(error)}")


def in_a_line(error: BaseException) -> str:
    """An error of someone else's, in a line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"


# ---- training ----


def loss_and_gradient(lm: Any, report: Report) -> None:
    """Against the cross-entropy of the model's own logits, row by row."""
    model = nextlat.attach(lm, NextTokenConfig())
    rows = [torch.randint(3, 90, (length,)) for length in (12, 7, 10)]
    lm.train()

    def reference(some: list[Tensor]) -> Tensor:
        each = [lm(input_ids=row[None], use_cache=False).logits[0] for row in some]
        logits = torch.cat([x[:-1] for x in each])
        return F.cross_entropy(logits.float(), torch.cat([row[1:] for row in some]))

    def compare(name: str, expected: list[Tensor], **batch: Tensor) -> None:
        with report.stage(f"loss of {name}"):
            lm.zero_grad()
            torch.manual_seed(1)
            want = reference(expected)
            want.backward()
            wanted = _gradient(lm)
            lm.zero_grad()
            torch.manual_seed(1)
            try:
                got = model(**batch).losses["next_token"]
                model(**batch).loss.backward()
            except NextLatError as error:
                report.entry["refusals"][name] = str(error)
                return
            if not torch.isfinite(want):
                report.wrong(f"{name}: the library's own loss is {want.item()}")
            elif abs(got - want) > 1e-4 * want.abs():
                report.wrong(f"{name}: loss {got.item():.6f} instead of {want.item():.6f}")
            elif (off := float((_gradient(lm) - wanted).norm() / wanted.norm())) > 1e-3:
                report.wrong(f"{name}: gradient off by {off:.1e}")
            else:
                report.entry["trains"].append(name)

    same = torch.stack([rows[0], rows[0].flip(0)])
    compare("whole rows", [rows[0], rows[0].flip(0)], input_ids=same, labels=same)
    for side in ("right", "left"):
        ids = torch.zeros(3, 12, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for b, row in enumerate(rows):
            at = slice(0, len(row)) if side == "right" else slice(12 - len(row), 12)
            ids[b, at], mask[b, at] = row, 1
        labels = ids.masked_fill(mask == 0, -100)
        compare(
            f"rows padded on the {side}", rows, input_ids=ids, labels=labels, attention_mask=mask
        )
    row = torch.cat([rows[1], rows[2]])[None].expand(2, -1)
    positions = torch.cat([torch.arange(7), torch.arange(10)])[None].expand(2, -1)
    compare("packed rows", rows[1:], input_ids=row, labels=row, position_ids=positions)
    lm.eval()

    with report.stage("causality"), torch.no_grad():
        ids = torch.randint(3, 90, (1, 20))
        other = torch.cat([ids[:, :10], ids[:, 10:].flip(1) + 1], dim=1)
        h, changed = (model.backbone.states(x)[0, :10] for x in (ids, other))
        if not model.backbone.close(h, changed):
            report.wrong(
                "its states depend on later tokens, and it is trained on them all the same"
            )


def _gradient(lm: Any) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in lm.parameters()]
    )


def objective_losses(model: Any, report: Report, *, name: str) -> None:
    """Finite, with the next-token part of plain training; MTP's extra heads begin as copies, whose
    loss is known."""
    lm, d = model.lm, model.objective.horizon
    ids = torch.randint(3, 90, (2, 15))
    with report.stage(f"loss of {name}"):
        lm.zero_grad()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        logits = lm(input_ids=ids, use_cache=False).logits.float()
        want = {0: F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())}
        for i in range(1, d + 1):
            want[i] = F.cross_entropy(logits[:, : -1 - i].flatten(0, 1), ids[:, 1 + i :].flatten())
        parts = {"next_token": want[0]}
        if name == "MTP":
            parts["multi_token"] = sum(want[i] for i in range(1, d + 1)) / d
        for part, value in parts.items():
            if abs(out.losses[part] - value) > 1e-4 * value.abs():
                report.wrong(
                    f"{name}: {part} {out.losses[part].item():.6f} instead of {value.item():.6f}"
                )
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        if not all(grad.isfinite().all() for grad in grads):
            report.wrong(f"{name}: gradients that are not finite")


def save_and_load(model: Any, report: Report, *, name: str) -> None:
    with report.stage(f"save and load of {name}"), tempfile.TemporaryDirectory() as directory:
        ids = torch.randint(3, 90, (2, 15))
        with torch.no_grad():
            before = model(input_ids=ids).logits, model(input_ids=ids, labels=ids).loss
        model.save_pretrained(directory)
        kernel = model.lm.config._attn_implementation
        again = nextlat.load(directory, attn_implementation=kernel).eval()
        with torch.no_grad():
            after = again(input_ids=ids).logits, again(input_ids=ids, labels=ids).loss
        old, new = model.state_dict(), again.state_dict()
        if old.keys() != new.keys():
            report.wrong(f"{name}: other parameters after save and load")
        elif other := [n for n, x in old.items() if not torch.equal(x, new[n])]:
            report.wrong(f"{name}: another {', '.join(other[:3])} after save and load")
        elif not all(
            torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(before, after, strict=True)
        ):
            # Not to the bit: the order of sums depends on where the weights lie in memory.
            report.wrong(f"{name}: other logits or another loss after save and load")


# ---- decoding ----


class Oracle:
    """Makes an objective draft what the model is going to say, wrong at every third position; the
    objective's own drafter runs beside it.

    The drafting state carries the model's hidden state, by which the position is looked up.
    """

    def __init__(
        self, model: Any, sequences: list[Tensor], report: Report, *, copies: bool
    ) -> None:
        self._width, self._vocabulary = model.backbone.width, model.backbone.vocab_size
        self._report, self._copies, self._close = report, copies, model.backbone.close
        with torch.no_grad():
            self._states = torch.cat([model.backbone.states(row[None])[0] for row in sequences])
        self._tokens = torch.cat([row.roll(-1) for row in sequences])
        self._start, self._draft = model.objective.drafting_states, model.objective.draft
        model.objective.drafting_states, model.objective.draft = self.start, self.draft

    def start(self, h: Tensor, input_ids: Tensor) -> Tensor:
        state = self._start(h, input_ids)
        if self._copies and not self._close(state[..., : self._width], h):
            self._report.wrong("MTP: drafts start from other states than training sees")
            self._copies = False
        return torch.cat([state, h], dim=-1)

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        own, _ = self._draft(state[..., : -self._width], token)
        at = torch.cdist(state[:, -self._width :].float(), self._states.float()).argmin(dim=-1)
        at = (at + 1).clamp(max=len(self._states) - 1)
        said = torch.where(at % 3 == 2, (self._tokens[at] + 1) % self._vocabulary, self._tokens[at])
        logits = 10.0 * F.one_hot(said, self._vocabulary).float()
        return torch.cat([own, self._states[at]], dim=-1), logits


def prompts() -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> ids and attention mask, padded on the left."""
    made = {}
    groups = {
        **{f"a prompt of {n}": (n,) for n in SINGLE},
        "a padded batch": PADDED,
        "a batch without padding": EVEN,
    }
    for name, lengths in groups.items():
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for b, length in enumerate(lengths):
            ids[b, -length:], mask[b, -length:] = torch.randint(3, 90, (length,)), 1
        made[name] = ids, mask
    return made


def library_output(
    lm: Any, given: dict[str, tuple[Tensor, Tensor]], report: Report
) -> dict[str, Tensor]:
    """What the library makes of each group, where it does."""
    wanted, failed = {}, {}
    for what, (ids, mask) in given.items():
        try:
            wanted[what] = lm.generate(
                ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
        except Exception as error:
            failed[what] = in_a_line(error)
    report.set(library_fails=failed)
    return wanted


def generation(
    model: Any,
    given: dict[str, tuple[Tensor, Tensor]],
    wanted: dict[str, Tensor],
    report: Report,
    *,
    name: str,
    lengths: tuple[int, ...],
) -> None:
    """`generate` against the library's, for every draft length and group of prompts."""
    lm, sequences = model.lm, []
    for what, rows in wanted.items():
        mask = F.pad(given[what][1], (0, NEW), value=1)
        sequences += [row[keep.bool()] for row, keep in zip(rows, mask, strict=True)]
    with report.stage(f"oracle of {name}"):
        Oracle(model, sequences, report, copies=name == "MTP")
    found: dict[str, Any] = {}
    for k in lengths:
        for what, want in wanted.items():
            ids, mask = given[what]
            with report.stage(f"{name}, draft length {k}, {what}"):
                try:
                    out, stats = model.generate(
                        ids,
                        attention_mask=mask,
                        max_new_tokens=NEW,
                        do_sample=False,
                        pad_token_id=0,
                        draft_length=k,
                        return_stats=True,
                    )
                except NextLatError as error:
                    found.setdefault("refused", {}).setdefault(str(k), {})[what] = str(error)
                    continue
                found.setdefault("decodes", {}).setdefault(str(k), []).append(what)
                if k and len(ids) == 1:
                    found["accepted"] = found.get("accepted", 0) + stats.accepted
                if not torch.equal(out, want):
                    report.wrong(
                        f"{name}, draft length {k}, {what}: {_difference(lm, ids, mask, out, want)}"
                    )
    report.set(**{name: found})


def _difference(lm: Any, ids: Tensor, mask: Tensor, got: Tensor, want: Tensor) -> str:
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    row, at = (got != want).nonzero()[0].tolist()
    seen = want[row : row + 1, int((mask[row] == 0).sum()) : at]
    with torch.no_grad():
        best = lm(input_ids=seen, use_cache=False).logits[0, -1].topk(2)
    gap = float((best.values[0] - best.values[1]) / best.values[0].abs().clamp(min=1e-6))
    whose = {int(want[row, at]): "the library's", int(got[row, at]): "ours"}
    says = whose.get(int(best.indices[0]), "neither")
    return (
        f"row {row} differs at new token {at - ids.shape[1]} "
        f"(without a cache: {says}, by {gap:.1e})"
    )


def check(lm: Any, report: Report) -> None:
    """Everything, for one model."""
    report.set(refusals={}, trains=[])
    torch.manual_seed(0)
    with report.stage("forward"):
        try:
            with torch.no_grad():
                lm(input_ids=torch.randint(3, 90, (2, 5)), use_cache=False)
        except Exception as error:
            report.set(library_forward=in_a_line(error))
    try:
        model = nextlat.attach(lm, NextLatConfig(horizon=2, hidden_size=32, num_layers=2))
    except NextLatError as error:
        report.set(refused=str(error))
        return
    except Exception as error:
        report.wrong(f"attach: {in_a_line(error)}")
        return
    with report.stage("losses"):
        loss_and_gradient(lm, report)
    with report.stage("NextLat"):
        objective_losses(model, report, name="NextLat")
        save_and_load(model, report, name="NextLat")
        report.set(packs=model.backbone.packs)
    torch.manual_seed(2)
    given = prompts()
    with report.stage("the library's generate"):
        wanted = library_output(lm, given, report)
    if wanted:
        generation(model, given, wanted, report, name="NextLat", lengths=DRAFTS)
        report.set(together=shares_passes(model.objective))
    try:
        model = nextlat.attach(lm, MTPConfig(horizon=2))
    except NextLatError as error:
        report.set(MTP={"cannot": str(error)})
        return
    except Exception as error:
        report.wrong(f"attach MTP: {in_a_line(error)}")
        return
    with report.stage("MTP"):
        objective_losses(model, report, name="MTP")
        save_and_load(model, report, name="MTP")
        longest = model.objective.max_draft_length
        if wanted:
            generation(
                model, given, wanted, report, name="MTP", lengths=(1, 2) if longest else (0,)
            )
