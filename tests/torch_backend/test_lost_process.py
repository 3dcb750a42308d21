"""What is said where another process is silent or gone, from the texts that gloo and NCCL raise."""

from __future__ import annotations

import pytest

from soup_xb.backends.torch.device import memory_guard
from soup_xb.backends.torch.processes import lost_process
from soup_xb.core.errors import ResourceError

SILENT = "[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation to complete"
GONE = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:33701."
RESET = "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:6376: Connection reset by peer."


@pytest.mark.parametrize(
    ("text", "code"), [(SILENT, "process-silent"), (GONE, "process-lost"), (RESET, "process-lost")]
)
def test_an_error_of_the_connection_ends_the_run_with_a_message_and_a_way_out(text: str, code: str) -> None:
    with pytest.raises(ResourceError) as raised, memory_guard("training"):
        raise RuntimeError(text)
    (problem,) = raised.value.problems
    assert problem.code == code
    assert "--resume" in problem.help
    assert raised.value.exit_code == 7


def test_a_timeout_is_named_in_seconds_with_its_key() -> None:
    found = lost_process(RuntimeError(SILENT))
    assert found is not None
    (problem,) = found.problems
    assert "within 5 s" in problem.message
    assert problem.where == "training.process_timeout"


def test_any_other_error_passes() -> None:
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
