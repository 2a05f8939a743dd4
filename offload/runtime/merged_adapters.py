"""peft's merges, where the system does not tell that weights were written to."""

from torch import nn

from offload.storage.errors import SessionError


class MergedAdapters:
    """Raises once adapters were merged into weights, or taken out of the model: into what was loaded they were not."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._merged, self._adapted = self._found()

    def check(self) -> None:
        """Look at the model as it is now.

        Raises:
            SessionError: if adapters were merged, or are gone, since the last time.
        """
        merged, adapted = self._found()
        if merged - self._merged or self._adapted - adapted - self._merged:
            raise SessionError(
                "adapters were merged into the weights, or taken out of the model, and this system does not tell which weights "
                "were written to (/proc/self/pagemap): merge before entering the session (`offload merge`), or enter it anew"
            )
        self._merged, self._adapted = merged, adapted

    def _found(self) -> tuple[set[int], set[int]]:
        """Layers with adapters that are merged, and all that have some; of peft's BaseTunerLayer."""
        adapted = [module for module in self._model.modules() if hasattr(module, "merged_adapters")]
        return {id(module) for module in adapted if module.merged_adapters}, {id(module) for module in adapted}
