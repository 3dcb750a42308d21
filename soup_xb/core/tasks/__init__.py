"""The tasks: the only table of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from soup_xb.core.tasks import (
    audio,
    bco,
    cpo,
    dpo,
    embedding,
    grpo,
    ipo,
    kto,
    orpo,
    pretrain,
    reward,
    rlhf,
    sft,
    simpo,
    vision,
)
from soup_xb.core.tasks.task import Task

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        module.TASK.name: module.TASK
        for module in (
            sft,
            pretrain,
            dpo,
            ipo,
            kto,
            orpo,
            simpo,
            cpo,
            bco,
            reward,
            grpo,
            rlhf,
            embedding,
            vision,
            audio,
        )
    }
)
# Every format that some task reads, in the order of the tasks.
FORMATS: tuple[str, ...] = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.formats))


_TASKS_OF: dict[str, tuple[str, ...]] = {}
for _task in TASKS.values():
    for _key in _task.all_keys:
        _TASKS_OF[_key] = (*_TASKS_OF.get(_key, ()), _task.name)


def readers(format: str) -> tuple[str, ...]:
    """The tasks that read rows of a format.

    >>> readers("unpaired-preference")
    ('kto', 'bco')
    """
    return tuple(name for name, task in TASKS.items() if format in task.formats)


def tasks_with(key: str) -> tuple[str, ...]:
    """The tasks for which a dotted config key means something; none for a key that is no task's own.

    >>> tasks_with("training.simpo_gamma")
    ('simpo',)
    """
    return _TASKS_OF.get(key, ())
