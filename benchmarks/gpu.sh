#!/usr/bin/env bash
# What only a GPU can tell, in a few minutes: the tests that need one, then a table of times, which is written to
# benchmarks/gpu.csv. Takes the Python of the environment that is active, with pyro_bmr and pytest installed.
set -uo pipefail
cd "$(dirname "$0")/.."
python -m pytest tests -m gpu -q -p no:cacheprovider
tests=$?
python benchmarks/gpu.py
table=$?
exit $((tests || table))
