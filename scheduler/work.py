"""What one pass of a model does, module by module: counted, not guessed from formulas of architectures."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from offload.storage.blocks import BlockKey


@dataclass(frozen=True, slots=True)
class Work:
    """What is computed between two points.

    Attributes:
        operations: tensor operations.
        products: (rows, FLOPs) of the products with weights, summed for each number of rows.
        other_flops: of everything else: attention, above all.
        traffic_bytes: read and written by everything but the products with weights.
    """

    operations: int = 0
    products: tuple[tuple[int, float], ...] = ()
    other_flops: float = 0.0
    traffic_bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        products = dict(self.products)
        for rows, flops in other.products:
            products[rows] = products.get(rows, 0.0) + flops
        return Work(
            self.operations + other.operations,
            tuple(sorted(products.items())),
            self.other_flops + other.other_flops,
            self.traffic_bytes + other.traffic_bytes,
        )

    def in_micro_batches(self, parts: int) -> "Work":
        """The same, computed by so many parts of the batch one after another."""
        products = ((max(1, rows // parts), flops) for rows, flops in self.products)
        return Work(self.operations * parts, tuple(products), self.other_flops, self.traffic_bytes)

    def of_tokens(self, share: float) -> "Work":
        """The same operations for that share of the tokens."""
        products = ((max(1, round(rows * share)), flops * share) for rows, flops in self.products)
        return Work(self.operations, tuple(products), self.other_flops * share, round(self.traffic_bytes * share))

    def shared_out(self, share: float) -> tuple["Work", "Work"]:
        """All but `share` of the products' outputs, and that share alone."""
        ours = tuple((rows, flops * (1 - share)) for rows, flops in self.products)
        theirs = tuple((rows, flops * share) for rows, flops in self.products)
        return replace(self, products=ours), Work(products=theirs)


@dataclass(frozen=True, slots=True)
class ModuleWork:
    """One call of a unit.

    Attributes:
        key: the unit's.
        uses: the blocks that it needs, its own and those that own tied weights.
        work: what it computes.
        result_bytes: what it returns, which crosses the link where it is computed elsewhere than the next one.
        gathered_rows: rows looked up where the unit is an embedding.
    """

    key: BlockKey
    uses: tuple[BlockKey, ...]
    work: Work
    result_bytes: int = 0
    gathered_rows: int = 0


@dataclass(frozen=True, slots=True)
class PassWork:
    """One call of the model.

    Attributes:
        phase: `prefill` or `decode`.
        batch_size: sequences.
        tokens: of each sequence in this pass.
        modules: in the order in which they were called.
        between: what is computed outside of all modules.
        temporary_bytes: the most that is held at once beside weights and KV cache.
        between_bytes: of that, what lies between the layers.
        context_tokens: of each sequence, what the KV cache holds before it, where that is known.
        exact: False where this was estimated from sizes, because the model could not be traced.
    """

    phase: str
    batch_size: int
    tokens: int
    modules: tuple[ModuleWork, ...]
    between: Work
    activation_bytes: int = 0
    between_bytes: int = 0
    exact: bool = True
    context_tokens: int = 0

    def in_chunks(self, chunk: int) -> tuple["PassWork", ...]:
        """The passes of the same prompt, `chunk` tokens at once.

        All alike: attention to what came before grows from chunk to chunk, and adds up to what it is in one pass.
        """
        tokens = (min(chunk, self.tokens - begun) for begun in range(0, self.tokens, chunk))
        return tuple(self._of_tokens(count) for count in tokens)

    def _of_tokens(self, tokens: int) -> "PassWork":
        share = tokens / self.tokens
        modules = tuple(
            replace(
                module,
                work=module.work.of_tokens(share),
                result_bytes=round(module.result_bytes * share),
                gathered_rows=-(-module.gathered_rows * tokens // self.tokens),
            )
            for module in self.modules
        )
        return replace(self, tokens=tokens, modules=modules, between=self.between.of_tokens(share))

    def in_micro_batches(self, parts: int, keys: frozenset[BlockKey]) -> "PassWork":
        """The same, with the batch split inside the modules of `keys`."""
        if parts == 1:
            return self
        modules = (
            replace(module, work=module.work.in_micro_batches(parts)) if module.key in keys else module
            for module in self.modules
        )
        return replace(self, modules=tuple(modules))


def total(items: Iterable[Work]) -> Work:
    result = Work()
    for item in items:
        result += item
    return result
