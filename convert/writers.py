"""Text generators that write training data: a local checkpoint or an OpenAI-compatible endpoint; and how they are read.

What a writer sends back is parsed strictly (`parse_pairs`): a line that is neither a JSON object of question and answer
nor a `Q:` or an `A:` makes no data.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kit.convert.errors import ExitCode, KitError

API_KEY = "KIT_WRITER_API_KEY"  # environment variable
RETRIES, BACKOFF, TIMEOUT = 5, 1.0, 300.0  # seconds: 1, 2, 4, ... between tries; of one answer
RETRIED = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Reply:
    """What a writer wrote, and whether it came to an end by itself (else its last words may be cut)."""

    text: str
    finished: bool


class Writer(ABC):
    """Answers prompts.

    Attributes:
        identity: everything that decides the answers, by name; a resumed run must have the same.
        batch_size: prompts at a time.
    """

    identity: dict[str, Any]
    batch_size: int

    @abstractmethod
    def write(self, prompts: Sequence[str], seed: int) -> list[Reply]:
        """Answer prompts, each on its own, in their order.

        Raises:
            KitError: if the writer cannot answer.
        """


class LocalWriter(Writer):
    """A checkpoint of this machine, through its chat template where it has one; greedy at temperature 0.

    The weights load with the first prompt. At temperatures above 0 a batch is sampled from its seed; the global random
    state is left alone.

    Args:
        model: what `kit` commands take as MODEL.
        max_new_tokens: an answer's length at most.
        temperature: of sampling; 0 takes the most likely token.
        batch_size: prompts a forward pass; they are padded on the left.
        dtype: compute dtype; "auto" is the checkpoint's.
        device: where to run.
        trust_remote_code: let the checkpoint's own code run.

    Raises:
        KitError: if the checkpoint cannot be opened.
    """

    def __init__(
        self,
        model: str,
        *,
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
        dtype: str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        from kit.convert.checkpoint import open_checkpoint

        self._checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
        self._tokenizer = self._checkpoint.load_tokenizer(trust_remote_code)
        self._compute, self._device, self._trust = self._checkpoint.compute_dtype(dtype), device, trust_remote_code
        self._max_new_tokens, self._temperature, self.batch_size = max_new_tokens, temperature, batch_size
        self._model: Any = None
        self.identity = {
            "writer": self._checkpoint.fingerprint(),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "dtype": str(self._compute),
            "device": device.split(":")[0],
            "batch_size": batch_size,
        }

    def write(self, prompts: Sequence[str], seed: int) -> list[Reply]:
        """Answer prompts in batches."""
        import torch

        if self._model is None:
            self._model = self._checkpoint.load_to_run(self._compute, self._device, trust_remote_code=self._trust)
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        replies: list[Reply] = []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for start in range(0, len(prompts), self.batch_size):
                replies += self._batch(prompts[start : start + self.batch_size])
        return replies

    def _batch(self, prompts: Sequence[str]) -> list[Reply]:
        from kit.convert.batches import generate

        texts = [self._rendered(prompt) for prompt in prompts]
        return [
            Reply(text, finished)
            for text, finished in generate(
                self._model, self._tokenizer, texts, self._max_new_tokens, temperature=self._temperature
            )
        ]

    def _rendered(self, prompt: str) -> str:
        if self._tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return prompt + "\n\n"


class EndpointWriter(Writer):
    """A server that speaks OpenAI's chat completions: vLLM, llama.cpp, or a hosted one.

    The key is read from the environment variable KIT_WRITER_API_KEY, if it is set; it is never printed. Requests that
    fail by the connection or with a status that may pass (429, 503, ...) are tried again five times, later and later.

    Args:
        url: up to and with `/v1`.
        model: the server's name of it; None: the only one that the server lists.
        max_new_tokens: an answer's length at most.
        temperature: of sampling.
        batch_size: requests at a time.

    Raises:
        KitError: if the URL is none, or no model is named and the server does not list exactly one.
    """

    def __init__(
        self, url: str, *, model: str | None, max_new_tokens: int, temperature: float, batch_size: int
    ) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        parts = urlsplit(url)
        if not parts.hostname or parts.username is not None or parts.query:
            secret = f"holds a password or a query; a key belongs into {API_KEY}"
            raise KitError(
                f"the writer's address {secret if parts.hostname else 'names no server'}",
                where="--writer",
                next_step="write https://HOST/v1",
                exit_code=ExitCode.USAGE,
            )
        self._url = url.rstrip("/")
        self._key = os.environ.get(API_KEY, "")
        retry = Retry(
            total=RETRIES,
            backoff_factor=BACKOFF,
            status_forcelist=RETRIED,
            allowed_methods=None,  # POST too: asking twice does no harm
            raise_on_status=False,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=batch_size))
        if self._key:
            self._session.auth = self._authorise  # a header alone gives way to what .netrc has for the host
        self.batch_size = batch_size
        self._options = {"max_tokens": max_new_tokens, "temperature": temperature}
        self._model = model or self._only_model()
        self.identity = {"writer": self._url, "model": self._model, **self._options}

    def _authorise(self, request: Any) -> Any:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def write(self, prompts: Sequence[str], seed: int) -> list[Reply]:
        """Answer prompts, `batch_size` requests at a time."""
        with ThreadPoolExecutor(self.batch_size) as pool:
            return list(pool.map(lambda prompt: self._ask(prompt, seed), prompts))

    def _ask(self, prompt: str, seed: int) -> Reply:
        body = {"model": self._model, "messages": [{"role": "user", "content": prompt}], "seed": seed, **self._options}
        answer = self._request("POST", "/chat/completions", body)
        try:
            choice = answer["choices"][0]
            return Reply(str(choice["message"]["content"] or ""), choice.get("finish_reason") == "stop")
        except (KeyError, IndexError, TypeError) as error:
            raise self._failed("the writer's answer holds no choices[0].message.content") from error

    def _only_model(self) -> str:
        try:
            names = [str(entry["id"]) for entry in self._request("GET", "/models", None)["data"]]
        except (KeyError, TypeError) as error:
            raise self._failed("the server does not list its models") from error
        if len(names) != 1:
            raise KitError(
                f"the server has {len(names)} models: {', '.join(names[:5])}",
                where=self._url,
                next_step="name one with --writer-model",
                exit_code=ExitCode.USAGE,
            )
        return names[0]

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        import requests

        try:
            response = self._session.request(method, self._url + path, json=body, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise self._failed(f"the writer cannot be reached: {type(error).__name__}") from error
        if not response.ok:
            said = " ".join(response.text.split())[:200]
            raise self._failed(f"the writer answers {response.status_code}: {said}")
        try:
            return response.json()
        except ValueError as error:
            raise self._failed("the writer's answer is no JSON") from error

    def _failed(self, what: str) -> KitError:
        if self._key:
            what = what.replace(self._key, "***")  # servers quote a key that they refuse
        return KitError(
            what,
            where=self._url,
            next_step=f"check the address, --writer-model and {API_KEY}; then go on with --resume",
        )


def is_local(writer: str) -> bool:
    """Whether what `--writer` names is a checkpoint, neither `none` nor an address."""
    return writer != "none" and not writer.startswith(("http://", "https://"))


def open_writer(
    writer: str,
    *,
    model: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Writer | None:
    """Open what `--writer` names: an address, `none` (returns None), or a model.

    Raises:
        KitError: if it cannot be opened.
    """
    if writer == "none":
        return None
    if not is_local(writer):
        return EndpointWriter(
            writer, model=model, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size
        )
    if model is not None:
        raise KitError(
            "a model's name is for a writer that is a server",
            where="--writer-model",
            next_step="leave it out, or give --writer an address",
            exit_code=ExitCode.USAGE,
        )
    return LocalWriter(
        writer,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )


def parse_pairs(reply: Reply) -> tuple[list[tuple[str, str]], int]:
    """Questions and answers in a writer's reply.

    A line is a JSON object of exactly `question` and `answer`, two strings that are not empty; or `Q: ...`, with
    `A: ...` as the next line that is not empty. A fence around them (```) is passed over. If the reply was cut off, its
    last line does not count.

    Returns:
        The pairs; how many lines made none.
    """
    lines = [line.strip() for line in reply.text.split("\n")]
    lines = [line for line in lines if line and not line.startswith("```")]
    dropped = 0
    if lines and not reply.finished:
        lines, dropped = lines[:-1], 1
    pairs: list[tuple[str, str]] = []
    question: str | None = None
    for line in lines:
        labelled = re.fullmatch(r"([QA]): +(\S.*)", line)
        if labelled and labelled[1] == "A" and question is not None:
            pairs.append((question, labelled[2]))
            question = None
            continue
        dropped += question is not None  # it got no answer
        question = labelled[2] if labelled and labelled[1] == "Q" else None
        if question is None:
            pair = _json_pair(line)
            pairs += [pair] if pair else []
            dropped += pair is None
    return pairs, dropped + (question is not None)


def _json_pair(line: str) -> tuple[str, str] | None:
    try:
        row = json.loads(line.removesuffix(","))
    except ValueError:
        return None
    if not isinstance(row, dict) or row.keys() != {"question", "answer"}:
        return None
    question, answer = row["question"], row["answer"]
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip()):
        return None
    return question.strip(), answer.strip()
