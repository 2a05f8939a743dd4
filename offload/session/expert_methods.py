"""What a session offers of the experts of a mixture."""

from typing import TYPE_CHECKING

from offload.scheduler.routing import Routing

if TYPE_CHECKING:
    from offload.session.opened import Opened


class ExpertMethods:
    """The methods of `Session` for experts."""

    @property
    def _parts(self) -> "Opened":
        raise NotImplementedError

    def routing(self) -> Routing:
        """Return which experts each token chose so far, layer by layer: empty unless experts are cached one by one."""
        from offload.moe.component import ExpertComponent

        experts = self._parts.component(ExpertComponent)
        if experts is None:
            return Routing("", 0, 0, ())
        if not experts.log.is_whole:
            self._parts.machine.notes.warn(
                "the run was too long to keep which experts all of its tokens chose: the later ones are left out"
            )
        return experts.log.routing()
