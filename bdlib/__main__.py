"""The command line: `python -m bdlib train | evaluate | defend | data | bench`, each with --help.

python -m bdlib train --attack badnets --rate 0.1
python -m bdlib defend --attack badnets --defense anp --seed 3 --json
python -m bdlib data list
"""

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from bdlib import __version__, names
from bdlib.commands import bench, options


def _attack(args: argparse.Namespace, lab: Any) -> Any:
    name = f"{args.attack}:{args.attack_preset}" if args.attack_preset else args.attack
    attack = names.attack(name, lab)
    if attack is None:
        return None
    given = {"target": args.target, "rate": args.rate, "class_rate": args.class_rate, "mode": args.mode}
    return _changed(attack, {k: v for k, v in given.items() if v is not None}, args.attack)


def _defense(args: argparse.Namespace, lab: Any) -> Any:
    name = f"{args.defense}:{args.preset}" if args.preset else args.defense
    defense = names.defence(name, lab.scale.network)
    if defense is None:
        raise ValueError(f"--defense none repairs nothing; name one of {', '.join(names.DEFENCES)}")
    given = {}
    for item in args.set or []:
        field, _, text = item.partition("=")
        try:
            given[field] = json.loads(text)
        except json.JSONDecodeError:
            raise ValueError(f"--set {item}: {text!r} is neither a number nor true, false or null") from None
    return _changed(defense, given, args.defense)


def _changed(settings: Any, given: dict[str, Any], name: str) -> Any:
    """`settings` with other values in the fields that the command line can express."""
    allowed = [f.name for f in fields(settings) if not is_dataclass(getattr(settings, f.name))]
    for field in given:
        if field not in allowed:
            raise ValueError(f"{name} has no field {field!r} to set; it has {', '.join(allowed)}")
    return replace(settings, **given)


def _lab(args: argparse.Namespace) -> Any:
    from bdlib.lab import SCALES, Lab

    recipe = None
    # a downloaded set takes the full scale's reserve and recipe, whatever the network
    scale = args.scale or ("full" if args.dataset not in (None, "signs", "digits") else None)
    if args.epochs is not None or args.batch is not None or args.lr is not None:
        base = SCALES[scale or os.environ.get("BDLIB_SCALE", "small")].recipe
        chosen = {"epochs": args.epochs, "batch": args.batch, "lr": args.lr}
        recipe = replace(base, **{k: v for k, v in chosen.items() if v is not None})
    return Lab(scale, device=args.device, dataset=args.dataset, network=args.network, recipe=recipe, verify=args.verify)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _show(title: str, rows: dict[str, Any]) -> str:
    width = max(map(len, rows))
    return "\n".join([title, *(f"  {k:<{width}}  {v}" for k, v in rows.items())])


def _scored(model: Any, lab: Any, trigger: Any) -> dict[str, Any]:
    from bdlib.cells import scores

    return scores(model, lab.test, trigger)


def _rows(scores: dict[str, Any]) -> dict[str, str]:
    names = {"acc": "ACC", "asr": "ASR", "ra": "RA", "target_acc": "ACC of the target class"}
    return {names[k]: _percent(v) for k, v in scores.items() if k in names}


def _poisoned(attack: Any, victim: Any) -> str:
    from bdlib.lab import Controlling

    return "other ones in each batch" if isinstance(attack, Controlling) else str(len(victim.indices))


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train a victim, or find it in the store, and score it."""
    lab = _lab(args)
    attack = _attack(args, lab)
    victim = lab.victim(attack, seed=args.seed)
    scores = _scored(victim.model, lab, victim.trigger)
    record = {**victim.facts, **scores}
    rows = {"attack": record["attack"], "poisoned images": _poisoned(attack, victim), **_rows(scores),
            "trained in": f"{record['seconds']:.0f} s on {record['device']} ({record['dtype']})"}  # fmt: skip
    return {"record": record, "text": _show(f"victim: {lab.scale.network} on {lab.scale.dataset}", rows)}


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Score a victim, beside a cleanly trained network on the same triggered images."""
    lab = _lab(args)
    attack = _attack(args, lab)
    if attack is None:
        raise ValueError("--attack none has no trigger to evaluate; name an attack")
    victim, clean = lab.victim(attack, seed=args.seed), lab.victim(None, seed=args.seed)
    scores, floor = _scored(victim.model, lab, victim.trigger), _scored(clean.model, lab, victim.trigger)
    rows = {k: f"{v}   (clean network: {_rows(floor)[k]})" for k, v in _rows(scores).items()}
    return {"record": {**victim.facts, **scores, "clean_network": floor}, "text": _show(repr(attack), rows)}


def defend(args: argparse.Namespace) -> dict[str, Any]:
    """Repair a victim with clean images, and score it before and after."""
    from bdlib.metrics import Scores, der
    from bdlib.provenance import fingerprint, run_info

    lab = _lab(args)
    attack, defense = _attack(args, lab), _defense(args, lab)
    victim = lab.victim(attack, seed=args.seed)
    clean = lab.clean(count=args.clean, per_class=args.per_class, seed=args.seed)
    repair = defense(victim.model, clean, seed=args.seed)
    before, after = (_scored(m, lab, victim.trigger) for m in (victim.model, repair.model))
    rating = {} if attack is None else {"der": der(Scores(**before), Scores(**after))}
    chosen = {k: repair.details[k] for k in ("threshold", "pruned") if k in repair.details}
    record = {
        "dataset": lab.scale.dataset, "network": lab.scale.network, "attack": repr(attack), "defense": repr(defense),
        "seed": args.seed, "clean_images": len(clean), "notes": list(lab.train.notes), "before": before, "after": after,
        **rating, **chosen, "seconds": repair.seconds, **run_info(lab.device),
        "code": fingerprint("bdlib.lab", type(defense).__module__),
    }  # fmt: skip
    first, second = _rows(before), _rows(after)
    rows = {k: f"{first[k]:>8} -> {second[k]:>8}" for k in first}
    rows |= {"DER": f"{rating['der']:.3f}"} if rating else {}
    rows |= {k: str(v) for k, v in chosen.items()} | {"seconds": f"{repair.seconds:.0f}"}
    return {"record": record, "text": _show(f"{defense!r}\non {attack!r}, {len(clean)} clean images", rows)}


