"""A healthy TPU under a given name: the one that is there, or a new one."""

from launcher.clock import Clock
from launcher.console import Console
from launcher.errors import BadUsage, TpuGone, TpuLost
from launcher.gcloud import Gcloud, Node, QueuedResource
from launcher.options import INTERRUPTIBLE, Timing, TpuOptions

# What a request or a TPU comes to without anybody's doing; it never comes back.
_ENDED_REQUESTS = ("FAILED", "SUSPENDED")
_ENDING_REQUESTS = ("SUSPENDING", "DELETING")
_WAITING_REQUESTS = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES")
_TAKEN_NODES = ("PREEMPTED", "TERMINATED")
_STOPPED_NODES = ("STOPPED", "STOPPING")


class Provisioner:
    """Brings a TPU to the state in which a job can start, and says why one was lost."""

    def __init__(self, gcloud: Gcloud, tpu: TpuOptions, timing: Timing, clock: Clock, console: Console) -> None:
        self._gcloud = gcloud
        self._tpu = tpu
        self._timing = timing
        self._clock = clock
        self._console = console

    def acquire(self) -> Node:
        """Waits as long as the queue lasts, and so long as `timing.start` for what comes after it.

        Raises:
            TpuLost: the request failed, or the TPU was taken or never came up.
            TpuGone: somebody deleted or stopped it.
            BadUsage: a TPU of that name is of another type.
        """
        request, node = self._settled()
        if request is None and node is None:
            self._create()
        elif self._is_over(request, node):
            self._console.say(
                f"{self._name} is left from before ({_told(request, node)}): it is deleted and made anew."
            )
            self._delete(request)
            self._create()
        elif node is not None and node.is_healthy:
            self._require_type(node)
            self._console.say(f"{self._name} is there and healthy: it is used as it is.")
            return node
        return self._wait()

    def why_lost(self) -> str:
        """Why a job may have ended without being at fault; "" if its TPU is well.

        Raises:
            TpuGone: somebody deleted or stopped the TPU.
        """
        deadline = self._clock.now() + self._timing.preemption_notice
        while True:
            request, node = self._look()
            self._refuse_gone(request, node)
            is_ending = request is not None and request.state in _ENDING_REQUESTS
            if self._is_over(request, node) or is_ending or not (node and node.is_healthy):
                return _told(request, node)
            if self._tpu.capacity not in INTERRUPTIBLE or self._clock.now() >= deadline:
                return ""
            self._clock.sleep(self._timing.poll)

    def discard(self) -> None:
        """Removes what a new attempt could not use: one that is stuck or ill costs, and would only be waited for."""
        request, node = self._settled()
        if (request is not None or node is not None) and not (node is not None and node.is_healthy):
            self._console.say(f"{self._name} is not to be used ({_told(request, node)}): it is deleted.")
            self._delete(request)

    def delete(self) -> bool:
        """Removes the request and the TPU; False if there was neither."""
        request, node = self._look()
        if request is None and node is None:
            return False
        self._delete(request)
        return True

    @property
    def _name(self) -> str:
        return f"TPU {self._tpu.place.tpu_name}"

    def _look(self) -> tuple[QueuedResource | None, Node | None]:
        return self._gcloud.queued_resource(), self._gcloud.node()

    def _is_over(self, request: QueuedResource | None, node: Node | None) -> bool:
        is_over = request is not None and request.state in _ENDED_REQUESTS
        return is_over or (node is not None and node.state in _TAKEN_NODES)

    def _create(self) -> None:
        tpu = self._tpu
        self._console.say(f"{self._name}: asking for {tpu.tpu_type.name}, {tpu.capacity}, in {tpu.place.zone}.")
        self._gcloud.create(tpu)

    def _delete(self, request: QueuedResource | None) -> None:
        if request is None:
            self._gcloud.delete_node()
        else:
            self._gcloud.delete_queued_resource()

    def _wait(self) -> Node:
        told = ""
        deadline = float("inf")
        while True:
            request, node = self._look()
            if node is not None and node.is_healthy and (request is None or request.state == "ACTIVE"):
                self._require_type(node)
                self._console.say(f"{self._name} is ready: {node.hosts} hosts.")
                return node
            self._refuse_gone(request, node)
            if self._is_over(request, node):
                raise TpuLost(f"{self._name} was not to be had: {_told(request, node)}")
            if told != (told := _told(request, node)):
                self._console.say(f"{self._name}: {told}")
            if request is not None and request.state in _WAITING_REQUESTS:
                deadline = float("inf")
            elif deadline == float("inf"):
                deadline = self._clock.now() + self._timing.start
            if self._clock.now() >= deadline:
                raise TpuLost(f"{self._name} was not ready {self._timing.start:.0f} s after it left the queue ({told})")
            self._clock.sleep(self._timing.poll)

    def _settled(self) -> tuple[QueuedResource | None, Node | None]:
        """What is there once nothing is on its way out."""
        request, node = self._look()
        if request is not None and request.state in _ENDING_REQUESTS:
            self._console.say(f"{self._name} is {request.state} from before: waiting for the end of that.")
        while request is not None and request.state in _ENDING_REQUESTS:
            self._clock.sleep(self._timing.poll)
            request, node = self._look()
        return request, node

    def _refuse_gone(self, request: QueuedResource | None, node: Node | None) -> None:
        if (request is None and node is None) or (request is not None and request.state == "DELETING"):
            raise TpuGone(f"{self._name} was deleted by somebody. Nothing is started anew.")
        if node is not None and node.state in _STOPPED_NODES:
            raise TpuGone(
                f"{self._name} is {node.state}: somebody stopped it. Start it (`gcloud compute tpus tpu-vm start`) or "
                f"delete it: python infra/launch.py clean {self._tpu.place.flags}"
            )

    def _require_type(self, node: Node) -> None:
        wanted = self._tpu.tpu_type.name
        if node.accelerator_type != wanted:
            raise BadUsage(
                f"{self._name} is a {node.accelerator_type}, and --tpu_type asks for {wanted}; take another name, or "
                f"delete it first: python infra/launch.py clean {self._tpu.place.flags}"
            )


def _told(request: QueuedResource | None, node: Node | None) -> str:
    parts: list[str] = []
    if request is not None:
        parts.append(f"request {request.state}" + (f", {request.reason}" if request.reason else ""))
    if node is not None:
        healthy = node.health in ("", "HEALTH_UNSPECIFIED", "HEALTHY")
        parts.append(f"TPU {node.state}" + ("" if healthy else f", {node.health}"))
    return "; ".join(parts) or "nothing there"
