"""A saved adapter opened with its base, to chat or to embed texts with, and what an embedding model is saved with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import evolve, frozen

from soup_xb.backends import available_backend, is_installed, open_session
from soup_xb.core.adapter.extras import (
    EMBEDDING_FILE,
    EmbeddingFacts,
    is_reward_model,
    read_embedding_facts,
    read_media_task,
    write_embedding_files,
)
from soup_xb.core.adapter.peft_file import SavedAdapter, adapter_folder, adapter_modules, read_adapter
from soup_xb.core.adapter.plan import AdapterPlan
from soup_xb.core.base.folder import BaseFolder, inspect_base
from soup_xb.core.base.modules import AdapterModule, Module
from soup_xb.core.base.rope import noted_scaling
from soup_xb.core.errors import ConfigError, ModelError
from soup_xb.core.objectives import losses
from soup_xb.core.objectives.objective import EmbeddingObjective, Objective, TokenObjective
from soup_xb.core.rows.examples import Message
from soup_xb.core.rows.formats.detect import Formats
from soup_xb.core.rows.formats.every import formats_named
from soup_xb.core.run.session import (
    Embedder,
    GenerationSettings,
    OptimizerSettings,
    Session,
    SessionSettings,
)
from soup_xb.core.tasks import TASKS
from soup_xb.data.hub import resolve_base
from soup_xb.data.media import open_tokenizer_for
from soup_xb.data.media_inputs import is_processor_folder, task_of_processor
from soup_xb.data.tokenize import fitted_data
from soup_xb.data.tokenizer import ChatTokenizer, open_tokenizer
from soup_xb.runs.open import OpenRun

# Nothing is trained through these sessions; the optimizer is never stepped.
_NO_TRAINING = OptimizerSettings("sgd", 0.0, 0.0, 0.0, 0.0, 0.0)


@frozen
class TrainedOptions:
    """Which adapter on which base. Without `adapter` the base alone; without `base` the adapter's own.

    `precision` is as in the config, or `base` for the one that the base is stored in.
    """

    backend: str
    adapter: Path | None = None
    base: str | None = None
    precision: str = "auto"


@frozen(eq=False)
class LoadedAdapter:
    """A session with the adapter attached (if there is one) and its tokenizer; `embedding` for one that embeds.

    `task` is vision or audio where the adapter was trained with its base's processor, else empty. `opening` is how the
    base was opened, None for the session of a run.
    """

    session: Session
    tokenizer: ChatTokenizer
    base: BaseFolder
    has_adapter: bool
    embedding: EmbeddingFacts | None = None
    task: str = ""
    opening: SessionSettings | None = None

    @property
    def formats(self) -> Formats:
        """The formats of rows that the adapter can be measured on."""
        if self.embedding is not None:
            prompts = (self.embedding.query_prompt, self.embedding.document_prompt)
            return formats_named(TASKS["embedding"].formats, prompts=prompts)
        task = TASKS[self.task or "sft"]
        return formats_named(task.formats, task.media)


@contextmanager
def open_trained(
    options: TrainedOptions, quantization: str = "none", objective: Objective | None = None
) -> Iterator[LoadedAdapter]:
    """Open a base with a saved adapter; closed on every exit.

    It is evaluated by `objective`, by default the loss over tokens or, for an adapter that embeds, over texts. Raises
    ModelError for an adapter that is damaged or belongs to another base, and for a reward model unless the objective
    asks for scores.
    """
    folder = adapter_folder(options.adapter) if options.adapter else None
    saved = read_adapter(folder) if folder else None
    scores = objective is not None and objective.outputs == "scores"
    if saved is not None and saved.head is not None and folder is not None and not scores:
        raise is_reward_model(folder)
    base = inspect_base(resolve_base(options.base or base_of(saved, folder)))
    task = media_task(base.path, folder)
    tokenizer = _tokenizer(base, folder, task)
    facts = saved_facts(saved, folder, base)
    precision = _stored_precision(base) if options.precision == "base" else options.precision
    settings = evolve(
        session_on(base.path, precision, facts),
        rope_scaling=noted_scaling(saved.settings, folder) if saved and folder else None,
        media=TASKS[task].media if task else "",
        quantization=quantization,
    )
    if objective is not None:
        settings = evolve(settings, objective=objective)
    session = open_session(options.backend, settings)
    try:
        if saved is not None and folder is not None:
            attach_saved(session, saved, folder)
            if session.judge is not None and saved.head is not None:
                session.judge.load_head(saved.head)
        yield LoadedAdapter(session, tokenizer, base, saved is not None, facts, task, settings)
    finally:
        session.close()


@contextmanager
def open_again(trained: LoadedAdapter, backend: str, folder: Path) -> Iterator[Session]:
    """Open the model in `folder` as `trained` was opened, without an adapter; closed on every exit."""
    if trained.opening is None:
        raise RuntimeError("the session of a run is not opened again")
    session = open_session(backend, evolve(trained.opening, base=folder, rope_scaling=None))
    try:
        yield session
    finally:
        session.close()


def session_on(base: Path, precision: str, embedding: EmbeddingFacts | None = None) -> SessionSettings:
    """How to open a base that nothing is trained on, with `embedding` for vectors of texts."""
    scale = {} if embedding is None else {"embedding_scale": embedding.scale}
    return SessionSettings(
        base=base,
        precision=precision,
        quantization="none",
        gradient_checkpointing=False,
        optimizer=_NO_TRAINING,
        seed=0,
        objective=EmbeddingObjective(losses.embedding, scale, {}) if embedding else TokenObjective(),
        pooling=embedding.pooling if embedding else "",
    )


def attach_saved(session: Session, saved: SavedAdapter, folder: Path) -> None:
    """Put a saved adapter on an opened base, VeRA as the plain LoRA that it equals.

    Raises ModelError naming both where they do not belong together.
    """
    known = {module.name: module for module in session.describe().modules}
    saved = saved.plain(tuple(known.values()), folder)
    plan = plan_of(saved, folder)
    for module in plan.modules:
        found = known.get(module.name)
        shape = _shape(module)
        if found is None or _shape(found) != shape:
            has = "has no such module" if found is None else f"is {_shape(found)} there"
            raise ModelError(
                "adapter-of-another-base",
                f"`{module.name}` is {shape} in the adapter for "
                f"`{saved.settings.get('base_model_name_or_path')}` and the base {has}",
                where=str(folder),
                help=_way_out(module.name, session.backend),
            )
    session.attach(plan)
    session.load_factors(saved.factors)


def _shape(module: Module | AdapterModule) -> tuple[int, ...]:
    sides = (module.out_features, module.in_features)
    return (module.experts, *sides) if module.experts else sides


def _way_out(name: str, backend: str) -> str:
    own = "name the adapter's own base with --base."
    if backend != "mlx" or not name.endswith("lm_head"):
        return own
    return f"{own} Where the base ties its head to the embedding, MLX has no head to adapt: use `--backend torch`."


def plan_of(saved: SavedAdapter, folder: Path) -> AdapterPlan:
    """The plan of a plain LoRA as it was saved. Raises ModelError where file and settings do not fit each other."""
    return AdapterPlan(
        modules=adapter_modules(saved, folder),
        dropout=0.0,
        init_strategy="random",
        use_rslora=saved.native.use_rslora if saved.native else saved.settings.get("use_rslora") is True,
        seed=0,
        task_type=_task_type(saved),
    )


def _task_type(saved: SavedAdapter) -> str | None:
    """PEFT's word for what the adapted model does; many adapters have none."""
    told = saved.settings.get("task_type")
    return told if isinstance(told, str) else None


