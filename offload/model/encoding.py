"""What is asked to be encoded of a plain checkpoint. Imports nothing."""

from dataclasses import dataclass

AS_IS = "as-is"
KINDS = ("int8", "int4", "nf4")
GROUP = 64
"""Numbers that share a scale, in four bits."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """What is encoded, and how.

    Attributes:
        layers, head: one of `KINDS`, or `AS_IS`.
    """

    layers: str
    head: str

    def __str__(self) -> str:
        if self.layers == AS_IS:
            return f"the head in {self.head}"
        said = f"{self.layers} weights, {'a scale a row' if self.layers == 'int8' else f'groups of {GROUP}'}"
        return said if self.head in (AS_IS, self.layers) else f"{said}; the head in {self.head}"
