"""Pictures through an artifact alone: its preprocessing and its ONNX file."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..engines.onnxruntime import OnnxRuntime
from ..errors import DownresError
from ..images import Unreadable, decode, preprocess
from ..records import Preprocessing
from ..tasks import Task, known_task, restored
from .manifest import read_manifest, refuse_changed


def predict(
    folder: str | Path,
    images: Sequence[str | Path],
    *,
    top: int = 5,
    threads: int | None = None,
    out: str | Path = "predictions",
    task: str | type[Task] | None = None,
) -> list[Any]:
    """Pictures by the artifact alone, as its task answers: a classifier's most likely classes, a segmentation network's masks.

    top: how many classes are named. out: folder for what is written, made if need be: NAME_mask.png and NAME_overlay.png.
    task: of one's own, where the artifact has one. Returns a record an image, with `to_json`.
    Raises DownresError for a broken artifact, a picture that cannot be read, or two pictures of one name.
    """
    known_task(task)
    manifest = read_manifest(folder)
    refuse_changed(Path(folder), manifest)
    own = restored(manifest["task"], manifest)
    p = Preprocessing.from_json(manifest["preprocessing"])
    runtime = OnnxRuntime(Path(folder) / "model.onnx", threads)
    if own.writes and (twice := [name for name, n in Counter(Path(i).stem for i in images).items() if n > 1]):
        raise DownresError(f"Files are named after their pictures, {twice[0]} would be written twice: predict them apart.")

    def answer(image: str | Path) -> Any:
        try:
            pixels = decode(image)
        except Unreadable as error:
            raise DownresError(f"Cannot read {image}: {error}; give a photograph.") from None
        return own.predict(runtime(preprocess(pixels, p)[None].numpy())[0][0], pixels, str(image), p, top, Path(out))

    return [answer(image) for image in images]
