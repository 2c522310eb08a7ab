"""Files that start a plan: scripts and compose files per node, manifests, a graph of Dynamo, values of llm-d, a router.

All are made of the commands that `--emit` prints, so that there is one place that knows an engine's options. YAML is
written as JSON, which is YAML: names from elsewhere are quoted by a library.

Sources: the Compose specification (services, devices by `deploy.resources`), Kubernetes 1.37 (`apps/v1` Deployment,
`v1` Service), Dynamo's `nvidia.com/v1alpha1` DynamoGraphDeployment (`services`, `componentType`, `extraPodSpec`), the
values of llm-d's chart `llm-d-modelservice`; tests hold what is written to their schemas.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from apex_opt.engines import ANY, load_kind
from apex_opt.engines.overlap import NANO, TWO
from apex_opt.errors import InputError
from apex_opt.files import expanded, reason, there
from apex_opt.ir import load_model
from apex_opt.launch.bench import CLIENT, DATASET
from apex_opt.launch.commands import CHECKPOINT, HEAD, NGINX
from apex_opt.outputs import check_folder, fresh_folder, placed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

IMAGES: Final = {
    "vllm": "vllm/vllm-openai:v0.20.2",
    "sglang": "lmsysorg/sglang:latest",
    "trtllm": "nvcr.io/nvidia/tensorrt-llm/release:1.0.0",
}
"""Containers that have the engine; another is named by IMAGE, and in a manifest by hand."""

_DYNAMO: Final = "nvcr.io/nvidia/ai-dynamo/vllm-runtime:1.4.0"
_CACHE: Final = "/root/.cache/huggingface"
_NODE_CACHE: Final = "/var/cache/huggingface"
"""Where a container keeps what it downloads, and where a node of Kubernetes keeps that."""
_SHM: Final = {"name": "shm", "emptyDir": {"medium": "Memory"}}
_SHM_MOUNT: Final = {"name": "shm", "mountPath": "/dev/shm"}
_LLM_D_PORT: Final = 8000
_UNKNOWN: Final = re.compile(rf"(?<![\w-])(NODE\d+|{HEAD}|{CHECKPOINT}\w+)(?![\w-])")
"""What commands name that is not known here: addresses of nodes, a head that makes drafts, a checkpoint."""
_NAMED: Final = "apex-opt-plan"
"""What is made in Kubernetes, and the ConfigMap that pods take what is not known here from."""

_CERTIFICATES: Final = ("certificates", "pipelines", "pools", "optimal", "gap")
"""Parts of the certificate of an answer that has no single one: by the types and the shapes of deployments."""

_IN_JSON: Final = re.compile(r'"(/[^"]*)"')
"""Folders in the text of JSON."""


def check_new(path: Path) -> None:
    """Whether a folder can be made, and is not one that holds something, before the work for it is done.

    Raises
    ------
    InputError    one that cannot, or that is not empty
    """
    if there(path) and not path.is_dir():
        raise InputError(f"--save {path}: is a file; name a folder that is not there yet")
    check_folder(path, "--save")
    if (place := placed(path)).is_symlink():
        raise InputError(f"--save {path}: is a link, in whose place a folder would be put; name the folder it leads to")
    if place.is_dir() and any(place.iterdir()):
        raise InputError(f"--save {path}: is there and not empty; name another folder, or empty it")


def check_started(path: Path, ask: Any) -> None:
    """Whether a command may start a plan of those that are asked for, before the work for it is done.

    Parameters
    ----------
    path : Path          of the folder
    ask : a dataclass    arguments of a command, of which those count that every plan has in common

    Raises
    ------
    InputError    what no command of the engine starts
    """
    if getattr(ask, "runnable", None) != ANY:
        return  # plans are then those that can be started
    rules, plan = load_kind(ask.engine).rules, str(getattr(ask, "plan", "")).lower()
    named = re.findall(r"\boverlap=(\w+)", plan) or [name.strip() for name in ask.overlap.split(",")]
    refused: dict[str, str] = {}
    if NANO in named:
        refused[NANO] = f"{rules.release} does not run overlap={NANO}"
    if TWO in named and rules.overlaps is not None and (model := load_model(ask.model)).family not in rules.overlaps:
        refused[TWO] = f"{rules.release} does not run overlap={TWO} of {model.family or model.name} models"
    if set(named) == set(refused):
        raise InputError(
            f"--save {path}: nothing would start it: {refused[named[0]]}; leave --save out, or choose another overlap"
        )
    shared = "share=" in plan or ask.serving.strip() == "shared"
    if shared and not rules.multiplexes:
        raise InputError(
            f"--save {path}: nothing would start it: {rules.release} does not compute prompts and answers side by side "
            "(serving=shared); leave --save out, or serve otherwise"
        )


def save(
    document: Mapping[str, Any],
    path: Path,
    given: Mapping[str, str],
    traffic: Mapping[str, Callable[[], Iterable[str]]] = MappingProxyType({}),
) -> None:
    """Write what starts the plan of an answer into a folder, whole or not at all.

    Parameters
    ----------
    document : mapping    of the answer
    path : Path           of the folder
    given : mapping       model, cluster and engine as they were asked for
    traffic : mapping     further files by name, as their lines

    Raises
    ------
    InputError    a plan without commands, or a folder that cannot be written
    """
    launch = document.get("launch")
    if not launch or not launch["commands"]:
        why = "; ".join(launch["notes"][:2]) if launch else "the answer has no plan"
        raise InputError(f"--save {path}: nothing starts it, so nothing is written ({why})")
    try:
        with fresh_folder(path, partial(check_new, path)) as folder:
            for name, text in files_of(document, given).items():
                (folder / name).write_text(text, encoding="utf-8")
                if name.endswith(".sh"):
                    (folder / name).chmod(0o755)
            for name, lines in traffic.items():
                with (folder / name).open("w", encoding="utf-8") as file:
                    file.writelines(lines())
    except OSError as error:
        raise InputError(f"--save {path}: cannot be written ({reason(error)}); name another folder") from error


def files_of(document: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """Names and texts of the files for an answer whose plan has commands; `given` as in `save`."""
    launch, routing = document["launch"], _routing(document)
    commands: Sequence[Mapping[str, Any]] = launch["commands"]
    found: dict[str, str] = {}
    for node in sorted({command["node"] for command in commands}):
        own = [command for command in commands if command["node"] == node]
        found[f"node{node}.sh"] = _script(node, own)
        if services := _services(launch["engine"], own):
            found[f"compose-node{node}.yaml"] = _yaml({"services": services})
    servers = [command for command in commands if command["replica"] is not None]
    alone = len({command["replica"] for command in servers}) == len(servers)
    paired = any("--disaggregation-mode" in command["argv"] for command in servers)  # by their router, node by node
    if alone and not paired and not any(map(_nodes, servers)):
        found["kubernetes.yaml"] = _yaml(_manifests(launch["engine"], servers))
        if launch["engine"] == "vllm" and len({str(_portless(command)) for command in servers}) == 1:
            found["dynamo.yaml"] = _yaml(_dynamo(servers, routing))
            if not _UNKNOWN.fullmatch(servers[0]["argv"][2]):  # the chart names the model in texts of its own
                found["llm-d-values.yaml"] = _yaml(_llm_d(servers))
    before = any(map(_deals, commands))
    if len(servers) > 1 and alone and not before and routing in NGINX:
        found["nginx.conf.template"] = _nginx(servers, NGINX[routing])
    if (bench := launch.get("bench")) is not None and bench["argv"]:
        found["bench.sh"] = _bench(bench["argv"], _newer(launch))
    found["README.md"] = _readme(document, found, given)
    return found


def _routing(document: Mapping[str, Any]) -> str:
    """The router that an answer was simulated with: the plan names it where there was a choice."""
    named = re.findall(r"\broute=(\w+)", document["best"]["plan"])
    asked: str = document["question"]["engine"]["routing"]
    return named[0] if named else asked


def _deals(command: Mapping[str, Any]) -> bool:
    """Whether a command starts what deals requests to servers."""
    return command["replica"] is None and command["argv"][0] == "python"


def _unknown(command: Mapping[str, Any]) -> set[str]:
    """What a command, or the file that it writes, names and is not known here."""
    words = (*command["argv"], *command["env"].values(), *(_file(command) or ())[1:])
    return {name for word in words for name in _UNKNOWN.findall(word)}


def _nodes(command: Mapping[str, Any]) -> set[str]:
    """Nodes that a command names, whose addresses are not known here."""
    return {name for name in _unknown(command) if name.startswith("NODE")}


def _asked_for(names: Iterable[str]) -> list[str]:
    """Lines of a script that end it where what it needs is not said."""
    return [f': "${{{name}:?set {name} to {_is(name)}}}"' for name in sorted(names)]


def _is(name: str) -> str:
    """What a name stands for that is not known here."""
    if name.startswith("NODE"):
        return "the address of that node"
    what = "the EAGLE-3 head that was trained for the model" if name == HEAD else "the checkpoint in that format"
    return f"{what}, its Hugging Face id or its folder"


def _file(command: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name and text of the file that a command writes before it starts; documents have it in the line alone."""
    words = shlex.split(command["text"])
    return (words[3], words[1]) if words[0] == "echo" else None


