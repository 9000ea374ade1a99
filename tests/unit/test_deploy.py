"""deploy/, by KubeRay's published fields, systemd's own check, and our command line."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from jobs.cli import app
from jobs.config import ExtractConfig, ExtractOptions, load_config
from jobs.submission import prepare
from jobs.timetable import Timetable
from tests.builders import REPOSITORY

KUBERAY = REPOSITORY / "deploy" / "kuberay"
SYSTEMD = REPOSITORY / "deploy" / "systemd"
# Fields that the files use, and their types in the CRDs of KubeRay v1.7.0 (commit 59d663ae of
# ray-project/kuberay, ray-operator/config/crd/bases/), looked up on 2026-11-24. `[]` is an entry
# of a list, `*` a key that the user chooses.
POD = {
    "serviceAccountName": "string",
    "securityContext.fsGroup": "integer",
    "nodeSelector.*": "string",
    "tolerations[].key": "string",
    "tolerations[].operator": "string",
    "tolerations[].effect": "string",
    "containers[].name": "string",
    "containers[].image": "string",
    "containers[].ports[].name": "string",
    "containers[].ports[].containerPort": "integer",
    "containers[].resources.requests.*": "int-or-string",
    "containers[].resources.limits.*": "int-or-string",
    "containers[].volumeMounts[].name": "string",
    "containers[].volumeMounts[].mountPath": "string",
    "volumes[].name": "string",
    "volumes[].emptyDir.medium": "string",
    "volumes[].ephemeral.volumeClaimTemplate.spec.accessModes[]": "string",
    "volumes[].ephemeral.volumeClaimTemplate.spec.resources.requests.*": "int-or-string",
}
RAY_CLUSTER = {
    "spec.rayVersion": "string",
    "spec.authOptions.mode": "string",
    "spec.authOptions.secretName": "string",
    "spec.enableInTreeAutoscaling": "boolean",
    "spec.autoscalerOptions.idleTimeoutSeconds": "integer",
    "spec.autoscalerOptions.upscalingMode": "string",
    "spec.headGroupSpec.serviceType": "string",
    "spec.headGroupSpec.rayStartParams.*": "string",
    **{f"spec.headGroupSpec.template.spec.{field}": kind for field, kind in POD.items()},
    "spec.workerGroupSpecs[].groupName": "string",
    "spec.workerGroupSpecs[].replicas": "integer",
    "spec.workerGroupSpecs[].minReplicas": "integer",
    "spec.workerGroupSpecs[].maxReplicas": "integer",
    "spec.workerGroupSpecs[].rayStartParams.*": "string",
    **{f"spec.workerGroupSpecs[].template.spec.{field}": kind for field, kind in POD.items()},
}
RAY_JOB = {
    "spec.clusterSelector.*": "string",
    "spec.entrypoint": "string",
    "spec.runtimeEnvYAML": "string",
    "spec.metadata.*": "string",
    "spec.submissionMode": "string",
    "spec.backoffLimit": "integer",
}
PUBLISHED = {
    "raycluster.yaml": ("ray.io_rayclusters.yaml", RAY_CLUSTER),
    "rayjob.yaml": ("ray.io_rayjobs.yaml", RAY_JOB),
}
PYTHON = {"string": str, "integer": int, "boolean": bool, "int-or-string": (int, str)}
CRDS = os.environ.get("TESSERA_KUBERAY_CRD")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a document with the path to it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}\0{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, f"{path}[]")
    else:
        yield path.removeprefix("\0"), value


def published_kind(schema: dict[str, Any], path: str) -> tuple[str, str]:
    """The type of a field in a CRD's schema, and its path with `*` for keys of the user's own."""
    shown = []
    for part in path.split("\0"):
        key, _, listed = part.partition("[]")
        properties = schema.get("properties", {})
        if key in properties:
            schema = properties[key]
        else:
            schema = schema["additionalProperties"]  # KeyError: no such field
            key = "*"
        if listed or part.endswith("[]"):
            schema = schema["items"]
            key += "[]"
        shown.append(key)
    kind = "int-or-string" if schema.get("x-kubernetes-int-or-string") else schema["type"]
    return kind, ".".join(shown)


def kind_of(fields: dict[str, str], path: str) -> str:
    """The type of a field in the list above."""
    shown = path.replace("\0", ".")
    starred = ".".join([*path.split("\0")[:-1], "*"])
    return fields[shown] if shown in fields else fields[starred]


@pytest.mark.parametrize("name", PUBLISHED)
def test_kuberay_files_use_published_fields(name: str) -> None:
    _, fields = PUBLISHED[name]
    document = yaml.safe_load((KUBERAY / name).read_text())
    assert document["apiVersion"] == "ray.io/v1"
    used = dict(leaves({"spec": document["spec"]}))
    assert len(used) > 5
    for path, value in used.items():
        assert isinstance(value, PYTHON[kind_of(fields, path)]), path


@pytest.mark.skipif(not CRDS, reason="TESSERA_KUBERAY_CRD names no folder with KubeRay's CRDs")
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_list_of_fields_is_what_kuberay_publishes(name: str) -> None:
    file, fields = PUBLISHED[name]
    document = yaml.safe_load((KUBERAY / name).read_text())
    crd = yaml.load((Path(CRDS or "") / file).read_text(), Loader=yaml.CSafeLoader)
    versions = {version["name"]: version for version in crd["spec"]["versions"]}
    schema = versions["v1"]["schema"]["openAPIV3Schema"]
    found = {
        starred: kind
        for path, _ in leaves({"spec": document["spec"]})
        for kind, starred in [published_kind(schema, path)]
    }
    assert found == {path: kind for path, kind in fields.items() if path in found}


def test_the_cluster_keeps_what_the_docs_promise() -> None:
    spec = yaml.safe_load((KUBERAY / "raycluster.yaml").read_text())["spec"]
    head = spec["headGroupSpec"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert spec["authOptions"] == {"mode": "token", "secretName": "tessera-token"}
    for group in spec["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        gpus = int(limits.get("nvidia.com/gpu", 0))
        if gpus:
            cpus = int(group["rayStartParams"]["num-cpus"])
            assert int(limits["cpu"]) - cpus == 2 * gpus
        memory = int(limits["memory"].removesuffix("Gi")) << 30
        assert int(group["rayStartParams"]["object-store-memory"]) <= 0.3 * memory


def test_commands_in_kubernetes_are_what_submit_makes_of_them() -> None:
    job = yaml.safe_load((KUBERAY / "rayjob.yaml").read_text())["spec"]
    words = shlex.split(job["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.cli"]
    assert set(shlex.split(prepare(words[3:]).entrypoint)) == set(words)
    assert yaml.safe_load(job["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    cron = yaml.safe_load((KUBERAY / "schedule.yaml").read_text())
    assert (cron["apiVersion"], cron["kind"]) == ("batch/v1", "CronJob")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    Timetable.parse(cron["spec"]["schedule"], cron["spec"]["timeZone"])
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["tessera", "submit"]
    assert container["args"][0] == "reindex"
    environment = {entry["name"]: entry for entry in container["env"]}
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"] == {
        "secretKeyRef": {"name": "tessera-token", "key": "auth_token"}
    }


def configured(words: list[str]) -> ExtractConfig:
    """What a command line of `extract` or `reindex` asks for."""
    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    values = command.make_context(words[0], words[1:]).params
    options = {name: values[name] for name in ExtractOptions.model_fields}
    given = {name: value for name, value in options.items() if value is not None}
    *inputs, output = values["paths"]
    return load_config(values["config"], {**given, "input": tuple(inputs), "output": output})


def test_all_that_work_on_one_output_ask_for_the_same() -> None:
    """With another option of the fingerprint a schedule would compute all of INPUT again, and lead
    readers to other data."""
    shipped = load_config(REPOSITORY / "jobs/configs/laion2b-en.yaml", {})
    job = yaml.safe_load((KUBERAY / "rayjob.yaml").read_text())["spec"]
    assert configured(shlex.split(job["entrypoint"])[3:]) == shipped
    assert job["metadata"]["output"] == shipped.output
    cron = yaml.safe_load((KUBERAY / "schedule.yaml").read_text())
    (container,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert configured(container["args"]) == shipped


def test_the_image_gets_what_is_installed_and_nothing_else() -> None:
    """No repository, no environment, no results: they make an image large, and may hold secrets."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    about = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert rules[0] == "*"
    assert {rule for rule in rules if rule.startswith("!")} == {f"!{n}" for n in packages | about}
    assert rules[-1] == "**/__pycache__"
    assert all((REPOSITORY / name).exists() for name in packages | about)


