"""benchmarks/first_hour.py at its small sizes: every part runs the real scripts, its figures are in JSON and table."""
import json

import first_hour
import pytest
import torch

import train_tokenizer
from runtime import BadInput


@pytest.fixture
def hour(script, tmp_path, vgg):
    """hour(1, 3): these parts with a small perceptual network; {part: its JSON}."""
    def call(*parts, **flags):
        flags = {"vgg": vgg, "out": tmp_path / "out", "runs": tmp_path / "runs"} | flags
        try:
            script("first_hour", "--small", "--part", *parts,
                   *[word for name, value in flags.items() for word in (f"--{name}", value)])
        finally:
            results.update({r["part"]: r for r in (json.loads(path.read_text())
                                                   for path in (tmp_path / "out").glob("*.json"))})
        return results
    results = call.results = {}
    return call


def test_every_part_runs_and_is_in_the_table(hour, script, tmp_path, capsys):
    results = hour(1, 2, 3, 4, 5, 6, 7)
    assert not any(r["failed"] for r in results.values()) and sorted(results) == [1, 2, 3, 4, 5, 6, 7]
    rows = {name: values for r in results.values() for name, values in r["rows"].items()}
    for name in ("phase 1, R1 every 4 steps", "phase 2", "ar_tiny", "nar_tiny"):
        assert rows[name]["finite"] and rows[name]["images_per_s"] > 0 and rows[name]["peak_MB"] > 0, name
    for name in ("encoding for the code cache", "4 samples of ar_tiny, decoded", "4 samples of nar_tiny, decoded",
                 "tokenizer, phase 2: a training step", "AR prior: sampling"):
        assert rows[name]["images_per_s"] > 0, name
    assert rows["matrix product, torch.float32"]["TFLOP_per_s"] > 0 and rows["first: R1, when it is due"]["ms"]
    assert rows["peak_MB of windows after a validation"].keys() == {"first", "last"}
    stopped = rows["SIGTERM: it saves and says so"]["step"]
    assert 13 <= stopped == rows["--resume, then SIGKILL"]["from_step"] < 60
    assert rows["--resume, to the end"] == {"from_step": rows["--resume, to the end"]["from_step"], "to_step": 60}
    assert all(r["machine"]["torch"] == torch.__version__ and r["seconds"] > 0 for r in results.values())
    assert list(results[2]["rows"])[:3] == ["first: phase-1 step with a 16th of R1", "first: R1, when it is due",
                                            "first: discriminator, for the tokenizer"]
    printed = capsys.readouterr().out.split("| part |")[1]
    script("first_hour", "--table", "--out", tmp_path / "out")
    assert capsys.readouterr().out.split("| part |")[1] == printed
    for r in results.values():
        assert f"| {r['part']} {r['name']} | no error |" in printed
        for name in r["rows"]:
            assert f"| {r['part']} {r['name']} | {name} |" in printed


def test_a_failed_command_is_shown_and_the_next_part_goes_on(hour, capsys):
    with pytest.raises(BadInput, match="failed: part 3, 7, 5"):
        hour(3, 7, 5, 1, vgg="nothing.pt")
    results, out = hour.results, capsys.readouterr().out
    assert "exit code 2" in results[3]["failed"] and "nothing.pt: no such file" in results[3]["failed"]
    assert "run --part 6 first" in results[7]["failed"] and "run --part 3 first" in results[5]["failed"]
    assert results[1]["rows"] and not results[1]["failed"]
    assert "| 3 phase1 | FAILED: exit code 2" in out and "| 1 versions | no error |" in out


def test_a_part_ends_at_its_limit(hour):
    with pytest.raises(BadInput, match="failed: part 1"):
        hour(1, limit=1)
    assert "cut off after 1 s" in hour.results[1]["failed"]


def test_speed_leaves_out_compilation_and_validation():
    times = [(0, 0), (10, 5.0), (20, 6.0), (20, 9.0), (40, 11.0)]
    text = "".join(f'probe {{"what": "train", "n": {n}, "time": {t}, "peak_MB": {n}}}\n' for n, t in times)
    values = first_hour.speed(text + 'probe {"what": "tr', "train")
    assert values == {"images_per_s": 10.0, "first_window_s": 5.0, "peak_MB": 40}
    with pytest.raises(first_hour.Failed, match="no progress"):
        first_hour.speed("step 1/2", "train")


def test_random_weights_have_vgg16s_layout(script, tmp_path, monkeypatch):
    monkeypatch.setattr(first_hour.Hour, "start", lambda self, *words, **_: started.append(words))
    started, args = [], first_hour.argparse.Namespace(small=True, out=tmp_path, runs=tmp_path, vgg="")
    for folder in ("pictures--data32", "pictures--val32"):
        (tmp_path / folder).mkdir()
    first_hour.Hour(args).train("run", "train_tokenizer.py")
    path = tmp_path / "vgg16_random.pt"
    assert path in started[0]
    train_tokenizer.load_vgg(str(path))
    path.unlink()  # half a gigabyte


@pytest.mark.parametrize("part", [-1, 10, "x"])
def test_a_part_that_is_not_there_is_refused(script, part):
    with pytest.raises(BadInput, match="argument --part: .*(at least 0 and at most 9|invalid int)") as error:
        script("first_hour", "--part", part)
    assert "\n" not in str(error.value)


def test_a_table_of_nothing_is_refused(script, tmp_path):
    with pytest.raises(BadInput, match="holds no results"):
        script("first_hour", "--table", "--out", tmp_path)
