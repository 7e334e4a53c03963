"""Models whose checkpoints carry the code that they run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class CarriesCode:
    """Mixed into a model before transformers' classes: `save_pretrained` writes the code beside the weights."""

    write_code: Callable[[str], None] | None = (
        None  # set where kit is installed; elsewhere transformers copies the code
    )

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As usual, with the code that the checkpoint runs on."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if self.write_code is not None:
            self.write_code(save_directory)
