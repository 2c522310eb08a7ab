"""Reads Hugging Face `config.json` files of decoder-only models into the Transformer IR: see `apex_opt.ir.families`.

Which field means what, and which default a family has, follows the configuration classes of the `transformers` library.
What the text decoder does not serve is left out, and named in `Model.unread`: towers that are not known, what speaks.
Layers of multi-token prediction are left out as well.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apex_opt.errors import InputError, join_faults
from apex_opt.files import absence, json_kind, read_json, there
from apex_opt.ir.checks import count_fault, shown
from apex_opt.ir.context import LENGTHS, angle_positions, context_limit
from apex_opt.ir.families import FAMILIES, Family, Layers, Sizes
from apex_opt.ir.families.towers import read_tower
from apex_opt.ir.fields import MISSING, Fields
from apex_opt.ir.kinds import class_fits, family_of, own_family, refuse_odd_kinds, stated_family, text_type
from apex_opt.ir.model import MAX_LAYERS, Block, Model, Run
from apex_opt.ir.patterns import PatternError
from apex_opt.ir.per_layer import read_layers
from apex_opt.ir.quantisation import QUANTISATION_KEYS, Quantisation, read_quantisation
from apex_opt.ir.understood import BESIDE, changes_nothing, odd_values, refuse_unknown, unknown_fields

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from apex_opt.ir.held import Held
    from apex_opt.ir.model import Tower

    _Layer = tuple[Block, tuple[str | None, ...]]

MAX_CONFIG_BYTES: Final = 16 << 20
"""A larger file is not read: real ones are kilobytes, a weight file given by mistake is gigabytes."""

QUANTISATION_FILES: Final[tuple[tuple[str, dict[str, str]], ...]] = (
    ("hf_quant_config.json", {}),
    ("quantize_config.json", {"quant_method": "gptq"}),
    ("quant_config.json", {"quant_method": "awq"}),
)
"""Files in which tools tell of quantisation where config.json does not, and the method of those that do not name it."""

_MTP_LAYERS: Final = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "n_mtp_layers")
"""How families call their layers of multi-token prediction: DeepSeek, GLM, MiMo; Qwen3.5; MiniMax; DeepSeek-V4."""
_MTP_UNSTATED: Final = frozenset({"qwen3_next"})
"""Families whose checkpoints have one such layer without a word of it: transformers ignores their weights of mtp.*"""
_DRAFT_NAME: Final = re.compile(r"eagle(?!.*vl)|medusa|speculator|mtp|nextn|dflash|hydra|draft", re.IGNORECASE)
_DRAFT_KEYS: Final = (
    *("draft_vocab_size", "eagle_config", "dflash_config", "medusa_num_heads", "medusa_num_layers"),
    *("speculators_model_type", "speculators_config", "speculator_config"),
)

_TEXT: Final = ("text_config", "llm_config", "language_config")
"""Objects in which files have the decoder: of `transformers`; of InternVL, Ovis and NVLM; of DeepSeek-VL2."""
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")
"""What files call the number of routed experts: which of these depends on the family and on what saved the file."""

_REAL_SIZES: Final = {"hidden_size": 2048, "vocab_size": 30_000}
"""Sizes from which a model of one layer is a draft head under the name of its model, as those of EAGLE are."""
_MOST_PARAMETERS: Final = 10**15
"""Weights of the largest model taken for real, far from where bytes of a plan leave the integers of a program."""
_LONGEST_SIDE: Final = 2**28
"""Rows or columns of the largest matrix taken for real: several of them are priced as one."""
_DTYPES: Final = {"bfloat16": "bf16", "float16": "fp16", "float32": "bf16"}


def read_config(path: Path, name: str | None = None) -> Model:
    """Model described by a Hugging Face `config.json`, and by the file beside it that tells of quantisation, if any.

    Parameters and errors are those of `read_file`, with what `model_from_config` refuses besides.
    """
    return model_from_config(*read_file(path, name))


def read_file(path: Path, name: str | None = None) -> tuple[dict[str, Any], str, str]:
    """What a `config.json` holds, with the quantisation that a file beside it tells of; the model's name; its source.

    Parameters
    ----------
    path : Path             the file, or the folder that holds it as `config.json`
    name : str or None      name of the model; None takes the folder's, or the file's where it is named otherwise

    Raises
    ------
    InputError              no such file, or not JSON
    """
    try:
        file = path / "config.json" if path.is_dir() else path
        if not there(file):
            if file != path:
                raise InputError(f"{path}: the folder holds no config.json; give the model's folder or the file itself")
            raise InputError(f"{path}: {absence(path)}; give a config.json or the folder that holds it")
        config = read_json_object(file)
        if not any(config.get(key) for key in QUANTISATION_KEYS):
            # Files of several models in one folder bear the model's name before what they are called otherwise.
            prefix = file.name.removesuffix("config.json") if file.name.endswith("config.json") else ""
            for beside, method in QUANTISATION_FILES:
                if there(other := file.with_name(prefix + beside)):
                    config["quantization_config"] = {**method, **read_json_object(other)}
                    break
        if name is None:
            stem = file.name.removesuffix(".json").removesuffix(".config")
            name = stem if stem != "config" else file.resolve().parent.name
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return config, name, str(file)


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object a file holds.

    Raises
    ------
    InputError      not a regular file, empty, too large, not UTF-8, not JSON, or not an object; unreadable
    """
    value = read_json(file, limit=MAX_CONFIG_BYTES, want="give a config.json")
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds {json_kind(value)}, not an object; give a config.json")
    return value


