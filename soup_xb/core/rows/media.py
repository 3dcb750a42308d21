"""The pictures and sounds of rows on their way to the model: paths until a micro-batch is due, arrays then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attrs import frozen

Array = np.ndarray[Any, Any]
# By the name of the model's argument, such as pixel_values.
Inputs = Mapping[str, Array]


@frozen
class MediaFile:
    """A picture or a sound that was found: `name` as the row writes it, `sha256` of its bytes when it was looked at."""

    kind: str
    name: str
    path: Path
    sha256: str


@frozen(eq=False)
class RowMedia:
    """What a row has besides tokens.

    `text` is its conversation with one mark for each file, before the marks became tokens; empty for a transcript.
    `where` names the row in errors. `make` gives the model's inputs for such rows together with the grid of their
    tokens, int32 (rows, length).
    """

    files: tuple[MediaFile, ...]
    text: str
    where: str
    make: Callable[[Sequence[RowMedia], Array], Inputs]

    @property
    def digest(self) -> bytes:
        """What tells these files from others."""
        return b"".join(bytes.fromhex(file.sha256) for file in self.files)


def media_inputs(media: Sequence[RowMedia], tokens: Array) -> Inputs:
    """The inputs of a micro-batch besides its tokens; none where no row has media."""
    return media[0].make(media, tokens) if media else {}
