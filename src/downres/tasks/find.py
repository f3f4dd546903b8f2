"""Which task a network, a run or an artifact is of: the one place that knows downres' own rooms by name."""

from typing import Any

from torch.utils.data import DataLoader

from ..errors import DownresError
from ..families import Model
from ..probe import Answer, chosen_answer, find_answers
from ..reduction import made_for
from .question import Question
from .task import KINDS, Task


def _own() -> None:
    """The rooms of downres itself enter themselves in KINDS."""
    from .agreement import task as _agreement  # noqa: F401
    from .classification import task as _classification  # noqa: F401
    from .multilabel import task as _multilabel  # noqa: F401
    from .regression import task as _regression  # noqa: F401
    from .segmentation import task as _segmentation  # noqa: F401


ASKED = ("segmentation", "classification")
"""Tasks that a network's answers tell by themselves, in the order in which they are asked; the others are named."""


def known_task(task: "str | type[Task] | None") -> type[Task] | None:
    """A task by its name, or as it is. Raises DownresError for a name that nobody gave."""
    if task is None or isinstance(task, type):
        return task
    _own()
    if task not in KINDS:
        raise DownresError(
            f"There is no task {task!r}: choose from {', '.join(KINDS)}, or name the file of your own, path/to/file.py:Class."
        )
    return KINDS[task]


def find_task(model: Model, data: Any, question: Question, task: "str | type[Task] | None" = None) -> Task:
    """The task of a model: the one named, else that which the network's answers are of.

    Of the data only folders, and of masks their headers, are looked at: a wrong folder is said at once, not after the costs.
    """
    _own()
    if isinstance(data, DataLoader):
        raise DownresError(
            "A DataLoader gives batches that are resized and normalised already: give its dataset, whose items are pictures as "
            "they are with their labels, or a folder."
        )
    p = model.preprocessing
    kind = known_task(task or question.task)
    answers = find_answers(made_for(model.module, p.hw), (len(p.mean), *p.hw))

    def made(answer: Answer) -> Task:
        named = kind or next(KINDS[name] for name in ASKED if KINDS[name].takes(answer, data, question))
        found = named.make(model, answer, data, question)
        found.which = answer.which
        return found

    if question.output_index is not None or None in answers:
        return made(chosen_answer(answers, question.output_index))
    fits, errors = {}, []
    for answer in answers.values():
        try:
            fits[answer] = made(answer)
        except DownresError as error:
            errors.append(error)
    # A single output tells foreground from background; where another has all the classes it is something else, such as edges.
    best = [answer for answer in fits if answer.outputs > 1] or list(fits)
    if len(best) == 1:
        return fits[best[0]]
    why = "which of them is judged cannot be known" if fits else f"none of them fits the data: {str(errors[0]).rstrip('.')}"
    raise DownresError(
        f"{_several(model, answers)}, and {why}; name one, output_index={next(reversed(answers))!r} for example."
    )


def _several(model: Model, answers: "dict[int | str | None, Answer]") -> str:
    def said(answer: Answer) -> str:
        return (
            f"{answer.outputs} numbers" if answer.size is None else f"{answer.outputs} maps {answer.size[0]}x{answer.size[1]}"
        )

    told = ", ".join(f"{key!r}: {said(answer)}" for key, answer in answers.items())
    return f"{type(model.module).__name__} returns several outputs ({told})"


def restored(described: dict[str, Any], facts: dict[str, Any]) -> Task:
    """The task of a run or an artifact, from what it wrote: without model and data."""
    try:
        kind = known_task(str(described["name"]))
        assert kind is not None
        task = kind.restore(described, facts)
        task.which = described.get("output_index")
        return task
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DownresError(
            f"What was written of the task cannot be read ({type(error).__name__}: {error}): search again in another folder."
        ) from error
