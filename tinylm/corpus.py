"""Offline text that every CPython carries, split so that no text is trained and evaluated on.

What train.py needs beside it (the test suite's sources, docstrings of C functions and of packages
in requirements.txt) is for training only and is never part of the "test" split.
"""
import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import sysconfig
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip"))


def stdlib_documents(split, source=False):
    """The language reference and the library's docstrings, as a list of texts.

    One document is a topic of pydoc_data.topics or all docstrings of a module (source=True: the
    module's whole source). A hash of the topic's or top-level module's name sends one in ten to
    split "test" and the rest to "train". Topics quote each other, so a paragraph of a "test"
    document is also removed from every "train" document that repeats it. The train split is the
    one of the running Python version; the names keep their split in every version.
    """
    from pydoc_data.topics import topics

    named = {**topics, **module_texts(source, SKIPPED_FOLDERS)}
    if split == "test":
        return [text for name, text in named.items() if text and held_out(name)]
    return without_test_paragraphs(
        [text for name, text in named.items() if not held_out(name)], source)


@functools.cache
def module_texts(source, skipped):
    """{module name: its docstrings, or its source} of the standard library's Python files."""
    root, named = Path(sysconfig.get_path("stdlib")), {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if all(part.isidentifier() for part in parts) and not skipped & set(parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            named[".".join(parts)] = text if source else docstrings(text)
    return named


def without_test_paragraphs(texts, source=False):
    """The texts without the paragraphs that a document of split "test" has; empty ones dropped."""
    seen = test_paragraphs(source)
    kept = ["\n\n".join(paragraph for paragraph in text.split("\n\n")
                        if words(paragraph) not in seen) for text in texts]
    return [text for text in kept if text.strip()]


@functools.cache
def test_paragraphs(source):
    """All paragraphs of split "test", source=True: also those of its modules' sources."""
    texts = stdlib_documents("test") + (stdlib_documents("test", source=True) if source else [])
    return {words(paragraph) for text in texts for paragraph in text.split("\n\n")}


def words(paragraph):
    """A paragraph with its white space and quotes evened out, for comparison."""
    return " ".join(paragraph.replace('"""', " ").split())


def test_suite_sources():
    """Sources of CPython's own tests; `test.test_x` is left out where `x` is held out."""
    tests = module_texts(True, SKIPPED_FOLDERS - {"test", "tests"} | {"lib2to3", "site-packages"})
    return without_test_paragraphs(
        [text for name, text in tests.items()
         if name.startswith("test.") and not held_out(name.split(".")[1].removeprefix("test_"))],
        source=True)


def builtin_docstrings():
    """Docstrings of the functions and classes that CPython writes in C, one text a module."""
    names = {*sys.builtin_module_names, *(module.name for module in pkgutil.iter_modules(
        [sysconfig.get_config_var("DESTSHARED") or ""]))}
    texts = []
    for name in sorted(name for name in names if not held_out(name) and "test" not in name):
        try:
            module = importlib.import_module(name)
        except ImportError:         # a module of another platform
            continue
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        members = [value for holder in [module, *classes] for value in vars(holder).values()]
        documented = (value for value in members if callable(value))
        texts.append("\n\n".join(dict.fromkeys(
            text for text in (inspect.getdoc(value) for value in documented) if text)))
    return without_test_paragraphs(texts)


def package_docstrings(package):
    """The docstrings of an installed package, one text a file, read without importing it."""
    root, texts = Path(importlib.util.find_spec(package).submodule_search_locations[0]), []
    for path in sorted(root.rglob("*.py")):
        if not SKIPPED_FOLDERS & set(path.relative_to(root).parts):
            try:
                texts.append(docstrings(path.read_text(encoding="utf-8")))
            except SyntaxError:     # written for a later Python
                continue
    return without_test_paragraphs(texts)


def docstrings(source):
    """All docstrings of a Python source text, in the order of the file, joined by blank lines."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))


def held_out(name):
    """True for one name in ten; `_pydatetime.x`, `_datetime` and `datetime` go the same way."""
    module = name.split(".")[0]
    module = module[3:] if module.startswith("_py") else module.lstrip("_")
    return hashlib.sha256(module.encode()).digest()[0] % 10 == 0
