"""A base's tokenizer with its chat template: examples -> token rows, prompts -> ids, ids -> text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from attrs import evolve, field, frozen

from soup_xb.core.base.folder import read_object
from soup_xb.core.base.model_config import CONFIG
from soup_xb.core.disk import foreign_errors
from soup_xb.core.errors import DataError, ModelError, Problem
from soup_xb.core.rows.examples import ChatExample, Example, Message, Source
from soup_xb.core.rows.row import Row, text_row
from soup_xb.data.chat_template import (
    ChatTemplate,
    RenderError,
    check_template,
    own_template,
    read_template,
)
from soup_xb.data.model_files import (
    ANY_CLASS,
    GENERATION,
    TokenizerChanges,
    base_end_ids,
    change_tokenizer,
    copy_tokenizer,
    read_as_it_stands,
    write_generation,
)
from soup_xb.data.spans import (
    Array,
    ControlTokens,
    Divided,
    Encoder,
    EndTokens,
    MarkRules,
    Markup,
    PlainMarks,
    mark_assistant_turns,
    turn_end,
    turn_marks,
    writes_head_itself,
)

# Among so many first and last tokens of a text its begin and end are looked for: white space may stand around it.
_LAST = 4
_CUT_AWAY = "everything to learn lies beyond max_length"


@frozen(eq=False)
class Tokenized:
    """What became of an example: a row, or the reason why there is nothing to learn in it.

    `rewritten` counts assistant turns left untrained because the chat template does not show them word for
    word, `hidden` the other turns that it does not show. `spelled` says whether its content spells control tokens,
    `forged` whether it holds marks of turns that are ordinary words, `reshaped` whether an answer has another form
    than a last one, `cut_by` names the template where it cuts thoughts out. `plain` is what
    `ChatTokenizer.plain_kind` says of a plain text.
    """

    source: Source
    row: Row | None
    reason: str = ""
    truncated: bool = False
    rewritten: int = 0
    hidden: int = 0
    spelled: bool = False
    reshaped: bool = False
    cut_by: str = ""
    plain: str = ""
    forged: bool = False


@frozen(eq=False)
class ChatTokenizer:
    """The tokenizer of a base. Made by `open_tokenizer`.

    `model` is the folder of the model that it belongs to, which may be another than its own. `prefix` are the ids that
    the tokenizer puts before a plain text by itself (bos), `end_ids` all ids that end a turn or a generation, the
    tokenizer's own eos first; `base_ends` are those of them that the base's own files name. `turn_end` is what the chat
    template writes after an assistant's words: empty for nothing, None where there is no template or it cannot be told.
    `new_template` is the template's text where the tokenizer's files hold another one or none.

    `controls` are the tokens that the content of a turn must not become, `openers` those that open a turn,
    `plain_marks` what the chat template writes around turns in ordinary words.
    `embedding_rows` is how many ids the base has an embedding for, None where its config does not tell. `train_on` is
    `data.train_on`: the answers, the last one of a row, or all.
    """

    base: Path
    model: Path
    hf: Any
    encoder: Encoder
    template: ChatTemplate | None
    ends: EndTokens
    prefix: tuple[int, ...]
    end_ids: tuple[int, ...]
    base_ends: tuple[int, ...]
    turn_end: str | None
    new_template: str
    controls: ControlTokens = field(factory=ControlTokens)
    openers: EndTokens = field(factory=lambda: EndTokens(()))
    embedding_rows: int | None = None
    train_on: str = "answers"
    plain_marks: PlainMarks = field(factory=PlainMarks)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides which tokens a text or a conversation becomes."""
        template = None if self.template is None else [self.template.text, dict(self.template.tokens)]
        facts = [self.encoder.engine.to_str(), template, self.prefix, self.end_ids]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def reads_files(self) -> bool:
        """Whether rows have pictures or sounds beside their tokens."""
        return False

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self.template is not None

    def on_day(self, day: str) -> Self:
        """The tokenizer with this date (YYYY-MM-DD) wherever its chat template tells one; empty changes nothing."""
        if self.template is None or not day:
            return self
        return evolve(self, template=evolve(self.template, day=day))

    @property
    def day(self) -> str:
        """The date that its chat template tells, empty where it tells none."""
        return self.template.day if self.template is not None and self.template.is_dated else ""

    @property
    def pad_id(self) -> int:
        """The id that fills short rows; it is never a target, and the base has an embedding for it."""
        pad = self.hf.pad_token_id
        known = (*(() if pad is None else (int(pad),)), *self.end_ids)
        return next((one for one in known if self.embedding_rows is None or one < self.embedding_rows), 0)

    def checked(self, ids: Array, where: object) -> Array:
        """Ids (length,) that go into the model. Raises DataError where the base has no embedding for one."""
        if self.embedding_rows is None or not ids.size or ids.max() < self.embedding_rows:
            return ids
        token = int(ids[ids >= self.embedding_rows][0])
        raise DataError(
            "token-without-row",
            f"holds the token `{self.hf.convert_ids_to_tokens(token)}` ({token}), and the base's embedding has rows "
            f"for 0 to {self.embedding_rows - 1} alone",
            where=str(where),
            help="take the tokenizer that belongs to the base, or give the base the rows: transformers' "
            "`resize_token_embeddings`, then train them.",
        )

    def tokenize(self, example: Example, max_length: int) -> Tokenized:
        """One example as a row, cut from the right at `max_length` tokens.

        Raises ModelError where a conversation meets a base without a chat template, DataError naming the row
        where the template refuses it.
        """
        return self.tokenize_many([example], max_length)[0]

    def tokenize_many(self, examples: Sequence[Example], max_length: int) -> list[Tokenized]:
        """`tokenize` for many examples at once, which is much faster; in the same order."""
        markups = [self._markup(example) for example in examples]
        encoded = self.encoder.encode([markup for markup in markups if markup.spans])
        rows = iter(encoded)
        return [
            self._tokenized(example, markup, next(rows), max_length)
            if markup.spans
            else Tokenized(
                example.source,
                None,
                markup.reason,
                rewritten=markup.rewritten,
                hidden=markup.hidden,
                spelled=markup.spelled,
                forged=markup.forged,
                cut_by=markup.cut_by,
            )
            for example, markup in zip(examples, markups, strict=True)
        ]

    def prompt_ids(self, messages: Sequence[Message], where: str = "") -> Array:
        """A conversation with the head of the answer after it, int32 (length,); `where` is for the error."""
        template = self._chat_template()
        try:
            divided = Divided.of(messages, (), self.controls, bool(self.turn_end))
            text = template.render(divided.messages, generation_prompt=True)
        except RenderError as error:
            raise DataError(
                "template-refuses", f"the chat template refuses the prompt: {error}", where=where
            ) from error
        markup = divided.joined(Markup(text, (), where=where), self.controls)
        [(ids, _)] = self.encoder.encode([markup])
        return self.checked(ids, where or str(self.base))

    def spells_control(self, messages: Sequence[Message]) -> bool:
        """Whether the content of a conversation spells tokens that open or end a turn or a text."""
        return self.controls.spelled(messages)

    def text_ids(self, text: str, where: str = "") -> Array:
        """A plain text, int32 (length,), begun as the tokenizer begins texts; `where` is for the error."""
        ids = np.array(self.encoder.ids(text), dtype=np.int32)
        start, white = self._missing_start(self.prefix, ids)
        return self.checked(np.array([*start, *ids[white:]], dtype=np.int32), where or self.base)

    def decode(self, ids: Sequence[int] | Array, special: bool = False) -> str:
        """Ids as text, without special tokens unless `special` is set."""
        text: str = self.hf.decode(
            [int(token) for token in ids], skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )
        return text

    @property
    def unnamed_end(self) -> str:
        """The token that ends a turn and is none of the ends that the base's own files name; empty if it is."""
        ids = [token for token in self.end_ids if token not in self.base_ends]
        return str(self.hf.convert_ids_to_tokens(ids[0])) if ids else ""

    def save(self, folder: Path, pad_token: str = "") -> None:
        """Write the tokenizer's own files, with the chat template in use, and a generation_config.json with all ends.

        transformers opens them beside an adapter and beside a model (config.json written before), and gives the same
        tokens. `pad_token` is for a tokenizer that has none.
        """
        alone = not (folder / CONFIG).is_file()
        name = type(self.hf).__name__
        changes = TokenizerChanges(
            template=self.new_template,
            pad_token=pad_token,
            class_name="" if not alone else ANY_CLASS if name == "TokenizersBackend" else name,
            plain_start=self.hf.bos_token_id not in _prefix(self.hf, self.encoder),
        )
        copy_tokenizer(self.base, folder, changes)
        if not self._opens_alike(folder):
            # Without the model's type, or with another one, transformers may take another class and build it anew.
            read_as_it_stands(folder)
            if not self._opens_alike(folder):
                self.hf.save_pretrained(str(folder))
                change_tokenizer(folder, changes)
        generation, config = _generation_files(self.base, self.model)
        write_generation(generation, config, folder, self.end_ids)

    def _opens_alike(self, folder: Path) -> bool:
        """Whether transformers makes the same tokens of the files in a folder."""
        try:
            again = _load(folder)
        except ModelError:
            return False
        same: bool = Encoder.of(again).engine.to_str() == self.encoder.engine.to_str()
        return same and again("a").input_ids == self.hf("a").input_ids

    def _chat_template(self) -> ChatTemplate:
        if self.template is None:
            raise ModelError(
                "no-chat-template",
                "the base has no chat template, and conversations cannot be written without one",
                where=str(self.base),
                help="give one as `data.chat_template` (text or a .jinja file), or take the base's -Instruct sibling.",
            )
        return self.template

    def _markup(self, example: Example) -> Markup:
        if isinstance(example, ChatExample):
            template = self._chat_template()
            try:
                return mark_assistant_turns(
                    example,
                    template,
                    self.ends,
                    self.turn_end or "",
                    MarkRules(self.controls, self.train_on, self.plain_marks),
                )
            except RenderError as error:
                raise DataError(
                    "template-refuses",
                    f"the base's chat template refuses the row: {error}",
                    where=str(example.source),
                    help="change the row, or give another template as `data.chat_template`.",
                ) from error
        if not example.completion.strip():
            return Markup("", (), reason="the completion is empty" if example.prompt else "the text is empty")
        text = example.prompt + example.completion
        start = 0 if self.train_on == "all" else len(example.prompt)
        return Markup(text, ((start, len(text)),))

    def _tokenized(
        self, example: Example, markup: Markup, encoded: tuple[Array, Array], max_length: int
    ) -> Tokenized:
        ids, trained = encoded
        if not isinstance(example, ChatExample):
            ids, trained = self._dressed(example, ids, trained)
        truncated = len(ids) > max_length
        ids, counts = self.checked(ids[:max_length], example.source).copy(), trained[:max_length].copy()
        # Nothing comes before the first token, so nothing can predict it.
        counts[:1] = 0
        trained = counts != 0 if markup.weights else counts
        weights = np.where(trained, counts, 1) if markup.weights else None
        row = text_row(ids, trained, example.source, weights) if trained.any() else None
        plain = (
            "" if isinstance(example, ChatExample) else self.plain_kind(example.prompt, example.completion)
        )
        return Tokenized(
            example.source,
            row,
            reason="" if row else _CUT_AWAY if truncated else "it is one token long",
            truncated=truncated,
            rewritten=markup.rewritten,
            hidden=markup.hidden,
            spelled=markup.spelled,
            forged=markup.forged,
            reshaped=markup.reshaped > 0,
            plain=plain,
        )

    def _dressed(self, example: Example, ids: Array, trained: Array) -> tuple[Array, Array]:
        """A plain text with what it lacks at its beginning, which is not trained on, and at its end, which is."""
        start, white = self._missing_start(self._start_of(example), ids)
        ids, trained = ids[white:], trained[white:]
        end = self._missing_end(ids)
        begin, behind = len(start), len(start) + len(ids)
        whole = np.empty(behind + len(end), dtype=np.int32)
        whole[:begin], whole[begin:behind], whole[behind:] = start, ids, end
        marks = np.zeros(len(whole), dtype=trained.dtype)
        marks[begin:behind], marks[behind:] = trained, 1
        return whole, marks

    def plain_kind(self, prompt: str, text: str = "") -> str:
        """What a plain text is on a base that knows chats: `rendered` where it holds the marks of turns, else `prompt`.

        Empty for a text without a prompt, and on a base without a chat template.
        """
        if self.template is None:
            return ""
        for one in (prompt, text):
            if self.openers.first(one) or self.plain_marks.first(one):
                return "rendered"
        return "prompt" if prompt.strip() else ""

    def _missing_start(self, start: tuple[int, ...], ids: Array) -> tuple[tuple[int, ...], int]:
        """What has to stand before the ids of a text, and how many of them are white space before what it spells."""
        head = ids[: _LAST + len(start)].tolist()
        for place in range(len(head) if start and start[0] in head else 0):
            if tuple(head[place : place + len(start)]) == start:
                white = not self.decode(head[:place], special=True).strip()
                return ((), place) if white else (start, 0)
        return start, 0

    def _missing_end(self, ids: Array) -> tuple[int, ...]:
        """The end token of a plain text; nothing for one that ends with a token of that kind, white space aside."""
        last = ids[-_LAST:].tolist()
        for count, token in enumerate(reversed(last)):
            if token in self.end_ids:
                return (
                    self.end_ids[:1] if self.decode(last[len(last) - count :], special=True).strip() else ()
                )
        return self.end_ids[:1]

    def _start_of(self, example: Example) -> tuple[int, ...]:
        """The ids before a plain text."""
        return self.prefix

    def notices(self) -> Iterator[Problem]:
        """What the user should know about the chat template before a conversation is trained on."""
        if self.turn_end == "":
            yield Problem(
                "no-end-token",
                "the chat template writes nothing at the end of an assistant turn: the model is not taught to stop",
                help="end the turn with `{{ eos_token }}` in a template given as `data.chat_template`.",
            )
        if self.template is not None and writes_head_itself(self.template):
            yield Problem(
                "no-generation-prompt",
                "the chat template writes no generation prompt: the head of each answer, which tells its role, is "
                "trained on as well, and the model has to write it",
                help="write the head under `{% if add_generation_prompt %}` in a template of your own and give that "
                "as `data.chat_template`.",
            )
        if self.template is not None and self.template.is_dated:
            yield Problem(
                "dated-template",
                f"the chat template may write the date: {self.day} here, and wherever this run is resumed; a run that "
                "starts on another day has other rows",
                help="give the template with a fixed date as `data.chat_template`.",
            )