def model_from_config(config: Mapping[str, Any], name: str, source: str) -> Model:
    """Model described by the contents of a Hugging Face `config.json`.

    A nested `text_config` is read in place of the whole. Without dtype, or with float32, a model is served in bf16.
    Biases, norms of query and key, windows and experts follow the model_type; layers that differ become several runs.

    Parameters
    ----------
    config : mapping    the parsed file
    name : str          name of the model
    source : str        where the file came from; opens every error message

    Raises
    ------
    InputError          an unsupported model_type; or all faults of the fields at once
    """
    whole, config = config, _thinker(config)
    refuse_odd_kinds((whole, config), source)
    _refuse_draft_heads(config, source)
    fields, wrapped = _text_part(config, source)
    file = source
    if wrapped:
        source += f" ({wrapped})"
    found = _reading(fields, family_of(fields, text_type(config, wrapped), source, bool(wrapped)), bool(wrapped))
    family, fields, size, layers, quantisation = found[:5]
    if wrapped:
        fields.faults.extend(_contradicted(config, fields, wrapped))
    if fields.faults:
        raise join_faults(source, list(dict.fromkeys(fields.faults)))

    tower = layers.tower or read_tower(config, size.hidden, file)
    blocks = layers.blocks
    try:
        stored = [_stored(quantisation, family, layer, block) for layer, block in enumerate(blocks)]
    except PatternError as error:
        raise InputError(f"{source}: quantization_config: {error}; give fewer or simpler ones") from None
    layout = [
        (block, tuple(None if entry is None else entry.format for entry in held))
        for block, held in zip(blocks, stored, strict=True)
    ]
    built, formats = _in_formats(layout)
    runs = tuple(Run(block=built[entry], count=sum(1 for _ in group)) for entry, group in groupby(layout))
    used = {entry for held in stored for entry in held if entry is not None}
    model = Model(
        name=name,
        hidden=size.hidden,
        vocab=size.vocab,
        tied_embeddings=found.tied,
        max_position=layers.longest or found.max_position,
        angles=angle_positions(fields),
        runs=runs,
        dtype=found.dtype,
        weight_format="+".join(formats) or found.dtype,
        kv_format=quantisation.kv_format,
        scheme=quantisation.scheme(formats, used),
        family=next(name for name, known in FAMILIES.items() if known is family),
        around=Fields(whole).text("model_type") if wrapped else "",
        tower_heads=_tower_heads(config),
        sound_heads=_sound_heads(config),
        mtp_layers=found.mtp_layers,
        tower=tower,
        unread=_unread({**whole, **config}, family, tower),
        pools=family.pools,
        stated_head_dim=stated if type(stated := fields.values.get("head_dim")) is int else 0,
        together=layers.together,
        before=layers.before,
        after=layers.after,
        source=source,
    )
    _check_size(model, fields, source)
    return model


def _repeated(fields: Fields, stated: Mapping[str, Any]) -> list[str]:
    """Other names under which a file states the same number of experts as under the one that is read."""
    told = [stated[key] for key in _EXPERTS if key in fields.asked and key in stated]
    return [key for key in _EXPERTS if key in stated and stated[key] in told]


