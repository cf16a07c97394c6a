"""What several tests of the mixture of quantised experts use."""

from pathlib import Path

import pytest

from moe_ext.moqe.__main__ import main
from moe_ext.moqe.experts.quantize import quantize
from moe_ext.moqe.options import QuantizeOptions


def quantize_to(folder: Path, model, schemes: str, **options) -> list[Path]:
    """Experts of a model, as the command makes them."""
    return quantize(QuantizeOptions(model=str(model), schemes=schemes, output=str(folder), group_size=16, **options))


def refused(argv, capsys) -> str:
    """The one line that a refused command says on its way out with exit code 2."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in argv])
    assert left.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("python -m moe_ext.moqe")
    return said
