"""The recall tests on a pretrained model: one that reads well must be able to pass them, or they measure nothing."""

import pytest

from kit.convert.checkpoint import open_checkpoint
from kit.convert.evaluate import evaluate

pytestmark = pytest.mark.real


def test_smollm2_finds_needles_and_most_pairs():
    result = evaluate({"smollm2": open_checkpoint("smollm2")}, num_tokens=0, recall=[256], speed=False)
    recall = result["rows"][0]["recall"]
    assert [found["accuracy"] for found in recall["needle"]] == [1.0] * 5
    assert recall["mqar"][0]["accuracy"] > 0.5
