"""What the Kubernetes objects of infra/ must keep to: a line for every breach."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jsonschema
from manifest_rules import mappings


def _closed(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required.split(),
        "additionalProperties": False,
        "properties": properties,
    }


_ANY: dict[str, Any] = {}
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_BOOL = {"type": "boolean"}
_COUNT = {"type": "integer", "minimum": 0}
_RESOURCES = _closed("", requests=_ANY, limits=_ANY)
_POD_TEMPLATE = {
    "type": "object",
    "required": ["spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["containers"],
            "properties": {
                "containers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "image", "resources"],
                        "properties": {"name": _TEXT, "image": _TEXT, "resources": _RESOURCES},
                    },
                }
            },
        }
    },
}
# Fields of KubeRay's API reference for ray.io/v1, as of its release 1.7; what its Go types do not
# call optional is required, and so are rayStartParams, which older releases want.
_HEAD = {"rayStartParams": _TEXTS, "template": _POD_TEMPLATE, "serviceType": _TEXT}
_HEAD |= {"resources": _TEXTS, "labels": _TEXTS, "headService": _ANY}
_HEAD |= {"enableIngress": _BOOL, "ingressOptions": _ANY}
_WORKERS = {"groupName": _TEXT, "rayStartParams": _TEXTS, "template": _POD_TEMPLATE}
_WORKERS |= {"replicas": _COUNT, "minReplicas": _COUNT, "maxReplicas": _COUNT, "numOfHosts": _COUNT}
_WORKERS |= {"idleTimeoutSeconds": _COUNT, "priority": _COUNT, "suspend": _BOOL}
_WORKERS |= {"resources": _TEXTS, "labels": _TEXTS, "scaleStrategy": _ANY}
_AUTOSCALER = {"idleTimeoutSeconds": _COUNT, "resources": _RESOURCES, "image": _TEXT}
_AUTOSCALER |= {"upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]}}
_AUTOSCALER |= {"version": {"enum": ["v1", "v2"]}, "imagePullPolicy": _TEXT}
_AUTOSCALER |= dict.fromkeys(["securityContext", "env", "envFrom", "volumeMounts"], _ANY)
_AUTOSCALER |= dict.fromkeys(["command", "args"], _ANY)
_AUTH = {"mode": {"enum": ["token", "disabled"]}, "secretName": _TEXT, "enableK8sTokenAuth": _BOOL}
_CLUSTER = {"rayVersion": _TEXT, "enableInTreeAutoscaling": _BOOL, "suspend": _BOOL}
_CLUSTER |= {"authOptions": _closed("", **_AUTH)}
_CLUSTER |= {"autoscalerOptions": _closed("", **_AUTOSCALER)}
_CLUSTER |= {"headGroupSpec": _closed("rayStartParams template", **_HEAD)}
_CLUSTER |= {
    "workerGroupSpecs": {
        "type": "array",
        "items": _closed("groupName minReplicas maxReplicas rayStartParams template", **_WORKERS),
    }
}
_CLUSTER |= dict.fromkeys(["upgradeStrategy", "managedBy", "headServiceAnnotations"], _ANY)
_CLUSTER |= dict.fromkeys(["gcsFaultToleranceOptions", "historyServerOptions"], _ANY)
_CLUSTER |= dict.fromkeys(["networkPolicy", "tlsOptions"], _ANY)
_RAY_CLUSTER = _closed("headGroupSpec rayVersion", **_CLUSTER)
_JOB = {"entrypoint": _TEXT, "rayClusterSpec": _RAY_CLUSTER, "runtimeEnvYAML": _TEXT}
_JOB |= {"shutdownAfterJobFinishes": _BOOL, "suspend": _BOOL, "jobId": _TEXT}
_JOB |= {"submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]}}
_JOB |= dict.fromkeys(["backoffLimit", "ttlSecondsAfterFinished", "activeDeadlineSeconds"], _COUNT)
_JOB |= dict.fromkeys(["preRunningDeadlineSeconds", "entrypointNumCpus"], _COUNT)
_JOB |= dict.fromkeys(["entrypointNumGpus", "entrypointResources", "metadata"], _ANY)
_JOB |= dict.fromkeys(["submitterPodTemplate", "submitterConfig", "clusterSelector"], _ANY)
_JOB |= dict.fromkeys(["managedBy", "deletionStrategy"], _ANY)
_VISIBLE = "NVIDIA_VISIBLE_DEVICES"
_WORKLOAD = {
    "type": "object",
    "required": ["selector", "template"],
    "properties": {"template": _POD_TEMPLATE},
}
_KINDS = {
    "RayCluster": ("ray.io/v1", _RAY_CLUSTER),
    "RayJob": ("ray.io/v1", _closed("entrypoint rayClusterSpec", **_JOB)),
    "Deployment": ("apps/v1", _WORKLOAD),
    "StatefulSet": ("apps/v1", _WORKLOAD | {"required": ["selector", "template", "serviceName"]}),
    "Service": ("v1", {"type": "object", "required": ["selector", "ports"]}),
    "Secret": ("v1", _ANY),
}


def kubernetes_problems(trees: list[dict[str, Any]]) -> list[str]:
    """What is wrong with a file's objects, each by itself and together."""
    found = []
    for tree in trees:
        kind, name = tree.get("kind", ""), tree.get("metadata", {}).get("name")
        where = f"{kind} {name}"
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", str(name)):
            found.append(f"{where}: no name that Kubernetes takes")
        version, schema = _KINDS.get(kind, ("", _ANY))
        if tree.get("apiVersion") != version:
            found.append(f"{where}: apiVersion is {tree.get('apiVersion')}")
        for error in jsonschema.Draft202012Validator(schema).iter_errors(tree.get("spec", {})):
            path = ".".join(str(part) for part in error.absolute_path)
            found.append(f"{where}: {path}: {error.message[:100]}")
        claims = tree.get("spec", {}).get("volumeClaimTemplates", [])
        for spec in mappings(tree):
            if "containers" in spec:
                found += [f"{where}: {problem}" for problem in _pod_problems(spec, claims)]
            head = spec.get("headGroupSpec", {}).get("rayStartParams", {"num-gpus": "0"})
            if head.get("num-gpus") != "0":
                found.append(f"{where}: Ray may count GPUs that the head does not have")
            if "groupName" in spec and not _in_order(spec):
                found.append(f"{where}: {spec['groupName']}: minReplicas ≤ replicas ≤ maxReplicas")
    return [*found, *_selector_problems(trees)]


