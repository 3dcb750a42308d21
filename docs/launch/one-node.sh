#!/bin/bash
# One machine, one process a device. usage: PROCESSES=4 bash one-node.sh soup.yaml
# A process that dies ends the others; torchrun starts all of them again, and each goes on from the last checkpoint.
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${PROCESSES:-2}" --max-restarts "${RESTARTS:-3}" \
  -m soup_xb train "${1:-soup.yaml}" --resume
