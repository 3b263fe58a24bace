"""GLoRA for PyTorch models: inject, train a supernet, search, merge.

>>> model = glora.inject(timm.create_model("vit_base_patch16_224", pretrained=True), rank=8)

The public names are listed in ``api.py``. Importing this package loads none of them, nor PyTorch: the first that is
used loads all of them.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import *  # noqa: F403
    from .api import __all__ as __all__
else:
    import sys
    from importlib import import_module
    from importlib.util import find_spec

    from .version import __version__  # noqa: F401

    def __getattr__(name):
        """A module of this package, or a public name (PEP 562)."""
        hidden = not name.isidentifier() or (name.startswith("_") and name != "__all__")
        if not hidden and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        api = None if hidden else import_module(f"{__name__}.api")
        if api is None or name not in ("__all__", *api.__all__):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        for public in ("__all__", *api.__all__):
            globals().setdefault(public, getattr(api, public))  # what a user has set before stays
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