def _in_order(group: dict[str, Any]) -> bool:
    numbers = [group.get(key) for key in ("minReplicas", "replicas", "maxReplicas")]
    return numbers == sorted(number for number in numbers if isinstance(number, int))


def _pod_problems(pod: dict[str, Any], claims: list[dict[str, Any]]) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    known = {*volumes, *(claim["metadata"]["name"] for claim in claims)}
    if pod.get("securityContext", {}).get("runAsNonRoot") is not True:
        yield "may run as root"
    for container in pod["containers"]:
        name = container.get("name")
        mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
        yield from (f"{name}: there is no volume {volume}" for volume in {*mounts.values()} - known)
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        if "memory" not in limits:
            yield f"{name}: no limit to its memory"
        if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
            yield f"{name}: GPUs are asked for in the limits, and then as many in the requests"
        seen = [m["value"] for m in container.get("env", []) if m["name"] == _VISIBLE]
        asks = "cuda" not in str(container.get("image")) or "nvidia.com/gpu" in limits
        if not asks and seen != ["void"]:
            yield f"{name}: sees the GPUs of its node without asking for one"
        if str(name).startswith("ray-"):
            shared = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
            if shared.get("medium") != "Memory":
                yield f"{name}: /dev/shm is not memory"
            if pod.get("restartPolicy") != "Never":
                yield f"{name}: the autoscaler needs restartPolicy: Never"
        elif "readinessProbe" not in container:
            yield f"{name}: no readinessProbe"


def _selector_problems(trees: list[dict[str, Any]]) -> Iterator[str]:
    labels = []
    for tree in trees:
        spec = tree.get("spec", {})
        if tree.get("kind") in ("Deployment", "StatefulSet"):
            own = spec.get("template", {}).get("metadata", {}).get("labels", {})
            labels.append(own)
            if not spec.get("selector", {}).get("matchLabels", {"?": ""}).items() <= own.items():
                yield f"{tree['metadata']['name']}: selects other pods than it makes"
    for tree in trees:
        if tree.get("kind") == "Service":
            wanted = tree["spec"].get("selector", {}).items()
            if not any(wanted <= own.items() for own in labels):
                yield f"Service {tree['metadata']['name']}: selects nothing"
