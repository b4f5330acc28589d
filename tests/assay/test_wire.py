"""The committed wire code is what protoc makes of proto/ now."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    protos = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    flags = ["--python_out", "--pyi_out", "--grpc_python_out"]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *(f"{flag}={tmp_path}" for flag in flags), *protos]
    subprocess.run(command, cwd=ROOT, check=True)
    made = sorted((tmp_path / "assay" / "v1").iterdir())
    assert made
    for file in made:
        assert file.read_text() == (ROOT / "assay" / "v1" / file.name).read_text(), f"{file.name}: run `make proto`"
    assert not (ROOT / "proto" / "__init__.py").exists()
