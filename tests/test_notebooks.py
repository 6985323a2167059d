"""The committed notebooks: current, complete, small, described. (nbval runs them; this reads them.)"""

import ast
import base64
import importlib
import re
from pathlib import Path

import execute
import nbformat
import pytest
from bs4 import BeautifulSoup
from conftest import ROOT
from nbformat import NotebookNode

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STATE = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
COLUMNS = 98  # characters of code that a wide window shows without scrolling
FRAME = 8 * 1024  # bytes of one picture in a widget
MACHINE = re.compile(r"(?:/(?:home|root|tmp|work|Users|mnt)/\w|[A-Z]:\\Users)[^\s\"']*")

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def outputs(notebook: NotebookNode) -> list[tuple[int, NotebookNode, NotebookNode]]:
    """(number of the cell, cell, output) for every output."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [(number, cell, output) for number, cell in enumerate(cells, 1) for output in cell.outputs]


def states(notebook: NotebookNode) -> dict[str, NotebookNode]:
    """The saved widget models by id."""
    return notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {})


def test_stamp_is_current(path: Path) -> None:
    assert execute.current(path), (
        f"{path.name}: its code, the library that it imports or a record that it reads has changed since its outputs "
        "were made: run make execute"
    )


def test_a_claim_that_fails_stops_the_book_and_no_reader(notebook: NotebookNode) -> None:
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert re.search(r"^claims\.tell\(\)", first.source, re.MULTILINE), (
        "a GPU's other network would stop a reader's run"
    )


def test_draws_are_made_where_the_images_are(notebook: NotebookNode) -> None:
    """A generator of the processor cannot draw on a GPU; `tests/pretend.py` finds the rest of what a GPU refuses."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and "augment(" in cell.source:
            assert "Generator()" not in cell.source, cell.id


def test_no_progress_bar_is_left_on_the_page(notebook: NotebookNode) -> None:
    models = {model["model_name"] for model in states(notebook).values()}
    assert not models & {"FloatProgressModel", "IntProgressModel"}, "an empty box: see NO_BARS in book/tools/execute.py"


def test_stamp_sees_code_library_and_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "ROOT", tmp_path)
    (tmp_path / "record.json").write_text("1")
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell("from bdlib import provenance"), nbformat.v4.new_markdown_cell("text")]
    notebook.metadata["bdlib"] = {"reads": ["record.json"]}

    def stamp() -> str:
        nbformat.write(notebook, tmp_path / "n.ipynb")
        return execute.stamp(tmp_path / "n.ipynb")

    first = stamp()
    notebook.cells[1].source = "other prose"
    assert stamp() == first
    (tmp_path / "record.json").write_text("2")
    second = stamp()
    assert second != first
    notebook.cells[0].source += "\n1 + 1"
    third = stamp()
    assert third not in (first, second)
    monkeypatch.setattr("bdlib.provenance.fingerprint", lambda *modules: f"another library: {modules}")
    assert stamp() != third
    notebook.metadata["bdlib"]["reads"] = ["absent.json"]
    with pytest.raises(ValueError, match=r"absent\.json"):
        stamp()


def test_code_fits_the_page(notebook: NotebookNode) -> None:
    long = [line for cell in notebook.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert [line for line in long if len(line) > COLUMNS] == []


def test_executed_in_order(notebook: NotebookNode) -> None:
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))


def test_no_error_and_no_warning_in_outputs(notebook: NotebookNode) -> None:
    for number, cell, output in outputs(notebook):
        allowed = "raises-exception" in cell.metadata.get("tags", [])
        assert output.output_type != "error" or allowed, f"code cell {number} ended in {output.get('ename')}"
        if output.output_type == "stream" and output.name == "stderr":
            pytest.fail(f"code cell {number} wrote to stderr: {output.text[:200]}")


def test_images_have_alt_texts(notebook: NotebookNode) -> None:
    for number, cell, output in outputs(notebook):
        data = output.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert alt.strip(), f"code cell {number} shows an image: give its metadata mystnb.image.alt"
        described("".join(data.get("text/html", "")), f"code cell {number}")
    for model in states(notebook).values():
        if model.model_name == "HTMLModel":
            described(model.state.get("value", ""), "an HTML widget")
        assert model.model_name != "ImageModel", "widgets.Image has no alt text: put <img alt=...> into widgets.HTML"


def described(html: str, where: str) -> None:
    """Every <img> of a piece of HTML has an alt text."""
    for image in BeautifulSoup(html, "html.parser").find_all("img"):
        assert (image.get("alt") or "").strip(), f"{where} has an <img> without alt text"


