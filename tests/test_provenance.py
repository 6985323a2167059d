"""The fingerprint of code: it changes with the meaning, with nothing else, and with what is imported too."""

import importlib
import re
import sys

import pytest
import torch

import bdlib.metrics
from bdlib import provenance
from bdlib.provenance import closure, fingerprint, run_info

FILES = {
    "__init__.py": "",
    "top.py": "from toybox import middle\nfrom toybox.leaf import f\n\ndef g(x):\n    return f(x) + 1\n",
    "middle.py": "from . import leaf\nfrom .sub import deep\n",
    "leaf.py": '"""Leaf."""\n\ndef f(x):\n    """Double."""\n    return 2 * x\n',
    "lonely.py": "import torch\n",
    "sub/__init__.py": "from .deep import h\n",
    "sub/deep.py": "from ..leaf import f\n\ndef h():\n    return f(1)\n",
}


@pytest.fixture
def box(tmp_path, monkeypatch):
    """A package of its own; write(name, text) changes one of its files."""

    def write(name, text):
        path = tmp_path / "toybox" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        provenance._parsed.cache_clear()  # a clock may be too coarse to tell two writes apart
        importlib.invalidate_caches()

    for name, text in FILES.items():
        write(name, text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(provenance, "PACKAGE", "toybox")
    yield write
    for name in [m for m in sys.modules if m.split(".")[0] == "toybox"]:
        del sys.modules[name]


def test_the_closure_follows_every_spelling_of_an_import(box):
    everything = {"toybox.top", "toybox.middle", "toybox.leaf", "toybox.sub", "toybox.sub.deep"}
    assert set(closure("toybox.top")) == everything
    assert set(closure("toybox.lonely")) == {"toybox.lonely"}
    assert set(closure("toybox.sub")) == {"toybox.sub", "toybox.sub.deep", "toybox.leaf"}


@pytest.mark.parametrize(
    "text",
    [
        FILES["leaf.py"].replace("Double.", "Twice the number."),
        FILES["leaf.py"].replace("return 2 * x", "return (2*x)  # why"),
        FILES["leaf.py"].replace("\n\ndef", "\n\n\n\ndef").replace('"""Leaf."""\n', ""),
    ],
    ids=["docstring", "comment and layout", "blank lines"],
)
def test_what_does_not_change_the_meaning_does_not_change_the_fingerprint(box, text):
    before = fingerprint("toybox.top")
    box("leaf.py", text)
    assert fingerprint("toybox.top") == before


@pytest.mark.parametrize("name", ["top.py", "leaf.py", "sub/deep.py", "sub/__init__.py"])
def test_a_changed_number_anywhere_below_changes_the_fingerprint(box, name):
    before, other = fingerprint("toybox.top"), fingerprint("toybox.lonely")
    box(name, FILES[name].replace("1", "3").replace("2 *", "5 *") + "z = 7\n")
    assert fingerprint("toybox.top") != before
    assert fingerprint("toybox.lonely") == other


def test_a_string_that_is_no_docstring_counts(box):
    before = fingerprint("toybox.leaf")
    box("leaf.py", FILES["leaf.py"].replace("return 2 * x", 'return "2 * x"'))
    assert fingerprint("toybox.leaf") != before


def test_several_modules_and_module_objects():
    assert re.fullmatch("[0-9a-f]{16}", fingerprint("bdlib.metrics"))
    assert fingerprint(bdlib.metrics) == fingerprint("bdlib.metrics")
    assert fingerprint("bdlib.metrics", "bdlib.neurons") == fingerprint("bdlib.neurons", "bdlib.metrics")
    assert fingerprint("bdlib.metrics", "bdlib.neurons") != fingerprint("bdlib.metrics")


def test_anp_depends_on_what_it_computes_with_and_on_nothing_that_draws():
    found = set(closure("bdlib.defenses.anp"))
    assert {f"bdlib.{m}" for m in ("neurons", "metrics", "training", "triggers", "data.imageset")} <= found
    assert not found & {f"bdlib.{m}" for m in ("plots", "widgets", "lab", "store", "attacks.blend", "defenses.fp")}


@pytest.mark.parametrize("name", ["bdlib.nothing", "bdlib.metrics.accuracy", "no_such_package"])
def test_a_name_that_is_no_module_is_refused(name):
    with pytest.raises(ValueError, match=name):
        fingerprint(name)


def test_a_body_of_words_alone_is_an_empty_body(box):
    box("leaf.py", 'def f(x):\n    """Only words."""\n')
    before = fingerprint("toybox.leaf")
    box("leaf.py", "def f(x):\n    pass\n")
    assert fingerprint("toybox.leaf") == before


def test_run_info_names_machine_versions_and_day(device, monkeypatch):
    monkeypatch.setenv("BDLIB_COMMIT", "abc123")
    info = run_info(device)
    assert set(info) == {"device", "dtype", "torch", "python", "commit", "date"}
    assert info["commit"] == "abc123" and info["dtype"] in ("float32", "bfloat16")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", info["date"]) and all(info.values())


def test_a_commit_without_git_is_unknown(monkeypatch, tmp_path):
    monkeypatch.delenv("BDLIB_COMMIT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == "unknown"


def test_a_fingerprint_does_not_depend_on_the_version_of_python(box):
    """Its dump of the syntax tree is its own: that of `ast` changed its format in 3.13 and gained fields in 3.12."""
    assert provenance._parsed(closure("toybox.leaf")["toybox.leaf"], 0)[0] == (
        "Module(body=[FunctionDef(name='f',args=arguments(args=[arg(arg='x')]),body=[Return(value=BinOp("
        "left=Constant(2),op=Mult(),right=Name(id='x',ctx=Load())))])])"
    )


@pytest.mark.parametrize(("wanted", "found"), [("float32", None), ("auto", torch.bfloat16), (None, torch.bfloat16)])
def test_the_number_type_follows_the_processor_unless_float32_is_wanted(wanted, found, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)
    monkeypatch.delenv("BDLIB_DTYPE", raising=False)
    if wanted:
        monkeypatch.setenv("BDLIB_DTYPE", wanted)
    assert provenance.amp_dtype("cpu") is found
    assert run_info("cpu")["dtype"] == ("float32" if found is None else "bfloat16")


def test_an_unknown_number_type_is_refused(monkeypatch):
    monkeypatch.setenv("BDLIB_DTYPE", "float16")
    with pytest.raises(ValueError, match="auto or float32, got 'float16'"):
        provenance.amp_dtype("cpu")