def data(args: argparse.Namespace) -> dict[str, Any]:
    """List the data sets, fetch one, or write a preview picture."""
    from bdlib import data as sets

    if args.action == "list":
        found = sets.status()
        rows = {
            s["name"]: "  ".join(str(v) for k, v in s.items() if k != "name" and v not in (None, "")) for s in found
        }
        return {"record": found, "text": _show("data sets", rows)}
    if not args.name:
        raise ValueError(f"data {args.action} needs the name of a set: {', '.join(sets.names())}")
    loaded = sets.load(args.name, verify=args.verify)
    facts = {
        "name": args.name, "train": len(loaded.train), "test": len(loaded.test), "classes": len(loaded.train.classes),
        "shape": loaded.train.shape, "notes": list(loaded.train.notes),
    }  # fmt: skip
    if args.action == "preview":
        from bdlib import plots

        x, y = loaded.train.images, loaded.train.labels
        views = [x[y == k][:8] for k in range(len(loaded.train.classes))]
        figure = plots.images(views, rows=list(loaded.train.classes))
        figure.savefig(args.output, dpi=150)
        facts["picture"] = args.output
    return {"record": facts, "text": _show(args.name, {k: str(v) for k, v in facts.items() if k != "name"})}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bdlib", description="Backdoor attacks and defences on small images.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(function: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(run=function)
        sub.add_argument("--json", action="store_true", help="print the record as JSON")
        sub.add_argument("--no-verify", dest="verify", action="store_false", help="accept data whose checksum differs")
        return sub

    for function in (train, evaluate, defend):
        sub = command(function)
        sub.add_argument("--attack", metavar="NAME", default="badnets", help=f"{', '.join(names.ATTACKS)} or none; "
                         "a preset may follow, wanet:official (default badnets)")  # fmt: skip
        sub.add_argument("--attack-preset", metavar="NAME", help="settings of the attack: paper, official, or one of "
                         "its own (default: paper on real data; small on signs and digits, where the attack has it, "
                         "else its defaults)")  # fmt: skip
        sub.add_argument("--rate", type=float, help="poison rate, share of all training images (default: the preset's)")
        sub.add_argument("--class-rate", type=float, help="of clean-label attacks: share of the target class")
        sub.add_argument("--target", type=int, help="target label (default: the book's choice for the data set)")
        sub.add_argument("--mode", choices=("all-to-one", "all-to-all"), help="label map (default all-to-one)")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--scale", choices=("small", "full"), help="default: BDLIB_SCALE, else small")
        sub.add_argument("--dataset", help="override the scale's data set")
        sub.add_argument("--network", help="override the scale's network")
        sub.add_argument("--device", help="cpu, cuda (default: BDLIB_DEVICE, else a GPU if there is one)")
        sub.add_argument("--epochs", type=int, help="override the scale's epochs")
        sub.add_argument("--batch", type=int, help="override the scale's batch size")
        sub.add_argument("--lr", type=float, help="override the scale's peak learning rate")
        sub.add_argument("--record", metavar="FILE", help="also append the record to this JSON Lines file")
        if function is defend:
            known = ", ".join(names.DEFENCES)
            sub.add_argument("--defense", "--defence", metavar="NAME", default="anp",
                             help=f"{known}; a preset may follow, anp:official (default anp)")  # fmt: skip
            sub.add_argument("--preset", choices=names.PRESETS, help="settings of the defence (default: small for the "
                             "small network, else paper)")  # fmt: skip
            sub.add_argument("--set", action="append", metavar="FIELD=VALUE", help="override a field of the defence")
            budget = sub.add_mutually_exclusive_group()
            budget.add_argument("--clean", type=int, help="number of clean images (default: the scale's)")
            budget.add_argument("--per-class", type=int, help="clean images of each class")
    sub = command(data)
    sub.add_argument("action", choices=("list", "fetch", "preview"))
    sub.add_argument("name", nargs="?", help="data set, for fetch and preview")
    sub.add_argument("-o", "--output", default="preview.png", help="picture written by preview")
    options(command(bench))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for cells that failed, 2 for bad input, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
    try:
        result = args.run(args)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was stored before is intact", file=sys.stderr)
        return 130
    if getattr(args, "record", None):
        from bdlib import files

        path = Path(args.record)
        lines = path.read_text(encoding="utf-8") if path.exists() else ""
        files.write_bytes(path, f"{lines}{json.dumps({'command': args.command, **result['record']})}\n".encode())
    with contextlib.suppress(BrokenPipeError):  # `| head` has read enough
        print(json.dumps(result["record"], indent=2) if args.json else result["text"], flush=True)
    return result.get("status", 0)


if __name__ == "__main__":
    sys.exit(main())