def _word(word: str) -> str:
    """A word for a shell, in which what is not known here is a variable."""
    parts = _UNKNOWN.split(word)
    return "".join(f'"${part}"' if index % 2 else shlex.quote(part) if part else "" for index, part in enumerate(parts))


def _script(node: int, commands: Sequence[Mapping[str, Any]]) -> str:
    """What starts everything on one node, and ends all once one of them ends."""
    lines = [
        "#!/usr/bin/env bash",
        f"# Starts what runs on node {node}; ends all of it once one part ends.",
        "set -euo pipefail",
    ]
    lines.append('cd "$(dirname "${BASH_SOURCE[0]}")"')
    for command in filter(_deals, commands):
        if (name := command["argv"][1]).endswith(".py"):  # not of a package, so it must lie here
            told = f"node{node}.sh: copy {name} here first, into $PWD"
            lines.append(f'[ -f {name} ] || {{ echo "{told}" >&2; exit 1; }}')
    lines.append("trap 'kill $(jobs -p) 2>/dev/null || true' EXIT")
    lines += _asked_for(set().union(*map(_unknown, commands)))
    for index, command in enumerate(commands):
        if file := _file(command):
            name, text = file
            lines.append(f"printf '%s\\n' {_word(text)} > {shlex.quote(name)}")
        words = [*(f"{name}={_word(value)}" for name, value in command["env"].items()), *map(_word, command["argv"])]
        if command["argv"][0] == "nvidia-smi":
            lines.append(" ".join(words))
        else:
            lines.append(f"{'env ' if command['env'] else ''}{' '.join(words)} > part{index}.log 2>&1 &")
    return "\n".join([*lines, "wait -n", ""])


