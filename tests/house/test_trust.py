"""What no line of the package may do with what comes from others: read a pickle, run code, ask the network."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import soup_xb

PACKAGE = Path(soup_xb.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Modules whose files run code when they are read, and calls that go through them.
PICKLING_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "jsonpickle",
}
PICKLING_CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.package",
    "dist.gather_object",
    "dist.all_gather_object",
    "dist.broadcast_object_list",
    "dist.scatter_object_list",
    "dist.send_object_list",
    "dist.recv_object_list",
    "checkpoint.load",
    "checkpoint.save",
    "mx.savez",
}
RUNNING_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "runpy.run_path",
    "runpy.run_module",
}
# Calls of transformers that would run a folder's code if they were let.
OPENING_CALLS = {"from_pretrained", "from_config", "load_dataset", "pipeline"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with its dotted name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def sources() -> Iterator[tuple[str, ast.AST]]:
    for path in MODULES:
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text("utf-8"))


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call passes by this name, None where it passes none."""
    value = next((entry.value for entry in call.keywords if entry.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else value


def test_no_module_imports_what_reads_pickles() -> None:
    found = []
    for name, tree in sources():
        for node in ast.walk(tree):
            imported = []
            if isinstance(node, ast.Import):
                imported = [entry.name for entry in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            found += [
                f"{name}: {module}" for module in imported if module.partition(".")[0] in PICKLING_MODULES
            ]
    assert not found


def test_no_call_reads_or_writes_a_pickle() -> None:
    found = []
    for name, tree in sources():
        for function, call in calls(tree):
            short = ".".join(function.split(".")[-2:])
            if short in PICKLING_CALLS:
                found.append(f"{name}:{call.lineno}: {function}")
            if short in ("np.load", "np.save", "numpy.load") and keyword(call, "allow_pickle") is not False:
                found.append(f"{name}:{call.lineno}: {function} without allow_pickle=False")
    assert not found


def test_the_search_for_pickles_would_find_one() -> None:
    tree = ast.parse("import torch\ntorch.load('x')\nnp.load(path)")
    assert [name for name, _ in calls(tree)] == ["torch.load", "np.load"]


def test_nothing_is_evaluated_and_no_shell_is_asked() -> None:
    found = []
    for name, tree in sources():
        for function, call in calls(tree):
            if function in RUNNING_CALLS or keyword(call, "shell") is True:
                found.append(f"{name}:{call.lineno}: {function}")
    assert not found


def test_every_opening_of_a_foreign_folder_forbids_its_code() -> None:
    """None would ask on stdin, True would run it; both engines, the tokenizer and the config say no."""
    found = 0
    for name, tree in sources():
        for function, call in calls(tree):
            owner, _, last = function.rpartition(".")
            if last not in OPENING_CALLS or "Auto" not in owner:
                continue
            assert keyword(call, "trust_remote_code") is False, f"{name}:{call.lineno}: {function}"
            found += 1
    assert found >= 4


def test_the_word_for_running_foreign_code_is_never_said_otherwise() -> None:
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", name


def test_no_process_is_started_that_would_import_from_the_current_folder() -> None:
    """`python -m` and `python -c` look there first; `process.python_command` does not."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable"
    ]
    assert [place.partition(":")[0] for place in found] == ["core/process.py"]


def test_a_download_takes_no_code_and_no_pickle() -> None:
    from soup_xb.data.hub import _FILES

    downloads = [
        call for _, tree in sources() for name, call in calls(tree) if name.endswith("snapshot_download")
    ]
    assert downloads
    assert all(ast.unparse(keyword(call, "allow_patterns")) == "_FILES" for call in downloads)  # type: ignore[arg-type]
    assert not [pattern for pattern in _FILES if pattern.endswith((".py", ".bin", ".pt", ".pkl", "*", ".so"))]


# Python itself reports what it is about to do; a hook sees what no reading of the source shows.
WATCHER = """
import json, sys
WATCHED = {"pickle.find_class", "socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "subprocess.Popen"}
seen = []
def hook(event, arguments):
    if event in WATCHED:
        seen.append((event, [str(part) for part in arguments[:2]]))
sys.addaudithook(hook)
from soup_xb.cli.main import main
for words in json.loads(sys.argv[1]):
    main.main(words, standalone_mode=False)
print(json.dumps(seen))
"""


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_run_reads_no_pickle_calls_nobody_and_imports_nothing_from_the_base(
    backend: str, tmp_path: Path, tiny_llama: Path, chat_file: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    shutil.copy(chat_file, tmp_path / "train.jsonl")
    file = tmp_path / "base" / "config.json"
    settings = {**json.loads(file.read_text()), "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    file.write_text(json.dumps(settings))
    # Where a run looks for modules: the base, and the folder that it is started in.
    for folder in (tmp_path / "base", tmp_path):
        (folder / "evil.py").write_text("raise SystemExit('the code of a folder ran')")
    (tmp_path / "jinja2.py").write_text("raise SystemExit('a module of the current folder ran')")
    content = {
        "base": "base",
        "backend": backend,
        "data": {"train": "train.jsonl", "max_length": 128},
        "training": {"max_steps": 4, "save_steps": 2, "lora": {"r": 4}},
        "output": "out",
    }
    (tmp_path / "soup.yaml").write_text(json.dumps(content))
    commands = [
        ["train"],
        ["train", "--resume", "--set", "training.max_steps=6"],
        ["generate", "--adapter", "out", "--backend", backend, "--prompt", "Hello", "--max-new-tokens", "2"],
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", WATCHER, json.dumps(commands)]
        if sys.version_info >= (3, 11)
        else [sys.executable, "-c", "import sys; sys.path.remove('')\n" + WATCHER, json.dumps(commands)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    # A command starts one process, which renders chat templates; on Linux a compiler gives MLX's BLAS its names.
    compiled = [started for _, started in seen if "soupx-blas-" in started[1]]
    rendered = [started for _, started in seen if "soup_xb.data.rendering" in started[1]]
    assert [event for event, _ in seen] == ["subprocess.Popen"] * len(seen), seen
    assert len(rendered) == len(commands), seen
    assert len(compiled) == (backend == "mlx" and sys.platform == "linux"), seen
    assert len(seen) == len(rendered) + len(compiled), seen
