"""kit: make a Hugging Face language model cheaper to run.

`import kit` is light: torch and transformers are imported when a function that needs them is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kit.convert.checkpoint import load
    from kit.modules.accelerated import enable_kernels

__version__ = "0.1.0"
__all__ = ["__version__", "enable_kernels", "load"]


def __getattr__(name: str) -> Any:
    """Resolve functions on first use, so that `import kit` stays light (PEP 562)."""
    if name == "load":
        from kit.convert.checkpoint import load

        return load
    if name == "enable_kernels":
        from kit.modules.accelerated import enable_kernels

        return enable_kernels
    raise AttributeError(f"module 'kit' has no attribute {name!r}")