def base_modules(name: str, embedding: EmbeddingFacts | None = None, task: str = "") -> tuple[Module, ...]:
    """The modules of a base that can carry an adapter: its structure, without weights.

    It is opened without its head for vectors of texts, or whole where the task's rows have files.
    """
    folder = inspect_base(resolve_base(name), weights=False)
    media = TASKS[task].media if task else ""
    settings = evolve(session_on(folder.path, "auto", embedding), weights=False, media=media)
    # transformers knows every type of base, mlx-lm those that are proven.
    session = open_session("torch" if is_installed("transformers") else available_backend("auto"), settings)
    try:
        return session.describe().modules
    finally:
        session.close()


def media_task(base: Path, folder: Path | None) -> str:
    """The task of an adapter whose rows had files: what its folder says, or else its base's processor."""
    if folder is None or not is_processor_folder(folder):
        return ""
    return read_media_task(folder) or task_of_processor(base)


def _stored_precision(base: BaseFolder) -> str:
    stored = base.config.get("dtype") or base.config.get("torch_dtype")
    return "bf16" if stored in ("bfloat16", "float16") else "fp32"


def base_of(saved: SavedAdapter | None, folder: Path | None) -> str:
    """The base that an adapter names. Raises ModelError where it names none."""
    name = saved.settings.get("base_model_name_or_path") if saved else None
    if not isinstance(name, str) or not name:
        raise ModelError(
            "no-base",
            "no base is named" if saved is None else "the adapter does not say which base it belongs to",
            where=str(folder or ""),
            help="name it with --base.",
        )
    return name


