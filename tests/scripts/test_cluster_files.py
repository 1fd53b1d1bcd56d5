"""What lies around serve_cluster: the pins and the Kubernetes manifest.

KUBERAY_CRD=ray.io_rayclusters.yaml (of ray-operator/config/crd/bases in KubeRay's repository) also validates the
manifest against that release's schema, with unknown keys refused.
"""

import json
import os
import re
import shlex
import shutil

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT

CLUSTER, SERVICE = yaml.safe_load_all((ROOT / "docs/kuberay.yaml").read_text(encoding="utf-8"))
GROUPS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}


def strict(schema):
    """A structural schema of Kubernetes as JSON Schema that refuses unknown keys, as ``kubectl --validate=strict``."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key != "format"}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    return made


@pytest.mark.skipif("KUBERAY_CRD" not in os.environ, reason="KUBERAY_CRD names no file of KubeRay's schema")
def test_the_manifest_keeps_to_kuberays_schema():
    with open(os.environ["KUBERAY_CRD"], encoding="utf-8") as file:
        versions = yaml.safe_load(file)["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema = strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    check = jsonschema.Draft202012Validator(schema)
    check.validate(CLUSTER)
    CLUSTER["spec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError):
        check.validate(CLUSTER)
    del CLUSTER["spec"]["workerGroupSpecs"][0]["replica"]


def test_ray_has_one_version_everywhere():
    (pin,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements-cluster.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert CLUSTER["spec"]["rayVersion"] == pin


def test_the_gateways_run_our_script_with_flags_that_it_has(run_script):
    (container,) = GROUPS["gateway"]["template"]["spec"]["containers"]
    words = shlex.split(container["args"][0].partition("exec ")[2])
    assert words[0] == "./scripts/serve_cluster.sh"
    said = run_script("scripts/serve_cluster.py", "--help").stdout
    flags = [word for word in words if word.startswith("--")]
    assert len(flags) >= 6
    assert all(flag in said for flag in flags)
    port = container["ports"][0]
    assert words[words.index("--port") + 1] == str(port["containerPort"])
    assert int(words[words.index("--replicas") + 1]) == GROUPS["gpu"]["replicas"]
    assert SERVICE["spec"]["selector"].items() <= GROUPS["gateway"]["template"]["metadata"]["labels"].items()


def test_no_replica_is_placed_beside_a_gateway_or_the_head():
    for group in (CLUSTER["spec"]["headGroupSpec"], GROUPS["gateway"]):
        assert group["rayStartParams"]["num-cpus"] == group["rayStartParams"]["num-gpus"] == "0"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "two"], "--replicas takes a number or auto, got 'two'"),
        (["--resource", "H100"], "--resource takes NAME=AMOUNT, got 'H100'"),
        (["--replace"], "need the --address"),
        (["--engine-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_one_line(tiny_engine, run_script, flags, said):
    done = run_script("scripts/serve_cluster.py", "--engine-dir", tiny_engine, *flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_engine_of_several_gpus_is_refused(tiny_engine, edit_json, run_script, tmp_path):
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    limits = json.loads((engine / "engine.json").read_text())["engine"]
    edit_json(engine / "engine.json", {"engine": limits | {"tp_size": 2}})
    done = run_script("scripts/serve_cluster.py", "--engine-dir", engine)
    assert done.returncode == 2
    assert "is split over 2 GPUs, a replica has one" in done.stderr
