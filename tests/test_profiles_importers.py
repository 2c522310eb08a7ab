"""Tables of APEX+ and Vidur: what their columns mean, what is left out, and what is no such table.

The files are made here, in the layout of those repositories, from times that simple laws give.
"""

from __future__ import annotations

import csv
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from apex_opt.cluster import load_cluster
from apex_opt.errors import InputError, UnknownNameError
from apex_opt.profiles import load_profile
from apex_opt.profiles.card import read_card
from apex_opt.profiles.importers import import_profile
from apex_opt.profiles.schema import schema_of
from apex_opt.profiles.tables import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.profiles.folder import Written

H100, A100 = (load_cluster(name).gpu for name in ("h100-sxm", "a100-sxm"))
VIDUR_OPS = (
    *("emb", "input_layernorm", "attn_pre_proj", "attn_rope", "attn_post_proj", "post_attention_layernorm"),
    *("mlp_up_proj", "mlp_act", "mlp_down_proj", "add"),
)
STATISTICS = ("min", "max", "mean", "median", "std")


def write_csv(path: Path, head: list[str], rows: list[list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def found(imported: Written, kind: str) -> dict[str, Any]:
    return read_table(imported.folder / f"{kind}.npz", schema_of(kind))


def dropped(imported: Written, kind: str) -> dict[str, int]:
    return dict(next(report.dropped for report in imported.reports if report.kind == kind))


# --- APEX+


def product_us(m: int, n: int, k: int) -> int:
    return 13 + int(2 * m * n * k / 5e8 + n * k / 1e6)


def apex_gemm(path: Path, gpu: str = "H100-SXM-80GB", *, energies: bool = False, slower: int = 1) -> Path:
    """x[m,k] y[k,n]: there m counts output features and n tokens."""
    head = ["gpu", "dtype", "m", "k", "n", "time(us)"] + ["avg_power(W)", "avg_energy(uJ)"] * energies
    rows = [
        [gpu, dtype, features, depth, tokens, product_us(tokens, features, depth) * slower, *[120.0, 9.0] * energies]
        for dtype, features, depth, tokens in product(("half", "float"), (1024, 4096), (512, 2048), (1, 8, 64, 512))
    ]
    return write_csv(path, head, rows)


def apex_mha(path: Path) -> Path:
    head = ["gpu", "dtype", "num_heads", "head_size", "batch_size", "seq_len", "time(us)"]
    head += ["mem_clk_freq", "graph_clk_freq", "avg_power(W)", "avg_energy(uJ)"]
    rows = [
        ["H100-SXM-80GB", "half", heads, 128, batch, length, int(batch * length * heads / 50 * slow), 2619, clock, 0, 0]
        for (clock, slow), heads, batch, length in product(((1980, 1), (810, 2)), (8, 32), (1, 4), (16, 256, 4096))
    ]
    return write_csv(path, head, rows)


def apex_comm(path: Path, gpu: str = "H100-SXM-80GB") -> Path:
    head = ["gpu", "num_nodes", "num_gpus_per_node", "dtype", "size(kb)", "time(us)", "gpu_freq", "energy(J)"]
    rows = [
        # Rows end before the last columns, as there.
        [gpu, nodes, gpus, dtype, size, 10 + size // 200]
        for nodes, gpus, dtype, size in product((1, 2), (1, 2, 8), ("half", "float"), (0, 1, 64, 1024, 65536))
    ]
    return write_csv(path, head, rows)


@pytest.fixture
def apex(tmp_path: Path) -> Path:
    """A repository with tables of two accelerators."""
    profile = tmp_path / "apex_plus" / "profile"
    mine = profile / "comp" / "H100-SXM-80GB"
    apex_gemm(mine / "gemm_1980.csv", energies=True)
    apex_gemm(mine / "gemm_810.csv", slower=2)
    apex_mha(mine / "mha_1980.csv")
    apex_mha(mine / "bimha_1980.csv")
    for name in ("all_reduce", "alltoall", "sendrecv"):
        apex_comm(profile / "comm" / "H100-SXM-80GB" / f"{name}.csv")
    apex_gemm(profile / "comp" / "V100-PCIE-16GB" / "gemm_0.csv", "V100-PCIE-16GB")
    write_csv(tmp_path / "apex_plus" / "data.csv", ["TIMESTAMP"], [[1]])
    return tmp_path / "apex_plus"


def test_products_of_apex_have_rows_and_features_where_we_have_them(apex: Path, tmp_path: Path) -> None:
    table = found(import_profile("apex", apex, H100, tmp_path / "out"), "gemm")
    shapes = {tuple(map(int, row)) for row in zip(table["m"], table["n"], table["k"], strict=True)}
    assert shapes == set(product((1, 8, 64, 512), (1024, 4096), (512, 2048)))
    assert set(table["dtype"]) == {"fp16"}
    assert np.isnan(table["energy_uj"]).all(), "its energies are means over longer intervals than the work"
    row = (table["m"] == 512) & (table["n"] == 4096) & (table["k"] == 2048)
    assert table["time_us"][row] == pytest.approx([product_us(512, 4096, 2048)], rel=1e-3)


def test_the_default_or_the_highest_clock_of_apex_is_taken(apex: Path, tmp_path: Path) -> None:
    imported = import_profile("apex", apex, H100, tmp_path / "out")
    assert dict(imported.passed_over)["gemm_810.csv"] == "another clock than the 1980 MHz taken"
    assert dropped(imported, "gemm") == {"formats not modelled": 16}
    assert dropped(imported, "attention_prefill") == {"another clock": 12}
    assert "gemm at 1980 MHz" in dict(read_card(imported.folder).texts)["hardware"]
    apex_gemm(apex / "profile" / "comp" / "H100-SXM-80GB" / "gemm_0.csv")
    imported = import_profile("apex", apex, H100, tmp_path / "out")
    assert {"gemm_810.csv", "gemm_1980.csv"} < set(dict(imported.passed_over))


def test_attention_of_apex_has_as_many_kv_heads_as_heads(apex: Path, tmp_path: Path) -> None:
    imported = import_profile("apex", apex, H100, tmp_path / "out")
    table = found(imported, "attention_prefill")
    assert table["kv_heads"].tolist() == table["heads"].tolist()
    row = (table["heads"] == 32) & (table["batch"] == 4) & (table["length"] == 256)
    assert table["time_us"][row] == pytest.approx([4 * 256 * 32 / 50], rel=2e-3)
    assert dict(imported.passed_over)["bimha_1980.csv"] == "attention without a causal mask"


def test_collectives_of_apex_are_those_within_a_node_by_whole_vector(apex: Path, tmp_path: Path) -> None:
    imported = import_profile("apex", apex, H100, tmp_path / "out")
    table = found(imported, "collective")
    assert set(table["op"]) == {"all_reduce", "all_to_all"}
    assert set(table["ranks"]) == {2.0, 8.0}
    assert set(table["bytes"]) == {1024.0 * size for size in (1, 64, 1024, 65536)}
    row = (table["op"] == "all_reduce") & (table["ranks"] == 8) & (table["bytes"] == 2**26)
    assert table["time_us"][row] == pytest.approx([10 + 65536 // 200], rel=1e-3)
    # Each row counts for the first reason that takes it: of a file 30 rows, then 15, 5 and 2.
    assert dropped(imported, "collective") == {
        "elements of 4 bytes (the same times, by bytes)": 60,
        "several nodes": 30,
        "one GPU": 10,
        "sizes below 1 KiB, which are given as 0": 4,
    }
    assert dict(imported.passed_over)["sendrecv.csv"] == "point to point, for which we have no table"


def test_the_card_of_apex_says_where_its_tables_come_from_and_under_which_licence(apex: Path, tmp_path: Path) -> None:
    imported = import_profile("apex", apex, H100, tmp_path / "out")
    assert imported.folder == tmp_path / "out" / "h100-sxm" / "apex"
    card = read_card(imported.folder)
    assert (card.licence, card.engine, card.gpu, card.use) == ("MIT", None, H100.name, "times")
    texts = dict(card.texts)
    assert "microsoft/apex_plus" in texts["origin"]
    assert "energy" in texts["not_measured"]
    assert "screen" in texts["derived"]


def test_a_folder_or_a_file_of_apex_will_do(apex: Path, tmp_path: Path) -> None:
    folder = apex / "profile" / "comp" / "H100-SXM-80GB"
    assert {r.kind for r in import_profile("apex", folder, H100, tmp_path / "a").reports} == {
        "gemm",
        "attention_prefill",
    }
    assert [r.kind for r in import_profile("apex", folder / "gemm_810.csv", H100, tmp_path / "b").reports] == ["gemm"]


def test_an_accelerator_without_profiles_of_ours_gets_a_folder_of_its_own_name(apex: Path, tmp_path: Path) -> None:
    v100 = load_cluster("v100-pcie").gpu
    imported = import_profile("apex", apex, v100, tmp_path / "out")
    assert imported.folder == tmp_path / "out" / "v100-pcie-16gb" / "apex"
    assert "default clock" in dict(read_card(imported.folder).texts)["hardware"]


def test_tables_of_other_accelerators_are_not_taken_for_ours(apex: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has tables of H100-SXM-80GB, V100-PCIE-16GB, none of a100-sxm-80gb"):
        import_profile("apex", apex, A100, tmp_path / "out")
    folder = apex / "profile" / "comp" / "V100-PCIE-16GB"
    with pytest.raises(InputError, match=r"gemm_0\.csv: measured on 'V100-PCIE-16GB', not on h100-sxm-80gb"):
        import_profile("apex", folder, H100, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Vidur


def vidur_mlp(path: Path, **layer: Any) -> Path:
    """One layer of a model: times of its ten operations in ms."""
    shape = {"n_head": 32, "n_kv_head": 8, "n_embd": 4096, "n_expanded_embd": 14336, "vocab_size": 128256}
    shape |= {"use_gated_mlp": True} | layer
    head = [f"time_stats.{op}.{statistic}" for op, statistic in product(VIDUR_OPS, STATISTICS)]
    head += [*shape, "num_tokens", "num_tensor_parallel_workers"]
    rows = []
    for tokens, ranks in product((1, 16, 256, 4096), (1, 4)):
        times = []
        for at, _ in enumerate(VIDUR_OPS):
            median = (at + 1) * (0.01 + tokens * 1e-4 / ranks)
            times += [median * 0.9, median * 1.1, median * 1.01, median, 0.0]
        rows.append([*times, *shape.values(), tokens, ranks])
    return write_csv(path, head, rows)


def vidur_attention(path: Path, backend: str = "AttentionBackend.FLASHINFER", slower: float = 1.0) -> Path:
    ops = ("attn_input_reshape", "attn_kv_cache_save", "attn_prefill", "attn_decode", "attn_output_reshape")
    head = [f"time_stats.{op}.{statistic}" for op, statistic in product(ops, STATISTICS)]
    head += ["n_embd", "n_q_head", "n_kv_head", "block_size", "num_tensor_parallel_workers", "max_model_len"]
    head += ["batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill", "attention_backend"]
    calls = [(1, chunk, cached, True) for chunk, cached in product((64, 512, 4096), (0, 128))]
    calls += [(batch, 0, cached, False) for batch, cached in product((1, 8, 64), (127, 1023, 4095))]
    rows = []
    for ranks, (batch, chunk, cached, prefill) in product((1, 4), calls):
        ms = 0.005 + (chunk * chunk * 1e-6 if prefill else batch * cached * 4e-6) / ranks
        times = {"attn_prefill": ms * slower if prefill else "", "attn_decode": "" if prefill else ms * slower}
        row = [times.get(op, 0.001) for op, _ in product(ops, STATISTICS)]
        rows.append([*row, 4096, 32, 8, 16, ranks, 4096, batch, chunk, cached, prefill, backend])
    return write_csv(path, head, rows)


def vidur_all_reduce(path: Path, op: str = "all_reduce") -> Path:
    head = ["", *(f"time_stats.{op}.{statistic}" for statistic in STATISTICS)]
    head += ["rank", "num_workers", "size", "collective", "devices_per_node", "max_devices_per_node"]
    rows = []
    for (workers, per_node), size in product(((2, 1), (2, 2), (8, 8), (16, 8), (1, 1)), (2048, 2**20, 2**26)):
        ms = 0.02 + size * 1e-9
        rows.append([len(rows), ms, ms, ms, ms, 0.0, 0, workers, size, op, per_node, 8])
    return write_csv(path, head, rows)


@pytest.fixture
def vidur(tmp_path: Path) -> Path:
    """A repository with tables of two models on one device, of another device, of two wirings."""
    data = tmp_path / "vidur" / "data" / "profiling"
    mine = data / "compute" / "a100" / "meta-llama" / "Meta-Llama-3-8B"
    vidur_mlp(mine / "mlp.csv")
    vidur_attention(mine / "attention.csv")
    vidur_mlp(data / "compute" / "a100" / "microsoft" / "phi-2" / "mlp.csv", use_gated_mlp=False, n_kv_head=32)
    vidur_mlp(data / "compute" / "h100" / "microsoft" / "phi-2" / "mlp.csv")
    for wiring, op in product(("dgx", "pairwise_nvlink"), ("all_reduce", "send_recv")):
        vidur_all_reduce(data / "network" / f"a100_{wiring}" / f"{op}.csv", op)
    return tmp_path / "vidur"


def test_a_layer_of_vidur_is_its_four_products(vidur: Path, tmp_path: Path) -> None:
    folder = vidur / "data" / "profiling" / "compute" / "a100" / "meta-llama"
    table = found(import_profile("vidur", folder, A100, tmp_path / "out"), "gemm")
    shapes = {tuple(map(int, row)) for row in zip(table["n"], table["k"], strict=True)}
    whole = {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)}
    quarter = {(1536, 4096), (4096, 1024), (7168, 4096), (4096, 3584)}
    assert shapes == whole | quarter
    assert set(table["dtype"]) == {"fp16"}
    for (n, k), place, ranks in (((6144, 4096), 3, 1), ((7168, 4096), 7, 4), ((4096, 3584), 9, 4)):
        row = (table["n"] == n) & (table["k"] == k) & (table["m"] == 256)
        assert table["time_us"][row] == pytest.approx([place * (10 + 25.6 / ranks)], rel=1e-3)


def test_layers_without_a_gate_have_half_the_columns_and_equal_products_become_one(vidur: Path, tmp_path: Path) -> None:
    imported = import_profile("vidur", vidur, A100, tmp_path / "out")
    table = found(imported, "gemm")
    shapes = {tuple(map(int, row)) for row in zip(table["n"], table["k"], strict=True)}
    assert {(14336, 4096), (12288, 4096)} <= shapes
    # Output and down projections are of the same shapes in both models.
    assert dropped(imported, "gemm") == {"repeats and slower kernels of one key": 16}
    assert ("mlp.csv", "embedding, norms, rotary, activation, sum: a memory table also needs copies") in (
        imported.passed_over
    )


def test_decode_of_vidur_adds_the_new_token_and_prefill_is_of_whole_prompts(vidur: Path, tmp_path: Path) -> None:
    imported = import_profile("vidur", vidur, A100, tmp_path / "out")
    decode, prefill = found(imported, "attention_decode"), found(imported, "attention_prefill")
    assert set(decode["context"]) == {128.0, 1024.0, 4096.0}
    heads = {tuple(map(int, row)) for row in zip(decode["heads"], decode["kv_heads"], decode["head_dim"], strict=True)}
    assert heads == {(32, 8, 128), (8, 2, 128)}
    row = (decode["heads"] == 8) & (decode["batch"] == 64) & (decode["context"] == 4096)
    assert decode["time_us"][row] == pytest.approx([5 + 64 * 4095 * 4e-3 / 4], rel=1e-3)
    assert dropped(imported, "attention_decode") == {}
    assert set(prefill["length"]) == {64.0, 512.0, 4096.0}
    assert dropped(imported, "attention_prefill") == {"prompts that continue a cached context": 6}
    assert "FLASHINFER" in dict(read_card(imported.folder).texts)["software"]


def test_of_several_attention_backends_the_fastest_stays(vidur: Path, tmp_path: Path) -> None:
    other = vidur / "data" / "profiling" / "compute" / "a100" / "meta-llama" / "other" / "attention.csv"
    vidur_attention(other, "AttentionBackend.FLASH_ATTENTION", slower=0.5)
    imported = import_profile("vidur", vidur, A100, tmp_path / "out")
    table = found(imported, "attention_decode")
    row = (table["heads"] == 32) & (table["batch"] == 1) & (table["context"] == 128)
    assert table["time_us"][row] == pytest.approx([(5 + 0.127 * 4) / 2], rel=1e-3)
    assert dropped(imported, "attention_decode") == {"repeats and slower kernels of one key": 18}


def test_all_reduces_of_vidur_are_those_within_a_node_of_the_catalogue(vidur: Path, tmp_path: Path) -> None:
    imported = import_profile("vidur", vidur, A100, tmp_path / "out")
    table = found(imported, "collective")
    assert sorted(zip(table["ranks"], table["bytes"], strict=True)) == list(product((2, 8), (2048, 2**20, 2**26)))
    assert table["time_us"].max() == pytest.approx(20 + 2**26 * 1e-6, rel=1e-3)
    assert dropped(imported, "collective") == {"several nodes": 6, "one GPU": 3}
    passed = dict(imported.passed_over)
    assert passed["a100_dgx/send_recv.csv"] == "point to point, for which we have no table"
    assert passed["a100_pairwise_nvlink/all_reduce.csv"] == "a node wired otherwise than the catalogue's"


def test_the_card_of_vidur_says_where_its_tables_come_from_and_under_which_licence(vidur: Path, tmp_path: Path) -> None:
    card = read_card(import_profile("vidur", vidur, A100, tmp_path / "out").folder)
    assert (card.name, card.licence, card.engine) == ("a100-sxm/vidur", "MIT", None)
    assert "microsoft/vidur" in dict(card.texts)["origin"]


def test_a_device_without_tables_of_vidur_is_told_which_there_are(vidur: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has nothing to import for l40s-48gb \(l40s\), only: a100; a100_dgx"):
        import_profile("vidur", vidur, load_cluster("l40s").gpu, tmp_path / "out")


# --- both


def test_what_was_imported_is_looked_up(vidur: Path, tmp_path: Path) -> None:
    import_profile("vidur", vidur, A100, tmp_path / "out")
    profile = load_profile(A100, profiles=str(tmp_path / "out"))
    expected = [3 * (10 + tokens * 0.1) * 1e-6 for tokens in (1, 16, 256, 4096)]
    assert profile.gemm_time_s("fp16", np.array([1, 16, 256, 4096]), 6144, 4096) == pytest.approx(expected, rel=2e-3)
    assert "vidur" in profile.provenance["gemm fp16"]


def test_equal_files_give_equal_folders(vidur: Path, tmp_path: Path) -> None:
    folders = [import_profile("vidur", vidur, A100, tmp_path / name).folder for name in ("one", "two")]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        ("apex", "gemm_0", "gpu,dtype,m,k,n\n", r"column time\(us\) is missing; it has gpu, dtype, m, k, n"),
        ("apex", "mha", "a,b\n1,2\n", r"column num_heads, .*, gpu, dtype is missing; it has a, b"),
        ("apex", "all_reduce", "", r"column num_nodes, .* is missing; it has $"),
        ("apex", "gemm", "gpu,dtype,m,k,n,time(us)\n", "a header and no rows"),
        ("apex", "gemm", "gpu,dtype,m,k,n,time(us)\nH100,half,1,1,1,x\n", r"line 2: time\(us\) = 'x' must be a number"),
        ("apex", "gemm", "gpu,dtype,m,k,n,time(us)\n,half,1,1,1,5\n", "measured on '', not on h100-sxm-80gb"),
        ("apex", "gemm", "gpu,dtype,m,k,n,time(us)\nH100,half,-1,1,1,5\n", "no row can be used .*out of bounds: 1"),
        ("apex", "gemm", "gpu,dtype,m,k,n,time(us)\nH100,half,1,1,1,0\n", "no row can be used"),
        ("apex", "gemm", "gpu,dtype,m,k,n,time(us)\nH100,float,1,1,1,5\n", "no row can be used .*not modelled: 1"),
        ("apex", "sendrecv", "gpu\n", "point to point, for which we have no table; nothing to import"),
        ("apex", "notes", "gpu\n", "holds no tables of APEX"),
        ("vidur", "mlp", "num_tokens\n1\n", "not a table of Vidur: column num_tensor_parallel_workers, n_head"),
        ("vidur", "attention", "n_embd\n1\n", "not a table of Vidur: column n_q_head"),
        (
            "vidur",
            "all_reduce",
            "size\n1\n",
            r"not a table of Vidur: column num_workers, .*median is missing; it has size",
        ),
        ("vidur", "gemm_0", "gpu\n", "holds no tables of Vidur"),
        ("vidur", "mlp", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_files_that_are_no_such_tables_are_refused_in_one_line(
    kind: str, name: str, text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / f"{name}.csv").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        import_profile(kind, tmp_path, H100, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "out").exists()


def test_attention_without_any_time_is_refused(tmp_path: Path) -> None:
    path = vidur_attention(tmp_path / "attention.csv")
    path.write_text(path.read_text().replace("attn_prefill", "a").replace("attn_decode", "b"))
    with pytest.raises(InputError, match=r"neither column time_stats\.attn_decode\.median nor"):
        import_profile("vidur", tmp_path, A100, tmp_path / "out")


def test_files_and_kinds_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        import_profile("apex", tmp_path / "nowhere", H100, tmp_path / "out")
    with pytest.raises(UnknownNameError, match="kind of profile 'apx'; did you mean apex"):
        import_profile("apx", tmp_path, H100, tmp_path / "out")
    (tmp_path / "gemm.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-16 text; save it as UTF-8; give a table of APEX"):
        import_profile("apex", tmp_path, H100, tmp_path / "out")
