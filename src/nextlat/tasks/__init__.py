"""Benchmark tasks. A new one is one new file and one line here: its name in recipes, and its
configuration."""

from nextlat.tasks.countdown import CountdownConfig
from nextlat.tasks.hmm import HMMConfig
from nextlat.tasks.path_star import PathStarConfig
from nextlat.tasks.streets.streets import StreetsConfig
from nextlat.tasks.task import Task, TaskConfig
from nextlat.tasks.text.text import TextConfig
from nextlat.tasks.word_problem import WordProblemConfig

TASKS: dict[str, type[TaskConfig]] = {
    "streets": StreetsConfig,
    "text": TextConfig,
    "word-problem": WordProblemConfig,
    "path-star": PathStarConfig,
    "countdown": CountdownConfig,
    "hmm": HMMConfig,
}

__all__ = [
    "TASKS",
    "CountdownConfig",
    "HMMConfig",
    "PathStarConfig",
    "StreetsConfig",
    "Task",
    "TaskConfig",
    "TextConfig",
    "WordProblemConfig",
]
