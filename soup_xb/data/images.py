"""Pictures: bytes of a file that somebody else wrote -> a PIL image in RGB."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from soup_xb.core.rows.examples import MediaFile
from soup_xb.data.media_files import read_file, unusable

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats of one still picture. PIL knows many more, some of which start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Three bytes each when unpacked: a small file can hold billions of them.
MOST_PIXELS = 2**26


def read_image(file: MediaFile, where: str) -> Image:
    """The picture, upright and in RGB. `where` names the row.

    Raises DataError for what is no picture, is damaged, or has more than 67 million pixels, told before it is unpacked.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    content = read_file(file, where)
    with warnings.catch_warnings():
        # PIL's own limits only warn below twice their value.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                if width * height > MOST_PIXELS:
                    raise unusable(file, where, f"has {width:,} x {height:,} pixels", _SMALLER)
                return ImageOps.exif_transpose(opened).convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise unusable(file, where, "unpacks to far more than a picture holds", _SMALLER) from error
        except UnidentifiedImageError as error:
            help = f"pictures are {', '.join(FORMATS[:-1])} or {FORMATS[-1]} files."
            raise unusable(file, where, "is no picture", help) from error
        except (OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
            raise unusable(file, where, f"is damaged: {error}") from error


_SMALLER = f"scale it down: at most {MOST_PIXELS:,} pixels; a model sees a fraction of that."
