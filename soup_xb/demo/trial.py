"""The demo as a run: the shipped config on the prepared base, and the format of the answers judged."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from importlib.resources import files
from pathlib import Path

from attrs import frozen

from soup_xb.core.config.load import LoadedConfig, load_config
from soup_xb.core.rows.examples import Message
from soup_xb.core.run.session import GenerationSettings
from soup_xb.runs.adapters import LoadedAdapter, TrainedOptions, continue_chat, open_trained

# Answers in the taught format are shorter; a base that rambles on has missed it by then.
ANSWER_TOKENS = 80


@frozen
class Trial:
    """One held-out prompt, answered by the base and by the tuned model."""

    prompt: str
    base: str
    tuned: str

    @property
    def base_passes(self) -> bool:
        """Whether the base's answer has the format."""
        return passes(self.base)

    @property
    def tuned_passes(self) -> bool:
        """Whether the tuned model's answer has the format."""
        return passes(self.tuned)


def shipped(name: str) -> Path:
    """A file of the demo's folder, as it lies in the installed package."""
    return Path(str(files("soup_xb.demo"))) / name


def held_out_prompts() -> tuple[str, ...]:
    """The 20 prompts that no training row asks."""
    text = shipped("data/prompts.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line)["prompt"] for line in text.splitlines())


def demo_config(base: Path, output: Path, overrides: tuple[str, ...] = ()) -> LoadedConfig:
    """The shipped config with its three places filled in; `overrides` are `--set` texts."""
    places = {"base": str(base), "data.train": str(shipped("data/train.jsonl")), "output": str(output)}
    filled = tuple(f"{key}={json.dumps(place)}" for key, place in places.items())
    return load_config(shipped("soup.yaml"), (*filled, *overrides))


def hold_trials(adapter: Path, backend: str, show: Callable[[Trial], None]) -> tuple[Trial, ...]:
    """Answer every held-out prompt greedily, without and with the adapter as saved; `show` hears each."""
    trials = []
    with open_trained(TrainedOptions(backend, adapter)) as trained:
        for prompt in held_out_prompts():
            trial = Trial(prompt, _answer(trained, prompt, False), _answer(trained, prompt, True))
            show(trial)
            trials.append(trial)
    return tuple(trials)


def _answer(trained: LoadedAdapter, prompt: str, adapter: bool) -> str:
    settings = GenerationSettings(ANSWER_TOKENS, temperature=0.0, end_ids=trained.tokenizer.end_ids)
    return continue_chat(trained, [Message("user", prompt)], settings, adapter)


LABELS = ("In short", "Because", "Try this")
_ANSWER = re.compile("\n".join(rf"{label}: (\S.*\S)" for label in LABELS))
_SENTENCE_END = (".", "!", "?", '"')


def passes(answer: str) -> bool:
    r"""Whether the answer is three labelled lines and nothing else, each a different whole sentence.

    >>> passes("In short: Ice floats.\nBecause: It is less dense.\nTry this: Freeze a full bottle.")
    True
    >>> passes("Ice floats because it is less dense.")
    False
    """
    match = _ANSWER.fullmatch(answer.strip())
    if match is None:
        return False
    sentences = match.groups()
    whole = all(len(text.split()) > 1 and text.endswith(_SENTENCE_END) for text in sentences)
    return whole and len(set(sentences)) == len(LABELS)


def score(answers: Iterable[str]) -> int:
    """How many of the answers have the format."""
    return sum(passes(answer) for answer in answers)
