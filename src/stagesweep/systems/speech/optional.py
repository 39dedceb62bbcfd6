"""Optional libraries of this system, imported inside the functions that use them.

Plain import statements keep their versions in the fingerprints of stages.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from stagesweep.base.errors import UserError

NAMES = ("transformers", "tokenizers", "soundfile", "jiwer", "safetensors", "peft")
# Loader processes are forked after a tokenizer was used, which would cause a warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def optional_imports() -> Iterator[None]:
    """Context of imports: a missing optional library is a UserError that says how to install it."""
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
