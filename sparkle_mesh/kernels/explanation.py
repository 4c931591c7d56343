"""Why a kernel runs where it runs, to be read."""

from __future__ import annotations

from dataclasses import dataclass

from sparkle_mesh.kernels.graph import Graph
from sparkle_mesh.kernels.placement import Choice


@dataclass(frozen=True, repr=False)
class Explanation:
    """The ways to run a kernel and what each is expected to take; ``str()`` of it is a table.

    Attributes
    ----------
    choices
        The one that is taken first.
    """

    kernel: str
    graph: Graph
    choices: tuple[Choice, ...]

    @property
    def chosen(self) -> Choice:
        """The one that is taken."""
        return self.choices[0]

    def __str__(self) -> str:
        inputs, outputs = (", ".join(map(str, types)) for types in (self.graph.inputs, self.graph.output_types))
        lines = [f"kernel {self.kernel}: {inputs} -> {outputs}"]
        for number, choice in enumerate(self.choices):
            mark = "->" if number == 0 else "  "
            lines.append(f"{mark} {choice.name:24} {choice.seconds * 1e3:10.3f} ms   {_reason(choice)}")
        if self.chosen.estimate is not None:
            lines.append(f"steps on {self.chosen.name}:")
            lines += [
                f"   {step.name:12} {step.seconds * 1e6:10.1f} us   {step.bound:10} "
                f"{step.moved_bytes / 1e6:10.2f} MB {step.flops / 1e6:10.2f} Mflop"
                for step in self.chosen.estimate.steps
            ]
        return "\n".join(lines)

    __repr__ = __str__


def _reason(choice: Choice) -> str:
    if choice.parts:
        parts = ", ".join(f"{part.device} {part.count}" for part in choice.parts)
        return f"shared: {parts}; who is done first takes from the other"
    found = choice.estimate
    assert found is not None
    reason = f"computes {found.compute_s * 1e3:.3f} ms, moves operands there {found.transfer_s * 1e3:.3f} ms"
    if found.correction != 1.0:
        reason += f"; such kernels took {found.correction:.2f} times what the roofline says"
    return reason