def _contradicted(config: Mapping[str, Any], fields: Fields, wrapped: str) -> Iterator[str]:
    """Faults of sizes that a decoder leaves to its class, and which the file around it states as other ones.

    Where the decoder states them, engines read no others.

    Parameters
    ----------
    config : mapping    the whole file
    fields : Fields     of the decoder, as they were read
    wrapped : str       where it lies
    """
    for key, value in config.items():
        own = fields.values.get(key)
        sizes = type(value) is int and type(own) is int
        if sizes and value != own and key not in config[wrapped] and key in fields.asked and not changes_nothing(key):
            told = f"{shown(own)} in its class and {shown(value)} around it"
            yield f"{key} is left out of {wrapped}, {told}; give it there"


class _Reading(NamedTuple):
    """A decoder as far as it can be read; the faults of its fields say what is wrong with it."""

    family: Family
    fields: Fields
    size: Sizes
    layers: Layers
    quantisation: Quantisation
    max_position: int
    tied: bool
    dtype: str
    mtp_layers: int
    unknown: tuple[tuple[str, Any], ...]


def _reading(fields: Fields, family: Family, wrapped: bool) -> _Reading:
    """The fields of a decoder, read as those of a family."""
    stated = fields.values
    fields = fields.alike(_EXPERTS)
    if wrapped:
        # Of a configuration within another one, only what differs from the defaults of its class is written.
        fields = fields.replaced({**family.defaults, **fields.values})
    fields.idle(*family.idle)
    fields = fields.spelled(family.spelled).filled(family.implied)

    listed = (fields.get(key) for key in family.layer_lists)
    entries = next((len(rows) for rows in listed if rows and isinstance(rows, list | str)), None)
    size = Sizes(
        hidden=fields.count("hidden_size"),
        layers=fields.filled({"num_hidden_layers": entries}).count("num_hidden_layers", maximum=MAX_LAYERS),
        vocab=fields.count("vocab_size"),
    )
    max_position = context_limit(fields)
    tied = fields.flag("tie_word_embeddings", default=family.tied) or family.pools  # which have no LM head
    layers = read_layers(family, fields, size)
    dtype, quantisation, mtp_layers = _dtype(fields), read_quantisation(fields), _mtp_layers(fields)
    fields.idle(*_repeated(fields, stated))
    fields.faults.extend(odd_values(stated))
    unknown = tuple(unknown_fields(fields, stated))
    if not fields.faults:  # a reader that met one has not asked for all
        refuse_unknown(fields, unknown)
    return _Reading(family, fields, size, layers, quantisation, max_position, tied, dtype, mtp_layers, unknown)


def told_by_field(config: Mapping[str, Any], source: str) -> tuple[str, bool, dict[str, str]]:
    """What is understood of a file that is not read, field by field.

    A file of a type that is not known is told as one of the family that would understand most of it, which is no claim
    that it is one.

    Parameters
    ----------
    config : mapping    the parsed file
    source : str        where the file came from; opens an error message

    Returns
    -------
    str             `model_type` of the family
    bool            whether it is the file's own, not the one nearest to it
    dict            by field: "read", "changes nothing", "not understood", or what is wrong with it

    Raises
    ------
    InputError      the file has no decoder that could be looked at
    """
    config = _thinker(config)
    plain, wrapped = _text_part(config, source)
    stated = {key: value for key, value in plain.values.items() if value not in (None, False, 0, "", [], {})}
    own = plain.values.get("model_type")
    known = own_family(plain, text_type(config, wrapped))
    names = [known] if known else list(FAMILIES)
    found = [(name, _reading(Fields(plain.values), FAMILIES[name], bool(wrapped))) for name in names]

    def strange(entry: tuple[str, _Reading]) -> tuple[int, float, int]:
        name, reading = entry
        alike = difflib.SequenceMatcher(None, own if isinstance(own, str) else "", name).ratio()
        left_out = len(FAMILIES[name].defaults.keys() - plain.values.keys()) if wrapped else 0
        return len(reading.unknown) + len(set(reading.fields.faults)), -alike, left_out

    name, reading = min(found, key=strange)
    unknown = {key for key, _ in reading.unknown}
    told = {
        key: "not understood" if key in unknown else "read" if key in reading.fields.asked else "changes nothing"
        for key in stated
    }
    if not known and "read" not in {text for key, text in told.items() if key != "model_type"}:
        raise InputError(f"{source}: no field is one of a decoder; give a model's config.json")
    if own is None and not stated_family(plain):
        told["model_type"] = MISSING
    if known and not wrapped and not class_fits(plain.get("architectures"), FAMILIES[known]):
        told["architectures"] = f"has no class of {known}"
    told |= dict.fromkeys(unknown, "not understood")
    faults = (fault.partition(" ") for fault in dict.fromkeys(reading.fields.faults))
    return name, bool(known), told | {key: text for key, _, text in faults if key not in unknown}


