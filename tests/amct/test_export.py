"""The last line of a script for AMCT: there is no export yet, and the error says how to keep the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import amct_lightning as amct
from amct_lightning import QuantRecord


def test_the_last_line_of_a_script_says_what_to_do_and_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4)
    amct.create_quant_retrain_config("config.json", model, x)
    qat = amct.create_quant_retrain_model("config.json", model, "record.txt", x)
    qat.train()(x)
    with pytest.raises(NotImplementedError, match=r"no ONNX export yet.*'out/net'") as caught:
        amct.save_quant_retrain_model("config.json", qat, "record.txt", "out/net", x, ["x"], ["y"], {"x": {0: "n"}})
    assert not (tmp_path / "out").exists()

    # Both remedies, as the message has them.
    message = str(caught.value)
    scope = {"torch": torch, "model": qat, "input": x, "convert_amct_state_dict": amct.convert_amct_state_dict}
    for code in ("model.eval()", "model(input)", "torch.save(convert_amct_state_dict(model.state_dict(), model, "
                 "to_amct=True), 'for_amct.pth')"):  # fmt: skip
        assert code in message
        eval(code, scope)
    assert list(QuantRecord.load("record.txt")) == ["0"]
    restored = amct.restore_quant_retrain_model("config.json", model, "again.txt", x, "for_amct.pth")
    assert torch.equal(restored.eval()(x), qat(x))
