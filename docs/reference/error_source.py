"""The codes of errors and notices as the source has them: found in its syntax tree, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from attrs import frozen

from soup_xb.core.config.support_rows import BACKENDS, ROWS
from soup_xb.core.errors import SoupError

PACKAGE = Path(__file__).parents[2] / "soup_xb"
NOTICE = "notice"
# A Problem becomes the error whose `of` its module calls, and a notice (`warning[...]`, `note`) where there is no such
# call. Here is what becomes of the others: of a module's Problems, or of one code of it.
FATES = {
    "backends/mlx/quantization:quantized": NOTICE,
    "cli/main": "ConfigError",
    "cli/main:bug": "SoupError",
    "cli/main:system-refused": "ResourceError",
    "core/config/checks": "ConfigError",
    "core/config/rules": "ConfigError",
    "core/base/modules:patterns-disagree": NOTICE,
    "core/base/towers:no-gradient": NOTICE,
    "core/config/run_rules": "ConfigError",
    "core/base/modules": "ConfigError",
    "core/config/yaml": "ConfigError",
    "runs/resume:fresh-start": NOTICE,
    "runs/resume:resume": NOTICE,
    "runs/resume:warm-start": NOTICE,
}


class UnreadableError(ValueError):
    """A code that this reader does not find by itself; write it as a text where it is raised."""


@frozen(order=True)
class Use:
    """One place that raises a code: its module without the ending, the error's class, and the message's form."""

    code: str
    module: str
    fate: str
    message: str


def uses() -> list[Use]:
    """Every use of a code in the package."""
    found = {use for path in sorted(PACKAGE.rglob("*.py")) for use in _Module(path).uses()}
    return sorted(found | set(_refusals()))


def exit_codes() -> dict[str, int]:
    """The exit code of each class of error."""
    return {kind.__name__: kind.exit_code for kind in (SoupError, *SoupError.__subclasses__())}


def _refusals() -> Iterator[Use]:
    for row in ROWS:
        for backend in BACKENDS:
            no = row.answer(backend)
            if no is not None and not row.follows:
                message = f"`{row.name.replace('=', ': ')}` is not available: {no.because}"
                yield Use(f"{backend}-no-{row.feature}", "core/config/support_rows", "ConfigError", message)


class _Module:
    """One source file: the calls that make an error, and the functions that pass a code on to one."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        self.tree = ast.parse(path.read_text("utf-8"))
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        # Name -> (place of the code among the arguments, place of the message, the class that is made in the end).
        self.makers = {name: (0, 1, name) for name in (*exit_codes(), "Problem", "KeyRefused")}
        # Rules that warn, by the name of their function.
        self.warning = {
            _name(call.args[0])
            for call in self.calls
            if _name(call.func) == "Rule" and any(entry.arg == "warning" for entry in call.keywords)
        }

    def uses(self) -> Iterator[Use]:
        if self.name == "core/errors":
            return
        while self._learn_makers():
            pass
        for call in self.calls:
            if _name(call.func) not in self.makers:
                continue
            place, message_place, made = self.makers[_name(call.func)]
            messages = self._forms(call, _argument(call, message_place, "message"))
            for code in self._codes(call, _argument(call, place, "code")):
                for message in messages:
                    yield Use(code, self.name, self._fate(call, made, code), message)

    def _learn_makers(self) -> bool:
        """Note each function that hands its own parameter on as a code. Whether there was a new one."""
        before = len(self.makers)
        for call in self.calls:
            if _name(call.func) not in self.makers:
                continue
            place, message_place, made = self.makers[_name(call.func)]
            function = self._function(call)
            own = _parameters(function)
            code = _name(_argument(call, place, "code"))
            if function is not None and code in own:
                message = _name(_argument(call, message_place, "message"))
                place = own.index(message) if message in own else -1
                self.makers.setdefault(function.name, (own.index(code), place, made))
        return len(self.makers) > before

    def _codes(self, near: ast.AST, code: ast.expr | None) -> list[str]:
        """The codes that an expression can be; none for a code that only passes through."""
        if isinstance(code, ast.Constant) and isinstance(code.value, str):
            return [code.value]
        if isinstance(code, ast.IfExp):
            return self._codes(near, code.body) + self._codes(near, code.orelse)
        if code is None or isinstance(code, ast.Attribute | ast.Starred | ast.Call | ast.Subscript):
            return []
        # The refusals of support rows are read from the rows.
        if isinstance(code, ast.JoinedStr) and self.name != "core/config/support":
            parts = [
                self._codes(near, part.value if isinstance(part, ast.FormattedValue) else part)
                for part in code.values
            ]
            return ["".join(words) for words in product(*parts)]
        if isinstance(code, ast.JoinedStr):
            return []
        if isinstance(code, ast.Name):
            function = self._function(near)
            if code.id in _parameters(function):
                return []
            values = [text for value in self._values(function, code.id) for text in self._codes(value, value)]
            if values:
                return list(dict.fromkeys(values))
        raise UnreadableError(f"{self.name}:{getattr(near, 'lineno', 0)}: `{ast.unparse(code)}` is no text")

    def _forms(self, near: ast.AST, message: ast.expr | None, depth: int = 0) -> list[str]:
        """The forms of a message, `…` for what is put in when it is raised."""
        if isinstance(message, ast.Constant):
            return [str(message.value)]
        if isinstance(message, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in message.values]
            return ["".join(parts)]
        if isinstance(message, ast.IfExp):
            return self._forms(near, message.body, depth) + self._forms(near, message.orelse, depth)
        if isinstance(message, ast.Name) and depth < 3:
            function = self._function(near)
            if function is not None and message.id in _parameters(function):
                place = _parameters(function).index(message.id)
                callers = [call for call in self.calls if _name(call.func) == function.name]
                values = [(call, _argument(call, place, message.id)) for call in callers]
            else:
                values = [(value, value) for value in self._nearest(near, function, message.id)]
            return [form for there, value in values for form in self._forms(there, value, depth + 1)] or ["…"]
        return ["…"]

    def _values(self, function: ast.FunctionDef | None, name: str) -> Iterator[ast.expr]:
        """What a name can hold in a function: what is assigned to it, or what a literal table gives in a loop."""
        for node in ast.walk(function or self.tree):
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                yield from _assigned(node.targets[0], node.value, name)
            elif isinstance(node, ast.For):
                for table in self._tables(function, node.iter):
                    for row in table.elts:
                        yield from _assigned(node.target, row, name)

    def _nearest(self, near: ast.AST, function: ast.FunctionDef | None, name: str) -> list[ast.expr]:
        """What was assigned last in the block of `near`, or anything that the name can hold in the function."""
        values = list(self._values(function, name))
        block = self.parents.get(self._statement(near))
        own = [value for value in values if self.parents.get(self._statement(value)) is block]
        own = [value for value in own if value.lineno < getattr(near, "lineno", 0)]
        return own[-1:] or values

    def _statement(self, node: ast.AST) -> ast.AST:
        while not isinstance(node, ast.stmt) and node in self.parents:
            node = self.parents[node]
        return node

    def _tables(self, function: ast.FunctionDef | None, iterated: ast.expr) -> Iterator[ast.Tuple]:
        """The literal tuples that an expression can be, followed through names and parameters."""
        if isinstance(iterated, ast.Tuple):
            yield iterated
        elif isinstance(iterated, ast.Name) and iterated.id in _parameters(function) and function is not None:
            place = _parameters(function).index(iterated.id)
            for call in self.calls:
                if _name(call.func) == function.name and (given := _argument(call, place, iterated.id)):
                    yield from self._tables(self._function(call), given)
        elif isinstance(iterated, ast.Name):
            for node in ast.walk(function or self.tree):
                if isinstance(node, ast.Assign) and _name(node.targets[0]) == iterated.id:
                    yield from self._tables(function, node.value)

    def _function(self, node: ast.AST) -> ast.FunctionDef | None:
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef):
                return node
        return None

    def _fate(self, call: ast.Call, made: str, code: str) -> str:
        if made in exit_codes():
            return made
        if made == "KeyRefused":
            return "ConfigError"
        function = self._function(call)
        if function is not None and function.name in self.warning:
            return NOTICE
        for name in (f"{self.name}:{code}", self.name):
            if name in FATES:
                return FATES[name]
        of = (
            call.func
            for call in self.calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "of"
        )
        return next((_name(func.value) for func in of if _name(func.value) in exit_codes()), NOTICE)


def _parameters(function: ast.FunctionDef | None) -> list[str]:
    return [entry.arg for entry in function.args.args if entry.arg not in ("self", "cls")] if function else []


def _assigned(target: ast.expr, value: ast.expr, name: str) -> Iterator[ast.expr]:
    """The part of `value` that an assignment gives to `name`."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for entry, part in zip(target.elts, value.elts, strict=True):
            yield from _assigned(entry, part, name)
    elif _name(target) == name:
        yield value


def _argument(call: ast.Call, place: int, name: str) -> ast.expr | None:
    if 0 <= place < len(call.args):
        return call.args[place]
    return next((entry.value for entry in call.keywords if entry.arg == name), None)


def _name(node: ast.AST | None) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
