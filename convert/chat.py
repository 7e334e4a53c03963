"""Talk to a model: the answer streams as it is made."""

from __future__ import annotations

import sys
from typing import Any

from kit.convert.checkpoint import Checkpoint, run_path


def chat(
    checkpoint: Checkpoint,
    *,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    kernels: bool = True,
) -> None:
    """Answer one prompt, or hold a conversation until end of input or `exit`.

    Models with a chat template get the whole conversation through it; others continue the text. One line on stderr says
    what a quantized model runs on; `kernels` are explained at `Checkpoint.load_to_run`.

    Raises:
        KitError: if the model cannot be loaded.
    """
    import torch
    from transformers import TextStreamer

    tokenizer = checkpoint.load_tokenizer(trust_remote_code)
    model = checkpoint.load_to_run(dtype, device, trust_remote_code=trust_remote_code, kernels=kernels)
    if path := run_path(model):
        print(f"{checkpoint.source}: {path}", file=sys.stderr)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    while (said := prompt if prompt is not None else _ask()) is not None:
        messages.append({"role": "user", "content": said})
        inputs = _encode(tokenizer, messages).to(model.device)
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            streamer=streamer,
        )
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
        if prompt is not None:
            return


def _encode(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer("\n\n".join(message["content"] for message in messages), return_tensors="pt")


def _ask() -> str | None:
    try:
        said = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if said in ("exit", "quit") else said
