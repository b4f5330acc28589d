"""`python -m agent.model.tool`, which `assay model` runs: weights in and out of files, their size, text from them."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from agent.checkpoint.storage import ShardRefused
from agent.model import generate, huggingface
from agent.model.config import ConfigError, V3Config
from agent.model.decoding import cache_bytes
from agent.model.files.reading import FileError, read_json
from agent.model.files.transfer import CONFIG, Written, export_folder, import_folder
from agent.model.memory import PRECISIONS, Count, Mesh, count, parameters, shares
from agent.model.presets import PRESETS

#: As the `assay` command has them: what was asked or named makes no sense; this machine does not let us.
USAGE, CONDITION, INTERRUPTED = 2, 5, 130
PUBLISHED = "671b"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for ending, base in (("B", 1000), ("iB", 1024))
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what goes wrong is one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        document = options.make(options)
    except huggingface.WeightsError as error:
        return _told(f"{options.subject}: {error.brief}", USAGE)
    except ConfigError as error:
        return _told(f"{options.subject}: {error}", USAGE)
    except (FileError, ShardRefused, generate.TextError) as error:
        return _told(str(error), USAGE)
    except OSError as error:
        return _told(f"{error.filename or options.subject}: {error.strerror or error}", CONDITION)
    except KeyboardInterrupt:
        return INTERRUPTED
    sys.stdout.write(json.dumps(document, indent=2) + "\n" if options.output == "json" else options.show(document))
    return 0


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as every command does."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"assay: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="assay model", description="Weights in and out of files, their size, and text from them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("import", help="make a model file of ours from a Hugging Face folder")
    one.add_argument("subject", metavar="HF_FOLDER", type=Path)
    one.add_argument("out", metavar="OUT", type=Path, help="safetensors of our names, fp32, and our configuration")
    one.add_argument(
        "--mtp", type=_whole, default=None, help="MTP modules there must be (default: as many as there are)"
    )
    one.set_defaults(make=_import, show=_facts)
    two = commands.add_parser("export", help="write the published layout from a model on disk")
    two.add_argument("subject", metavar="MODEL", type=Path, help="model file, checkpoint or HF folder")
    two.add_argument("out", metavar="HF_FOLDER", type=Path)
    two.add_argument("--shard-size", type=_size, default=_size("5GB"), help="such as 500MB or 5GiB (default: 5GB)")
    two.add_argument("--dtype", choices=list(_DTYPES), default="fp32", help="of the weights (default: fp32)")
    two.set_defaults(make=_export, show=_facts)
    three = commands.add_parser("plan", help="parameters, and bytes of each rank of a mesh")
    named = ", ".join((PUBLISHED, *PRESETS))
    three.add_argument("subject", metavar="CONFIG", help=f"a config.json, its folder, or one of {named}")
    three.add_argument("--mesh", type=_mesh, default=Mesh(), help="such as dp=128,ep=64,pp=16 (default: one rank)")
    three.add_argument("--mtp", type=_whole, default=None, help="MTP modules (default: 0; a preset's own)")
    three.set_defaults(make=_plan, show=_tables)
    four = generate.added(commands)
    for command in (one, two, three, four):
        command.add_argument("-o", "--output", choices=["table", "json"], default="table")
    return parser


def _import(options: argparse.Namespace) -> dict[str, Any]:
    return _written("assay.model-import/1", import_folder(options.subject, options.out, options.mtp))


def _export(options: argparse.Namespace) -> dict[str, Any]:
    done = export_folder(options.subject, options.out, options.shard_size, _DTYPES[options.dtype])
    return _written("assay.model-export/1", done)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    config, mesh = _config(options.subject, options.mtp), options.mesh
    shapes = parameters(config)
    size = count(config, shapes)
    return {
        "schema": "assay.model-plan/1",
        "model": options.subject,
        "parameters": {"total": size.total, "active_per_token": size.active, "mtp": size.mtp},
        "counted": _counted(config, size),
        "cache_bytes_per_token": cache_bytes(config)._asdict(),
        "mesh": {**asdict(mesh), "ranks": mesh.ranks},
        "per_rank": {
            name: [{**asdict(share), "total": share.total} for share in shares(config, shapes, mesh, kind)]
            for name, kind in PRECISIONS.items()
        },
    }


def _config(subject: str, mtp: int | None) -> V3Config:
    if subject in PRESETS and mtp is None:
        return PRESETS[subject].config
    if subject in PRESETS:
        return huggingface.config(huggingface.document(PRESETS[subject].config), mtp or 0)
    if subject == PUBLISHED:
        return huggingface.config(huggingface.DEEPSEEK_V3, mtp or 0)
    path = Path(subject)
    return huggingface.config(read_json(path / CONFIG if path.is_dir() else path), mtp or 0)


def _counted(config: V3Config, size: Count) -> dict[str, str]:
    """What each figure means."""
    return {
        "total": "embedding, blocks, final norm and head; neither MTP modules nor router biases",
        "active_per_token": f"of total: one row of the embedding, {config.num_experts_per_tok} of"
        f" {config.n_routed_experts} routed experts of each layer, and all the rest",
        "mtp": f"what {config.mtp_depth} MTP modules add; they share embedding and head",
        "per_rank": "bytes without activations; master and moments divided among all ranks that hold the parameter",
    }


def _written(schema: str, done: Written) -> dict[str, Any]:
    return {
        "schema": schema,
        "path": str(done.path),
        "files": done.files,
        "tensors": done.tensors,
        "bytes": done.nbytes,
    }


def _facts(document: Mapping[str, Any]) -> str:
    return "".join(f"{name:8} {value}\n" for name, value in document.items() if name != "schema")


def _tables(document: Mapping[str, Any]) -> str:
    mesh, counted = document["mesh"], document["counted"]
    rows = [(name, row) for name, stages in document["per_rank"].items() for row in stages]
    size, unit = (2**30, "GiB") if max(row["total"] for _, row in rows) >= 2**30 else (2**20, "MiB")
    lines = [f"{document['model']}, {_axes(mesh)}, ranks: {mesh['ranks']}", ""]
    for name, value in document["parameters"].items():
        lines.append(f"{name:17}{_short(value):>10}{value:>18,}   {counted[name]}")
    cached = document["cache_bytes_per_token"]
    lines += [
        f"cache of a token  {cached['mla']:,} bytes in bf16; as 8 groups {cached['gqa']:,}, as heads {cached['mha']:,}",
        "",
        f"{unit} of one rank of each stage: {counted['per_rank']}",
        _row("precision", "stage", "parameters", *_KINDS),
    ]
    for precision, row in rows:
        sizes = (f"{row[kind] / size:.2f}" for kind in _KINDS)
        lines.append(_row(precision, row["stage"], _short(row["parameters"]), *sizes))
    return "\n".join(lines) + "\n"


_KINDS = ("weights", "gradients", "master", "moments", "total")


def _row(*cells: object) -> str:
    return "".join(f"{cell!s:>11}" for cell in cells)


def _short(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _axes(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={mesh[axis]}" for axis in ("dp", "ep", "pp"))


def _mesh(text: str) -> Mesh:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, number = part.strip().partition("=")
        if axis not in ("dp", "ep", "pp") or axis in sizes:
            raise argparse.ArgumentTypeError(f"{part!r}: each of dp, ep and pp may be given once, as in dp=4,ep=2")
        sizes[axis] = _whole(number, least=1)
    try:
        return Mesh(**sizes)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _whole(text: str, least: int = 0) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, not {text!r}")
    return int(text)


def _size(text: str) -> int:
    """Bytes: 500MB and 5GB are decimal, as at Hugging Face; 5GiB is binary."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B|)", text)
    if match is None or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GiB, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def _told(message: str, code: int) -> int:
    sys.stderr.write(f"assay: {' '.join(message.split())}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
