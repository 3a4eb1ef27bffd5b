"""A model as lm-evaluation-harness sees one.

``harness_model(model, tokenizer)`` goes where ``lm_eval.simple_evaluate(model=...)``
takes an ``LM``. The package ``lm_eval`` is needed for that only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from jaxllm.core.model import Model
from jaxllm.data.tokenizers import Tokenizer, check_vocabulary
from jaxllm.evaluate.choice import loglikelihoods, score_tokens
from jaxllm.generation import generate

# What lm-evaluation-harness puts in the settings of a generation request.
SETTINGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")


class Requests:
    """The three kinds of requests; each takes objects with ``args``.

    Args:
      model, tokenizer: A model and its tokenizer.
      batch_size: Rows of a batch.
      max_gen_toks: New tokens where a request does not say.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        batch_size: int = 16,
        max_gen_toks: int = 256,
    ):
        super().__init__()
        check_vocabulary(tokenizer, model.config.vocab_size)
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_gen_toks = batch_size, max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Names cached requests; equal tokenizers share them."""
        return self.tokenizer.fingerprint

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy or not) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        size, shown = self.batch_size, not disable_tqdm
        found = loglikelihoods(self.model, self.tokenizer, pairs, size, shown)
        return [(one.logprob, one.greedy) for one in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts: each token once, after BOS (or EOS) in the
        first window and after the token before it at the start of the next ones."""
        parts = [self._windows(request.args[0]) for request in requests]
        flat = [window for windows in parts for window in windows]
        found = iter(score_tokens(self.model, flat, self.batch_size, not disable_tqdm))
        return [sum(next(found).logprob for _ in windows) for windows in parts]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        t = self.tokenizer
        start = t.bos_id if t.bos_id is not None else t.eos_id
        ids = t.encode(text, bos=False)
        if start is None:
            start, ids = ids[0], ids[1:]
        room, ids = self.model.config.max_length - 1, [start, *ids]
        return [
            (ids[at : at + 1], ids[at + 1 : at + 1 + room])
            for at in range(0, len(ids) - 1, room)
        ]

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """The text that follows each (context, settings); see ``SETTINGS``.

        A context that leaves no room for the new tokens loses its beginning.

        Raises:
          ValueError: A setting that this adapter does not know.
        """
        asked = [(i, *request.args) for i, request in enumerate(requests)]
        key = lambda item: sorted((k, str(v)) for k, v in item[2].items())  # noqa: E731
        groups = [list(g) for _, g in itertools.groupby(sorted(asked, key=key), key)]
        texts: dict[int, str] = {}
        hidden = dict(delay=2, leave=False, disable=disable_tqdm)
        for group in tqdm(groups, "generate", **hidden):
            numbers, contexts, (settings, *_) = zip(*group, strict=True)
            texts |= zip(numbers, self._generate(contexts, settings), strict=True)
        return [texts[i] for i in range(len(asked))]

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        unknown = sorted(set(settings) - set(SETTINGS))
        if unknown:
            known = ", ".join(SETTINGS)
            raise ValueError(f"generation settings {unknown}; accepted: {known}")
        until = settings.get("until") or ()
        count = settings.get("max_gen_toks", self.max_gen_toks)
        count = min(count, self.model.config.max_length - 1)
        room = self.model.config.max_length - count
        sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
        made = generate(
            self.model,
            self.tokenizer,
            [self.tokenizer.encode(context)[-room:] for context in contexts],
            count,
            temperature=settings.get("temperature", 1.0) if sampled else 0.0,
            top_k=settings.get("top_k") if sampled else None,
            top_p=settings.get("top_p") if sampled else None,
            stop=until,
            batch_size=self.batch_size,
        )
        return [one.text for one in made]


def harness_model(model: Model, tokenizer: Tokenizer, **settings):
    """An ``lm_eval.api.model.LM`` of a model; settings as for ``Requests``.

    Raises:
      ImportError: lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        message = "lm-evaluation-harness is not here: pip install lm_eval"
        raise ImportError(message) from error
    adapter = type("JaxLM", (Requests, LM), {})
    return adapter(model, tokenizer, **settings)
