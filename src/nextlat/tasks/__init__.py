"""Benchmark tasks. A new one is one new file and one line here: its name in recipes, and its configuration."""

from nextlat.tasks.base import Metric, Task
from nextlat.tasks.streets import StreetsConfig
from nextlat.tasks.text import TextConfig
from nextlat.tasks.word_problem import WordProblemConfig

TaskConfig = StreetsConfig | TextConfig | WordProblemConfig

TASKS: dict[str, type[TaskConfig]] = {
    "streets": StreetsConfig,
    "text": TextConfig,
    "word-problem": WordProblemConfig,
}

__all__ = ["TASKS", "Metric", "StreetsConfig", "Task", "TaskConfig", "TextConfig", "WordProblemConfig"]
