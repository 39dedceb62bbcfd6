"""peft loads an exported expert, with the same logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stagesweep.systems.speech.data.dataset import Speech
from stagesweep.systems.speech.model.mixture import MixtureWhisper
from stagesweep.systems.speech.stage.evaluate import write_adapters


@pytest.mark.filterwarnings("ignore")
def test_an_expert_in_peft_gives_the_same_logits(
    tiny: MixtureWhisper, small: Speech, speech_run: Any
) -> None:
    peft = pytest.importorskip("peft")
    run = speech_run(model=tiny)
    write_adapters(run, tiny)
    folder: Path = run.file("adapters/expert_2/adapter_config.json").parent
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == tiny.rank
    (batch,) = small.split("test").batches(99)
    tiny.eval()
    n = len(batch["index"])
    expected = tiny({**batch, "expert": torch.full((n,), 2)})["logits"][:, 0]
    base: Any = type(tiny.whisper)(tiny.whisper.config)
    state = {key.replace(".base.", "."): v for key, v in tiny.whisper.state_dict().items()}
    base.load_state_dict({k: v for k, v in state.items() if k in base.state_dict()})
    other = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        found = other(input_features=batch["mel"], decoder_input_ids=batch["tokens"]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with other.disable_adapter(), torch.no_grad():
        plain = other(input_features=batch["mel"], decoder_input_ids=batch["tokens"]).logits
    assert not torch.allclose(plain, expected, atol=1e-3)