def test_the_crontab_line() -> None:
    (line,) = [
        line
        for line in (REPOSITORY / "deploy/cron/tessera").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    fields = line.split(maxsplit=6)
    Timetable.parse(" ".join(fields[:5]), "UTC")
    words = shlex.split(fields[6].partition(">>")[0])
    assert words[:4] == ["flock", "-n", "/run/lock/tessera-reindex", "/opt/tessera/bin/tessera"]
    assert words[4] == "submit"
    assert words[words.index("--") + 1] == "reindex"


def test_systemd_units_name_our_commands() -> None:
    lines = {}
    for unit in ("tessera-reindex.service", "tessera-schedule.service"):
        (line,) = [
            line.removeprefix("ExecStart=")
            for line in (SYSTEMD / unit).read_text().splitlines()
            if line.startswith("ExecStart=")
        ]
        lines[unit] = shlex.split(line)
    assert lines["tessera-reindex.service"][1] == "submit"
    schedule = lines["tessera-schedule.service"]
    assert schedule[1] == "schedule"
    options = dict(zip(schedule[2::2], schedule[3::2], strict=False))
    Timetable.parse(options["--cron"], options["--timezone"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in SYSTEMD.iterdir():
        text = unit.read_text().replace("/opt/tessera/bin/tessera", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    assert len(units) == 3
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False
    )
    names = [unit.name for unit in tmp_path.iterdir()]
    ours = [line for line in done.stderr.splitlines() if any(name in line for name in names)]
    assert (done.returncode, ours) == (0, []), "it tells of the machine's own units, too"
