#!/bin/bash
# What a GPU that is lent for minutes is asked: the tests that need one, then the benchmarks. Needs an installed
# package, or this folder on PYTHONPATH.  benchmarks/on_gpu.sh [SUITE ...]
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
$python -m pytest -n 12 -q --tb=short --show-capture=no tests/test_on_gpu.py
$python -m benchmarks run --device cuda --ahead 120 --suite "${@:-recurrent}" > /dev/null
