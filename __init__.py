"""kit: make a Hugging Face language model cheaper to run.

`import kit` is light: torch and transformers are imported when a function that needs them is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kit.convert.checkpoint import load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Resolve `kit.load` on first use, so that `import kit` stays light (PEP 562)."""
    if name == "load":
        from kit.convert.checkpoint import load

        return load
    raise AttributeError(f"module 'kit' has no attribute {name!r}")
