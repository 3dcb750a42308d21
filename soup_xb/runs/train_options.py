"""What the command line decides about a run besides the file."""

from __future__ import annotations

from attrs import field, frozen

from soup_xb.runs.resume import ResumeRequest


@frozen
class TrainOptions:
    """What the command line decides besides the file.

    `prompts` are answered by the base and the tuned model at the end, for the report.
    """

    resume: ResumeRequest = field(factory=ResumeRequest)
    overwrite: bool = False
    prompts: tuple[str, ...] = ()
