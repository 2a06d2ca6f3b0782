"""Resident memory over many batch sizes; ``sizes.py`` measures every recipe."""

import pytest
from attack.sizes import compare


@pytest.mark.attack
def test_resident_memory_does_not_grow_with_the_number_of_batch_sizes():
    assert compare("hfp8", 80)["ratio"] <= 1.05
