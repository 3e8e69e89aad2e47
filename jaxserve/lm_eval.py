"""An engine in this process as a model of EleutherAI's lm-evaluation-harness.

    python -m jaxserve.lm_eval run --model jaxserve --model_args pretrained=DIR_OR_ID --tasks hellaswag

is the harness's own command line (the same flags, the same results) with this model in its registry; there is no entry
point by which the harness would find it itself. From Python, import this module and name the model "jaxserve".
"""

import logging
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxserve.errors import ConfigError, InvalidParameter, UnsupportedParameter
from jaxserve.llm import LLM
from jaxserve.request import SamplingParams

log = logging.getLogger("jaxserve.lm_eval")

type TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_PASSED = (*_SAMPLING, "seed", "skip_special_tokens", "ignore_eos", "min_tokens")


@register_model("jaxserve")
class JaxserveLM(TemplateLM):
    """`pretrained` is what LLM takes as model (None: the embedded one), `options` are LLM's own.

    Pages hold one token unless block_size says otherwise, so that the choices of a question share it whole. The engine
    batches by itself: of the harness's batch_size nothing depends. Raises ConfigError, CheckpointError.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if device is not None:
            raise ConfigError(
                f"device={device!r}: leave it out and set JAX_PLATFORMS, for instance to cpu, cuda or tpu"
            )
        self.llm = LLM(pretrained, **({"block_size": 1} | options))
        self._text = self.llm.text
        self._max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        if not self._text.eos_token_ids:
            raise ConfigError(f"{self._text.name} has no end-of-sequence token")
        return self._text.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, as for the harness's own Hugging Face models."""
        bos = self._text.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its completion may have; a scored one may have one more, which is only predicted."""
        return self.llm.info.max_model_len

    @property
    def tokenizer_name(self) -> str:
        return self._text.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's template, by which the harness knows its cached requests from others'."""
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise UnsupportedParameter("a chat template cannot be chosen by name; give --apply_chat_template alone")
        return None if self._text.template is None else next(iter(self._text.template.sources.values()))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self._text.template is None:
            raise UnsupportedParameter(f"model {self._text.name} has no chat template; leave out --apply_chat_template")
        return self._text.template.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """None adds BOS where the model wants one, unless the text begins with it, as rendered templates do."""
        tokenizer = self._text.tokenizer
        ids = tokenizer.encode(string, add_special_tokens=add_special_tokens is not False, parse_special=True)
        if add_special_tokens is None and ids[:2] == [tokenizer.bos_token_id] * 2:
            return ids[1:]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        most = self.max_length + 1
        contexts = []
        for _, context, continuation in requests:
            if (excess := len(context) + len(continuation) - most) > 0:
                if excess >= len(context):
                    raise InvalidParameter(
                        f"a continuation of {len(continuation)} tokens does not fit the model's {self.max_length}"
                    )
                log.warning("a context of %d tokens is cut by its first %d to fit", len(context), excess)
                context = context[excess:]
            contexts.append(context)
        continuations = [continuation for _, _, continuation in requests]
        scores = self.llm.score(contexts, continuations, progress=False if disable_tqdm else None)
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows: list[TokenRequest] = []
        ends = []
        for text in texts:
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
            ends.append(len(windows))
        scores = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        totals = [sum(scores[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        prompts, params = [], []
        for context, arguments in (request.args for request in requests):
            wanted = self._sampling(dict(arguments))
            room = self.max_length - (wanted.max_tokens or 0)
            if room < 1:
                raise InvalidParameter(f"max_gen_toks {wanted.max_tokens} leaves no room in {self.max_length} tokens")
            ids = self.tok_encode(context)
            if len(ids) > room:
                log.warning("a prompt of %d tokens is cut to its last %d", len(ids), room)
            prompts.append(ids[-room:])
            params.append(wanted)
        outputs = self.llm.generate(prompts, params, progress=False if disable_tqdm else None)
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _sampling(self, arguments: dict[str, Any]) -> SamplingParams:
        """A task's generation_kwargs as ours. Raises InvalidParameter, naming what is not served."""
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(arguments, default_max_gen_toks=self._max_gen_toks))
        most, stop, sampled = wanted.pop("max_gen_toks"), wanted.pop("until"), wanted.pop("do_sample")
        if unknown := sorted(wanted.keys() - set(_PASSED)):
            raise InvalidParameter(f"generation_kwargs: {unknown[0]} is not served; known are {', '.join(_PASSED)}")
        wanted["temperature"] = wanted.get("temperature", 1.0) if sampled else 0.0
        return SamplingParams(max_tokens=most, stop=tuple(s for s in stop if s), **wanted)


def main() -> None:
    """The harness's own command line, to which this module has added its model."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
