"""Perplexity of training-free attention patterns: the last `window` keys, with and without the first tokens (sinks).

    python benchmarks/window_baseline.py MODEL TEXT_FILE --windows 12 --seq-len 2048

The baseline that every linearized model is to be read beside (arXiv:2608.28444): nothing is trained, keys outside the
pattern are masked. Windows are cut as in `kit eval --dataset`.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F

from kit.convert.checkpoint import open_checkpoint
from kit.convert.data import perplexity_windows, read_documents
from kit.convert.measure import hardware
from kit.convert.pipeline import resolve_device

PATTERNS = {
    "full attention": (None, 0),
    "window 64": (64, 0),
    "window 64, 4 sinks": (64, 4),
    "window 128, 4 sinks": (128, 4),
}


def pattern_mask(length: int, window: int, sinks: int, device: str) -> torch.Tensor:
    """(1, 1, T, T), True where a query may look: `window` keys in all, of which `sinks` are the first tokens."""
    at = torch.arange(length, device=device)
    distance = at[:, None] - at
    near = (distance >= 0) & (distance < window - sinks)
    return (near | ((at < sinks)[None] & (distance >= 0)))[None, None]


@torch.no_grad()
def main() -> None:
    """Measure and print one line a pattern."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=2048)
    options = parser.parse_args()
    device = resolve_device("auto")
    checkpoint = open_checkpoint(options.model)
    model = checkpoint.load_model(getattr(torch, checkpoint.dtype), device)
    text = "\n\n".join(read_documents(options.text))
    rows = perplexity_windows(text, checkpoint.load_tokenizer(), options.seq_len, options.windows)
    print(f"{options.model}, {options.text}, {rows.numel():,} tokens, {checkpoint.dtype}, {hardware(device)}")
    for name, (window, sinks) in PATTERNS.items():
        mask = None if window is None else pattern_mask(rows.shape[1], window, sinks, device)
        losses = []
        for row in rows.to(device):
            logits = model(row[None], attention_mask=mask, use_cache=False).logits[0, :-1].float()
            losses.append(F.cross_entropy(logits, row[1:]))
        mean, error = torch.stack(losses).mean().item(), torch.stack(losses).std().item() / len(losses) ** 0.5
        print(f"{name:22} {math.exp(mean):8.2f} ± {math.exp(mean) * error:.2f}", flush=True)


if __name__ == "__main__":
    main()