def open_tokenizer(
    base: Path, chat_template: str | None = None, processor: Any = None, model: Path | None = None
) -> ChatTokenizer:
    """The tokenizer in a local folder. `chat_template` (text, or the path of a .jinja file) wins over the base's.

    With `processor` (see media.processor) it is that processor's tokenizer, and turns reach the template as parts.
    `model` is the folder of its model where that is another one, an adapter's base.

    Raises ModelError for a folder without a usable tokenizer, or a broken or oversized chat template, and
    ConfigError for a template file that cannot be read. No code in the folder is run.
    """
    hf = _load(base) if processor is None else _fast(processor.tokenizer, base)
    holder = hf if getattr(processor, "chat_template", None) is None else processor
    text = read_template(chat_template) if chat_template is not None else own_template(holder, base)
    where = "data.chat_template" if chat_template is not None else str(base)
    template = (
        ChatTemplate(text, hf.special_tokens_map, where, in_parts=processor is not None) if text else None
    )
    own = hf.chat_template.get("default") if isinstance(hf.chat_template, dict) else hf.chat_template
    if template is not None:
        check_template(template)
        hf.chat_template = template.text
    ends = EndTokens(token.content for token in hf.added_tokens_decoder.values())
    end = turn_end(template, ends) if template else None
    encoder = Encoder.of(hf)
    generation, config = _generation_files(base, model or base)
    base_ends = _unique([hf.eos_token_id, *base_end_ids(generation, config)])
    token = ends.first(end or "")
    end_ids = _unique([*base_ends, hf.convert_tokens_to_ids(token.group()) if token else None])
    marks, plain = _turn_marks(template, ends) if template else (frozenset(), PlainMarks())
    controls = _control_tokens(hf, marks, end_ids, processor) if template else ControlTokens()
    return ChatTokenizer(
        base=base,
        model=model or base,
        hf=hf,
        encoder=evolve(encoder, controls=controls.ids),
        template=template,
        ends=ends,
        prefix=_prefix(hf, encoder),
        end_ids=end_ids,
        base_ends=base_ends,
        turn_end=end,
        new_template=template.text if template and template.text != own else "",
        controls=controls,
        openers=EndTokens(_openers(hf, marks, end_ids)),
        plain_marks=plain,
        embedding_rows=_embedding_rows(model or base),
    )


