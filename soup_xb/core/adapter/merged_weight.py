"""What a merged weight must be."""

from __future__ import annotations

from soup_xb.core.errors import ModelError


def beyond_format(module: str, dtype: str) -> ModelError:
    """The error of a merged weight that its number format cannot hold.

    >>> beyond_format("model.layers.0.mlp.up_proj", "float16").problems[0].code
    'merge-not-finite'
    """
    return ModelError(
        "merge-not-finite",
        f"the merged weight of `{module}` has entries that {dtype} cannot hold",
        help="the adapter adds more than this number format holds: use it beside the base, or train at a lower rate.",
    )
