"""`import dylo_moe` alone is quick; its public names are found when they are asked for."""

import subprocess
import sys

import pytest

import dylo_moe


def test_importing_the_package_loads_no_heavy_library():
    program = "import sys, dylo_moe; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", dylo_moe.__all__)
def test_each_public_name_is_there(name):
    assert getattr(dylo_moe, name).__name__ == name
    assert name in dir(dylo_moe)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'DyLoRA'"):
        _ = dylo_moe.DyLoRA
