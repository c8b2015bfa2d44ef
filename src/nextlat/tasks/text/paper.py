"""What arXiv 2511.05963 reports of text."""

from nextlat.results import Published, PublishedFigures, Saying
from nextlat.tasks.task import NEXTLAT


def _figures(title: str, *figures: float) -> PublishedFigures:
    methods = ("GPT", "JTP d=1", "JTP d=2", "MTP d=1", "MTP d=2", "NextLat d=1", "NextLat d=2")
    by_method = dict(zip(methods, figures, strict=True))
    return PublishedFigures(title=title, unit="number", by_method=by_method)


PUBLISHED = Published(
    setting="FineWeb-Edu, 1.3 billion parameters, 100 billion tokens, GPT-2's vocabulary; "
    "linear probes: TinyStories, 8 layers of width 768",
    source=f"{NEXTLAT}v4",
    figures={
        "perplexity": _figures("Perplexity", 10.52, 11.08, 11.18, 10.90, 11.00, 10.83, 10.88),
        "word_perplexity on wikitext": _figures(
            "wikitext, word perplexity", 17.93, 19.28, 19.60, 18.82, 18.61, 18.39, 18.44
        ),
        "perplexity on lambada_standard": _figures(
            "lambada_standard, perplexity", 20.26, 21.88, 22.11, 20.23, 18.34, 19.77, 17.83
        ),
    },
    sayings=[
        Saying(methods=methods, text=text)
        for methods, text in {
            ("NextLat",): "linear probes are as good as GPT's one token ahead, and the best of "
            "all at long offsets for d=1 and d=8",
            ("BST", "MTP", "JTP"): "linear probes are worse than GPT's at offset 1",
            ("MTP", "JTP"): "linear probes fall behind quickly with the offset",
            ("GPT", "JTP", "MTP", "NextLat"): "average zero-shot accuracy 58.8 %, 58.8 and "
            "58.6 % (d=1, 2), 58.8 and 58.7 %, 58.8 and 59.2 %",
        }.items()
    ],
)
