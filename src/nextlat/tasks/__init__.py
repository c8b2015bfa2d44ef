"""Benchmark tasks. A new one is one new file and one line here: its name in recipes, and its configuration."""

from nextlat.tasks.base import Metric, Task
from nextlat.tasks.streets import StreetsConfig
from nextlat.tasks.word_problem import WordProblemConfig

TaskConfig = StreetsConfig | WordProblemConfig

TASKS: dict[str, type[TaskConfig]] = {
    "streets": StreetsConfig,
    "word-problem": WordProblemConfig,
}

__all__ = ["TASKS", "Metric", "StreetsConfig", "Task", "TaskConfig", "WordProblemConfig"]
