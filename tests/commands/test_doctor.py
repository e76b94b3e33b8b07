"""nvmm doctor: versions against those allowed and tested, what is missing for what, exit codes."""

from __future__ import annotations

import json
from importlib.metadata import metadata

import pytest

from nvmm.commands import doctor
from nvmm.commands.doctor import Finding

LISTED = [
    "torch>=2.8",
    "numpy",
    "megatron-core==0.16.1",
    'soundfile; extra == "audio"',
    'soxr; extra == "audio"',
]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions of what is installed; torch's absence leaves out hardware and kernels."""
    versions = {"torch": "2.13.0+cu130", "numpy": "2.4.6", "megatron-core": "0.16.1"}
    versions |= {"soundfile": "1", "soxr": "1"}
    monkeypatch.setattr(doctor, "requires", lambda name: LISTED)
    monkeypatch.setattr(doctor, "installed", versions.get)
    monkeypatch.setattr(
        doctor, "tested", lambda: {"torch": "2.13.0", "numpy": "2.4.6", "soxr": "1"}
    )
    return versions


def of(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def test_versions_are_compared_with_what_is_allowed_and_tested(there: dict[str, str]) -> None:
    assert of([*doctor.required()]) == {"megatron-core": "ok", "numpy": "ok", "torch": "ok"}
    there |= {"numpy": "1.26", "megatron-core": "0.15.0", "torch": "2.14.0"}
    assert of([*doctor.required()]) == {
        "megatron-core": "wrong",
        "numpy": "differs",
        "torch": "differs",
    }
    del there["torch"]
    [finding] = [each for each in doctor.required() if each.name == "torch"]
    assert finding == Finding("torch", "wrong", "missing: pip install 'torch>=2.8'")


def test_extras_say_what_is_missing_for_what(
    there: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"audio": "sounds"})
    assert of([*doctor.extras()]) == {"[audio]": "ok"}
    there["soxr"] = "2"
    assert [*doctor.extras()] == [Finding("[audio]", "differs", "sounds; soxr 2 (tested 1)")]
    del there["soxr"]
    text = "soxr missing, for sounds: pip install 'nvmm[audio]'"
    assert [*doctor.extras()] == [Finding("[audio]", "absent", text)]


def test_every_extra_that_it_names_exists() -> None:
    assert doctor.EXTRAS.keys() <= {*metadata("nvmm").get_all("Provides-Extra", [])}


@pytest.mark.parametrize(
    ("state", "code"), [("ok", 0), ("absent", 0), ("differs", 0), ("wrong", 1)]
)
def test_exit_code_and_json(
    state: doctor.State,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([Finding("gloo", state, "why")]))
    monkeypatch.setattr("sys.argv", ["nvmm doctor", "--json"])
    assert doctor.main() == code
    assert json.loads(capsys.readouterr().out) == [{"name": "gloo", "state": state, "text": "why"}]
    monkeypatch.setattr("sys.argv", ["nvmm doctor"])
    assert doctor.main() == code
    assert ("wrong: gloo" in capsys.readouterr().out) == (code == 1)


def test_this_machine_can_train() -> None:
    findings = of([*doctor.examine()])
    assert findings["nvmm"] == "ok" and "wrong" not in findings.values()
    assert {"gpu", "nccl", "g++", "kernels"} <= findings.keys()