def _check_size(model: Model, fields: Fields, source: str) -> None:
    """Refuse a model too large to be real, with the largest number that its file states."""
    tower = model.tower
    matrices = [matrix for block in model.blocks for matrix in block.matrices]
    matrices += [matrix for _, matrix in tower.matrices] if tower else []
    weights = max(model.parameters, tower.parameters if tower else 0)
    longest = max([model.hidden, model.vocab, *(max(matrix.rows, matrix.columns) for matrix in matrices)])
    if weights <= _MOST_PARAMETERS and longest <= _LONGEST_SIDE:
        return
    sizes = [(key, size) for key, size in fields.values.items() if type(size) is int and key not in LENGTHS]
    key, size = max(sizes, key=lambda pair: pair[1], default=("num_hidden_layers", model.layers))
    fault = (
        f"a model of {weights:,} weights; at most {_MOST_PARAMETERS:,} are read"
        if weights > _MOST_PARAMETERS
        else f"a matrix of {longest:,} rows or columns; at most {_LONGEST_SIDE:,} are read"
    )
    raise InputError(f"{source}: {fault}; give a smaller {fields.name(key)} than {size:,}")


def _tower_heads(config: Mapping[str, Any]) -> int | None:
    """Heads of the tower that reads images, 0 where the file leaves them to the tower's defaults; None without one."""
    tower = config.get("vision_config")
    if not isinstance(tower, dict):
        return None
    stated = (tower.get(key) for key in ("num_attention_heads", "vt_num_attention_heads", "num_heads"))
    return next((heads for heads in stated if count_fault("heads", heads) is None and heads), 0)


def _sound_heads(config: Mapping[str, Any]) -> int:
    """Heads of the tower that reads sound beside a decoder; 0 where they are not stated, or there is none."""
    tower = config.get("audio_config")
    heads = tower.get("encoder_attention_heads") if isinstance(tower, dict) else None
    return heads if isinstance(heads, int) and count_fault("heads", heads) is None else 0


def _unread(config: Mapping[str, Any], family: Family, tower: Tower | None) -> tuple[str, ...]:
    """Objects that have towers, or what speaks, of which nothing is counted: their names, and the kinds they state."""
    if family.pools:
        return ()
    found = []
    for key, value in config.items():
        known = tower is not None and key == "vision_config"
        if known or not isinstance(value, dict) or not value or not BESIDE.search(key):
            continue
        kind = value.get("model_type")
        found.append(f"{key} ({kind:.40})" if isinstance(kind, str) and kind else key)
    return tuple(found)


def _mtp_layers(fields: Fields) -> int:
    """Layers of multi-token prediction in the checkpoint: see `_MTP_LAYERS`; 0 where the file states none."""
    stated = [fields.count(key, default=0, minimum=0, maximum=MAX_LAYERS) for key in _MTP_LAYERS]
    return 1 if fields.text("model_type") in _MTP_UNSTATED else next(filter(None, stated), 0)


def _stored(quantisation: Quantisation, family: Family, layer: int, block: Block) -> tuple[Held | None, ...]:
    """How the checkpoint stores the covered matrices of one layer, in the order of its cells' `forms`."""
    found = []
    for part in (part for cell in block.cells for part in cell.forms.values()):
        modules = family.modules[part]
        if part == "experts":
            numbers = [number for number in quantisation.experts if number < block.ffn.experts]
            modules = tuple(name.replace(".experts.0.", f".experts.{n}.") for n in numbers for name in modules)
        elif part.startswith("shared ") and not block.ffn.dense:
            modules = ()
        found.append(quantisation.held(layer, modules))
    return tuple(found)


