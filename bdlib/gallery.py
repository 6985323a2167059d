"""Pictures of every attack, from committed data: learnt triggers take minutes to make, and a page shows them at once.

python -m bdlib bench gallery       # make what is missing or stale in book/results/small/gallery.safetensors
sheets()["WaNet"].triggered         # (8, 3, 32, 32) uint8
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from bdlib import attacks, files, provenance, store
from bdlib.lab import Controlling, Lab
from bdlib.records import RESULTS

FILE = RESULTS / "gallery.safetensors"
SEED = 3  # the first of the seeds that results are reported on
TEST, TRAINED, MEASURED = 8, 4, 500  # pictures shown, poisons shown, images behind a mean


@dataclass(frozen=True)
class Sheet:
    """What an attack does to pictures.

    Args:
        name: class name of the attack.
        clean: ``(8, C, H, W)`` uint8 test images of eight classes other than the target, the same for every attack.
        triggered: ``(8, C, H, W)`` uint8, the same with the trigger.
        poisoned: ``(4, C, H, W)`` uint8 training images as the victim saw them; None where the attacker controls the
            training, and every epoch poisons others.
        original: ``(4, C, H, W)`` uint8, what they were before.
        psnr: peak signal-to-noise ratio of triggered test images in dB, mean over 500 but those of the target class.
        ssim: their structural similarity (Wang et al. 2004, Gaussian window of 11 pixels), mean over the same.
        linf: their largest change in grey levels, mean over the same.
        attack: its settings.
    """

    name: str
    clean: Tensor
    triggered: Tensor
    poisoned: Tensor | None
    original: Tensor | None
    psnr: float
    ssim: float
    linf: float
    attack: str


def sheets(path: Path = FILE) -> dict[str, Sheet]:
    """The committed sheets by name, in the order of `bdlib.attacks.KINDS`.

    Raises:
        FileNotFoundError: no such file. (One that is not what was written raises ``files.DamagedFile``.)
    """
    found = files.read(path)
    if found is None:
        raise FileNotFoundError(f"no pictures at {path}; `make records` makes them")
    tensors, facts = found
    out = {}
    for row in facts["attacks"]:
        name = row["name"]
        poisoned, original = tensors.get(f"{name}.poisoned"), tensors.get(f"{name}.original")
        numbers = {k: row[k] for k in ("psnr", "ssim", "linf", "attack")}
        out[name] = Sheet(name, tensors["clean"], tensors[f"{name}.triggered"], poisoned, original, **numbers)
    return out


def distances(clean: Tensor, triggered: Tensor) -> dict[str, float]:
    """PSNR (dB), SSIM and L-infinity (grey levels): means over images ``(N, C, H, W)`` uint8.

    Raises:
        ModuleNotFoundError: torchmetrics is not installed (``pip install bdlib[records]``).
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = clean.double(), triggered.double()  # in float32 a flat image would differ from itself
    ssim = structural_similarity_index_measure(b, a, data_range=255.0)
    assert isinstance(ssim, Tensor)  # it would be two, with the contrast apart
    psnr = peak_signal_noise_ratio(b, a, data_range=255.0, dim=(1, 2, 3))  # of each image, then the mean
    return {"psnr": float(psnr), "ssim": float(ssim), "linf": float((a - b).abs().amax((1, 2, 3)).mean())}


def sheet(attack: Any, lab: Lab) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Pictures and distances of one attack, whose victim is trained or found in the store."""
    victim = lab.victim(attack, seed=SEED)
    assert victim.trigger is not None
    shown = lab.test[_shown(lab)]
    tensors = {"triggered": victim.trigger.stamp(shown.images)}
    if not isinstance(attack, Controlling):
        model = lab.victim(None, seed=SEED).model if getattr(attack, "needs_model", False) else None
        poisoned = attack.poison(lab.train, seed=SEED, model=model)
        some = poisoned.indices[:: max(1, len(poisoned.indices) // TRAINED)][:TRAINED]
        tensors |= {"poisoned": poisoned.data.images[some], "original": lab.train.images[some]}
    plain = lab.test[:MEASURED]
    plain = plain[victim.trigger.mapping.eligible(plain.labels)]
    return tensors, distances(plain.images, victim.trigger.stamp(plain.images))


def _shown(lab: Lab) -> Tensor:
    others = [k for k in range(len(lab.test.classes)) if k != lab.target][:TEST]
    return torch.stack([(lab.test.labels == k).nonzero()[1, 0] for k in others])


def _key(attack: Any, lab: Lab) -> str:
    code = provenance.fingerprint("bdlib.training", "bdlib.models", type(attack).__module__)
    data = [part.fingerprint() for part in (lab.train, lab.test)]
    return store.key(attack=repr(attack), data=data, scale=repr(lab.scale), code=code)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    # tensors, and what is known of each sheet by name; a damaged file counts as empty
    try:
        tensors, facts = files.read(path) or ({}, {"attacks": []})
    except files.DamagedFile:
        return {}, {}
    return tensors, {row["name"]: row for row in facts["attacks"]}


def missing(lab: Lab, path: Path = FILE) -> dict[str, Any]:
    """The attacks, by name, whose sheets are missing or stale."""
    _, rows = _read(path)
    return {n: a for n, a in attacks.every(lab.target).items() if rows.get(n, {}).get("key") != _key(a, lab)}


def make(lab: Lab, path: Path = FILE) -> int:
    """Make the sheets that are missing or stale, write after each. Returns how many were made."""
    todo, (tensors, rows) = missing(lab, path), _read(path)
    tensors["clean"] = lab.test[_shown(lab)].images.cpu()
    for name, attack in tqdm(todo.items(), desc="gallery"):
        pictures, numbers = sheet(attack, lab)
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{name}.")}
        tensors |= {f"{name}.{k}": v.cpu() for k, v in pictures.items()}
        numbers = {k: round(v, 3) for k, v in numbers.items()}
        rows[name] = {"name": name, "key": _key(attack, lab), "attack": repr(attack), **numbers}
        rows[name] |= provenance.run_info(lab.device)
        files.write(path, tensors, {"attacks": [rows[n] for n in attacks.every() if n in rows]})
    return len(todo)
