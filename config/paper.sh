#!/usr/bin/env bash
# The paper's scale on one GPU: the tests on the device, speed, a backbone, the paper's arms. Make the text first:
#   python prepare.py --source=fineweb-edu --tokens=100M
# Words are keys for every run, such as --max_iters=2000. What is finished is skipped, so it can be started again.
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest -q test_routing.py tests/test_devices.py --device=cuda
python bench.py config/paper.py --dtype=bfloat16 --compile | tee results/paper/bench.md
python study.py config/paper.py --arms=static,g1_no_utilrank,g3_no_utilrank,g1_full_aux,g3_full_aux,best \
    --seeds=0 --backbone=backbone --compile --report=results/paper "$@"
