"""The manifest of an artifact: what it says, and whether the files beside it are those that it was written with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import DownresError

FORMAT = 3


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an artifact; DownresError when there is none or it is of another format."""
    file = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
        assert manifest["format"] == FORMAT
    except FileNotFoundError:
        raise DownresError(
            f"{folder} is not a shipped model (it has no manifest.json): give the folder RUN/best of a search."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise DownresError(f"{file} is broken or of another format than {FORMAT}: export the model again.") from None
    return manifest


def changed_files(folder: Path, manifest: dict[str, Any]) -> list[str]:
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or not _manifest_as_written(folder / "manifest.json", digests.get("manifest.json")):
        return ["manifest.json"]  # it vouches for the others
    changed = []
    for name, digest in digests.items():
        file = folder / name
        if name != "manifest.json" and (not file.is_file() or sha256(file) != digest):
            changed.append(name if file.is_file() else f"{name} (missing)")
    return changed


def refuse_changed(folder: Path, manifest: dict[str, Any]) -> None:
    if changed := changed_files(folder, manifest):
        raise DownresError(f"{folder} is not as it was shipped (changed: {', '.join(changed)}): copy or export it again.")


def _manifest_as_written(file: Path, digest: Any) -> bool:
    """Whether the bytes of the manifest, its own digest left blank, have that digest."""
    blank = file.read_bytes().replace(f'"{digest}"'.encode(), b'""', 1)
    return hashlib.sha256(blank).hexdigest() == digest


def sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
