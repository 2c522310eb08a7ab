"""The documents of measured runs, profiles, clusters and lists as types; those of searches are in `types`."""

from __future__ import annotations

from typing import ClassVar, Literal

from apex_opt.report.types import Document, Number, Sources, TraceFacts
from apex_opt.schema import Described

# ---- measured runs -----------------------------------------------------------------------------------------------


class Compared(Described):
    """A figure measured and predicted; the error is above 0 where more was predicted."""

    measured: float
    predicted: float
    error_pct: float


class Steps(Described):
    """Measured steps against the batch law."""

    steps: int
    measured_s: float
    predicted_s: float
    bias_pct: Number


class StepSize(Steps):
    """Those of a size."""

    least: int
    most: int


class StepKind(Steps):
    """Those of a kind."""

    by_size: tuple[StepSize, ...]


class Measurement(Described):
    """A measured run."""

    name: str
    origin: str
    kind: str
    model: str
    status: str


class Served(Measurement):
    """A run of which it is known what was served on what."""

    cluster: str
    plan: str
    engine: str
    judged: bool
    requests: int
    concurrency: int | None


class Unread(Measurement):
    """A run of which too little is known."""

    reason: str
    detail: str


class Unpredicted(Served):
    """A run that cannot be predicted."""

    reason: str
    detail: str


class Predicted(Served):
    """A run beside its simulation."""

    gpus: int
    metrics: dict[str, Compared]
    set_aside: dict[str, str]
    assumptions: tuple[str, ...]
    predicted_breakdown: dict[str, float]
    preemptions: int
    batches: int
    causes: dict[str, StepKind | int] | None


class Errors(Described):
    """Errors of a figure over several runs; APE is the absolute error in percent of the measured value."""

    mean_ape_pct: float
    median_ape_pct: float
    bias_pct: float
    n: int


class Coverage(Described):
    """How many runs were predicted, of all and of those whose model can be described; why the others were not.

    Runs that are not what they say are set `aside`; they are in `total`, not in `supported`. A run may stand in several
    `rows` of its file.
    """

    predicted: int
    total: int
    rows: int
    supported: int
    aside: int
    reasons: dict[str, int]


class Validation(Document):
    """Measured serving runs beside their simulation."""

    PAGE: ClassVar[str] = "apex_opt.report.validation_tables:validation_page"
    ROWS: ClassVar[str] = "rows"
    LIMITED: ClassVar[bool] = True

    schema: Literal["apex_opt.validation/2"] = "apex_opt.validation/2"
    command: str
    status: str
    units: dict[str, str]
    rows: tuple[Predicted | Unpredicted | Unread, ...]
    summary: dict[str, Errors]
    summary_with_set_aside: dict[str, Errors]
    summary_by: dict[str, dict[str, dict[str, Errors]]]
    coverage: Coverage
    causes: dict[str, dict[str, StepKind]]
    files: tuple[str, ...]
    passed_over: tuple[str, ...]
    provenance: Sources


# ---- profiles ----------------------------------------------------------------------------------------------------


class Table(Described):
    """A measured table."""

    table: str
    rows: int
    bytes: int


class Profile(Described):
    """A folder of measured tables, as its card describes it."""

    accelerator: str
    source: str
    gpu: str
    engine: str | None
    use: str
    date: str | None
    licence: str
    hardware: str | None = None
    software: str | None = None
    method: str | None = None
    origin: str | None = None
    derived: str | None = None
    not_measured: str | None = None
    dropped: str | None = None
    power: str | None
    tables: tuple[Table, ...]
    rows: int
    bytes: int


class Inventory(Document):
    """The measured tables there are."""

    PAGE: ClassVar[str] = "apex_opt.report.profile_tables:profile_page"
    ROWS: ClassVar[str] = "profiles"

    schema: Literal["apex_opt.inventory/2"] = "apex_opt.inventory/2"
    command: str
    status: str
    root: str
    profiles: tuple[Profile, ...]
    tables: int
    rows: int
    bytes: int


class MadeTable(Described):
    """A table that was made.

    Parameters
    ----------
    dropped : rows left out, by reason
    """

    folder: str
    table: str
    source_rows: int
    screened_rows: int
    rows: int
    dropped: dict[str, int]
    lookup_error: dict[str, float] | None
    bytes: int


class MadeTables(Document):
    """Tables that were distilled, imported or measured."""

    PAGE: ClassVar[str] = "apex_opt.report.profile_tables:profile_page"
    ROWS: ClassVar[str] = "tables"

    schema: Literal["apex_opt.tables/2"] = "apex_opt.tables/2"
    command: str
    status: str
    target: str
    tables: tuple[MadeTable, ...]
    passed_over: tuple[dict[str, str], ...]
    source_rows: int
    rows: int
    bytes: int


class Board(Described):
    """The power of a GPU, fitted."""

    gpu: str
    runs: int
    judged_runs: int
    coefficients: dict[str, float]
    mean_ape_pct: float
    median_ape_pct: float
    largest_ape_pct: float
    power_toml: str


class Fit(Document):
    """An engine's own time and the power of GPUs, fitted on measured runs."""

    PAGE: ClassVar[str] = "apex_opt.report.profile_tables:profile_page"
    ROWS: ClassVar[str] = "boards"

    schema: Literal["apex_opt.fit/2"] = "apex_opt.fit/2"
    command: str
    status: str
    engine: str
    runs: int
    judged_runs: int
    times_us: dict[str, dict[str, float]]
    errors: dict[str, dict[str, Errors]]
    engine_toml: str
    boards: tuple[Board, ...]