def test_is_small(path: Path, notebook: NotebookNode) -> None:
    assert path.stat().st_size < 2_000_000, f"{path.name} has {path.stat().st_size / 1e6:.1f} MB"
    frames = re.compile(r"data:image/[\w+.-]+;base64,([A-Za-z0-9+/=]+)")
    for model in states(notebook).values():
        for match in frames.finditer(str(model.state.get("value", ""))):
            size = len(base64.b64decode(match[1]))
            assert size <= FRAME, f"a widget frame has {size} bytes: use palette PNG or WebP at the size shown"
        for buffer in model.get("buffers", []):
            size = len(base64.b64decode(buffer["data"]))
            assert size <= FRAME, f"a widget buffer has {size} bytes"


def test_widgets_are_saved(notebook: NotebookNode) -> None:
    shown = {output.data[VIEW]["model_id"] for _, _, output in outputs(notebook) if VIEW in output.get("data", {})}
    assert shown <= set(states(notebook)), "a widget is shown whose state was not saved: run make execute"


def test_controls_work_without_a_kernel(notebook: NotebookNode) -> None:
    linked = set()
    for model in states(notebook).values():
        if model.model_name in ("LinkModel", "DirectionalLinkModel"):
            linked |= {str(end[0]).removeprefix("IPY_MODEL_") for end in (model.state.source, model.state.target)}
    controls = re.compile(r"(Slider|Dropdown|ToggleButtons|RadioButtons|Select|Checkbox|ToggleButton|Text|Play)Model")
    for name, model in states(notebook).items():
        if controls.fullmatch(re.sub(r"^(Int|Float|Bounded|Selection|Range)+", "", model.model_name)):
            assert name in linked, f"a {model.model_name} ({model.state.get('description')}) is linked to nothing"
            assert model.state.get("description") or model.model_name == "PlayModel", (
                f"a {model.model_name} has no name"
            )


def test_names_of_the_library_exist(notebook: NotebookNode) -> None:
    tree = execute.code(notebook)
    modules = {}  # name in the notebook -> module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bdlib":
            module = importlib.import_module(node.module)
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if execute.is_module(full):
                    modules[alias.asname or alias.name] = importlib.import_module(full)
                assert hasattr(module, alias.name), f"{full} does not exist"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "bdlib":
                    module = importlib.import_module(alias.name)
                    modules[alias.asname or "bdlib"] = module if alias.asname else importlib.import_module("bdlib")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            assert hasattr(module, node.attr), f"{module.__name__}.{node.attr} does not exist"


def test_says_nothing_about_the_machine(notebook: NotebookNode) -> None:
    for number, _, output in outputs(notebook):
        text = "".join(output.get("text", "")) + str(
            {k: v for k, v in output.get("data", {}).items() if "image/" not in k}
        )
        assert not (found := MACHINE.search(text)), f"code cell {number} shows a path of the machine: {found[0]}"


def test_declares_the_records_it_reads(notebook: NotebookNode) -> None:
    declared = {record.name for record in execute.reads(notebook)}
    named = {Path(node.value).name for node in ast.walk(execute.code(notebook)) if is_record(node)}
    assert named <= declared, f"add to the metadata's bdlib.reads: {', '.join(sorted(named - declared))}"


def is_record(node: ast.AST) -> bool:
    """Whether a node is the name of a file under book/results."""
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".json")):
        return False
    return any((ROOT / "book" / "results").rglob(Path(node.value).name))


def test_is_in_the_contents(path: Path) -> None:
    assert path in execute.chapters(), f"{path.name} is not in book/_toc.yml"


def test_is_tidy(notebook: NotebookNode) -> None:
    assert (notebook.nbformat, notebook.nbformat_minor) <= (4, 5)  # jupyter-cache refuses more
    assert all("execution" not in cell.metadata for cell in notebook.cells), "timestamps: run make execute"


def test_written_stably(tmp_path: Path) -> None:
    # two runs of the same notebook give the same file, random names of widgets included
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("slider")
    notebook.cells = [cell]
    texts = []
    for name in ("0" * 32, "a" * 32):
        cell.outputs = [nbformat.v4.new_output("display_data", {VIEW: {"model_id": name}})]
        notebook.metadata["widgets"] = {
            STATE: {"state": {name: {"model_name": "X", "state": {"c": f"IPY_MODEL_{name}"}}}}
        }
        execute.tidy(notebook)
        texts.append(nbformat.writes(notebook))
    assert texts[0] == texts[1]
