"""Another runtime: the same network, measured and shipped for another engine."""

from typing import TYPE_CHECKING, Any

from ..errors import DownresError
from ..parse import check_runtime, check_runtimes, is_runtime
from .technique import Technique

if TYPE_CHECKING:
    from ..records import Candidate
    from ..reduction import Work


class RuntimeChoice(Technique):
    """runtime: where it is measured and shipped, `openvino` or `onnxruntime:cuda`; None: the first that the run was given."""

    name, neutral, keyword, option = "runtime", None, "runtimes", ""  # the option is that of how it is measured
    help = "Where a file runs."
    in_file, crosses = True, True

    def normalise(self, value: Any) -> str | None:
        return None if value is None else check_runtime(value)

    def word(self, c: "Candidate") -> str:
        assert c.runtime is not None
        return c.runtime

    def read(self, word: str) -> dict[str, Any]:
        return {self.name: word} if is_runtime(word) else {}

    def parse_option(self, text: str) -> tuple[str, ...]:
        return check_runtimes(text)

    def columns(self, c: "Candidate") -> dict[str, Any]:
        return {}  # its latency names the runtime, of every candidate

    def detail(self, c: "Candidate") -> str:
        return f"in {c.runtime}"

    def how(self, c: "Candidate") -> str:
        return f"the runtime {c.runtime}"

    def prepare(self, work: "Work") -> None:
        raise DownresError(
            f"`reduce` makes a torch network, {work.candidate.runtime} is where a file runs: search with `runtime`, "
            "or leave it out here."
        )


RUNTIME = RuntimeChoice()
