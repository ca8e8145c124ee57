"""benchmarks/sweep.py with a tiny prior: every combination once, one table, and on after a stop."""
import json

import numpy as np
import pytest
from test_prior import save_prior, save_tokenizer

from runtime import BadInput


@pytest.fixture
def sweep(script, vgg, tmp_path, monkeypatch):
    """sweep("--temperature", 1, 2): an AR prior, 4 samples of 16 x 16, an FD in the features of a small network."""
    monkeypatch.chdir(tmp_path)
    tokenizer = save_tokenizer(tmp_path / "tokenizer.pt")
    prior = save_prior(tmp_path / "prior.pt", tokenizer)
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
    cpu = "--device cpu"
    return lambda *words: script("sweep", f"--sample=--prior {prior} --tokenizer {tokenizer} --n 4 {cpu}",
                                 f"--fid=--real {tmp_path}/real.npz --features {vgg} --workers 0 {cpu}", *words)


def test_a_sweep_and_its_continuation(sweep, tmp_path, capfd):
    sweep("--temperature", 0.5)
    (tmp_path / "sweep/temperature-0.5/fid.json").unlink()  # as after a kill between the two scripts
    capfd.readouterr()
    sweep("--temperature", 0.5, 2)
    sweep("--temperature", 0.5, 2)
    out = capfd.readouterr().out
    assert out.count("4 samples in ") == 1  # only what is missing
    assert sum(line.startswith("FD (") for line in out.splitlines()) == 2
    rows = (tmp_path / "sweep/table.md").read_text().splitlines()
    assert rows[:2] == ["| temperature | FD | accuracy |", "| --- | --- | --- |"] and len(rows) == 4
    for row, temperature in zip(rows[2:], ("0.5", "2")):
        folder = tmp_path / f"sweep/temperature-{temperature}"
        result, sampler = (json.loads((folder / f"{name}.json").read_text()) for name in ("fid", "sampler"))
        assert row == f"| {temperature} | {result['FD']:.4g} | {result['accuracy']:.4g} |"
        assert sampler["temperature"] == float(temperature)
    assert "\n".join(rows) in out and "4 images of sweep/temperature-0.5/samples.npz" in out.splitlines()[-1]


def test_bad_sweeps(sweep, tmp_path, capfd):
    with pytest.raises(BadInput, match="nothing to try"):
        sweep()
    with pytest.raises(BadInput, match="sample.py failed as said above"):
        sweep("--choice_temperature", 1)
    assert "are for NAR" in capfd.readouterr().err
    (tmp_path / "sweep/flags.json").write_text("{}")
    with pytest.raises(BadInput, match="another --sample or --fid"):
        sweep("--temperature", 1)