def _tokenizer(base: BaseFolder, folder: Path | None, task: str) -> ChatTokenizer:
    if task and folder:
        # The processor is the base's; the template may be one that the run was given.
        template = folder / "chat_template.jinja"
        return open_tokenizer_for(TASKS[task].media, base.path, str(template) if template.is_file() else None)
    return open_tokenizer(folder if folder and _holds_tokenizer(folder) else base.path, model=base.path)


def _holds_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def refuse_files(trained: LoadedAdapter) -> None:
    """Raise ConfigError for an adapter whose prompts would be pictures or sounds."""
    if trained.task:
        raise ConfigError(
            "prompt-is-text",
            f"the adapter was trained with `task: {trained.task}`, and a prompt on the command line is text alone",
            help="load base and adapter with transformers and PEFT (docs/vision-audio.md shows how), or measure "
            "it on rows with `soupx eval`.",
        )


def continue_chat(
    trained: LoadedAdapter, messages: Sequence[Message], settings: GenerationSettings, adapter: bool = True
) -> str:
    """The answer to a conversation; without a chat template, the continuation of its texts."""
    if trained.tokenizer.has_chat_template:
        tokens = trained.tokenizer.prompt_ids(messages)
    else:
        tokens = trained.tokenizer.text_ids("\n\n".join(message.content for message in messages))
    answer: str = trained.tokenizer.decode(trained.session.generate(tokens, settings, adapter))
    return answer.strip()


TASK_TYPE = "FEATURE_EXTRACTION"


def trained_facts(run: OpenRun) -> EmbeddingFacts:
    """How a run turned texts into vectors."""
    config = run.loaded.config
    return EmbeddingFacts(
        pooling=embedder_of(run.session).pooling,
        scale=TASKS[config.task].setting(config.training, "embedding_scale"),
        max_length=fitted_data(config, run.base, run.tokenizer)[0].max_length,
        query_prompt=config.data.query_prompt or "",
        document_prompt=config.data.document_prompt or "",
    )


def embedder_of(session: Session) -> Embedder:
    """The embedder of a session whose base was opened for embeddings."""
    if session.embedder is None:
        raise RuntimeError("open the session with a `pooling`")
    return session.embedder


def embeds(saved: SavedAdapter, folder: Path, base: BaseFolder | None = None) -> bool:
    """Whether a saved adapter's model makes vectors of texts.

    PEFT writes no task where it was given none: then the files beside it tell, or a `base` that writes none.
    """
    told = saved.settings.get("task_type")
    if told is not None or saved.head is not None:
        return bool(told == TASK_TYPE)
    return (folder / EMBEDDING_FILE).is_file() or (base is not None and base.is_encoder)


def saved_facts(
    saved: SavedAdapter | None, folder: Path | None, base: BaseFolder | None = None
) -> EmbeddingFacts | None:
    """How a saved adapter's model turns texts into vectors; None for an adapter that does not embed.

    One that another tool wrote has our defaults, and the pooling that fits its base.
    """
    if saved is None or folder is None or not embeds(saved, folder, base):
        return None
    scale = losses.settings(losses.embedding)["embedding_scale"] or 1.0
    return read_embedding_facts(folder) or EmbeddingFacts(pooling="auto", scale=scale, max_length=512)


def save_embedding_model(
    folder: Path, facts: EmbeddingFacts, session: Session, tokenizer: ChatTokenizer
) -> None:
    """Write sentence-transformers' files and the tokenizer, which needs a padding token where several texts meet."""
    write_embedding_files(folder, facts, session.describe().hidden_size)
    pad_token = ""
    if tokenizer.hf.pad_token is None:
        tokenizer.hf.pad_token = pad_token = str(tokenizer.hf.convert_ids_to_tokens(tokenizer.pad_id))
    tokenizer.save(folder, pad_token)


def refuse_embeddings(saved: SavedAdapter, folder: Path, what: str) -> None:
    """Raise ModelError where an adapter that embeds texts is asked for words."""
    if embeds(saved, folder):
        raise ModelError(
            "embeds-only",
            f"the adapter makes vectors of texts, and {what}",
            where=str(folder),
            help="load the folder with `sentence_transformers.SentenceTransformer`, or use `soupx eval`.",
        )


def refuse_to_answer(adapter: Path | None) -> None:
    """Raise ModelError where a prompt is put to an adapter that embeds texts; before its base is opened."""
    if adapter is not None:
        folder = adapter_folder(adapter)
        refuse_embeddings(read_adapter(folder), folder, "has no answers to give")
