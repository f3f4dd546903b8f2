"""One room a task, and the one door to all of them: `Task`."""

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from .evidence import Arrays, Evidence
    from .find import find_task, known_task, restored
    from .question import Question
    from .segmentation.counted import counted
    from .task import KINDS, Data, Task

__all__ = ["KINDS", "Arrays", "Data", "Evidence", "Question", "Task", "counted", "find_task", "known_task", "restored"]

# Whoever counts costs needs none of what looks at images, fits and draws.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "evidence": ("Arrays", "Evidence"),
        "find": ("find_task", "known_task", "restored"),
        "question": ("Question",),
        "segmentation.counted": ("counted",),
        "task": ("KINDS", "Data", "Task"),
    },
)
