"""configs/k8s/: what is in there fits Kubernetes' published schemas, and jaxserve as it is.

The schemas are those of the package kubernetes-validate, which `make test-ray` has; elsewhere those tests are skipped.
LeaderWorkerSet is not among them: its pod templates are checked as pods, and what is around those against LWS below,
which was written by hand from its documented API, leaderworkerset.x-k8s.io/v1, for the fields that may be used here.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cyclopts import UnknownOptionError

from jaxserve import cli
from jaxserve.config import EngineOptions, MeshShape, ServerOptions
from jaxserve.hosts.places import check_served, place
from jaxserve.metrics import EngineMetrics
from jaxserve.server import LAST_WORDS_S

yaml = pytest.importorskip("yaml", reason="the manifests are read by PyYAML")
FOLDER = Path(__file__).parent.parent / "configs" / "k8s"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
KUBERNETES = "1.33"

INTEGER = {"type": "integer", "minimum": 0}
LWS = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "leaderworkerset.x-k8s.io/v1"},
        "kind": {"const": "LeaderWorkerSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["leaderWorkerTemplate"],
            "additionalProperties": False,
            "properties": {
                "replicas": INTEGER,
                "startupPolicy": {"enum": ["LeaderCreated", "LeaderReady"]},
                "networkConfig": {
                    "type": "object",
                    "required": ["subdomainPolicy"],
                    "additionalProperties": False,
                    "properties": {"subdomainPolicy": {"enum": ["Shared", "UniquePerReplica"]}},
                },
                "rolloutStrategy": {
                    "type": "object",
                    "required": ["type"],
                    "additionalProperties": False,
                    "properties": {
                        "type": {"const": "RollingUpdate"},
                        "rollingUpdateConfiguration": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "partition": INTEGER,
                                "maxUnavailable": {"type": ["integer", "string"]},
                                "maxSurge": {"type": ["integer", "string"]},
                            },
                        },
                    },
                },
                "leaderWorkerTemplate": {
                    "type": "object",
                    "required": ["workerTemplate"],
                    "additionalProperties": False,
                    "properties": {
                        "size": INTEGER | {"minimum": 1},
                        "restartPolicy": {
                            "enum": ["Default", "None", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart"]
                        },
                        "workerTemplate": {"type": "object"},
                        "leaderTemplate": {"type": "object"},
                    },
                },
            },
        },
    },
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


MANIFESTS = [(name, d) for name in FILES for d in documents(name) if "kind" in d]


def templates(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates of a manifest."""
    for key, value in manifest.items():
        if isinstance(value, dict):
            if key.lower().endswith("template") and "spec" in value:
                yield value
            yield from templates(value)


PODS = [(f"{name} {d['kind']}", t) for name, d in MANIFESTS for t in templates(d)]


def flags(container: dict[str, Any]) -> dict[str, Any]:
    """What our command line makes of a container's arguments, by the names of the parameters."""
    _, bound, _ = cli.make_app().parse_args(container["args"], exit_on_error=False, print_error=False)
    return dict(bound.arguments)


def validate(manifest: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="`make test-ray` has the schemas of Kubernetes")
    import jsonschema

    if manifest["kind"] == "LeaderWorkerSet":
        jsonschema.validate(manifest, LWS)
        for template in templates(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template["metadata"], "spec": template["spec"]}
            kubernetes.validate(pod, KUBERNETES, strict=True)
    else:
        kubernetes.validate(manifest, KUBERNETES, strict=True)


def test_there_is_one_of_each() -> None:
    kinds = {d["kind"] for _, d in MANIFESTS}
    assert {"LeaderWorkerSet", "Job", "Deployment", "Service", "HorizontalPodAutoscaler"} <= kinds
    assert len(PODS) == 5


@pytest.mark.parametrize(("name", "manifest"), MANIFESTS, ids=lambda x: x if isinstance(x, str) else x["kind"])
def test_manifests_fit_the_schemas(name: str, manifest: dict[str, Any]) -> None:
    validate(manifest)