class FittedTime(Described):
    """A time of an engine before and after, in microseconds.

    Parameters
    ----------
    low, high : what it is between with a confidence of 95%; left out where it was not fitted, or ended at its limit
    kept : why it was not fitted
    at_limit : true where the fit ended at the least or the most that it may be
    """

    before: float
    after: float
    low: float | None = None
    high: float | None = None
    kept: str | None = None
    at_limit: bool | None = None


class BeforeAfter(Described):
    """Errors by figure, before and after."""

    before: dict[str, Errors]
    after: dict[str, Errors]


class Calibration(Document):
    """An engine's times fitted on a user's own runs.

    Parameters
    ----------
    like : the engine that the file takes all else from
    fitted : errors on the runs that were fitted on
    crossed : on each load with times fitted on the others; left out with a single load
    held : on runs that were held out
    out : the file that was written
    """

    PAGE: ClassVar[str] = "apex_opt.report.calibration:calibration_page"
    ROWS: ClassVar[str] = "rows"

    schema: Literal["apex_opt.calibration/2"] = "apex_opt.calibration/2"
    command: str
    status: str
    engine: str
    like: str
    runs: int
    times_us: dict[str, FittedTime]
    fitted: BeforeAfter
    crossed: BeforeAfter | None = None
    held: BeforeAfter | None = None
    engine_toml: str
    out: str | None
    rows: tuple[dict[str, str | float], ...]


# ---- clusters and lists ------------------------------------------------------------------------------------------


class Device(Described):
    """A GPU of a cluster."""

    name: str
    node: int
    gpu: str
    state: Literal["free", "busy", "down"]


class Wire(Described):
    """A link between two GPUs or switches."""

    ends: tuple[str, ...]
    kind: str
    bytes_per_s: float
    latency_s: float
    source: str


class Reached(Described):
    """What a GPU reaches over the same switches, and how many there are."""

    from_: str
    to: str
    gpus: int
    over: tuple[str, ...]
    bytes_per_s: float
    latency_s: float


class ShownCluster(Document):
    """GPUs of a cluster, what they share, every link, and what one GPU reaches."""

    PAGE: ClassVar[str] = "apex_opt.report.topology:cluster_page"
    ROWS: ClassVar[str] = "gpus"

    schema: Literal["apex_opt.cluster/2"] = "apex_opt.cluster/2"
    command: str
    status: str
    cluster: str
    count: dict[str, int]
    gpus: tuple[Device, ...]
    switches: tuple[dict[str, str | int | None], ...]
    domains: dict[str, tuple[tuple[str, ...], ...]]
    links: tuple[Wire, ...]
    reached: tuple[Reached, ...]


class ImportedCluster(Document):
    """A cluster file, where it goes, and what is in it."""

    PAGE: ClassVar[str] = "apex_opt.report.topology:cluster_page"
    ROWS: ClassVar[str] = "notes"

    schema: Literal["apex_opt.cluster_import/2"] = "apex_opt.cluster_import/2"
    command: str
    status: str
    cluster: str
    nodes: int
    gpus: int
    notes: tuple[str, ...]
    toml: str
    target: str | None


class ListedModel(Described):
    """A model that can be named."""

    name: str
    parameters: int
    active_parameters: int
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    max_position: int
    weights: str
    source: str
    cells: dict[str, int]
    kv: str
    kv_bytes_per_token: int
    kv_bytes_at_context: int
    state_bytes_per_sequence: int
    figures: dict[str, str]
    tower_reads: str | None
    tower_parameters: int | None
    unread: tuple[str, ...]


class ListedCluster(Described):
    """An accelerator that can be named, and a node of it."""

    cluster: str
    gpu: str
    gpus: int
    memory_bytes: int
    memory_bytes_per_s: float
    bf16_flops_per_s: Number
    fp16_flops_per_s: Number
    fp8_flops_per_s: Number
    fp4_flops_per_s: Number
    int8_flops_per_s: Number
    capability: Number
    tdp_w: float
    idle_w: float
    link: str
    link_bytes_per_s: float
    usd_per_gpu_h: Number
    profile: str
    sources: Sources


class ListedTrace(TraceFacts):
    """A trace that ships."""

    title: str


class Models(Document):
    """The models that can be named; or the one that was asked for, and why it is not read."""

    PAGE: ClassVar[str] = "apex_opt.report.models:models_page"
    ROWS: ClassVar[str] = "models"

    schema: Literal["apex_opt.models/2"] = "apex_opt.models/2"
    status: str
    asked: str | None = None
    reason: str | None = None
    nearest: str | None = None
    own_family: bool | None = None
    fields: dict[str, str] | None = None
    runs: str | None = None
    models: tuple[ListedModel, ...]


class Clusters(Document):
    """The accelerators that can be named."""

    PAGE: ClassVar[str] = "apex_opt.report.tables:rendered"
    ROWS: ClassVar[str] = "clusters"

    schema: Literal["apex_opt.accelerators/2"] = "apex_opt.accelerators/2"
    status: str
    clusters: tuple[ListedCluster, ...]


class Traces(Document):
    """The traces that ship."""

    PAGE: ClassVar[str] = "apex_opt.report.tables:rendered"
    ROWS: ClassVar[str] = "traces"

    schema: Literal["apex_opt.traces/2"] = "apex_opt.traces/2"
    status: str
    traces: tuple[ListedTrace, ...]
