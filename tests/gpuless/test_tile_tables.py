"""Tables of tiles that were measured: the file, who may use it, and that kernels go by it."""

import dataclasses
import json

import pytest
import torch
import triton
from torch import nn

from int8fx.kernels.gpu import configs, tile_tables
from int8fx.kernels.gpu.configs import DecodeConfig, GemmConfig
from int8fx.kernels.gpu.tile_tables import TileTable, file_name, load, using
from int8fx.testing.gpuless.layers import generated, serve_cpu_tensors_with_gpu_kernels
from int8fx.testing.nogpu import fake_cuda

GPU = fake_cuda.install("H100")
serve_cpu_tensors_with_gpu_kernels()

TILE = GemmConfig(64, 128, 256, 4, 3)
ROWS = DecodeConfig(128, 64, 8, 2)
TABLE = TileTable(
    GPU.name,
    "sm_90",
    GPU.multiprocessors,
    "580.65",
    {"torch": torch.__version__, "triton": triton.__version__},
    {(512, 4096, 1024): TILE, (None, 4096, 1024): GemmConfig(128, 256, 64, 8, 4, extra_m=64)},
    {("rows 16", 4096, 1024): ROWS},
    {(512, 4096, 1024): 31.5, (None, 4096, 1024): 200.0, ("rows 16", 4096, 1024): 9.25},
)


def test_a_table_is_read_as_it_was_written():
    text = TABLE.to_json()
    assert TileTable.from_json(text) == TABLE
    rows = json.loads(text)["products"]
    assert rows[0]["tile"] == {
        "block_m": 64, "block_n": 128, "block_k": 256, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    assert (rows[0]["us"], rows[1]["rows"]) == (31.5, None)


def changed(**parts: object) -> str:
    return json.dumps(json.loads(TABLE.to_json()) | parts)


def with_tile(**tile: object) -> str:
    row = {"rows": 512, "N": 4096, "K": 1024, "us": 1.0}
    return changed(products=[row | {"tile": tile}])


SIZES = {"block_m": 64, "block_n": 128, "block_k": 256, "num_warps": 4, "num_stages": 3}
ROW = {"N": 4096, "K": 1024, "us": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(format=2), "of format 2; known: 1"),
        ("[]", "of format 'list'; known: 1"),
        (json.dumps({"format": 1}), "without 'device'"),
        (with_tile(**SIZES, block_q=3), "a tile with block_q; known: block_m, "),
        (with_tile(block_m=64), "a tile without block_n, block_k, num_warps, num_stages"),
        (with_tile(**SIZES | {"block_m": "64"}), "block_m is '64'; it has to be an integer"),
        (with_tile(**SIZES | {"block_m": True}), "block_m is True; it has to be an integer"),
        (with_tile(**SIZES, parts=8), "8 parts for rows = 512, N = 4096, K = 1024: 272 tiles; 256 can"),
        (with_tile(**SIZES, parts=2, extra_m=32), "without extended tiles"),
        (with_tile(**SIZES, extra_m=16), "extra_m 16 of block_m 64; 0 or half of it"),
        (changed(decodes=[ROW | {"kind": "rows 8", "tile": {}}]), "a tile without block_n"),
        (
            changed(decodes=[ROW | {"kind": "rows 8", "tile": dataclasses.asdict(ROWS)}]),
            "of kind 'rows 8' .* known: 'rows 16', 'rows 64', 'quantises'",
        ),
        (
            changed(device={"name": "?", "arch": "sm_1", "processors": 1, "driver": ""}),
            "none for 'sm_1'",
        ),
    ],
)
def test_what_is_no_table_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TileTable.from_json(text)


def write(folder, table: TileTable) -> None:
    (folder / file_name(GPU.name)).write_text(table.to_json())


def test_a_file_has_the_name_of_its_gpu(tmp_path):
    assert file_name("NVIDIA H200") == "h200.json"
    assert file_name("NVIDIA GeForce RTX 5090") == "rtx-5090.json"
    assert load(GPU.name, "sm_90", tmp_path) is None
    write(tmp_path, TABLE)
    assert load(GPU.name, "sm_90", tmp_path) == TABLE
    assert load("NVIDIA H200", "sm_90", tmp_path) is None


def test_a_table_of_another_gpu_or_another_compiler_is_none_for_this(tmp_path, monkeypatch):
    write(tmp_path, dataclasses.replace(TABLE, device="NVIDIA H800"))
    with pytest.raises(ValueError, match=f"{file_name(GPU.name)}: it is of NVIDIA H800"):
        load(GPU.name, "sm_90", tmp_path)
    write(tmp_path, dataclasses.replace(TABLE, versions={"triton": "2.0.0"}))
    said = []
    monkeypatch.setattr(tile_tables.logger, "info", lambda text, *values: said.append(text % values))
    assert load(GPU.name, "sm_90", tmp_path) is None
    assert "measured with triton 2.0.0" in said[0]


CPU = torch.device("cpu")


def product_candidates(M: int, N: int, dtype: torch.dtype) -> tuple[list[GemmConfig], list[GemmConfig]]:
    built_in = configs.gemm_configs("sm_90", M, N, 1024, dtype, 132)
    return built_in, tile_tables.product_tiles(built_in, CPU, M, N, 1024, dtype)


@pytest.mark.parametrize("M", [257, 400, 512])
def test_what_was_measured_is_the_best_guess_for_its_class_and_its_shape(M):
    with using(TABLE):
        built_in, candidates = product_candidates(M, 4096, torch.float16)
        assert candidates == [*built_in, TILE]
        for other in ((256, 4096, torch.float16), (M, 4112, torch.float16), (M, 4096, torch.float32)):
            built_in, candidates = product_candidates(*other)
            assert candidates == built_in
    built_in, candidates = product_candidates(M, 4096, torch.float16)
    assert candidates == built_in


def test_all_extended_tiles_of_a_launch_are_of_one_size():
    with using(TABLE):
        built_in, candidates = product_candidates(4096, 4096, torch.float16)
    (extended,) = [tile for tile in candidates if tile.extra_m]
    assert extended == candidates[-1] == TABLE.products[None, 4096, 1024]
    assert any(tile.extra_m for tile in built_in) and extended not in built_in


def test_a_measured_tile_that_is_a_candidate_anyway_is_tried_once():
    built_in = configs.decode_configs("sm_90", "rows 16", 4096, 1024, 132)
    first = {("rows 16", 4096, 1024): built_in[0]}
    with using(dataclasses.replace(TABLE, decodes=first)):
        found = tile_tables.decode_tiles(built_in, CPU, "rows 16", 4096, 1024, torch.bfloat16)
    assert found == [*built_in[1:], built_in[0]]


@pytest.mark.parametrize(
    ("M", "block_n"), [(1, ROWS.block_n), (400, TILE.block_n), (2000, 256), (200, None)]
)
def test_kernels_are_launched_with_it(M, block_n):
    model = nn.Sequential(nn.RMSNorm(1024), nn.Linear(1024, 4096)).half().requires_grad_(False)
    x = torch.empty(M, 1024, dtype=torch.float16)
    name = "decode_kernel" if M <= 16 else "gemm_kernel"

    def launched() -> dict:
        (kernel,) = [k for k in generated(model, x).kernels if k.name.startswith(name)]
        (config,) = kernel.configs
        return dict(kernel.autotuner.triton_meta["constants"]) | config.kwargs

    built_in = launched()
    with using(TABLE):
        chosen = launched()
    assert (built_in == chosen) == (block_n is None)
    assert block_n in (None, chosen["BLOCK_N"])