@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "livenessProbe", "httpGet", "pth"), "/livez"),
        ("Job", ("spec", "backoffLimit"), "many"),
        ("HorizontalPodAutoscaler", ("spec", "maxReplica"), 3),
        ("LeaderWorkerSet", ("spec", "leaderWorkerTemplate", "size"), 0),
        ("LeaderWorkerSet", ("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "container"), []),
    ],
)
def test_a_planted_mistake_is_found(kind: str, path: tuple, wrong: Any) -> None:
    schemas = pytest.importorskip("jsonschema", reason="`make test-ray` has the schemas of Kubernetes")
    manifest, *_ = [d for name in FILES for d in documents(name) if d.get("kind") == kind]
    place = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = wrong
    with pytest.raises(schemas.ValidationError):
        validate(manifest)


@pytest.mark.parametrize(("name", "template"), PODS, ids=lambda x: x if isinstance(x, str) else "")
def test_commands_are_ours_and_what_is_around_them_fits(name: str, template: dict[str, Any]) -> None:
    (container,) = template["spec"]["containers"]
    given = flags(container)
    assert container["image"].startswith("jaxserve:")
    grace_s = template["spec"]["terminationGracePeriodSeconds"]
    if container["args"][0] == "batch":
        (mount,) = container["volumeMounts"]
        assert Path(given["output"]).is_relative_to(mount["mountPath"])
        return
    server: ServerOptions = given["server"]
    assert server.host == "0.0.0.0"
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace_s > pause_s + server.shutdown_timeout + LAST_WORDS_S
    if template["metadata"]["labels"].get("role") == "follower":
        assert "ports" not in container, "its leader serves"
    else:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports == {"http": server.port, "grpc": server.port + 1}
        assert template["metadata"]["annotations"]["prometheus.io/port"] == str(server.port)
        for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/livez")):
            assert container[probe]["httpGet"] == {"path": path, "port": "http"}
    chips = container["resources"]["limits"].get("google.com/tpu")
    if chips is not None:
        topology = template["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        rows, columns = map(int, topology.split("x"))
        assert MeshShape.parse(given["device"].mesh).devices == rows * columns
        (group,) = [d for n, d in MANIFESTS if f"{n} {d['kind']}" == name]
        size = group["spec"]["leaderWorkerTemplate"]["size"]
        assert size * int(chips) == rows * columns
        assert ("hosts" in given) == (size > 1)


def test_hosts_of_a_group_run_the_same_command() -> None:
    (group,) = [d for name, d in MANIFESTS if name.startswith("tpu-multihost") and d["kind"] == "LeaderWorkerSet"]
    leader, follower = (t["spec"]["containers"][0] for t in templates(group))
    for same in ("image", "args", "env", "resources", "lifecycle"):
        assert leader[same] == follower[same]
    given = flags(leader)
    environ = {"LWS_LEADER_ADDRESS": "jaxserve-tpu-16-0.jaxserve-tpu-16.default", "LWS_GROUP_SIZE": "4"}
    secret = replace(given["hosts"], host_secret="s")
    for index in range(4):
        here = place(secret, environ | {"LWS_WORKER_INDEX": str(index)})
        assert (here.index, here.count) == (index, 4) and here.coordinator.startswith("jaxserve-tpu-16-0.")
        check_served(EngineOptions(device=given["device"], place=here), given["server"])


def test_a_flag_that_is_none_is_refused() -> None:
    with pytest.raises(UnknownOptionError, match="max-num-seq"):
        flags({"args": ["serve", "--max-num-seq=3"]})


def test_the_autoscaler_reads_a_metric_of_ours() -> None:
    (rule,) = documents("prometheus-adapter.yaml")[0]["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    assert f"\n{series}{{" in EngineMetrics("model").text().decode()
    (autoscaler,) = [d for _, d in MANIFESTS if d["kind"] == "HorizontalPodAutoscaler"]
    (metric,) = autoscaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    target = autoscaler["spec"]["scaleTargetRef"]
    (deployment,) = [d for _, d in MANIFESTS if d["kind"] == target["kind"]]
    assert (target["name"], target["apiVersion"]) == (deployment["metadata"]["name"], deployment["apiVersion"])
    assert "replicas" not in deployment["spec"]  # or each roll-out would undo what the autoscaler did


def test_services_find_their_pods() -> None:
    for name, service in MANIFESTS:
        if service["kind"] == "Service":
            pods = [t for n, d in MANIFESTS if n == name for t in templates(d)]
            selector = service["spec"]["selector"].items()
            (pod,) = [t for t in pods if selector <= t["metadata"]["labels"].items()]
            names = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
