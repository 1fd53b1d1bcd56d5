#!/usr/bin/env bash
# Serve one engine from several GPUs or machines behind one gateway, until Ctrl-C. Needs requirements-cluster.txt.
#
#   ./scripts/serve_cluster.sh --engine-dir engines/smollm2-135m-instruct --replicas 2
set -euo pipefail
scripts="$(cd "$(dirname "$0")" && pwd)"
source "$scripts/python.sh"
exec "$PY" "$scripts/serve_cluster.py" "$@"