def _in_formats(layout: Sequence[_Layer]) -> tuple[dict[_Layer, Block], list[str]]:
    """Blocks that name the formats of their matrices, and those of the checkpoint, that of the most weights first."""
    counts = Counter(layout)
    weights: Counter[str] = Counter()
    for (block, stored), count in counts.items():
        for matrix in _numbered(block, range(1, len(stored) + 1)).matrices:
            if matrix.quantised and (name := stored[matrix.quantised - 1]) is not None:
                weights[name] += count * matrix.weights
    formats = sorted(weights, key=lambda name: -weights[name])
    place = {name: index + 1 for index, name in enumerate(formats)}
    built = {}
    for block, stored in counts:
        # A checkpoint in 16 bit leaves nothing out: another one of it may have any matrix in another format.
        forms = [0 if name is None else place.get(name, 1) for name in stored] if formats else [1] * len(stored)
        built[block, stored] = _numbered(block, forms)
    return built, formats


def _numbered(block: Block, forms: Iterable[int]) -> Block:
    """The block with these formats of its covered matrices, in the order of its cells' `forms`."""
    numbers = iter(forms)
    changes: list[dict[str, Any]] = [dict(zip(cell.forms, numbers, strict=False)) for cell in block.cells]
    return replace(block, attention=replace(block.attention, **changes[0]), ffn=replace(block.ffn, **changes[1]))


def _refuse_draft_heads(config: Mapping[str, Any], source: str) -> None:
    """Refuse the heads that guess tokens for another model: nothing can be served with one alone."""
    parts = (config, *(config[key] for key in _TEXT if isinstance(config.get(key), dict)))
    for fields in parts:
        architectures = fields.get("architectures")
        names = [fields.get("model_type"), *(architectures if isinstance(architectures, list) else ())]
        signs = [name for name in names if isinstance(name, str) and _DRAFT_NAME.search(name)]
        signs += [key for key in _DRAFT_KEYS if fields.get(key)]
        if count_fault("layers", fields.get("num_hidden_layers"), 1, 1) is None and all(
            isinstance(size := fields.get(key), int) and size >= least for key, least in _REAL_SIZES.items()
        ):
            signs.append("a single layer under a whole vocabulary")
        if signs:
            raise InputError(f"{source}: {signs[0]:.60} is that of a draft head; give the model it drafts for")


def _thinker(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What writes, of a model that speaks as well: engines serve that part of Qwen's Omni models."""
    part = config.get("thinker_config")
    if not isinstance(part, dict):
        return config
    shared = ("dtype", "torch_dtype", *QUANTISATION_KEYS)
    return {**{key: config[key] for key in shared if config.get(key) is not None}, **part}


def _text_part(config: Mapping[str, Any], source: str) -> tuple[Fields, str]:
    """The decoder's fields, and the object they lay in, which inherits what concerns the whole model; "": none."""
    there = [key for key in _TEXT if config.get(key) is not None]
    if not there:
        return Fields(config), ""
    named, *others = there
    if odd := next((key for key in others if config[key] != config[named]), None):
        raise InputError(f"{source}: {named} and {odd} differ, and a file has one decoder; give it without one of them")
    inner = Fields(config).section(named)
    if inner is None:
        raise InputError(f"{source}: {named} must be an object, not {shown(config[named])}")
    shared = ("dtype", "torch_dtype", "tie_word_embeddings", *QUANTISATION_KEYS)
    inherited = {key: config[key] for key in shared if key in config}
    own = {key: value for key, value in inner.values.items() if value is not None or key not in inherited}
    # Engines ask the whole file first what is quantised, and whether the LM head is the embedding.
    first = {key: config[key] for key in QUANTISATION_KEYS if config.get(key)}
    if config.get("tie_word_embeddings") is not None:
        first["tie_word_embeddings"] = config["tie_word_embeddings"]
    return Fields({**inherited, **own, **first}), named


def _dtype(fields: Fields) -> str:
    """16-bit type the model is served in."""
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    given = fields.text(key).removeprefix("torch.")
    if given and given not in _DTYPES:
        fields.fault(key, f"must be one of {', '.join(_DTYPES)}, not {shown(given)}")
    return _DTYPES.get(given, "bf16")
