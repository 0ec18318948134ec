"""Provisioning of a healthy TPU under a given name: the existing one, or a new one."""

from launcher.clock import Clock
from launcher.console import Console
from launcher.errors import BadUsage, TpuGone, TpuLost
from launcher.gcloud import Gcloud, Node, QueuedResource
from launcher.options import INTERRUPTIBLE, PollTiming, TpuOptions

# A request in one of these states, or a TPU in one of _LOST_NODES, ended without user action and never recovers.
_ENDED_REQUESTS = ("FAILED", "SUSPENDED")
_ENDING_REQUESTS = ("SUSPENDING", "DELETING")
_WAITING_REQUESTS = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES")
_LOST_NODES = ("PREEMPTED", "TERMINATED")
_STOPPED_NODES = ("STOPPED", "STOPPING")


class Provisioner:
    """Brings a TPU into a state in which a job can start, and reports why a TPU was lost."""

    def __init__(self, gcloud: Gcloud, tpu: TpuOptions, timing: PollTiming, clock: Clock, console: Console) -> None:
        self._gcloud = gcloud
        self._tpu = tpu
        self._timing = timing
        self._clock = clock
        self._console = console

    def acquire(self) -> Node:
        """Return a healthy TPU, requesting one if needed.

        The wait in the queue has no limit. After the queue, the TPU has `timing.start` seconds to become ready.

        Raises:
            TpuLost: the request failed, or the TPU was preempted or never became ready.
            TpuGone: someone deleted or stopped the TPU.
            BadUsage: a TPU of that name has another type.
        """
        request, node = self._wait_until_settled()
        if request is None and node is None:
            self._create()
        elif self._is_over(request, node):
            self._console.say(
                f"{self._name} is left over from an earlier launch ({_status_text(request, node)}): "
                "deleting and re-creating it."
            )
            self._delete(request)
            self._create()
        elif node is not None and node.is_healthy:
            self._require_type(node)
            self._console.say(f"{self._name} exists and is healthy: using it as it is.")
            return node
        return self._wait()

    def why_lost(self) -> str:
        """Return why a job may have failed through no fault of its own; "" if its TPU is healthy.

        Raises:
            TpuGone: someone deleted or stopped the TPU.
        """
        deadline = self._clock.now() + self._timing.preemption_notice
        while True:
            request, node = self._query()
            self._raise_if_gone(request, node)
            is_ending = request is not None and request.state in _ENDING_REQUESTS
            if self._is_over(request, node) or is_ending or not (node and node.is_healthy):
                return _status_text(request, node)
            if self._tpu.capacity not in INTERRUPTIBLE or self._clock.now() >= deadline:
                return ""
            self._clock.sleep(self._timing.poll)

    def discard(self) -> None:
        """Delete a request or a TPU that a new attempt cannot use: a stuck or unhealthy TPU is billed for nothing."""
        request, node = self._wait_until_settled()
        if (request is not None or node is not None) and not (node is not None and node.is_healthy):
            self._console.say(f"{self._name} is unusable ({_status_text(request, node)}): deleting it.")
            self._delete(request)

    def delete(self) -> bool:
        """Delete the request and the TPU. Return False if neither existed."""
        request, node = self._query()
        if request is None and node is None:
            return False
        self._delete(request)
        return True

    @property
    def _name(self) -> str:
        return f"TPU {self._tpu.place.tpu_name}"

    def _query(self) -> tuple[QueuedResource | None, Node | None]:
        return self._gcloud.queued_resource(), self._gcloud.node()

    def _is_over(self, request: QueuedResource | None, node: Node | None) -> bool:
        is_over = request is not None and request.state in _ENDED_REQUESTS
        return is_over or (node is not None and node.state in _LOST_NODES)

    def _create(self) -> None:
        tpu = self._tpu
        self._console.say(f"{self._name}: requesting {tpu.tpu_type.name}, {tpu.capacity}, in {tpu.place.zone}.")
        self._gcloud.create(tpu)

    def _delete(self, request: QueuedResource | None) -> None:
        if request is None:
            self._gcloud.delete_node()
        else:
            self._gcloud.delete_queued_resource()

    def _wait(self) -> Node:
        last_printed = ""
        deadline = float("inf")
        while True:
            request, node = self._query()
            if node is not None and node.is_healthy and (request is None or request.state == "ACTIVE"):
                self._require_type(node)
                self._console.say(f"{self._name} is ready: {node.hosts} hosts.")
                return node
            self._raise_if_gone(request, node)
            if self._is_over(request, node):
                raise TpuLost(f"{self._name} could not be obtained: {_status_text(request, node)}")
            if last_printed != (last_printed := _status_text(request, node)):
                self._console.say(f"{self._name}: {last_printed}")
            if request is not None and request.state in _WAITING_REQUESTS:
                deadline = float("inf")
            elif deadline == float("inf"):
                deadline = self._clock.now() + self._timing.start
            if self._clock.now() >= deadline:
                raise TpuLost(
                    f"{self._name} was not ready {self._timing.start:.0f} s after it left the queue ({last_printed})"
                )
            self._clock.sleep(self._timing.poll)

    def _wait_until_settled(self) -> tuple[QueuedResource | None, Node | None]:
        """Return the request and the TPU, after any suspension or deletion in progress has finished."""
        request, node = self._query()
        if request is not None and request.state in _ENDING_REQUESTS:
            self._console.say(f"{self._name} is still {request.state}: waiting until that has finished.")
        while request is not None and request.state in _ENDING_REQUESTS:
            self._clock.sleep(self._timing.poll)
            request, node = self._query()
        return request, node

    def _raise_if_gone(self, request: QueuedResource | None, node: Node | None) -> None:
        if (request is None and node is None) or (request is not None and request.state == "DELETING"):
            raise TpuGone(f"{self._name} was deleted by someone. It is not re-created.")
        if node is not None and node.state in _STOPPED_NODES:
            raise TpuGone(
                f"{self._name} is {node.state}: someone stopped it. Start it (`gcloud compute tpus tpu-vm start`) or "
                f"delete it: {self._tpu.place.command_line('clean')}"
            )

    def _require_type(self, node: Node) -> None:
        wanted = self._tpu.tpu_type.name
        if node.accelerator_type != wanted:
            raise BadUsage(
                f"{self._name} is a {node.accelerator_type}, and --tpu_type requests {wanted}; use another name, or "
                f"delete it first: {self._tpu.place.command_line('clean')}"
            )


def _status_text(request: QueuedResource | None, node: Node | None) -> str:
    parts: list[str] = []
    if request is not None:
        parts.append(f"request {request.state}" + (f", {request.reason}" if request.reason else ""))
    if node is not None:
        healthy = node.health in ("", "HEALTH_UNSPECIFIED", "HEALTHY")
        parts.append(f"TPU {node.state}" + ("" if healthy else f", {node.health}"))
    return "; ".join(parts) or "not found"
