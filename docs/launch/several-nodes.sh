#!/bin/bash
# Several machines: the same command on each. The first one's name is HEAD, and the output folder is on a disk that all see.
# usage: HEAD=node1 NODES=2 PROCESSES=4 bash several-nodes.sh soup.yaml
set -euo pipefail
: "${HEAD:?the name of the first machine}"
exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "${PROCESSES:-2}" --max-restarts "${RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${RUN:-soup}" \
  -m soup_xb train "${1:-soup.yaml}" --resume
