"""The container image: built once for given contents, and identified by its tag."""

import dataclasses

from launcher.commands import Commands
from launcher.console import Console
from launcher.errors import CommandFailed
from launcher.gcloud import require
from launcher.options import ImageOptions
from launcher.source import Source

DOCKERFILE = "infra/Dockerfile"


@dataclasses.dataclass(frozen=True)
class Registry:
    """The Artifact Registry of a project in one region."""

    region: str
    project: str

    @property
    def host(self) -> str:
        """Host name of the registry."""
        return f"{self.region}-docker.pkg.dev"

    def image_uri(self, options: ImageOptions, source: Source) -> str:
        """Return the URI of the image of these sources."""
        # The project of an organisation may be named `example.com:project`.
        project = self.project.replace(":", "/")
        return f"{self.host}/{project}/{options.repository}/{options.name}:{source.tag}"


def ensure_image(
    registry: Registry, options: ImageOptions, source: Source, commands: Commands, console: Console
) -> str:
    """Build and push the image of these sources unless it exists. Return its URI."""
    uri = registry.image_uri(options, source)
    find = ["gcloud", "artifacts", "docker", "images", "describe", uri, "--format", "value(image_summary.digest)"]
    if commands.run([*find, "--quiet"]).code == 0:
        console.say(f"The image of these sources already exists: {uri}")
        return uri
    console.say(f"Building the image {uri}")
    require(commands.run(["gcloud", "auth", "configure-docker", registry.host, "--quiet"]))
    # TPU hosts are x86, whatever the architecture of this machine.
    build = ["docker", "build", "--platform", "linux/amd64", "--file", DOCKERFILE, "--tag", uri, "-"]
    require(commands.run(build, source.archive, f"(a tar file of {len(source.files)} tracked files)"))
    pushed = commands.run(["docker", "push", uri])
    if pushed.code != 0:
        advice = (
            f"Does the repository exist? `gcloud artifacts repositories create {options.repository} "
            f"--repository-format docker --location {registry.region} --project {registry.project}`"
        )
        raise CommandFailed(pushed.argv, pushed.code, pushed.err, advice)
    return uri
