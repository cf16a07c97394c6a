import pytest
import torch

from dylo_moe import training


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decides by itself")
@pytest.mark.parametrize(("flags", "fast"), [({"avx512f", "amx_tile"}, True), ({"avx512f"}, False), (set(), False)])
def test_bf16_is_chosen_on_a_cpu_only_where_it_has_amx_tiles(monkeypatch, flags, fast):
    monkeypatch.setattr(training, "_cpu_flags", lambda: flags)
    assert training.multiplies_bf16_fast() is fast