def _newer(launch: Mapping[str, Any]) -> str | None:
    """What has to be installed to measure, where the containers of the servers do not have it."""
    if launch["bench"]["dataset"] is None:
        return None
    return (
        f"bench.sh replays {DATASET}, which takes vLLM {CLIENT} or later where it is run (pip install "
        f"'vllm>={CLIENT}'); the servers' own image, {IMAGES[launch['engine']]}, does not have it"
    )


def _bench(argv: Sequence[str], newer: str | None) -> str:
    """What sends the traffic of the question, and keeps what it measures beside itself."""
    lines = [
        "#!/usr/bin/env bash",
        "# Measures the servers under the traffic that was planned for.",
        *(f"# {line}" for line in textwrap.wrap(newer or "", 100)),
        "set -euo pipefail",
    ]
    lines.append('cd "$(dirname "${BASH_SOURCE[0]}")"')
    lines += _asked_for({name for word in argv for name in _UNKNOWN.findall(word)})
    return "\n".join([*lines, " ".join(map(_word, argv)), ""])


def _services(engine: str, commands: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compose services of the servers of a node; a command that needs a file or mpirun stays with the script."""
    found = {}
    for command in commands:
        if command["replica"] is None or _file(command) or command["argv"][0] == "mpirun":
            continue
        words = [_composed(word) for word in command["argv"]]
        gpus = {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
        found[f"replica{command['replica']}"] = {
            "image": f"${{IMAGE:-{IMAGES[engine]}}}",
            "entrypoint": words[:1],
            "command": words[1:],
            "environment": {name: _composed(value) for name, value in command["env"].items()} | {"HF_TOKEN": None},
            "volumes": [
                {"type": "bind", "source": "${HF_HOME:-${HOME}/.cache/huggingface}", "target": _CACHE},
                *(
                    {"type": "bind", "source": _composed(path), "target": _composed(path), "read_only": True}
                    for path in _folders(command)
                ),
            ],
            "network_mode": "host",
            "ipc": "host",
            "deploy": {"resources": {"reservations": {"devices": [gpus]}}},
        }
    return found


def _composed(word: str) -> str:
    """A word in which Compose puts in what is not known here and nothing else."""
    return _UNKNOWN.sub(lambda match: f"${{{match[1]}:?}}", word.replace("$", "$$"))


def _podded(word: str) -> str:
    """A word in which Kubernetes puts in what is not known here and nothing else."""
    return _UNKNOWN.sub(r"$(\1)", word.replace("$(", "$$("))


def _manifests(engine: str, servers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A Deployment for each server and a Service before all of them; the cluster chooses the GPUs."""
    items: list[dict[str, Any]] = []
    for command in servers:
        port, name = int(_port(command)), f"replica{command['replica']}"
        labels = {"app": "apex-opt-plan", "replica": name}
        container = {
            "name": "engine",
            "image": IMAGES[engine],
            "command": list(map(_podded, command["argv"])),
            "env": _variables(command),
            "ports": [{"name": "http", "containerPort": port}],
            "resources": {"limits": {"nvidia.com/gpu": str(_gpus(command))}},
            "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10},
            "volumeMounts": [_SHM_MOUNT, *_mounts(command)],
        }
        if file := _file(command):
            name_of, text = file
            started = (
                f"printf '%s\\n' {shlex.quote(text)} > {shlex.quote(name_of)} && exec {shlex.join(command['argv'])}"
            )
            container["command"] = ["sh", "-c", _podded(started)]
        pod = {
            "containers": [container],
            "volumes": [_SHM, *_volumes(command)],
        }
        spec = {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        }
        items.append(
            {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "labels": labels}, "spec": spec}
        )
    service = {"selector": {"app": "apex-opt-plan"}, "ports": [{"name": "http", "port": 8000, "targetPort": "http"}]}
    items.append({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "apex-opt-plan"}, "spec": service})
    return {"apiVersion": "v1", "kind": "List", "items": items}


