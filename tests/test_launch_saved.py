"""What `--save` writes: the commands of `--emit`, word for word, in files that their readers take; or nothing."""

from __future__ import annotations

import json
import shlex
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from cli_cases import Once, run
from launch_cases import DENSE, emitted

import apex_opt
from apex_opt.errors import InputError
from apex_opt.launch.saved import check_new, files_of, save
from apex_opt.plans.speculation import Speculation
from apex_opt.report.launch import launch_document
from apex_opt.schema import to_plain

ONCE = Once()
COMPOSE = "builtin_schemas/vendor/compose-spec.json"
KUBERNETES = "1.37"


def closed(**properties: Any) -> dict[str, Any]:
    """An object with these properties and no other."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


TEXT, SWITCH, OBJECTS = {"type": "string"}, {"type": "boolean"}, {"type": "array", "items": {"type": "object"}}
PODS = {"create": SWITCH, "replicas": {"type": "integer"}, "containers": OBJECTS, "volumes": OBJECTS}
VALUE = closed(configMapKeyRef={"type": "object"}, secretKeyRef={"type": "object"})
ENVS = {"type": "array", "items": {**closed(name=TEXT, value=TEXT, valueFrom=VALUE), "required": ["name"]}}
AMOUNTS = closed(**dict.fromkeys(("cpu", "memory", "gpu", "gpuType"), TEXT), custom={"type": "object"})
COMPONENT = closed(
    componentType=TEXT,
    replicas={"type": "integer", "minimum": 0},
    envs=ENVS,
    resources=closed(requests=AMOUNTS, limits=AMOUNTS, claims=OBJECTS),
    extraPodSpec={"type": "object"},
)
DYNAMO = closed(
    apiVersion={"const": "nvidia.com/v1alpha1"},
    kind={"const": "DynamoGraphDeployment"},
    metadata={"type": "object"},
    spec=closed(
        services={"type": "object", "maxProperties": 25, "minProperties": 1, "additionalProperties": COMPONENT}
    ),
)
"""A graph of Dynamo as far as it may be written, closed, of `spec.versions[v1alpha1]` of ai-dynamo/dynamo's
`deploy/operator/config/crd/bases/nvidia.com_dynamographdeployments.yaml`. `extraPodSpec` is a PodSpec of Kubernetes
with a Container beside, `mainContainer`, which the operator names."""
LLM_D = closed(
    modelArtifacts=closed(
        **dict.fromkeys(("name", "uri", "size", "mountPath", "authSecretName"), TEXT),
        labels=closed(**dict.fromkeys(("llm-d.ai/inferenceServing", "llm-d.ai/model"), TEXT)),
    ),
    routing=closed(servicePort={}, proxy={"type": "object", "properties": {"enabled": SWITCH}}),
    decode=closed(**PODS, parallelism={"type": "object"}),
    prefill=closed(**PODS),
)
"""Values of llm-d's chart that may be written, with the types that `charts/llm-d-modelservice/values.schema.tmpl.json`
of llm-d-incubation/llm-d-modelservice gives them; it allows no others beside and in the first two. `decode` and
`prefill` it leaves open: `parallelism` stands in `values.yaml`. A container is one of Kubernetes but for how its
command is made and whether the model is mounted."""


def document(engine: str, plan: str, nodes: int = 1) -> dict[str, Any]:
    """What `save` reads of an answer."""
    launch = to_plain(launch_document(emitted(engine, DENSE, plan, nodes, 8)))
    question = {"engine": {"routing": "round_robin"}}
    return {"launch": launch, "question": question, "status": "feasible", "version": "0", "best": {"plan": plan}}


def arguments(script: str, variables: dict[str, str]) -> list[list[str]]:
    """Words of what a script would start, as bash reads them."""
    lines = [line.partition(" > part")[0] for line in script.splitlines() if line.endswith("&")]
    printed = "\n".join(f"printf '%s\\0' {line}; echo" for line in lines)
    done = subprocess.run(["bash", "-uc", printed], env=variables, capture_output=True, text=True, check=True)
    return [line.split("\0")[:-1] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_scripts_start_the_commands_word_for_word(engine: str) -> None:
    asked = document(engine, "dp2 tp4")
    script = files_of(asked, {})["node0.sh"]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    expected = [
        ["env", *(f"{name}={value}" for name, value in command["env"].items()), *command["argv"]]
        for command in asked["launch"]["commands"]
    ]
    assert arguments(script, {}) == expected


def test_the_options_file_of_an_engine_is_written_before_it_starts(tmp_path: Path) -> None:
    asked = document("trtllm", "tp4")
    script = files_of(asked, {})["node0.sh"]
    line = next(line for line in script.splitlines() if line.startswith("printf"))
    subprocess.run(["bash", "-c", line], cwd=tmp_path, check=True)
    (path,) = tmp_path.iterdir()
    assert path.name in asked["launch"]["commands"][0]["argv"]
    assert "kv_cache_config" in json.loads(path.read_text())


def test_addresses_of_nodes_are_variables_that_must_be_set() -> None:
    files = files_of(document("vllm", "tp16", nodes=2), {})
    assert {"node0.sh", "node1.sh"} <= set(files)
    assert "kubernetes.yaml" not in files
    script = files["node1.sh"]
    (words,) = arguments(script, {"NODE0": "10.0.0.1", "NODE1": "10.0.0.2"})
    assert words[words.index("--master-addr") + 1] == "10.0.0.1"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env={"PATH": "/bin:/usr/bin"}, check=False
    )
    assert done.returncode != 0
    assert "NODE0" in done.stderr


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_a_head_that_is_not_known_ends_a_script_early_and_is_put_in_where_it_is_said(
    engine: str, tmp_path: Path
) -> None:
    drafting = Speculation(method="eagle", draft_tokens=2, accepted=((1,),))
    own = {"drafting": (drafting,), "max_num_seqs": 64}
    launch = to_plain(launch_document(emitted(engine, DENSE, "tp8 spec=eagle:2", 1, 8, settings=own)))
    files = files_of({**document(engine, "tp8"), "launch": launch}, {})
    script = files["node0.sh"]
    without = {"PATH": "/bin:/usr/bin"}
    path = tmp_path / "node0.sh"
    path.write_text(script, encoding="utf-8")
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, env=without, check=False)
    assert done.returncode != 0 and [*tmp_path.iterdir()] == [path]
    assert "set EAGLE3_HEAD to the EAGLE-3 head" in done.stderr and len(done.stderr.splitlines()) == 1
    # What the command would start with, and the file that it reads, have the head that is said.
    path.write_text("\n".join(line for line in script.splitlines() if not line.endswith(("&", "wait -n"))))
    given = {"EAGLE3_HEAD": "own/head"}
    subprocess.run(["bash", str(path)], env=without | given, check=True)
    path.unlink()
    told = [*arguments(script, given)[0], *(file.read_text() for file in tmp_path.iterdir())]
    assert "own/head" in " ".join(told) and "EAGLE3_HEAD" not in " ".join(told)
    # A pod takes it from a ConfigMap, in its words or in those of the shell that writes the file.
    (pod, _) = json.loads(files["kubernetes.yaml"])["items"]
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    assert "$(EAGLE3_HEAD)" in " ".join(container["command"])
    assert {"name": "apex-opt-plan", "key": "EAGLE3_HEAD"} in [
        one.get("valueFrom", {}).get("configMapKeyRef") for one in container["env"]
    ]
    assert "kubectl create configmap apex-opt-plan --from-literal=EAGLE3_HEAD=..." in files["README.md"]
    if engine == "vllm":
        worker = json.loads(files["dynamo.yaml"])["spec"]["services"]["VllmWorker"]
        assert "$(EAGLE3_HEAD)" in " ".join(worker["extraPodSpec"]["mainContainer"]["args"])
        (served,) = json.loads(files["llm-d-values.yaml"])["decode"]["containers"]
        assert "$(EAGLE3_HEAD)" in " ".join(served["command"]) and served["env"][-1]["name"] == "EAGLE3_HEAD"


def test_a_checkpoint_in_another_format_is_asked_for_wherever_it_is_named() -> None:
    files = files_of(document("vllm", "tp8 w4a16"), {})
    assert "set CHECKPOINT_IN_W4A16 to the checkpoint in that format" in files["node0.sh"]
    assert arguments(files["node0.sh"], {"CHECKPOINT_IN_W4A16": "own/four"})[0].count("own/four") == 1
    (service,) = json.loads(files["compose-node0.yaml"])["services"].values()
    assert "${CHECKPOINT_IN_W4A16:?}" in service["command"]
    (pod, _) = json.loads(files["kubernetes.yaml"])["items"]
    assert "$(CHECKPOINT_IN_W4A16)" in pod["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "llm-d-values.yaml" not in files and "Values for llm-d are left out" in files["README.md"]


@pytest.mark.parametrize(
    ("engine", "plan", "nodes", "told"),
    [
        ("vllm", "tp16", 2, "Kubernetes, Dynamo and llm-d are left out: a replica starts by several commands"),
        ("sglang", "tp8", 1, "Dynamo and llm-d are left out: they are written for vllm, not for sglang"),
        ("trtllm", "tp8", 1, "Compose files are left out: a server starts by mpirun, or reads a file"),
    ],
)
def test_forms_that_are_not_written_are_told_with_why(engine: str, plan: str, nodes: int, told: str) -> None:
    assert told in files_of(document(engine, plan, nodes), {})["README.md"]


def test_odd_names_of_checkpoints_stay_one_word() -> None:
    asked = document("vllm", "tp4")
    odd = "a b'c\"$(touch x);`y`: {z}"
    (command,) = asked["launch"]["commands"]
    command["argv"][2] = odd
    files = files_of(asked, {})
    assert arguments(files["node0.sh"], {})[0].count(odd) == 1
    service = json.loads(files["compose-node0.yaml"])["services"]["replica0"]
    assert [word.replace("$$", "$") for word in service["command"]][1] == odd


CASES = [
    ("vllm", "dp2 tp4", 1),
    ("vllm", "tp8", 1),
    ("sglang", "dp2 tp4", 1),
    ("trtllm", "tp8", 1),
    ("vllm", "tp16", 2),
]


@pytest.mark.parametrize(("engine", "plan", "nodes"), CASES)
def test_compose_files_are_valid_by_the_specification(engine: str, plan: str, nodes: int) -> None:
    schema = json.loads((resources.files("check_jsonschema") / COMPOSE).read_text(encoding="utf-8"))
    files = files_of(document(engine, plan, nodes), {})
    written = [json.loads(text) for name, text in files.items() if name.startswith("compose")]
    assert len(written) == (nodes if engine != "trtllm" else 0)
    for content in written:
        jsonschema.validate(content, schema)
        for service in content["services"].values():
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({"services": {"one": {**service, "imagee": "x"}}}, schema)


@pytest.mark.parametrize(("engine", "plan"), [case[:2] for case in CASES if case[2] == 1])
def test_manifests_are_valid_by_the_schemas_of_kubernetes(engine: str, plan: str) -> None:
    asked = document(engine, plan)
    manifest = json.loads(files_of(asked, {})["kubernetes.yaml"])
    *deployments, service = manifest["items"]
    assert [item["kind"] for item in (*deployments, service)] == ["Deployment"] * len(deployments) + ["Service"]
    for item in manifest["items"]:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)
    servers = [command for command in asked["launch"]["commands"] if command["replica"] is not None]
    for item, command in zip(deployments, servers, strict=True):
        assert item["spec"]["selector"]["matchLabels"] == item["spec"]["template"]["metadata"]["labels"]
        (container,) = item["spec"]["template"]["spec"]["containers"]
        assert container["command"] == command["argv"] or container["command"][:2] == ["sh", "-c"]
        item["spec"]["template"]["spec"]["container"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize("plan", ["tp8", "dp2 tp4"])
@pytest.mark.parametrize("routing", ["round_robin", "dynamo"])
def test_a_graph_of_dynamo_has_the_fields_of_its_type(plan: str, routing: str) -> None:
    asked = document("vllm", plan)
    asked["question"]["engine"]["routing"] = routing
    graph = json.loads(files_of(asked, {})["dynamo.yaml"])
    jsonschema.validate(graph, DYNAMO)
    services = graph["spec"]["services"]
    for name, component in services.items():
        for odd in (
            {**component, "replica": 1},
            {**component, "resources": {"limit": {}}},
            {**component, "replicas": "1"},
        ):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({**graph, "spec": {"services": {**services, name: odd}}}, DYNAMO)
        pod = dict(component["extraPodSpec"])
        main = {"name": "main", "env": component.get("envs", []), **pod.pop("mainContainer")}
        kind = {"apiVersion": "v1", "kind": "Pod", "metadata": graph["metadata"]}
        kubernetes_validate.validate({**kind, "spec": {**pod, "containers": [main]}}, KUBERNETES, strict=True)
    worker = services["VllmWorker"]
    replicas, gpus = (1, "8") if plan == "tp8" else (2, "4")
    assert (worker["componentType"], services["Frontend"]["componentType"]) == ("worker", "frontend")
    assert (worker["replicas"], worker["resources"]["limits"]["gpu"]) == (replicas, gpus)
    assert "--port" not in worker["extraPodSpec"]["mainContainer"]["args"]


@pytest.mark.parametrize("plan", ["tp8", "dp2 tp4"])
def test_values_of_llm_d_are_those_of_its_chart(plan: str) -> None:
    asked = document("vllm", plan)
    values = json.loads(files_of(asked, {})["llm-d-values.yaml"])
    jsonschema.validate(values, LLM_D)
    for name in ("modelArtifacts", "routing", "decode"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**values, name: {**values[name], "replica": 1}}, LLM_D)
    assert set(values["modelArtifacts"]["labels"]) == {"llm-d.ai/inferenceServing", "llm-d.ai/model"}
    decode = values["decode"]
    servers = [command for command in asked["launch"]["commands"] if command["replica"] is not None]
    assert decode["replicas"] == len(servers)
    container = dict(decode["containers"][0])
    assert (container.pop("modelCommand"), container.pop("mountModelVolume")) == ("custom", False)
    pod = {"containers": [container], "volumes": decode["volumes"]}
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": pod}
    kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    words, port = container["command"], str(values["routing"]["servicePort"])
    assert (words[2], words[-2:]) == (values["modelArtifacts"]["name"], ["--port", port])
    assert str(decode["parallelism"]["tensor"]) == container["resources"]["limits"]["nvidia.com/gpu"]


def test_nginx_stands_before_all_servers() -> None:
    assert files_of(document("vllm", "dp2 tp4"), {})["nginx.conf.template"].count("server ${NODE0}:") == 2


def test_nginx_deals_as_the_router_that_was_simulated() -> None:
    asked = document("vllm", "dp2 tp4")
    for routing, line in (("least_loaded", "least_conn;"), ("power_of_two", "random two least_conn;")):
        asked["question"]["engine"]["routing"] = routing
        assert f"upstream engines {{\n    {line}\n" in files_of(asked, {})["nginx.conf.template"]
    assert "nginx.conf.template" not in files_of(document("vllm", "dp2 tp4 route=cache_aware"), {})
    named = document("vllm", "dp2 tp4 route=least_loaded")
    assert "least_conn;" in files_of(named, {})["nginx.conf.template"]
    asked["question"]["engine"]["routing"] = "dynamo"
    assert "DYN_ROUTER_MODE" in files_of(asked, {})["dynamo.yaml"]


def test_a_folder_that_holds_something_is_refused_before_the_work_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        check_new(tmp_path / "missing" / ".." / ".." / tmp_path.name)
    done = ONCE.run("simulate", "--plan", "tp8", "--save", str(tmp_path))
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1
    assert "not empty" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="is a file"):
        check_new(tmp_path / "mine")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link"):
        check_new(tmp_path / "link")
    report = tmp_path / "new" / "report.html"
    done = ONCE.run("simulate", "--plan", "tp8", "--save", str(tmp_path / "new"), "--report", str(report))
    assert (done.code, done.out) == (2, "")
    assert done.err == f"error: --report={report}: is in the folder that --save writes; name a path outside it\n"
    around = str(tmp_path / "missing" / ".." / "new")
    done = ONCE.run("simulate", "--plan", "tp8", "--save", around, "--report", str(report))
    assert done.err == f"error: --report={report}: is in the folder that --save writes; name a path outside it\n"


def test_a_plan_that_nothing_starts_writes_nothing(tmp_path: Path) -> None:
    asked = document("vllm", "tp4")
    asked["launch"]["commands"] = []
    with pytest.raises(InputError, match="nothing starts it"):
        save(asked, tmp_path / "new", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("plan", "--overlap=nano_batches"), "vLLM 0.20 does not run overlap=nano_batches"),
        (("simulate", "--plan=tp8 overlap=nano_batches"), "vLLM 0.20 does not run overlap=nano_batches"),
        (
            ("plan", "--engine=sglang", "--model=mixtral-8x22b", "--overlap=two_batches"),
            "SGLang 0.5 does not run overlap=two_batches of mixtral models",
        ),
        (("plan", "--serving=shared"), "vLLM 0.20 does not compute prompts and answers side by side"),
    ],
)
def test_what_nothing_starts_is_refused_before_the_work(words: tuple[str, ...], why: str, tmp_path: Path) -> None:
    done = run(*words, "--runnable=any", f"--save={tmp_path / 'new'}", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1  # nothing is said of searching
    assert f"new: nothing would start it: {why}" in done.err


def test_an_answer_is_saved_with_its_certificate(tmp_path: Path) -> None:
    done = ONCE.run("simulate", "--plan", "dp2 tp4", "--save", str(tmp_path / "new"))
    assert done.code == 0
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert {"README.md", "node0.sh", "compose-node0.yaml", "kubernetes.yaml", "dynamo.yaml"} <= names
    text = (tmp_path / "new" / "README.md").read_text()
    assert "## Certificate" in text
    assert all(name in text for name in names - {"README.md"})
    assert shlex.split((tmp_path / "new" / "node0.sh").read_text().splitlines()[-1]) == ["wait", "-n"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("options", "calibrated"),
    [
        (("--cluster=2xh100-sxm", "--serving=aggregated,pools"), True),
        (("--cluster=2xh100-sxm", "--serving=pools"), False),
    ],
)
def test_what_is_saved_of_pools_has_all_its_certificates_and_of_replicas_how_they_are_calibrated(
    options: tuple[str, ...], calibrated: bool, tmp_path: Path
) -> None:
    trace = ("--model=llama-3.1-8b", "--trace=poisson:rate=4,n=30,prompt=256,output=32")
    done = run("plan", *trace, *options, "--format=json", f"--save={tmp_path / 'new'}")
    assert done.code == 0
    text, answer = (tmp_path / "new" / "README.md").read_text(), json.loads(done.out)
    told = json.loads(text.partition("## Certificate\n\n```json\n")[2].partition("```")[0])
    assert told["pools"] == answer["pools"] and told["gap"] == answer["gap"] == 0
    said = " ".join(answer["launch"]["bench"]["notes"])
    assert ("## Measure and calibrate" in text) == calibrated == ("not of several pools" not in said)


OWN = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024}
OWN |= {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 4, "vocab_size": 1000}
OWN |= {"max_position_embeddings": 2048, "torch_dtype": "bfloat16"}


def test_an_own_model_is_served_from_its_whole_path_which_containers_mount(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OWN), encoding="utf-8")
    (tmp_path / "mine.toml").write_text('name = "desk"\nnodes = 1\ngpu = "h200-sxm"\ngpus_per_node = 1\n')
    trace = "--trace=static:n=4,prompt=64,output=4"
    asked = ("plan", "--model=config.json", "--cluster=./mine.toml", trace, "--save=new")
    done = run(*asked, cwd=tmp_path)
    assert done.code == 0, done.err
    files, own = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}, str(tmp_path)
    assert f" vllm serve {own} " in files["node0.sh"]
    assert f"--model {own} " in files["bench.sh"]
    bind = json.loads(files["compose-node0.yaml"])["services"]["replica0"]["volumes"][1]
    assert (bind["source"], bind["target"], bind["read_only"]) == (own, own, True)
    pods = [json.loads(files["kubernetes.yaml"])["items"][0]["spec"]["template"]["spec"]]
    worker = json.loads(files["dynamo.yaml"])["spec"]["services"]["VllmWorker"]["extraPodSpec"]
    pods.append({"containers": [worker["mainContainer"]], "volumes": worker["volumes"]})
    for pod in pods:
        (name,) = [one["name"] for one in pod["volumes"] if one.get("hostPath", {}).get("path") == own]
        (container,) = pod["containers"]
        assert [one["mountPath"] for one in container["volumeMounts"] if one["name"] == name] == [own]
        assert {one["name"] for one in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    assert f"- model: your folder {own}; it must hold weights and tokenizer on every node" in files["README.md"]
    (line,) = [line for line in files["README.md"].splitlines() if line.startswith("solve.py calibrate")]
    assert {f"--model={own}/config.json", f"--cluster={own}/mine.toml", "--engine=vllm"} <= set(shlex.split(line))


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_the_folder_of_a_draft_model_is_mounted_wherever_a_command_names_it(engine: str, tmp_path: Path) -> None:
    config = Path(apex_opt.__file__).parent / "ir" / "configs" / "llama-3.1-8b.json"
    (tmp_path / "config.json").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
    known = Speculation(method="draft", draft_tokens=2, model=str(tmp_path), accepted=((1,),))
    own = {"drafting": (known,), "max_num_seqs": 64}
    found = emitted(engine, DENSE, f"tp8 spec=draft:{tmp_path}:2", 1, 8, settings=own)
    files = files_of({**document(engine, "tp8"), "launch": to_plain(launch_document(found))}, {})
    pod = json.loads(files["kubernetes.yaml"])["items"][0]["spec"]["template"]["spec"]
    assert str(tmp_path) in [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]


def test_a_file_that_lies_among_no_weights_has_a_line_on_what_to_put_there(tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text(json.dumps(OWN), encoding="utf-8")
    asked = ("plan", "--model=tuned.json", "--cluster=1xh200-sxm", "--trace=static:n=4,prompt=64,output=4")
    done = run(*asked, "--save=new", cwd=tmp_path)
    assert done.code == 0, done.err
    told = "- model: put the folder or the Hugging Face id of its weights in place of tuned"
    assert told in (tmp_path / "new" / "README.md").read_text()


def test_gated_models_get_the_token_that_is_set_and_downloads_are_kept() -> None:
    files = files_of(document("vllm", "tp4"), {})
    service = json.loads(files["compose-node0.yaml"])["services"]["replica0"]
    assert service["environment"]["HF_TOKEN"] is None  # which passes on what is set, and nothing where nothing is
    assert [bind["target"] for bind in service["volumes"]] == ["/root/.cache/huggingface"]
    pod = json.loads(files["kubernetes.yaml"])["items"][0]["spec"]["template"]["spec"]
    token = pod["containers"][0]["env"][-1]
    assert token["name"] == "HF_TOKEN" and token["valueFrom"]["secretKeyRef"]["optional"]
    assert {one["name"] for one in pod["volumes"]} == {"shm", "cache"}


def test_of_the_ways_to_start_it_one_is_chosen() -> None:
    text = files_of(document("vllm", "dp2 tp4"), {})["README.md"]
    ways, _, then = text.partition("Choose one of:")[2].partition("Then:")
    assert all(name in ways for name in ("node0.sh", "compose-node0.yaml", "kubernetes.yaml", "dynamo.yaml"))
    assert "nginx.conf.template" in then


def test_a_proxy_that_is_not_there_is_said_in_a_line_before_anything_starts(tmp_path: Path) -> None:
    asked = document("vllm", "tp4")
    words = ["python", "toy_proxy_server.py", "--port", "8192"]
    asked["launch"]["commands"].append({"node": 0, "replica": None, "env": {}, "argv": words, "text": " ".join(words)})
    files = files_of(asked, {})
    assert "what deals requests to the servers is started by node0.sh alone" in files["README.md"]
    script = tmp_path / "node0.sh"
    script.write_text(files["node0.sh"])
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"node0.sh: copy toy_proxy_server.py here first, into {tmp_path}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["node0.sh"]


@pytest.mark.parametrize(("engine", "image"), [("vllm", "v0.20.2"), ("sglang", "lmsysorg/sglang")])
def test_what_a_file_of_traffic_takes_to_be_sent_is_told_in_the_script_and_the_readme(engine: str, image: str) -> None:
    asked = document(engine, "tp8")
    bench = {"argv": ["vllm", "bench", "serve"], "dataset": "traffic.jsonl", "result": None, "notes": []}
    for dataset, told in (("traffic.jsonl", True), (None, False)):
        launch = asked["launch"] | {"bench": bench | {"dataset": dataset}}
        files = files_of(asked | {"launch": launch}, {})
        for name in ("README.md", "bench.sh"):
            assert ("takes vLLM 0.23 or later" in " ".join(files[name].replace("# ", "").split())) is told
        assert (image in files["bench.sh"]) is told
        assert subprocess.run(["bash", "-n"], input=files["bench.sh"], text=True, check=False).returncode == 0
