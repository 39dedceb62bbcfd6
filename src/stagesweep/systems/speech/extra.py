"""The optional libraries of this system, imported where they are used.

They are imported by plain statements, so that a stage's fingerprint knows their versions.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from stagesweep.base.errors import UserError

NAMES = ("transformers", "tokenizers", "soundfile", "jiwer", "safetensors", "peft")
# Loader processes are forked from one that has used a tokenizer, which would warn about that.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def needed() -> Iterator[None]:
    """For imports of optional libraries; UserError says how to install one that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in NAMES:
            raise
        raise UserError(
            f"speech needs the package {name}, which is not installed; "
            "install it: pip install 'stagesweep[speech]'"
        ) from error
