"""The Kubernetes objects, as far as reading tells; each rule is shown a fault of its kind, too."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes_rules import kubernetes_problems
from manifest_rules import INFRA, configuration_of, documents, mappings, read

from amint_ray.contracts import UserError

KUBERNETES = sorted(f"kubernetes/{path.name}" for path in (INFRA / "kubernetes").glob("*.yaml"))


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_objects_have_what_they_need(name: str) -> None:
    assert kubernetes_problems(documents(read(name))) == []


GONE = object()
HEAD, GPU = "spec headGroupSpec template spec", "spec workerGroupSpecs 0 template spec"
GROUP, PROBE = "spec workerGroupSpecs 0", "spec template spec containers 0 readinessProbe"
KUBERNETES_FAULTS: list[tuple[str, int, str, object, str]] = [
    ("raycluster", 0, "apiVersion", "ray.io/v1alpha1", "apiVersion"),
    ("raycluster", 0, "metadata name", "Amint", "no name"),
    ("raycluster", 0, "spec headGroupSpec", GONE, "headGroupSpec"),
    ("raycluster", 0, "spec headGroupSpec rayStartParams", GONE, "rayStartParams"),
    ("raycluster", 0, "spec headGroupSpec rayStartParams num-cpus", 0, "string"),
    ("raycluster", 0, "spec headGroupSpec rayStartParams num-gpus", GONE, "GPUs that the head"),
    ("raycluster", 0, f"{HEAD} containers 0 env 1 value", "all", "without asking"),
    ("mlflow", 3, "spec template spec containers 0 env", [], "without asking"),
    ("raycluster", 0, "spec authOptions secret", "amint", "secret"),
    ("raycluster", 0, "spec autoscalerOptions version", "v3", "v3"),
    ("raycluster", 0, "spec enableInTreeAutoscaling", "yes", "boolean"),
    ("raycluster", 0, f"{GROUP} groupName", GONE, "groupName"),
    ("raycluster", 0, f"{GROUP} rayStartParams", GONE, "rayStartParams"),
    ("raycluster", 0, f"{GROUP} template", GONE, "template"),
    ("raycluster", 0, f"{GROUP} minReplicas", GONE, "minReplicas"),
    ("raycluster", 0, f"{GROUP} maxReplicas", GONE, "maxReplicas"),
    ("raycluster", 0, f"{GROUP} maxReplicas", 1, "≤"),
    ("raycluster", 0, f"{GROUP} minReplicas", 3, "≤"),
    ("raycluster", 0, f"{GROUP} maxReplicas", "many", "integer"),
    ("raycluster", 0, f"{HEAD} containers 0 image", GONE, "image"),
    ("raycluster", 0, f"{GPU} containers 0 name", GONE, "name"),
    ("raycluster", 0, f"{GPU} containers", [], "containers"),
    ("raycluster", 0, f"{GPU} containers 0 resources limits nvidia.com/gpu", GONE, "limits"),
    ("raycluster", 0, f"{GPU} containers 0 resources limits nvidia.com/gpu", "2", "limits"),
    ("raycluster", 0, f"{GPU} volumes 0 emptyDir medium", "", "not memory"),
    ("raycluster", 0, f"{GPU} volumes 0 name", "other", "no volume"),
    ("raycluster", 0, f"{GPU} containers 0 volumeMounts 0 mountPath", "/shm", "not memory"),
    ("raycluster", 0, f"{GPU} securityContext runAsNonRoot", False, "root"),
    ("raycluster", 0, f"{HEAD} restartPolicy", GONE, "restartPolicy"),
    ("rayjob", 0, "spec entrypoint", GONE, "entrypoint"),
    ("rayjob", 0, "spec rayClusterSpec", GONE, "rayClusterSpec"),
    ("rayjob", 0, "spec rayClusterSpec headGroupSpec", GONE, "headGroupSpec"),
    ("rayjob", 0, "spec backoffLimit", "two", "integer"),
    ("rayjob", 0, "spec submissionMode", "Http", "Http"),
    ("mlflow", 0, "spec selector app", "other", "selects nothing"),
    ("mlflow", 1, "spec serviceName", GONE, "serviceName"),
    ("mlflow", 1, "spec volumeClaimTemplates 0 metadata name", "data", "no volume"),
    ("mlflow", 1, PROBE, GONE, "readinessProbe"),
    ("mlflow", 3, "spec template metadata labels app", "other", "other pods"),
    ("mlflow", 3, "spec template spec containers 0 resources limits memory", GONE, "memory"),
]


@pytest.mark.parametrize(("name", "place", "path", "value", "told"), KUBERNETES_FAULTS)
def test_a_fault_in_a_kubernetes_file_is_found(
    name: str, place: int, path: str, value: object, told: str
) -> None:
    trees = documents(read(f"kubernetes/{name}.yaml"))
    *way, last = path.split()
    node = trees[place]
    for part in way:
        node = node[int(part) if isinstance(node, list) else part]
    if value is GONE:
        del node[last]
    else:
        node[last] = value
    found = kubernetes_problems(trees)
    assert any(told in problem for problem in found), found


def secrets_referred_to(tree: Any) -> set[tuple[str, str | None]]:
    """Name and, where one is named, key of the Secrets that a tree refers to."""
    found: set[tuple[str, str | None]] = set()
    for m in mappings(tree):
        if "secretKeyRef" in m:
            found.add((m["secretKeyRef"]["name"], m["secretKeyRef"]["key"]))
        if "secretRef" in m:
            found.add((m["secretRef"]["name"], None))
        if "secretName" in m:
            found.add((m["secretName"], "auth_token"))
    return found


def test_the_secrets_that_are_referred_to_are_those_of_the_example() -> None:
    example = documents(read("kubernetes/secrets.example.yaml"))
    there = {tree["metadata"]["name"]: tree["stringData"] for tree in example}
    referred = {r for name in KUBERNETES for r in secrets_referred_to(documents(read(name)))}
    assert {name for name, _ in referred} == {*there}
    assert all(key is None or key in there[name] for name, key in referred)


def test_gpus_autoscaling_and_token_of_the_ray_clusters() -> None:
    (cluster,), (job,) = (documents(read(f"kubernetes/{n}.yaml")) for n in ("raycluster", "rayjob"))
    spec = cluster["spec"]
    assert job["spec"]["rayClusterSpec"] == spec
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["authOptions"]["mode"] == "token"
    (group,) = spec["workerGroupSpecs"]
    assert group["minReplicas"] < group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == 1


def test_the_job_is_one_that_amint_takes_and_its_cluster_has_room_for() -> None:
    (job,) = documents(read("kubernetes/rayjob.yaml"))
    config = configuration_of(job["spec"]["entrypoint"])
    assert config.data.path.startswith("s3://BUCKET/")
    assert config.storage.path.startswith("s3://BUCKET/")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert config.cluster.workers == group["minReplicas"]
    assert config.cluster.cpus_per_worker < int(container["resources"]["limits"]["cpu"])


@pytest.mark.parametrize(
    "fault",
    ["imagenet1k_vit_bas", "imagenet1k_vit_base cluster.worker=2", "digits train.epochs=no"],
)
def test_a_job_that_amint_does_not_take_is_found(fault: str) -> None:
    with pytest.raises(UserError):
        configuration_of(f"amint train {fault}")
