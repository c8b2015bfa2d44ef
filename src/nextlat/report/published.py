"""What the paper reports, task by task: figures, and what it says in words. Of another scale than
anything measured here."""

from dataclasses import dataclass

from nextlat.report.glossary import NEXTLAT

SOURCE = f"{NEXTLAT}v4"


@dataclass(frozen=True)
class Saying:
    """What the paper says of some methods without a figure for each, and the pattern of our metrics
    that it is about ("" = none)."""

    methods: tuple[str, ...]
    text: str
    metrics: str = ""


@dataclass(frozen=True)
class Published:
    """What a paper reports on one task.

    Attributes:
        setting: of what. source: from where.
        rows: method, or method and horizon -> metrics, each with an entry in the glossary. sayings:
            what has no row.
        ours: metric of the rows -> ours that measure the same, where they bear other names.
    """

    setting: str
    rows: dict[str, dict[str, float]]
    sayings: tuple[Saying, ...] = ()
    ours: dict[str, tuple[str, ...]] | None = None
    source: str = SOURCE


def _manhattan(
    test: float, valid: float, compression: float, rank: float | None, detours: float
) -> dict[str, float]:
    row = {
        "next_token_test": test,
        "valid_trajectories": valid,
        "sequence_compression": compression,
        "detour_robustness": detours,
    }
    return row if rank is None else {**row, "effective_latent_rank": rank}


def _language(held_out: float, wikitext: float, lambada: float) -> dict[str, float]:
    return {
        "perplexity": held_out,
        "lm_eval_wikitext_word_perplexity": wikitext,
        "lm_eval_lambada_standard_perplexity": lambada,
    }


def _by_horizon(method: str, metric: str, values: dict[int, float]) -> dict[str, dict[str, float]]:
    return {f"{method} d={horizon}": {metric: value} for horizon, value in values.items()}


PUBLISHED: dict[str, Published] = {
    "streets": Published(
        "all of Manhattan, random walks, 91 million sequences, 48 layers of width 384, horizon 8",
        {
            "GPT": _manhattan(1.0, 0.970, 0.65, 160.1, 0.850),
            "MTP": _manhattan(1.0, 0.981, 0.64, 57.7, 0.950),
            "JTP": _manhattan(1.0, 0.971, 0.32, 215.8, 0.870),
            "NextLat": _manhattan(1.0, 0.987, 0.71, 52.7, 0.950),
            "true world model": _manhattan(1.0, 1.0, 1.0, None, 1.0),
        },
    ),
    "path-star": Published(
        "200,000 training graphs of 100 names, 12 layers of width 384, horizon of the arm length minus 2, five seeds",
        {},
        (
            Saying(
                ("NextLat",), "near 100 % on G(2, 10), G(5, 5) and G(7, 7)", "exact_path_accuracy"
            ),
            Saying(
                ("BST",),
                "solves the first two and starts to fail on G(7, 7)",
                "exact_path_accuracy",
            ),
            Saying(("GPT", "MTP", "JTP"), "failed", "exact_path_accuracy"),
        ),
    ),
    "countdown": Published(
        "four numbers, three equations, 500,000 problems, 12 layers of width 768, three seeds",
        {
            "GPT": {"solved": 0.331},
            "BST": {"solved": 0.423},
            **_by_horizon("MTP", "solved", {1: 0.392, 4: 0.497, 8: 0.573}),
            **_by_horizon("JTP", "solved", {1: 0.390, 4: 0.494, 8: 0.550}),
            **_by_horizon("NextLat", "solved", {1: 0.548, 4: 0.576, 8: 0.587}),
        },
        (
            Saying(
                ("NextLat",),
                "54.8 % of the last equations are valid at d=1, of the next best method 42.3 %",
            ),
        ),
        {"solved": ("solved_seen", "solved_held_out")},
    ),
    "word-problem": Published(
        "A5, one million sequences of 12 elements, 2 layers of width 512, horizon 1",
        {},
        (
            Saying(
                ("NextLat",),
                "the dynamics model alone stays above 95 % at 36 elements, three times the training length",
                r"dynamics_accuracy_\d+",
            ),
            Saying(
                ("GPT", "NextLat"),
                "the transformer fails beyond the training length (12)",
                r"transformer_accuracy_\d+",
            ),
            Saying(("GPT",), "trained on 36 elements it fails too"),
        ),
    ),
    "text": Published(
        "FineWeb-Edu, 1.3 billion parameters, 100 billion tokens, GPT-2's vocabulary; linear probes: TinyStories, 8 layers of width 768",
        {
            "GPT": _language(10.52, 17.93, 20.26),
            "JTP d=1": _language(11.08, 19.28, 21.88),
            "JTP d=2": _language(11.18, 19.60, 22.11),
            "MTP d=1": _language(10.90, 18.82, 20.23),
            "MTP d=2": _language(11.00, 18.61, 18.34),
            "NextLat d=1": _language(10.83, 18.39, 19.77),
            "NextLat d=2": _language(10.88, 18.44, 17.83),
        },
        (
            Saying(
                ("NextLat",),
                "linear probes are as good as GPT's one token ahead, and the best of all at long offsets for d=1 and d=8",
            ),
            Saying(("BST", "MTP", "JTP"), "linear probes are worse than GPT's at offset 1"),
            Saying(("MTP", "JTP"), "linear probes fall behind quickly with the offset"),
            Saying(
                ("GPT", "JTP", "MTP", "NextLat"),
                "average zero-shot accuracy 58.8 %, 58.8 and 58.6 % (d=1, 2), 58.8 and 58.7 %, 58.8 and 59.2 %",
            ),
        ),
    ),
}