def _embedding_rows(base: Path) -> int | None:
    """The vocabulary's size in the base's config."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if not (base / CONFIG).is_file():
        return None
    written = read_object(base / CONFIG, "base-config")
    if written.get("model_type") not in CONFIG_MAPPING:
        return None
    with foreign_errors(partial(_unreadable_config, base / CONFIG)):
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def _load(base: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

    # The tokenizer's reader reads config.json as well, and would take the blame for it.
    if (base / CONFIG).is_file() and read_object(base / CONFIG, "base-config").get(
        "model_type"
    ) in CONFIG_MAPPING:
        with foreign_errors(partial(_unreadable_config, base / CONFIG)):
            AutoConfig.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    with foreign_errors(partial(_unusable, base)):
        tokenizer = AutoTokenizer.from_pretrained(str(base), trust_remote_code=False, local_files_only=True)
    return _fast(tokenizer, base)


def _fast(tokenizer: Any, base: Path) -> Any:
    if not tokenizer.is_fast:
        raise ModelError(
            "slow-tokenizer",
            "the base's tokenizer cannot say which characters a token stands for",
            where=str(base),
            help="save it with a tokenizer.json (transformers: `AutoTokenizer`, then `save_pretrained`).",
        )
    return tokenizer


def _unreadable_config(file: Path, reason: str) -> ModelError:
    return ModelError(
        "base-config",
        f"transformers cannot read it: {reason}",
        where=str(file),
        help="download the file again; a type that is newer than transformers needs a newer transformers.",
    )


def _unusable(base: Path, reason: str) -> ModelError:
    if "custom code" in reason or "trust_remote_code" in reason:
        return ModelError(
            "remote-code",
            "the base's tokenizer wants to run its own code",
            where=str(base / "tokenizer_config.json"),
            help="soup-xb never runs code from a model folder; use a base that transformers knows.",
        )
    if not any((base / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return ModelError(
            "no-tokenizer",
            "there is no tokenizer.json",
            where=str(base),
            help="download the base's tokenizer files as well.",
        )
    return ModelError(
        "broken-tokenizer",
        f"the tokenizer cannot be read: {reason}",
        where=str(base),
        help="download the base's tokenizer files again.",
    )


def _prefix(hf: Any, encoder: Encoder) -> tuple[int, ...]:
    """The ids that the tokenizer puts before a text by itself."""
    bare = encoder.ids("a")
    dressed = list(hf("a").input_ids)
    for length in range(len(dressed) - len(bare) + 1):
        if dressed[length : length + len(bare)] == bare:
            return tuple(dressed[:length])
    return ()


# Marks of thoughts and of calls, by what their tokens are called: an answer may hold them.
_INSIDE_ANSWERS = re.compile(r"think|thought|reason|tool|call|func", re.IGNORECASE)


def _turn_marks(template: ChatTemplate, ends: EndTokens) -> tuple[frozenset[str], PlainMarks]:
    tokens, plain = turn_marks(template, ends)
    outside = (
        frozenset(mark for mark in marks if not _INSIDE_ANSWERS.search(mark))
        for marks in (tokens, plain.anywhere)
    )
    return next(outside), evolve(plain, anywhere=next(outside))


def _openers(hf: Any, marks: frozenset[str], end_ids: tuple[int, ...]) -> frozenset[str]:
    """The marks that open a turn: not those that end one, and what opens a text only where nothing else does."""
    opening = marks - {hf.pad_token, *hf.convert_ids_to_tokens(list(end_ids))}
    return opening - {hf.bos_token} or opening


# The tokens that a tokenizer has a use for by itself; a base may end texts with the one that it calls unknown.
_NAMED = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


def _control_tokens(
    hf: Any, marks: frozenset[str], end_ids: tuple[int, ...], processor: Any
) -> ControlTokens:
    """What opens or ends a text or a turn: by the tokenizer, the end ids, and the marks that the template writes.

    The marks of files that a processor puts into texts are left to it.
    """
    added = {token.content: int(id) for id, token in hf.added_tokens_decoder.items()}
    names = {*(getattr(hf, f"{name}_token") for name in _NAMED), *hf.convert_ids_to_tokens(list(end_ids))}
    files = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    in_answers = ((names | marks) & added.keys()) - files
    special = {token.content for token in hf.added_tokens_decoder.values() if token.special}
    in_prompts = in_answers | (special - files)
    return ControlTokens(
        EndTokens(in_prompts), EndTokens(in_answers), frozenset(added[token] for token in in_prompts)
    )


def special_tokens(hf: Any) -> EndTokens:
    """The special tokens of a tokenizer: those that begin, end, part or fill texts, and what else it calls special."""
    return EndTokens(token.content for token in hf.added_tokens_decoder.values() if token.special)


def _unique(ids: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(token) for token in ids if token is not None))


def _generation_files(base: Path, model: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """The generation_config.json beside a tokenizer or its model, if there is one, and the model's config.json."""
    files = (folder / GENERATION for folder in (base, model))
    config = read_object(model / CONFIG, "base-config") if (model / CONFIG).is_file() else {}
    return next((file for file in files if file.is_file()), None), config
