"""The matrix: data sets x networks x attacks x poison rates x defences x clean budgets x seeds, in plain words.

    python -m bdlib bench --preset paper               # run what is missing; killed at any point, run it again
    python -m bdlib bench --matrix my.toml --list      # what is there, what is missing
    python -m bdlib bench export --preset paper        # the records that the book shows

`bdlib.cells` computes and keeps the entries.
"""

import re
import tomllib
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from bdlib import data as datasets
from bdlib import names
from bdlib.lab import NETWORKS, Lab
from bdlib.training import Recipe

ALL_ATTACKS, ALL_DEFENCES = tuple(names.ATTACKS), ("none", *names.DEFENCES)


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix in plain words; see `Matrix` for each. ``rate`` None is the attack's own."""

    dataset: str
    network: str
    attack: str
    rate: float | None
    defence: str
    clean: str
    seed: int
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    curves: bool = False

    def __str__(self) -> str:
        parts = (self.dataset, self.network, self.attack, self.rate, self.defence, self.clean, self.seed)
        return "/".join(str(p) for p in parts if p not in (None, ""))

    @property
    def victim(self) -> "Cell":
        """The cell that trains and scores the victim of this one."""
        return replace(self, defence="none", clean="", curves=False)


@dataclass(frozen=True)
class Matrix:
    """Everything to be run: the product of its lists.

    Args:
        datasets, networks: names, see `bdlib.data.names` and `bdlib.lab.NETWORKS`.
        attacks, defences: names, see `bdlib.names`; ``"anp:official"`` names a preset, "none" is clean training, or no
            repair.
        rates: shares of all training images to poison; empty for each attack's own. Attacks that poison a share of the
            target class keep their own.
        clean: the defender's budgets: ``"500"``, ``"5%"`` of the training set, ``"10/class"``.
        seeds: of training, of the draw of the clean set and of the defence.
        epochs, batch, lr: change the recipe of the victims; None is that of the scale.
        curves: also record ACC and ASR against the pruning threshold, which looks at the test set: for figures.

    Raises:
        ValueError: an unknown name, which the message puts beside the known ones; a list that is empty.
    """

    datasets: tuple[str, ...] = ("cifar10",)
    networks: tuple[str, ...] = ("preact_resnet18",)
    attacks: tuple[str, ...] = ("badnets",)
    rates: tuple[float, ...] = ()
    defences: tuple[str, ...] = ALL_DEFENCES
    clean: tuple[str, ...] = ("500",)
    seeds: tuple[int, ...] = (0,)
    epochs: int | None = None
    batch: int | None = None
    lr: float | None = None
    curves: bool = False

    def __post_init__(self) -> None:
        for name in ("datasets", "networks", "attacks", "defences", "clean", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        for name, known in (("datasets", datasets.names()), ("networks", tuple(NETWORKS))):
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"{name} must be of {', '.join(known)}, got {value!r}")
        for dataset, attack in product(self.datasets, self.attacks):
            names.attack(attack, Lab("small", dataset=dataset, device="cpu"))
        for network, defence in product(self.networks, self.defences):
            names.defence(defence, network)
        for text in self.clean:
            names.budget(text, 50_000)
        for rate in self.rates:
            if not 0 <= rate <= 1:
                raise ValueError(f"rates must be in [0, 1], got {rate}")
        recipe = {"epochs": self.epochs, "batch": self.batch, "lr": self.lr}
        Recipe(**({"epochs": 1} | {k: v for k, v in recipe.items() if v is not None}))  # type: ignore[arg-type]

    def cells(self) -> list[Cell]:
        """All cells, those of one victim together, the victim itself first."""
        out: dict[Cell, None] = {}
        for dataset, network, seed, attack in product(self.datasets, self.networks, self.seeds, self.attacks):
            for rate in self.rates if self.rates and names.counts_all(attack) else (None,):
                recipe = (self.epochs, self.batch, self.lr)
                victim = Cell(dataset, network, attack, rate, "none", "", seed, *recipe)
                for clean, defence in product(self.clean, sorted(self.defences, key="none".__ne__)):
                    cell = replace(victim, defence=defence, clean=clean, curves=self.curves)
                    out[victim if defence == "none" else cell] = None
        return list(out)

    @classmethod
    def read(cls, path: Path) -> "Matrix":
        """A matrix from a TOML file whose keys are the fields of this class.

        Raises:
            ValueError: not TOML, an unknown key (the line is named), a value of the wrong kind.
        """
        text = Path(path).read_text(encoding="utf-8")
        try:
            found = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
        known = {f.name: f for f in fields(cls)}
        kind: dict[str, tuple[type, ...]] = dict.fromkeys(("seeds", "epochs", "batch"), (int,))
        kind |= {"rates": (int, float), "lr": (int, float), "curves": (bool,), "clean": (str, int)}
        for key, value in found.items():
            here = re.compile(rf"\s*\[*\s*[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
            line = next((n for n, t in enumerate(text.splitlines(), 1) if here.match(t)), 0)
            if key not in known:
                raise ValueError(f"{path}, line {line}: unknown key {key!r}; known are {', '.join(known)}")
            if isinstance(known[key].default, tuple):
                if not isinstance(value, list):
                    raise ValueError(f"{path}, line {line}: {key} must be a list, got {value!r}")
            for v in value if isinstance(known[key].default, tuple) else (value,):
                if type(v) not in kind.get(key, (str,)):  # exactly: True is an int too
                    raise ValueError(f"{path}, line {line}: {key} cannot hold {v!r}")
            if isinstance(value, list):  # 1 and 1.0 are one rate, and one cell
                found[key] = tuple({"clean": str, "rates": float}.get(key, lambda v: v)(v) for v in value)
        try:
            return cls(**found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


PRESETS = {
    "smoke": Matrix(("digits",), ("small",), ("badnets", "blend"), defences=("none", "ft", "rnp"),
                    clean=("20/class",), epochs=4),
    "cpu": Matrix(networks=("small",), attacks=("none", "badnets", "blend"), epochs=8, batch=128, lr=0.1),
    "cpu-attacks": Matrix(networks=("small",), attacks=(
                          "badnets:official", "trojan", "trojan-patch", "cl:small", "sig", "refool", "refool:official",
                          "input-aware:small", "dynamic:small", "wanet", "wanet:small", "lf:small", "ssba:small",
                          "fc:small", "dfst:small", "lira:small", "a-blend", "a-patch", "bpp:small"),
                          defences=("none", "anp"), epochs=8, batch=128, lr=0.1),
    "chapter": Matrix(curves=True),
    "paper": Matrix(attacks=("none", *ALL_ATTACKS), rates=(0.1,), clean=("5%",)),
    "gtsrb": Matrix(("gtsrb",), attacks=("none", "badnets", "blend", "sig", "input-aware", "wanet", "bpp"),
                    rates=(0.1,), clean=("5%",)),
    "low-data": Matrix(attacks=("badnets", "blend"), rates=(0.1,), clean=("10/class", "25/class", "500", "1%", "5%")),
}  # fmt: skip