def _dynamo(servers: Sequence[Mapping[str, Any]], routing: str) -> dict[str, Any]:
    """A graph of Dynamo: its frontend, and a worker of vLLM for each replica."""
    words = _portless(servers[0])["argv"]
    frontend: dict[str, Any] = {"componentType": "frontend", "replicas": 1}
    frontend["extraPodSpec"] = {"mainContainer": {"image": _DYNAMO}}
    if routing == "dynamo":
        frontend["envs"] = [{"name": "DYN_ROUTER_MODE", "value": "kv"}]
    worker: dict[str, Any] = {
        "image": _DYNAMO,
        "command": ["python3", "-m", "dynamo.vllm"],
        "args": ["--model", *map(_podded, words[2:])],
    }
    worker["volumeMounts"] = _mounts(servers[0])
    services = {
        "Frontend": frontend,
        "VllmWorker": {
            "componentType": "worker",
            "replicas": len(servers),
            "resources": {"limits": {"gpu": str(_gpus(servers[0]))}},
            "envs": _variables(servers[0]),
            "extraPodSpec": {"mainContainer": worker, "volumes": _volumes(servers[0])},
        },
    }
    kind = {"apiVersion": "nvidia.com/v1alpha1", "kind": "DynamoGraphDeployment"}
    return {**kind, "metadata": {"name": "apex-opt-plan"}, "spec": {"services": services}}


