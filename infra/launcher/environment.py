"""The environment variables of a job, and which of them are secrets."""

import re
from collections.abc import Mapping, Sequence

from launcher.console import Console
from launcher.errors import BadUsage

DEFAULTS = {
    # JAX's default port, 8482, is blocked by the firewalls of some organisations.
    "JAX_COORDINATOR_PORT": "8476",
    # Above 0, the TPU driver does not print the line that says why it halted.
    "TPU_MIN_LOG_LEVEL": "0",
    "TPU_STDERR_LOG_LEVEL": "0",
    "PYTHONUNBUFFERED": "1",
}
# Forwarded to the job if they are set on this machine.
PASSED_ON = ("HF_TOKEN", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_MODE", "WANDB_PROJECT")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether a variable of that name holds a secret."""
    return _SECRET.search(name) is not None


def job_environment(given: Sequence[Sequence[str]], own: Mapping[str, str], console: Console) -> dict[str, str]:
    """Return the job's variables: the defaults, the forwarded ones and the given ones. Later ones take precedence.

    Raises:
        BadUsage: as `given_variables`.
    """
    passed_on = {name: own[name] for name in PASSED_ON if name in own}
    return {**DEFAULTS, **passed_on, **given_variables(given, own, console)}


def given_variables(given: Sequence[Sequence[str]], own: Mapping[str, str], console: Console) -> dict[str, str]:
    """Return the variables given as `-e NAME VALUE`, `-e NAME=VALUE` or `-e NAME`.

    Raises:
        BadUsage: a variable to forward is not set, or `-e` has more than two words.
    """
    variables: dict[str, str] = {}
    for words in given:
        if len(words) == 1 and "=" in words[0]:
            words = words[0].split("=", 1)
        if len(words) == 2:
            if is_secret(words[0]):
                console.complain(
                    f"Warning: `-e {words[0]} VALUE` shows a secret to everyone who can list this machine's processes; "
                    f"export it and write `-e {words[0]}`."
                )
            variables[words[0]] = words[1]
        elif len(words) == 1 and words[0] in own:
            variables[words[0]] = own[words[0]]
        elif len(words) == 1:
            raise BadUsage(f"-e {words[0]} forwards your own {words[0]}, which is not set; export it, or give a value")
        else:
            raise BadUsage(f"-e {' '.join(words)}: write -e NAME VALUE, -e NAME=VALUE, or -e NAME to forward your own")
    return variables
