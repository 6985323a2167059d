"""Reading the committed records: all that a chapter needs of `bdlib.bench`, without the code that makes them.

read("defences")          # book/results/small/defences.json, a list of records
"""

import json
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "small"


def read(experiment: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of an experiment, as chapters read them; a damaged file is reported and counts as empty.

    Raises:
        FileNotFoundError: no such experiment.
    """
    path = folder / f"{experiment}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none"
        raise FileNotFoundError(f"no records {path}; there are: {there}. `make records` makes them") from None
    except ValueError as error:
        warnings.warn(f"{path} is damaged ({error}); its records are made anew", stacklevel=2)
        return []