def _llm_d(servers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Values of llm-d's chart `llm-d-modelservice`: all replicas answer whole requests, with no proxy before them."""
    first = _portless(servers[0])
    gpus = _gpus(servers[0])
    container = {
        "name": "vllm",
        "image": IMAGES["vllm"],
        "modelCommand": "custom",
        "command": [*map(_podded, first["argv"]), "--port", str(_LLM_D_PORT)],
        "env": _variables(servers[0]),
        "ports": [{"name": "http", "containerPort": _LLM_D_PORT}],
        "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
        "mountModelVolume": False,
        "volumeMounts": [_SHM_MOUNT, *_mounts(servers[0])],
    }
    model = first["argv"][2]
    labels = {"llm-d.ai/inferenceServing": "true", "llm-d.ai/model": "apex-opt-plan"}
    return {
        "modelArtifacts": {"name": model, "uri": f"hf://{model}", "labels": labels},
        "routing": {"servicePort": _LLM_D_PORT, "proxy": {"enabled": False}},
        "decode": {
            "create": True,
            "replicas": len(servers),
            "parallelism": {"tensor": gpus},
            "containers": [container],
            "volumes": [_SHM, *_volumes(servers[0])],
        },
        "prefill": {"create": False},
    }


def _folders(command: Mapping[str, Any]) -> list[str]:
    """Folders of one's own that a command names, or the JSON in it: of its model and of what makes its drafts."""
    words = (*command["argv"], *(_file(command) or ())[1:])
    found = (_IN_JSON.findall(word) if word.startswith("{") else [word] * word.startswith("/") for word in words)
    return list(dict.fromkeys(folder for folders in found for folder in folders))


def _variables(command: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Environment of a container in Kubernetes: the plan's, the token of gated models, and what is not known here."""
    token = {"secretKeyRef": {"name": "hf-token", "key": "HF_TOKEN", "optional": True}}
    own = [{"name": name, "value": value} for name, value in _portless(command)["env"].items()]
    said = [
        {"name": name, "valueFrom": {"configMapKeyRef": {"name": _NAMED, "key": name}}}
        for name in sorted(_unknown(command))
    ]
    return [*own, {"name": "HF_TOKEN", "valueFrom": token}, *said]


def _volumes(command: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a pod: the cache of Hugging Face, and folders of one's own, as they lie on its node."""
    cache = {"name": "cache", "hostPath": {"path": _NODE_CACHE, "type": "DirectoryOrCreate"}}
    own = enumerate(_folders(command))
    return [cache, *({"name": f"own{at}", "hostPath": {"path": path, "type": "Directory"}} for at, path in own)]


def _mounts(command: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where a container has the volumes of its pod."""
    own = enumerate(_folders(command))
    found = ({"name": f"own{at}", "mountPath": path, "readOnly": True} for at, path in own)
    return [{"name": "cache", "mountPath": _CACHE}, *found]


def _gpus(command: Mapping[str, Any]) -> int:
    return len(next(iter(v for k, v in command["env"].items() if k.endswith("VISIBLE_DEVICES"))).split(","))


def _port(command: Mapping[str, Any]) -> str:
    words = command["argv"]
    return str(words[words.index("--port") + 1])


def _portless(command: Mapping[str, Any]) -> dict[str, Any]:
    """Words and environment without what differs between equal replicas: the port, and which GPUs of the node."""
    words, at = list(command["argv"]), command["argv"].index("--port")
    env = {name: value for name, value in command["env"].items() if not name.endswith("VISIBLE_DEVICES")}
    return {"argv": words[:at] + words[at + 2 :], "env": env}


def _nginx(servers: Sequence[Mapping[str, Any]], dealt: str) -> str:
    """The router before several servers, for the template folder of nginx's container or `envsubst`."""
    lines = "".join(f"    server ${{NODE{command['node']}}}:{_port(command)};\n" for command in servers)
    inside = ("proxy_pass http://engines", "proxy_buffering off", "proxy_read_timeout 1h")
    location = "    location / {\n" + "".join(f"        {line};\n" for line in inside) + "    }\n"
    return f"upstream engines {{\n{dealt}{lines}}}\nserver {{\n    listen 8080;\n{location}}}\n"


_TOLD: Final = {
    "bench": "`bash {}` once all of it answers: sends the traffic that was planned for and keeps what it measures",
    "node": "`bash {}` on that node starts it, with a log for each part",
    "compose": "`docker compose -f {} up` on that node; passes on HF_TOKEN where it is set, which gated models need, "
    "and keeps downloads in HF_HOME; a clock of the GPUs is set by the script alone",
    "kubernetes": "`kubectl apply -f {}`; the cluster chooses the GPUs, which may lie otherwise in a node than "
    "the plan has them, no clock is set, and its Service deals requests at random. A gated model first takes `kubectl "
    "create secret generic hf-token --from-literal=HF_TOKEN=...`",
    "dynamo": "`kubectl apply -f {}` where the Dynamo operator runs, with the same secret",
    "llm-d": "`helm install plan llm-d-modelservice/llm-d-modelservice -f {}` where llm-d's charts are known, with the "
    "same secret; what deals requests is llm-d's gateway, whose pool takes the label llm-d.ai/model=apex-opt-plan",
    "nginx": "the router that deals requests as was simulated: set NODE0, ... to the nodes' addresses, and put {} into "
    "/etc/nginx/templates of nginx's container",
}

_WAYS: Final = ("node", "compose", "kubernetes", "dynamo", "llm-d")
"""How files begin of which one kind is chosen to start the servers."""


def _readme(document: Mapping[str, Any], files: Mapping[str, str], given: Mapping[str, str]) -> str:
    """The plan in words: what it is, how it starts, what to check, and its certificate.

    Parameters
    ----------
    document, given : as in `save`
    files : the others, by name
    """
    launch = document["launch"]
    lines = [
        f"# A plan for {launch['engine']}",
        "",
        f"Made by apex_opt {document['version']}, status {document['status']}.",
        "",
    ]
    told = {name: f"- {_TOLD[next(key for key in _TOLD if name.startswith(key))].format(name)}" for name in files}
    before = [command for command in launch["commands"] if _deals(command)]
    for name in told:
        if before and name.startswith("compose"):
            told[name] += f"; what deals requests to the servers is started by node{before[0]['node']}.sh alone"
    ways = [name for name in files if name.startswith(_WAYS)]
    lines += ["## Files", "", "Choose one of:", "", *(told[name] for name in ways)]
    lines += ["", "Then:", "", *(line for name, line in told.items() if name not in ways)]
    if (bench := launch.get("bench")) is not None and bench["dataset"] is not None:
        lines.append(f"- `{bench['dataset']}`: what `bench.sh` sends, a line for each request")
    notes = list(launch["notes"])
    asked = sorted(set().union(*map(_unknown, launch["commands"])))
    own = [name for name in asked if not name.startswith("NODE")]
    notes += [f"{name} is {_is(name)}: set it before a script or compose is started" for name in own]
    if own and "kubernetes.yaml" in files:
        values = " ".join(f"--from-literal={name}=..." for name in own)
        notes.append(f"In Kubernetes, with Hugging Face ids: `kubectl create configmap {_NAMED} {values}`")
    notes += _left_out(document, files)
    if "bench.sh" in files and (newer := _newer(launch)) is not None:
        notes.append(newer)
    lines += ["", "## To know and to check", "", *(f"- {note}" for note in notes)]
    lines += _measuring(document, given)
    certificate = document.get("certificate")
    if any(document.get(key) for key in _CERTIFICATES[:3]):
        certificate = {key: document[key] for key in _CERTIFICATES if document.get(key) not in (None, [])}
    sections = (("Plan", document.get("best")), ("Question", document.get("question")), ("Certificate", certificate))
    for title, content in sections:
        if content:
            lines += ["", f"## {title}", "", "```json", json.dumps(content, indent=1), "```"]
    return "\n".join([*lines, ""])


def _left_out(document: Mapping[str, Any], files: Mapping[str, str]) -> list[str]:
    """Which forms are not written, and why."""
    launch, found = document["launch"], []
    if "kubernetes.yaml" not in files:
        pools = "{" in document["best"]["plan"]
        why = "a proxy of their own deals to pools" if pools else "a replica starts by several commands"
        found.append(f"Manifests for Kubernetes, Dynamo and llm-d are left out: {why}")
    elif launch["engine"] != "vllm":
        found.append(f"Files for Dynamo and llm-d are left out: they are written for vllm, not for {launch['engine']}")
    elif "dynamo.yaml" not in files:
        found.append("Files for Dynamo and llm-d are left out: they take replicas that are alike, and these are not")
    elif "llm-d-values.yaml" not in files:
        found.append("Values for llm-d are left out: its chart names the checkpoint, which is not known here")
    if not any(name.startswith("compose") for name in files):
        found.append("Compose files are left out: a server starts by mpirun, or reads a file that the script writes")
    return found


def _measuring(document: Mapping[str, Any], given: Mapping[str, str]) -> list[str]:
    """How a measurement of the plan is taken back, where there is one that can be."""
    bench, best = document["launch"].get("bench"), document.get("best")
    if bench is None or bench["result"] is None or best is None or not measurable(document):
        return []
    question = document["question"]
    words = {name: _own(given.get(name)) or question[name]["name"] for name in ("model", "cluster", "engine")}
    words["plan"] = best["plan"]
    options = (f"--{name}={value}" for name, value in words.items())
    line = shlex.join(["solve.py", "calibrate", f"--measured={bench['result']}", *options, "--out=mine.toml"])
    told = "With a measurement the engine's own times are fitted to this machine; what is yours goes by its file:"
    return ["", "## Measure and calibrate", "", told, "", "```", "bash bench.sh", line, "```"]


def measurable(document: Mapping[str, Any]) -> bool:
    """Whether `calibrate` takes a measurement of the best plan: one on its own, on a cluster of one type of GPU."""
    best, cluster = document.get("best"), document.get("question", {}).get("cluster") or {}
    if not isinstance(best, dict):
        return True
    return ("parts" not in best or len(best["parts"]) == 1) and len(cluster.get("pools", ())) <= 1


def _own(given: str | None) -> str | None:
    """A file or a folder that was given, by its whole path; None where something else was."""
    return os.path.abspath(path) if given and there(path := expanded(given.strip())) else None


def _yaml(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
