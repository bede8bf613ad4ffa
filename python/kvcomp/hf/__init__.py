"""transformers: a Cache whose layers are packed, and a context manager that gives one to every generate call."""

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(f"kvcomp.hf: expected torch and transformers (pip install 'kvcomp[hf]'), got: {error}") from error

from .. import w4 as _w4  # noqa: F401  (registers its checkpoints with transformers)
from .cache import Cache
from .context import compress

__all__ = ["Cache", "compress"]
