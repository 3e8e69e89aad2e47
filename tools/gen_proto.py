"""Generates the Python files of jaxserve's protocol buffers, with the grpcio-tools of the `dev` extra.

    python tools/gen_proto.py [DIRECTORY]

writes jaxserve/server/proto/*_pb2.py, *_pb2.pyi and *_pb2_grpc.py below DIRECTORY (default: the repository).
"""

import argparse
import sys
from importlib import resources
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PROTO_DIR = Path("jaxserve/server/proto")


def generate(out: Path) -> list[Path]:
    """Writes the generated files below `out` and returns them. Raises RuntimeError if protoc refuses the files."""
    from grpc_tools import protoc

    protos = sorted((REPOSITORY / PROTO_DIR).glob("*.proto"))
    (out / PROTO_DIR).mkdir(parents=True, exist_ok=True)
    flags = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    include = resources.files("grpc_tools") / "_proto"
    arguments = ["protoc", f"-I{REPOSITORY}", f"-I{include}", *flags, *map(str, protos)]
    if protoc.main(arguments) != 0:
        raise RuntimeError(f"protoc failed on {', '.join(p.name for p in protos)}")
    endings = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")
    return [out / PROTO_DIR / (p.stem + ending) for p in protos for ending in endings]


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate the Python files of jaxserve's protocol buffers.")
    parser.add_argument("directory", nargs="?", type=Path, default=REPOSITORY)
    for path in generate(parser.parse_args().directory):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
