"""A loop whose loss or weights stop being numbers is stopped, and what it was learning is set back.

watch = Watch("ANP masks", masks)          # {name: tensor}, changed in place by the loop
watch(loss)                                # after each step; raises Diverged
watch.look()                               # once more when the loop is over
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Diverged(ValueError):
    """A loss or a learnt tensor holds NaN or infinity.

    Args:
        message: says what, at which step, and what to change.
        step: the first step that is known to be bad, counted from 1.
        state: ``{name: tensor}`` as it last was good: for `Module.load_state_dict` or, if the loop learns masks, for
            `bdlib.neurons.prune`.
        good: the number of steps behind that state.
    """

    def __init__(self, message: str, step: int, state: dict[str, Tensor], good: int) -> None:
        super().__init__(message)
        self.step, self.state, self.good = step, state, good


class Watch:
    """Looks after the tensors that a loop changes in place.

    A look waits for the device, so there is one in `every` steps; the step at which a loss went bad is found exactly.

    Args:
        what: name of the loop, for the message.
        tensors: ``{name: tensor}``, e.g. a state_dict.
        advice: what to change, for the message.
        every: steps from one look to the next.
    """

    def __init__(self, what: str, tensors: Mapping[str, Tensor], advice: str = "lower lr", every: int = 50) -> None:
        self.what, self.tensors, self.advice, self.every = what, dict(tensors), advice, every
        self.losses: list[Tensor] = []
        self.done = 0  # steps behind the good state
        self.good = self._copy()

    def _copy(self) -> dict[str, Tensor]:
        return {n: t.detach().clone() for n, t in self.tensors.items()}

    def __call__(self, loss: Tensor) -> None:
        """Take note of the loss of a step that has been made."""
        self.losses.append(loss.detach())
        if len(self.losses) >= self.every:
            self.look()

    @torch.no_grad()
    def look(self) -> None:
        """Keep a copy if all is finite, else set the tensors back to the last one.

        Raises:
            Diverged: with that copy.
        """
        if not self.losses:
            return
        bad = (~torch.stack(self.losses).isfinite()).tolist()
        finite = torch.stack([t.isfinite().all() for t in self.tensors.values()])
        if not any(bad) and bool(finite.all()):
            self.done, self.losses, self.good = self.done + len(bad), [], self._copy()
            return
        first = bad.index(True) if any(bad) else len(bad) - 1
        reason = f"the loss is {float(self.losses[first])}"
        if not any(bad):
            reason = f"{list(self.tensors)[finite.tolist().index(False)]} holds NaN or infinity"
        for name, tensor in self.tensors.items():
            tensor.copy_(self.good[name])
        step = self.done + first + 1
        message = f"{self.what} diverged at step {step}: {reason}; {self.advice}"
        raise Diverged(f"{message}. The state after step {self.done} is in `.state`", step, self.good, self.done)
