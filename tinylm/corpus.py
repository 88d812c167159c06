"""Offline text that every CPython carries, split so that no text is trained and evaluated on."""
import ast
import hashlib
import sysconfig
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip"}


def stdlib_documents(split, source=False):
    """The language reference and the library's docstrings, as a list of texts.

    One document is a topic of pydoc_data.topics or all docstrings of a module (source=True: the
    module's whole source). A hash of the topic's or top-level module's name sends one in ten to
    split "test" and the rest to "train". Topics quote each other, so a paragraph of a "test"
    document is also removed from every "train" document that repeats it. The train split is the
    one of the running Python version; the names keep their split in every version.
    """
    from pydoc_data.topics import topics

    named = dict(topics)
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not all(part.isidentifier() for part in parts) or SKIPPED_FOLDERS & set(parts):
            continue
        text = path.read_text(encoding="utf-8")
        named[".".join(parts)] = text if source else docstrings(text)
    test = [text for name, text in named.items() if held_out(name)]
    if split == "test":
        return [text for text in test if text]
    seen = {" ".join(paragraph.split()) for text in test for paragraph in text.split("\n\n")}
    train = ["\n\n".join(paragraph for paragraph in text.split("\n\n")
                         if " ".join(paragraph.split()) not in seen)
             for name, text in named.items() if not held_out(name)]
    return [text for text in train if text]


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
